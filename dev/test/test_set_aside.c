// Which checkpoints are set aside, and by whom: what is damaged, not what cannot be read for a while, or by one process
// alone; and only by training.
#define _GNU_SOURCE 1
#include "dev/test/unreadable_files.h" // defines: unreadable

#include "llmc/checkpoint.h" // defines: checkpoint_save, checkpoint_load_newest
#include "dev/test/checkpointed_run.h" // defines: run, model, saved, loaded, save, load, in_run, file_in, exists, ON_A_RUN

#include <sys/wait.h>

static void test_all_damaged(void** state) {
    (void)state;
    Error err;
    char path[PATH_MAX];
    for (int pass = 0; pass < 2; pass++) {
        for (int k = 1; k <= 2; k++) {
            file_in(path, k == 1 ? "step_00000010" : "step_00000020", "state.json");
            spill(path, "{}", 2);
        }
        assert_int_equal(load(&err), -1);
        assert_int_equal(err.code, EXIT_BAD_DATA);
        assert_int_equal(load(&err), -1); // nor is the next start a new beginning
        assert_int_equal(err.code, EXIT_BAD_DATA);
        save(&saved[0], 10, 5, 0); // but saving goes on
        save(&saved[1], 20, 5, 0);
        assert_int_equal(load(&err), 20);
    }
    assert_true(exists("step_00000020.bad") && exists("step_00000020.bad.2"));
    assert_false(exists("step_00000020.bad.3"));
}

// What cannot be read may be whole: it keeps its name, until an older one was loaded in its place.
static void test_unreadable(void** state) {
    (void)state;
    Error err;
    unreadable = "step_000000";
    assert_int_equal(load(&err), -1);
    assert_int_equal(err.code, EXIT_IO);
    assert_non_null(strstr(err.text, "step_00000020")); // the newest one's reason
    assert_true(exists("step_00000010") && exists("step_00000020"));
    unreadable = NULL;
    assert_int_equal(load(&err), 20);
    unreadable = "step_00000020/model";
    assert_int_equal(load(&err), 10);
    assert_true(weights_equal(&loaded, &saved[0]));
    assert_true(exists("step_00000020.bad") && !exists("step_00000020"));
    save(&saved[1], 20, 5, 0);
    char path[PATH_MAX];
    file_in(path, "step_00000020", "state.json");
    spill(path, "{}", 2);
    unreadable = "step_00000010"; // one damaged, one not readable
    assert_int_equal(load(&err), -1);
    assert_int_equal(err.code, EXIT_IO);
    assert_true(exists("step_00000010") && exists("step_00000020.bad.2"));
    unreadable = NULL;
}

// Who does not train uses the next older one, too, but changes nothing: a run may be saving there.
static void test_readers_change_nothing(void** state) {
    (void)state;
    Error err = {0, {0}};
    char path[PATH_MAX];
    bool found;
    CheckpointData d = data_of(&loaded, 0);
    d.m = d.v = NULL;
    assert_int_equal(mkdir(in_run("step_00000030.tmp"), 0777), 0);
    file_in(path, "step_00000020", "state.json");
    spill(path, "{}", 2);
    assert_true(checkpoint_load_newest(run, &d, &found, &err) && found);
    assert_int_equal(d.state.step, 10);
    assert_memory_equal(loaded.params, saved[0].params, loaded.count * 4);
    file_in(path, "step_00000010", "state.json");
    spill(path, "{}", 2);
    assert_false(checkpoint_load_newest(run, &d, &found, &err));
    assert_int_equal(err.code, EXIT_BAD_DATA);
    assert_non_null(strstr(err.text, "2 are damaged"));
    assert_true(exists("step_00000010") && exists("step_00000020") && exists("step_00000030.tmp"));
    assert_int_equal(load(&err), -1); // who trains does all that
    assert_true(exists("step_00000010.bad") && exists("step_00000020.bad") && !exists("step_00000030.tmp"));
}

// Two processes save step 30 or load together; the other one cannot read `hides`. Returns the step, or minus the code.
static long as_two(bool saves, const char* hides, Error* err) {
    int ends[2], status;
    bool found;
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends), 0);
    fflush(stdout), fflush(stderr);
    pid_t child = fork();
    assert_true(child >= 0);
    int sockets[2] = {child == 0 ? ends[0] : -1, ends[1]};
    Control control = {.rank = child == 0, .size = 2, .sockets = sockets, .timeout = 60};
    CheckpointData d = data_of(saves ? &saved[1] : &loaded, saves ? 30 : 0);
    d.control = &control;
    tensors_owned(&model, control.rank, 2, &d.begin, &d.end);
    if (saves) d.params += d.begin, d.m += d.begin, d.v += d.begin;
    if (child == 0) unreadable = hides;
    memset(err, 0, sizeof *err);
    bool ok = saves ? checkpoint_save(run, &d, 9, 0, err) : checkpoint_load_newest(run, &d, &found, err);
    if (child == 0) _exit(ok ? 100 + (int)d.state.step : err->code);
    close(ends[0]);
    assert_int_equal(waitpid(child, &status, 0), child);
    close(ends[1]);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), ok ? 100 + (int)d.state.step : err->code); // both know the same
    return ok ? (long)d.state.step : -err->code;
}

// What another process does not see may be there: the first one's word counts.
static void test_another_process_cannot_read(void** state) {
    (void)state;
    Error err;
    assert_int_equal(as_two(true, NULL, &err), 30);
    assert_int_equal(as_two(false, NULL, &err), 30);
    static const char* const hides[] = {"step_00000030", "step_00000030/optim", "step_000000"};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(as_two(false, hides[i], &err), -EXIT_IO);
        assert_non_null(strstr(err.text, "rank 1: "));
        assert_non_null(strstr(err.text, "step_00000030"));
        assert_true(exists("step_00000020") && exists("step_00000030"));
    }
    // damage of a file that the first process does not read to load
    char path[PATH_MAX];
    size_t size;
    file_in(path, "step_00000030", "optim-00002-of-00002.safetensors");
    char* data = slurp(path, &size);
    data[size - 1] ^= 1;
    spill(path, data, size);
    free(data);
    assert_int_equal(as_two(false, NULL, &err), 20);
    assert_true(exists("step_00000030.bad") && !exists("step_00000030"));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        ON_A_RUN(test_all_damaged),
        ON_A_RUN(test_unreadable),
        ON_A_RUN(test_readers_change_nothing),
        ON_A_RUN(test_another_process_cannot_read),
    };
    // damages, each named on stderr: only the tests' own messages are for the reader
    if (getenv("VERBOSE") == NULL && freopen("/dev/null", "w", stderr) == NULL) return EXIT_OS;
    return cmocka_run_group_tests_name("set_aside", tests, NULL, NULL);
}
