// The fast tier of one process: what stays in it, and what is copied from it. Of several: e2e_fast_tier.sh.
#define _GNU_SOURCE 1
#include "dev/test/unreadable_files.h" // defines: unreadable

#include "llmc/fast_tier.h" // defines: fast_save, fast_load_newest, fast_open, fast_give_up
#include "dev/test/checkpointed_run.h" // defines: run, model, saved, loaded, load, in_run, exists, slurp, spill, ON_A_RUN

static FastTier tier;
static CheckpointPart part;
static Control one = {.size = 1};

// Of saved[k] at this step; the tier is a directory of the run.
static CheckpointData fast_data(int k, uint64_t step, uint64_t copied) {
    Error err = {0, {0}};
    CheckpointData d = data_of(&saved[k], step);
    d.control = &one, d.part = &part, d.begin = 0, d.end = parameter_layout(&model).num_parameters;
    memset(&part, 0, sizeof part);
    snprintf(tier.base, sizeof tier.base, "%s", run);
    snprintf(tier.run, sizeof tier.run, "%s", in_run("fast"));
    snprintf(tier.past, sizeof tier.past, "%s", in_run("fast/past"));
    snprintf(tier.directory, sizeof tier.directory, "%s", in_run("fast/past/rank_00000-of-00001"));
    if (!fast_save(&tier, &d, &part, copied, &err)) fail_msg("%s", err.text);
    part.alone = false;
    assert_true(step_path(part.source, tier.directory, step, "", &err));
    return d;
}

// The newest two stay, and the one that is being copied; nothing that is newer than what was saved last.
static void test_fast_retention(void** state) {
    (void)state;
    static const struct {
        uint64_t step, copied;
        const char* left;
    } saves[] = {{30, 0, " 30"},     {31, 0, " 31 30"},     {32, 30, " 32 31 30"}, {33, 30, " 33 32 30"},
                 {34, 0, " 34 33"},  {33, 0, " 33"},        {33, 33, " 33"},       {40, 33, " 40 33"},
                 {36, 33, " 36 33"}, {37, 33, " 37 36 33"}, {38, 0, " 38 37"},     {10, 0, " 10"}};
    for (size_t i = 0; i < sizeof saves / sizeof saves[0]; i++) {
        char left[64] = "";
        Error err = {0, {0}};
        StepList list;
        fast_data(0, saves[i].step, saves[i].copied);
        assert_true(steps_list(tier.directory, false, &list, &err));
        for (int k = 0; k < list.count; k++)
            snprintf(left + strlen(left), sizeof left - strlen(left), " %d", (int)list.steps[k]);
        assert_string_equal(left, saves[i].left);
        free(list.steps);
    }
}

// A damage that came to the disk of the tier does not go into the copy unseen, whichever byte it is.
static void test_damaged_copies(void** state) {
    (void)state;
    static const char* const files[] = {"model.safetensors", "optim-00001-of-00001.safetensors",
                                        manifest_name};
    for (int f = 0; f < 3; f++)
        for (int k = 0; k < 20; k++) {
            char path[PATH_MAX + 64];
            size_t size;
            Error err = {0, {0}};
            CheckpointData d = fast_data(1, 30, 0);
            snprintf(path, sizeof path, "%s/%s", part.source, files[f]);
            char* text = slurp(path, &size);
            text[size * (size_t)k / 20] ^= 4;
            spill(path, text, size);
            free(text);
            assert_false(checkpoint_save(run, &d, 9, 0, &err));
            assert_int_equal(err.code, EXIT_IO); // another try may help: the run does not end for good
            assert_false(exists("step_00000030") || exists("step_00000030.tmp"));
            assert_int_equal(load(&err), 20);
        }
    Error err = {0, {0}};
    CheckpointData d = fast_data(0, 30, 0); // saved[0] is what step 10 has, too
    assert_true(checkpoint_save(run, &d, 9, 0, &err));
    assert_int_equal(load(&err), 30);
    assert_true(weights_equal(&loaded, &saved[0]));
}

// A model that is another one's is no damage: nothing is removed, and nothing older used in its place.
static void test_fast_tier_of_another_model(void** state) {
    (void)state;
    Error err = {0, {0}};
    bool found;
    fast_data(1, 30, 0);
    ModelConfig other = tiny_model(3);
    other.max_position_embeddings *= 2;
    CheckpointData d = data_of(&loaded, 0);
    d.control = &one, d.model = &other, d.end = parameter_layout(&other).num_parameters;
    d.params = d.m = d.v = NULL;
    assert_false(fast_load_newest(&tier, run, &d, &found, &err));
    assert_int_equal(err.code, EXIT_CONFIG);
    assert_true(exists("fast/past/rank_00000-of-00001/step_00000030") && exists("step_00000020"));
}

