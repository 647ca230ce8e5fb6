// Checkpoints: what is saved comes back to the bit, and whatever happens to the files is noticed, named,
// set aside and survived in the same call. Where that is not so simple: test_set_aside.c.
#define _GNU_SOURCE 1
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

// The code under test reads and writes through these, which may do less than they are asked to.
static bool shy_io;
static void (*before_read)(void); // called once, if it is set
static ssize_t shy_read(int fd, void* data, size_t n) {
    static unsigned calls;
    void (*once)(void) = before_read;
    before_read = NULL;
    if (once != NULL) once();
    if (!shy_io) return read(fd, data, n);
    if (++calls % 7 == 0) return errno = EINTR, -1;
    return read(fd, data, n > 41 ? 41 : n);
}
static ssize_t shy_write(int fd, const void* data, size_t n) {
    static unsigned calls;
    if (!shy_io) return write(fd, data, n);
    if (++calls % 7 == 0) return errno = EINTR, -1;
    return write(fd, data, n > 41 ? 41 : n);
}
#define read shy_read
#define write shy_write

#include "llmc/checkpoint_tool.h" // defines: checkpoint_verify, checkpoint_info, checkpoint_diff
#include "dev/test/checkpointed_run.h" // defines: run, model, saved, loaded, save, load, in_run, exists, ON_A_RUN ...

// ----------------------------------------------------------------------------
// saving and loading

static void test_round_trip(void** state) {
    (void)state;
    Error err;
    for (int which = 0; which < NUM_TINY_MODELS; which++) {
        for (int pass = 0; pass < 2; pass++) {
            begin_run(which);
            shy_io = pass == 1;
            assert_int_equal(load(&err), 0); // nothing there yet
            save(&saved[0], 10, 1, 0);
            assert_int_equal(load(&err), 10);
            assert_true(weights_equal(&loaded, &saved[0]));
            shy_io = false;
            end_run();
        }
    }
}

static void test_model_alone(void** state) {
    (void)state;
    Error err = {0, {0}};
    CheckpointData d = data_of(&loaded, 0);
    d.m = d.v = NULL;
    assert_true(checkpoint_load(in_run("step_00000020"), &d, &err));
    assert_memory_equal(loaded.params, saved[1].params, loaded.count * 4);
    assert_int_equal(((unsigned char*)loaded.m)[0], 0xAB); // untouched
    // A checkpoint without moments cannot continue a run that needs them.
    CheckpointData bare = data_of(&saved[1], 30);
    bare.m = bare.v = NULL;
    assert_true(checkpoint_save(run, &bare, 5, 0, &err));
    d.m = loaded.m, d.v = loaded.v;
    assert_false(checkpoint_load(in_run("step_00000030"), &d, &err));
    assert_non_null(strstr(err.text, "lacks"));
}

static void test_another_model(void** state) {
    (void)state;
    Error err;
    model.hidden_size = 16, model.head_dim = 8;
    weights_free(&loaded);
    loaded = weights_new(&model);
    assert_int_equal(load(&err), -1);
    assert_int_equal(err.code, EXIT_CONFIG);
    assert_non_null(strstr(err.text, "hidden_size is 8 and 16"));
    assert_true(exists("step_00000020")); // nothing is wrong with the checkpoints
    assert_true(exists("step_00000010"));
}

static void test_same_step_again(void** state) {
    (void)state;
    Error err;
    save(&saved[0], 20, 5, 0); // other weights than step 20 had
    assert_false(exists("step_00000020.tmp"));
    assert_int_equal(load(&err), 20);
    assert_true(weights_equal(&loaded, &saved[0]));
}

static void test_retention(void** state) {
    (void)state;
    for (uint64_t step = 30; step <= 70; step += 10) save(&saved[0], step, 2, 40);
    static const char* const kept[] = {"step_00000040", "step_00000060", "step_00000070"};
    static const char* const gone[] = {"step_00000010", "step_00000020", "step_00000030", "step_00000050"};
    for (int i = 0; i < 3; i++) assert_true(exists(kept[i]));
    for (int i = 0; i < 4; i++) assert_false(exists(gone[i]));
    save(&saved[0], 5, 1, 0); // a run that went back: what it just saved stays
    assert_true(exists("step_00000005") && exists("step_00000070"));
    assert_false(exists("step_00000040"));
    save(&saved[0], 123456789012ull, 0, 0); // fewer than one is one
    assert_true(exists("step_123456789012"));
}