// A durable checkpoint that cannot be read is newer than what the tier has: the run goes on without it, also when it can
// be read again.
static void test_fast_tier_instead(void** state) {
    (void)state;
    for (int pass = 0; pass < 2; pass++) {
        Error err = {0, {0}};
        bool found;
        if (pass == 0) fast_data(0, 15, 0);
        CheckpointData d = data_of(&loaded, 0);
        d.control = &one, d.end = parameter_layout(&model).num_parameters;
        unreadable = pass == 0 ? "step_00000020" : NULL;
        if (!fast_load_newest(&tier, run, &d, &found, &err)) fail_msg("%s", err.text);
        unreadable = NULL;
        assert_true(found && tier.loaded && d.state.step == 15);
        assert_true(exists("step_00000020.bad") && !exists("step_00000020"));
    }
}

// What is passed over is newer than what the run goes on from: it is gone before anything is trained.
static void test_fast_newer_is_forgotten(void** state) {
    (void)state;
    char path[PATH_MAX];
    Error err = {0, {0}};
    bool found;
    CheckpointData d = data_of(&loaded, 0);
    d.control = &one, d.end = parameter_layout(&model).num_parameters;
    fast_data(0, 30, 0), fast_data(1, 31, 0);
    snprintf(path, sizeof path, "%s", in_run("fast/past/rank_00000-of-00001/step_00000031/state.json"));
    assert_int_equal(rename(path, in_run("state.json")), 0); // for a while
    assert_true(fast_load_newest(&tier, run, &d, &found, &err) && found && tier.loaded && tier.to_copy);
    assert_int_equal(d.state.step, 30);
    rename(in_run("state.json"), path);
    assert_true(exists("fast/past/rank_00000-of-00001/step_00000030"));
    assert_false(exists("fast/past/rank_00000-of-00001/step_00000031"));
}

// Another past: nothing of the one before is loaded, and the first save removes it.
static void test_fast_pasts(void** state) {
    (void)state;
    char before[PATH_MAX], directory[PATH_MAX];
    Error err = {0, {0}};
    bool found;
    CheckpointData d = data_of(&loaded, 0);
    RunIdentity identity;
    d.control = &one, d.end = parameter_layout(&model).num_parameters;
    memset(&tier, 0, sizeof tier);
    assert_int_equal(mkdir(in_run("node"), 0777), 0);
    assert_true(run_identity_begin(&identity, run, &err));
    assert_true(fast_open(&tier, in_run("node"), &identity, &one, &err));
    CheckpointData fast = data_of(&saved[1], 30);
    CheckpointPart own = {true, {0}, {0}};
    fast.control = &one, fast.part = &own, fast.end = d.end;
    assert_true(fast_save(&tier, &fast, &own, 0, &err));
    snprintf(before, sizeof before, "%s", tier.past),
        snprintf(directory, sizeof directory, "%s", tier.directory);
    assert_true(fast_load_newest(&tier, run, &d, &found, &err) && tier.loaded);
    assert_int_equal(d.state.step, 30);
    assert_true(fast_give_up(&tier, &identity, &one, &err));
    assert_string_not_equal(tier.directory, directory);
    assert_true(fast_load_newest(&tier, run, &d, &found, &err) && found && !tier.loaded);
    assert_int_equal(d.state.step, 20);
    assert_int_equal(access(directory, F_OK), 0);
    fast.state = state_of(21), own.alone = true;
    assert_true(fast_save(&tier, &fast, &own, 0, &err));
    assert_true(access(before, F_OK) != 0 && errno == ENOENT);
    assert_true(run_identity_begin(&identity, run, &err) &&
                fast_open(&tier, in_run("node"), &identity, &one, &err));
    assert_true(fast_load_newest(&tier, run, &d, &found, &err) && tier.loaded);
    assert_int_equal(d.state.step, 21);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        ON_A_RUN(test_fast_retention),
        ON_A_RUN(test_damaged_copies),
        ON_A_RUN(test_fast_tier_of_another_model),
        ON_A_RUN(test_fast_tier_instead),
        ON_A_RUN(test_fast_newer_is_forgotten),
        ON_A_RUN(test_fast_pasts),
    };
    // damages, each named on stderr: only the tests' own messages are for the reader
    if (getenv("VERBOSE") == NULL && freopen("/dev/null", "w", stderr) == NULL) return EXIT_OS;
    return cmocka_run_group_tests_name("fast_tier", tests, NULL, NULL);
}