// ----------------------------------------------------------------------------
// left-overs and other processes

static void test_leftovers(void** state) {
    (void)state;
    Error err = {0, {0}};
    static const char* const ours[] = {"step_00000030.tmp", "step_00000005.delete"};
    static const char* const theirs[] = {"step_00000030.tmp2", "step_30.tmp", "notes", "step_000000030.tmp"};
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < 2; i++) {
            char path[PATH_MAX];
            assert_int_equal(mkdir(in_run(ours[i]), 0777), 0);
            assert_true(path_join(path, in_run(ours[i]), "model.safetensors", &err));
            spill(path, "half", 4);
        }
        for (int i = 0; i < 4; i++) mkdir(in_run(theirs[i]), 0777);
        // While another process saves, its half-written checkpoint is left alone.
        int lock = directory_lock(run, 0, &err);
        assert_true(lock >= 0);
        assert_int_equal(load(&err), 20);
        assert_true(exists(ours[0]) && exists(ours[1]));
        close(lock);
        if (pass == 0)
            assert_int_equal(load(&err), 20);
        else
            save(&saved[1], 20, 5, 0);
        for (int i = 0; i < 2; i++) assert_false(exists(ours[i]));
        for (int i = 0; i < 4; i++) assert_true(exists(theirs[i]));
    }
}

static void test_lock(void** state) {
    (void)state;
    Error err = {0, {0}};
    int first = directory_lock(run, 0, &err);
    assert_int_equal(directory_lock(run, 0.05, &err), -1);
    assert_non_null(strstr(err.text, "another process"));
    close(first);
    memset(&err, 0, sizeof err);
    int second = directory_lock(run, 0, &err);
    assert_true(second >= 0);
    close(second);
}

static void prune_step_20(void) { rename(in_run("step_00000020"), in_run("step_00000020.delete")); }

// A checkpoint that another process removes while it is being read was not damaged: look again at what
// there is.
static void test_removed_while_read(void** state) {
    (void)state;
    Error err;
    before_read = prune_step_20;
    assert_int_equal(load(&err), 10);
    assert_true(weights_equal(&loaded, &saved[0]));
    assert_false(exists("step_00000020.bad"));
    before_read = prune_step_20; // a name that is not there: nothing happens
    assert_int_equal(load(&err), 10);
    rename(in_run("step_00000010"), in_run("step_00000020"));
    before_read = prune_step_20;
    assert_int_equal(load(&err), 0); // nothing is left, and nothing was damaged
}

// ----------------------------------------------------------------------------
// damage

// After a damage to step 20: it is found, step 20 is set aside, step 10 loaded. Puts step 20 back.
static void expect_fallback(const char* what, size_t where) {
    Error err;
    long step = load(&err);
    if (step != 10) fail_msg("%s, %zu: loaded step %ld (%s)", what, where, step, err.text);
    assert_true(weights_equal(&loaded, &saved[0]));
    assert_false(exists("step_00000020"));
    assert_int_equal(rename(in_run("step_00000020.bad"), in_run("step_00000020")), 0);
}

static const char* const files_of_a_checkpoint[] = {
    "config.json",       "generation_config.json",
    "model.safetensors", "optim-00001-of-00001.safetensors",
    "run_config.json",   "state.json",
    "manifest.json",
};
enum { NUM_FILES = sizeof files_of_a_checkpoint / sizeof files_of_a_checkpoint[0] };

// How much of a file is examined byte by byte: a header with its length, or all of it.
static size_t header_of(const char* name, const char* data, size_t size) {
    uint64_t n;
    if (!tensor_file_name(name)) return size;
    memcpy(&n, data, 8);
    return 8 + (size_t)n;
}

static void test_every_header_byte(void** state) {
    (void)state;
    for (int f = 0; f < NUM_FILES; f++) {
        char path[PATH_MAX];
        size_t size;
        file_in(path, "step_00000020", files_of_a_checkpoint[f]);
        char* data = slurp(path, &size);
        size_t header = header_of(files_of_a_checkpoint[f], data, size);
        for (size_t i = 0; i < header; i++) {
            data[i] ^= (char)(1 << i % 8);
            spill(path, data, size);
            expect_fallback(files_of_a_checkpoint[f], i);
            data[i] ^= (char)(1 << i % 8);
            spill(path, data, i); // cut off here
            expect_fallback("cut off", i);
        }
        spill(path, data, size);
        free(data);
    }
    Error err;
    assert_int_equal(load(&err), 20);
    assert_true(weights_equal(&loaded, &saved[1]));
}

static void test_payload_bytes(void** state) {
    (void)state;
    for (int f = 2; f < 4; f++) {
        char path[PATH_MAX];
        size_t size;
        file_in(path, "step_00000020", files_of_a_checkpoint[f]);
        char* data = slurp(path, &size);
        size_t header = header_of(files_of_a_checkpoint[f], data, size);
        for (size_t k = 0; k < 5000; k++) {
            size_t i = header +
                       (size_t)(random_uniform(7, RANDOM_INIT, (uint64_t)f, k) * (double)(size - header - 1));
            data[i] ^= (char)(1 << k % 8);
            spill(path, data, size);
            expect_fallback(files_of_a_checkpoint[f], i);
            data[i] ^= (char)(1 << k % 8);
        }
        spill(path, data, size);
        free(data);
    }
}

static void test_wrong_files(void** state) {
    (void)state;
    for (int f = 0; f < NUM_FILES; f++) {
        const char* name = files_of_a_checkpoint[f];
        char path[PATH_MAX], other[PATH_MAX], away[PATH_MAX];
        size_t size, other_size;
        file_in(path, "step_00000020", name);
        file_in(other, "step_00000010", name);
        snprintf(away, sizeof away, "%s/away", run);
        char *data = slurp(path, &size), *others = slurp(other, &other_size);
        spill(path, "", 0);
        expect_fallback("empty", (size_t)f);
        data[size] = '\n';
        spill(path, data, size + 1);
        expect_fallback("one byte longer", (size_t)f);
        if (size != other_size || memcmp(data, others, size) != 0) { // config.json is the same in both
            spill(path, others, other_size);
            expect_fallback("that of the step before", (size_t)f);
        }
        unlink(path);
        expect_fallback("missing", (size_t)f);
        if (strcmp(name, manifest_name) != 0) { // a link to the right file: still not what was written
            spill(away, data, size);
            assert_int_equal(symlink(away, path), 0);
            expect_fallback("a link", (size_t)f);
            unlink(path);
            assert_int_equal(mkfifo(path, 0666), 0);
            expect_fallback("a FIFO", (size_t)f);
            unlink(path);
        }
        spill(path, data, size);
        free(data);
        free(others);
    }
    char extra[PATH_MAX];
    file_in(extra, "step_00000020", "model-00002-of-00002.safetensors");
    spill(extra, "", 0);
    expect_fallback("a file too many", 0);
    unlink(extra);
    // The whole of step 10 under the name of step 20
    assert_int_equal(rename(in_run("step_00000020"), in_run("true")), 0);
    char command[4 * TEMPORARY_PATH];
    snprintf(command, sizeof command, "cp -r '%s/step_00000010' '%s/step_00000020'", run, run);
    assert_int_equal(system(command), 0);
    expect_fallback("another step's checkpoint", 0);
}

static void test_no_manifest(void** state) {
    (void)state;
    Error err = {0, {0}};
    char path[PATH_MAX];
    CheckpointData d = data_of(&loaded, 0);
    file_in(path, "step_00000020", manifest_name);
    unlink(path);
    assert_false(checkpoint_load(in_run("step_00000020"), &d, &err)); // not taken for a foreign model
    assert_int_equal(err.code, EXIT_BAD_DATA);
}

// ----------------------------------------------------------------------------
// files that carry the right hashes and are wrong all the same

static String forged; // body of a manifest, to which its hash is added

static bool parse_forged(const char* body, Error* err) {
    char hex[MANIFEST_DIGITS + 1];
    Manifest m;
    memset(err, 0, sizeof *err);
    forged.size = 0;
    string_append(&forged, "%s%s", body, manifest_hash_key);
    hash_to_hex(hex, XXH3_128bits(forged.data, forged.size));
    string_append(&forged, "%s%s", hex, manifest_end);
    bool ok = manifest_parse(&m, forged.data, forged.size, "m", err);
    if (ok) manifest_free(&m);
    return ok;
}

#define HASH "\"xxh3_128\": \"0123456789abcdef0123456789abcdef\""

static void test_forged_manifests(void** state) {
    (void)state;
    static const char* const bad[] = {
        "{",
        "[",
        "{\"files\": {},",
        "{\"files\": [],",
        "{\"files\": 1,",
        "{\"file\": {\"a\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\"../a\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\"a/b\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\".a\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\"\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\"manifest.json\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\"a\": {\"size\": 1, " HASH "}, \"a\": {\"size\": 1, " HASH "}},",
        "{\"files\": {\"a\": {\"size\": -1, " HASH "}},",
        "{\"files\": {\"a\": {\"size\": 1.5, " HASH "}},",
        "{\"files\": {\"a\": {" HASH "}},",
        "{\"files\": {\"a\": {\"size\": 1}},",
        "{\"files\": {\"a\": 1},",
        "{\"files\": {\"a\": {\"size\": 1, \"xxh3_128\": \"0123\"}},",
        "{\"files\": {\"a\": {\"size\": 1, \"xxh3_128\": \"0123456789ABCDEF0123456789abcdef\"}},",
        "{\"files\": {\"a\\u0000b\": {\"size\": 1, " HASH "}}} x,",
    };
    Error err;
    if (!parse_forged("{\"files\": {\"a\": {\"size\": 1, " HASH "}},", &err)) fail_msg("%s", err.text);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        if (parse_forged(bad[i], &err)) fail_msg("accepted: %s", bad[i]);
        assert_int_equal(err.code, EXIT_BAD_DATA);
    }
    free(forged.data);
    memset(&forged, 0, sizeof forged);
}

static void test_bad_states(void** state) {
    (void)state;
    String text = {NULL, 0, 0};
    TrainState s;
    Error err = {0, {0}};
    train_state_write(state_of(20), &text);
    assert_true(train_state_parse(&s, text.data, "s", &err));
    TrainState written = state_of(20), old = {7, 8, 9, 10, 0, 0, 0, {0, 0, 0}, {0, 0, 0}};
    assert_memory_equal(&s, &written, sizeof s);
    const char* first_version =
        "{\"step\": 7, \"tokens\": 8, \"rows\": 9, \"data_fingerprint\": \"000000000000000a\"}";
    assert_true(train_state_parse(&s, first_version, "s", &err));
    assert_memory_equal(&s, &old, sizeof s);
    static const struct {
        const char *find, *put;
    } changes[] = {
        {"\"step\": 20", "\"step\": -1"},
        {"\"step\": 20", "\"step\": 1.5"},
        {"\"step\": 20", "\"step\": \"20\""},
        {"\"step\": 20", "\"stop\": 20"},
        {"\"rows\": 160", "\"rows\": 1e99"},
        {"\"step\": 20,", ""},
        {"fedcba9876543224", "fedcba987654322"},
        {"fedcba9876543224", "fedcba98765432240"},
        {"fedcba9876543224", "fedcba987654322g"},
        {"{", "{\"more\": 1,"},
        {"{", "["},
        {"}\n", "}x"},
        {"3fd5555555555555", "7ff8000000000001"},
        {"3fd5555555555555", "fff0000000000000"},
        {"3fb999999999999a", "bfb999999999999a"},
    };
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        const char* at = strstr(text.data, changes[i].find);
        assert_non_null(at);
        String changed = {NULL, 0, 0};
        string_append(&changed, "%.*s%s%s", (int)(at - text.data), text.data, changes[i].put,
                      at + strlen(changes[i].find));
        memset(&err, 0, sizeof err);
        if (train_state_parse(&s, changed.data, "s", &err)) fail_msg("accepted: %s", changed.data);
        free(changed.data);
    }
    free(text.data);
}

// ----------------------------------------------------------------------------
// the optimizer's file in several pieces, as another layout may write it

// Writes elements [from, to) of every moment, in per mille of its size.
static void write_moments(const char* name, const StoredTensors* all, int from, int to, Manifest* manifest) {
    String file = {NULL, 0, 0};
    uint64_t end = 0;
    safetensors_header_begin(&file);
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < all->count; i++) {
            const StoredTensor* t = &all->tensors[i];
            uint64_t first = stored_elements(t) * (uint64_t)from / 1000,
                     last = stored_elements(t) * (uint64_t)to / 1000;
            uint64_t count = last - first;
            char full[RANGED_NAME];
            stored_name(full, t, first, last);
            if (pass == 0)
                safetensors_header_add(&file, &end, full, 1, &count);
            else
                string_append_bytes(&file, t->memory + t->hf.offset + first, (size_t)count * 4);
        }
        if (pass == 0) safetensors_header_finish(&file);
    }
    Error err = {0, {0}};
    assert_true(bytes_write(in_run("step_00000020"), name, file.data, file.size, manifest, &err));
    free(file.data);
}

static void test_moments_in_pieces(void** state) {
    (void)state;
    static const struct {
        int from[3], to[3];
        bool ok;
    } cases[] = {
        {{0, 100, 617}, {100, 617, 1000}, true},  {{0, 617, 100}, {100, 1000, 617}, false}, // out of order
        {{0, 100, 600}, {100, 617, 1000}, false}, {{0, 100, 650}, {100, 617, 1000}, false}, // overlap, hole
        {{0, 100, 617}, {100, 617, 900}, false},
    };
    char path[PATH_MAX], optim[PATH_MAX];
    file_in(optim, "step_00000020", "optim-00001-of-00001.safetensors");
    file_in(path, "step_00000020", manifest_name);
    unlink(optim);
    StoredTensors all = stored_moments(&model, saved[1].m, saved[1].v);
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        Error err = {0, {0}};
        Manifest old, manifest = {NULL, 0};
        String text = {NULL, 0, 0};
        char name[64];
        size_t size;
        char* before = slurp(path, &size);
        assert_true(manifest_parse(&old, before, size, "m", &err));
        for (int i = 0; i < old.count; i++)
            if (strncmp(old.files[i].name, "optim", 5) != 0) manifest_add(&manifest, &old.files[i]);
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "optim-%05d-of-00003.safetensors", i + 1);
            write_moments(name, &all, cases[k].from[i], cases[k].to[i], &manifest);
        }
        manifest_write(&manifest, &text);
        spill(path, text.data, text.size);
        CheckpointData d = data_of(&loaded, 0);
        bool ok = checkpoint_load(in_run("step_00000020"), &d, &err);
        assert_int_equal(ok, cases[k].ok);
        if (ok) assert_true(weights_equal(&loaded, &saved[1]));
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "optim-%05d-of-00003.safetensors", i + 1);
            file_in(optim, "step_00000020", name);
            unlink(optim);
        }
        manifest_free(&old);
        manifest_free(&manifest);
        free(text.data);
        free(before);
    }
    free(all.tensors);
}

// ----------------------------------------------------------------------------
// the commands

static void test_commands(void** state) {
    (void)state;
    char path[PATH_MAX];
    const char *ten = in_run("step_00000010"), *twenty = in_run("step_00000020");
    int out = dup(STDOUT_FILENO), nowhere = open("/dev/null", O_WRONLY);
    fflush(stdout);
    dup2(nowhere, STDOUT_FILENO);
    int whole = checkpoint_verify(twenty), info = checkpoint_info(twenty),
        missing = checkpoint_info("/nonexistent"), nothing = checkpoint_verify("/nonexistent");
    int same = checkpoint_diff(twenty, twenty), different = checkpoint_diff(ten, twenty);
    file_in(path, "step_00000020", "run_config.json");
    spill(path, "{\n  \"seed\": 2\n}\n", 16);
    int damaged = checkpoint_verify(twenty);
    fflush(stdout);
    dup2(out, STDOUT_FILENO);
    close(out), close(nowhere);
    assert_int_equal(whole, EXIT_OK);
    assert_int_equal(info, EXIT_OK);
    assert_int_equal(missing, EXIT_NO_INPUT);
    assert_int_equal(nothing, EXIT_NO_INPUT); // what is not there is not damaged
    assert_int_equal(same, EXIT_OK);
    assert_int_equal(different, 1);
    assert_int_equal(damaged, EXIT_BAD_DATA);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        ON_A_RUN(test_model_alone),
        ON_A_RUN(test_another_model),
        ON_A_RUN(test_same_step_again),
        ON_A_RUN(test_retention),
        ON_A_RUN(test_leftovers),
        ON_A_RUN(test_lock),
        ON_A_RUN(test_removed_while_read),
        ON_A_RUN(test_every_header_byte),
        ON_A_RUN(test_payload_bytes),
        ON_A_RUN(test_wrong_files),
        ON_A_RUN(test_no_manifest),
        cmocka_unit_test(test_forged_manifests),
        cmocka_unit_test(test_bad_states),
        ON_A_RUN(test_moments_in_pieces),
        ON_A_RUN(test_commands),
    };
    // Thousands of damages, each named on stderr: only the tests' own messages are for the reader.
    if (getenv("VERBOSE") == NULL && freopen("/dev/null", "w", stderr) == NULL) return EXIT_OS;
    return cmocka_run_group_tests_name("checkpoint", tests, NULL, NULL);
}
