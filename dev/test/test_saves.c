// What a run saves and when, whatever its directories do, and that the next start goes on from it.
#define _GNU_SOURCE 1
#include <errno.h>
#include <sys/file.h>

static int no_locks; // what a file system says that has none; 0: it has
static int shy_flock(int fd, int operation) {
    if (no_locks == 0) return flock(fd, operation);
    return errno = no_locks, -1;
}
#define flock(fd, operation) shy_flock(fd, operation)

#include "dev/test/pretend_gpt.h" // defines: world, train, expect_ok, slurp, occurrences, weight_after, TEST

static void expect_checkpoint(const char* run_dir, int step) {
    char path[PATH_MAX];
    RunConfig* run = malloc_check(sizeof *run);
    Error err = {0};
    CHECK(config_load(run, "configs/tiny_llama.json", 0, NULL, &err));
    size_t n = parameter_layout(&run->model).num_parameters;
    float* state = calloc_check(3 * n, sizeof *state);
    CheckpointData data = {.model = &run->model, .params = state, .m = state + n, .v = state + 2 * n};
    snprintf(path, sizeof path, "%s/%s/checkpoints/step_%08d", temp_dir, run_dir, step);
    if (!checkpoint_load(path, &data, &err)) fail_msg("%s", err.text);
    assert_int_equal(data.state.step, step);
    assert_int_equal(data.state.rows, ROWS * step);
    assert_int_equal(data.state.tokens, ROWS * T * step);
    assert_true(state[0] == weight_after(step));
    assert_true(state[3 * n - 1] == (float)step);
    free(state), free(run);
}

// What a checkpoint holds is the state of its step, however far training has gone meanwhile.
static void checkpoints_hold_their_step(void** state) {
    (void)state;
    world.snapshot_seconds = 0.03, world.step_seconds = 0.005;
    for (int asynchronous = 0; asynchronous <= 1; asynchronous++) {
        const char* dir = asynchronous ? "a" : "s";
        expect_ok(train(asynchronous, dir, MORE("checkpoint.every=3", "checkpoint.keep_last=9")));
        assert_true(asynchronous ? world.started_while_writing > 0 : world.started_while_writing == 0);
        const int steps[] = {3, 6, 9, 10};
        for (int i = 0; i < 4; i++) expect_checkpoint(dir, steps[i]);
        char* log = slurp(world.log);
        assert_int_equal(occurrences(log, "\"event\":\"checkpoint\""), 4);
        free(log);
    }
}

// By the clock: a save where the interval is over when a step begins, behind that step, and nowhere else but at the end;
// and the log says what it cost. What is compared are the times that steps really had: they may be any.
static void checkpoints_come_by_the_clock(void** state) {
    (void)state;
    const double interval = 0.072; // of steps of 30 ms or more: each third, where the machine is not slow
    world.step_seconds = 0.03, world.snapshot_seconds = 0.001;
    for (int asynchronous = 0; asynchronous <= 1; asynchronous++) {
        double begun = seconds_now();
        expect_ok(train(asynchronous, asynchronous ? "a" : "s",
                        MORE("checkpoint.minutes=0.0012", "checkpoint.keep_last=99")));
        // the clock was set between these two: at the start, then between the end of a step and the snapshot
        double earliest = begun, latest = world.started[0];
        int saves = 0;
        for (int i = 0; i < 10; i++) {
            double asked_after = i > 0 ? world.finished[i - 1] : begun, asked_before = world.started[i];
            bool saved = world.saved[i + 1] != 0;
            if (saved && i < 9) assert_true(asked_before - earliest >= interval);
            if (!saved) assert_true(asked_after - latest < interval);
            if (saved) earliest = world.finished[i], latest = world.saved[i + 1];
            saves += saved;
        }
        assert_true(world.saved[10] != 0);
        char* log = slurp(world.log);
        assert_int_equal(occurrences(log, "\"event\":\"checkpoint\""), saves);
        assert_int_equal(occurrences(log, "\"stall\":"), saves);
        free(log);
        expect_checkpoint(asynchronous ? "a" : "s", 10);
    }
}

static void intervals_follow_the_formula(void** state) {
    (void)state;
    RunConfig* run = calloc_check(1, sizeof *run);
    assert_true(isinf(save_interval(run, 1, 1)));
    run->checkpoint.minutes = 5;
    assert_float_equal(save_interval(run, 1, 1), 300, 1e-9);
    run->checkpoint.failures_per_day = 4; // W = sqrt(2 * 3 * 21600)
    assert_float_equal(save_interval(run, 3, 100), 300, 1e-9);
    run->checkpoint.minutes = 0;
    assert_float_equal(save_interval(run, 3, 100), 360, 1e-9);
    assert_float_equal(save_interval(run, 3, 500), 500, 1e-9);
    assert_float_equal(save_interval(run, 0, 0), sqrt(2 * 21600), 1e-9);
    free(run);
}

// A save that is not over does not hold up training by the next one, which its low cost would have come soon; the clock
// does.
static void intervals_outlast_a_save(void** state) {
    (void)state;
    Trainer* t = &trainer;
    memset(t, 0, sizeof *t);
    t->control.size = 1, t->run.checkpoint.failures_per_day = 864000; // W = sqrt(2 * 0.0001 / 10) s
    t->stall = 0.0001, t->saver.seconds = 2, t->copier.seconds = 1, t->save_started = seconds_now() - 100;
    for (int busy = 0; busy < 4; busy++) {
        t->saver.busy = busy & 1, t->copier.busy = busy >> 1;
        t->saver.started = t->copier.started = seconds_now() - 50;
        t->run.checkpoint.minutes = 0;
        t->run.parallel.hang_seconds_max = 40; // it hangs: the next one waits for it, and is watched
        assert_int_equal(step_requests(t) & REQUEST_SAVE, REQUEST_SAVE);
        t->run.parallel.hang_seconds_max = 1800;
        assert_int_equal(step_requests(t) & REQUEST_SAVE, busy == 0 ? REQUEST_SAVE : 0);
        t->run.checkpoint.minutes = 1;
        assert_int_equal(step_requests(t) & REQUEST_SAVE, REQUEST_SAVE);
    }
}

// A stop saves the step it came in; the next start goes on with the step and the rows behind it.
static void stops_and_goes_on(void** state) {
    (void)state;
    expect_ok(train(true, "whole", MORE("log.every=1")));
    int32_t expected[10];
    memcpy(expected, world.first_token, sizeof expected);
    world.stop_step = 5, world.snapshot_seconds = 0.02; // while the checkpoint of step 4 is being written
    Outcome o = train(true, "a", MORE("checkpoint.every=4"));
    assert_int_equal(o.err.code, EXIT_STOPPED);
    assert_int_equal(o.state.step, 5);
    free(o.said);
    assert_int_equal(step_lines(), 5);
    expect_checkpoint("a", 4);
    expect_checkpoint("a", 5);
    world.stop_step = 0;
    expect_ok(train(true, "a", MORE("checkpoint.every=4")));
    assert_int_equal(world.steps, 5);
    assert_memory_equal(world.first_token, expected + 5, 5 * sizeof *expected);
    assert_int_equal(world.applied_steps[0], 5);
    memcpy(world.first_token, expected, sizeof expected);
    expect_checkpoint("a", 10);
}

// Where nothing can be saved training goes on and says so each time; that the last one failed is the run's
// error, said once.
static void failed_saves_are_said_once(void** state) {
    (void)state;
    for (int asynchronous = 0; asynchronous <= 1; asynchronous++) {
        const char* dir = asynchronous ? "a" : "s";
        snprintf(world.blocked, sizeof world.blocked, "%s/%s/checkpoints", temp_dir, dir);
        Outcome o = train(asynchronous, dir, MORE("checkpoint.every=4"));
        assert_int_equal(world.steps, 10);
        assert_int_equal(o.err.code, EXIT_CANNOT_WRITE);
        assert_int_equal(occurrences(o.said, "warning: no checkpoint at step 4:"), 1);
        assert_int_equal(occurrences(o.said, "warning: no checkpoint at step 8:"), 1);
        assert_int_equal(occurrences(o.said, "warning: "), 2);
        free(o.said);
        world.stop_step = 8; // the stop promises that its step is saved
        CHECK(unlink(world.blocked) == 0);
        o = train(asynchronous, dir, MORE("checkpoint.every=4"));
        assert_int_equal(o.err.code, EXIT_CANNOT_WRITE);
        assert_int_equal(occurrences(o.said, "warning: no checkpoint at step 4:"), 1);
        free(o.said);
        world.stop_step = 0;
    }
}

static int events(const char* tier) {
    char what[64];
    snprintf(what, sizeof what, "\"tier\":\"%s\"", tier);
    char* log = slurp(world.log);
    int n = occurrences(log, what);
    free(log);
    return n;
}

// What goes through the fast tier to the run's directory is there in the end, whatever ends the run; what stays in the
// tier does not count as saved.
static void fast_tier_passes_on(void** state) {
    (void)state;
    world.snapshot_seconds = 0.01;
    for (int asynchronous = 0; asynchronous <= 1; asynchronous++) {
        const char *dir = asynchronous ? "a" : "s", *stopped = asynchronous ? "a2" : "s2";
        expect_ok(
            train(asynchronous, dir,
                  MORE(fast_dir, "checkpoint.every=4", "checkpoint.fast_every=3", "checkpoint.keep_last=9")));
        const int steps[] = {4, 8, 10};
        for (int i = 0; i < 3; i++) expect_checkpoint(dir, steps[i]);
        assert_true(events("durable") == 3 && events("fast") == 6);
        world.stop_step = 6; // behind a save that stays in the tier
        Outcome o = train(asynchronous, stopped, MORE(fast_dir, "checkpoint.fast_every=3"));
        assert_int_equal(o.err.code, EXIT_STOPPED);
        assert_string_equal(o.said, "");
        free(o.said);
        expect_checkpoint(stopped, 6);
        assert_true(events("durable") == 1 && events("fast") == 2); // what is there is not written once more
        world.stop_step = 0;
        expect_ok(train(asynchronous, stopped, MORE(fast_dir, "checkpoint.fast_every=3")));
        assert_int_equal(world.steps, 4);
    }
}

// Copies that fail are said as failed saves are; the next start copies what the tier has, before anything else.
static void failed_copies_are_made_up_for(void** state) {
    (void)state;
    for (int asynchronous = 0; asynchronous <= 1; asynchronous++) {
        const char* dir = asynchronous ? "a" : "s";
        snprintf(world.blocked, sizeof world.blocked, "%s/%s/checkpoints", temp_dir, dir);
        Outcome o = train(asynchronous, dir, MORE(fast_dir, "checkpoint.every=4"));
        assert_int_equal(o.err.code, EXIT_CANNOT_WRITE);
        assert_int_equal(occurrences(o.said, "warning: no checkpoint at step 4:"), 1);
        assert_int_equal(occurrences(o.said, "warning: no checkpoint at step 8:"), 1);
        assert_int_equal(occurrences(o.said, "warning: step 10 cannot be copied from checkpoint.fast_dir:"),
                         1);
        assert_int_equal(occurrences(o.said, "warning: "), 3);
        assert_true(events("durable") == 0 && events("fast") == 3);
        free(o.said);
        CHECK(unlink(world.blocked) == 0);
        world.blocked[0] = '\0';
        expect_ok(train(asynchronous, dir, MORE(fast_dir, "checkpoint.every=4")));
        assert_int_equal(world.steps, 0);
        expect_checkpoint(dir, 10);
        assert_int_equal(events("durable"), 1);
        expect_ok(train(asynchronous, dir, MORE(fast_dir, "checkpoint.every=4")));
        assert_int_equal(events("durable"), 1); // it is there
    }
}

// Who cannot save any more, as those that save with it do not answer, ends, to be started again; they know nothing of it.
static void lost_saves_end_the_run(void** state) {
    (void)state;
    world.lost = true, world.snapshot_seconds = 0.01;
    char* const due[] = {"checkpoint.every=2", "checkpoint.fast_every=2", "checkpoint.every=10"};
    for (int i = 0; i < 3; i++) {
        Outcome o = train(true,
                          i == 0   ? "a"
                          : i == 1 ? "b"
                                   : "c",
                          i == 1 ? MORE(fast_dir, due[i]) : MORE(due[i]));
        assert_int_equal(o.err.code, EXIT_LOST);
        assert_non_null(strstr(o.err.text, "no more checkpoints"));
        assert_in_range(world.steps, i < 2 ? 3 : 10,
                        i < 2 ? 5 : 10); // soon behind the save that fails
        assert_false(trainer.agreed);
        free(o.said);
    }
}

// What all have found together is known to be: the first process says it.
static void errors_of_all_are_agreed_on(void** state) {
    (void)state;
    expect_ok(train(true, "a", MORE("schedule.max_steps=4")));
    Outcome o = train(true, "a", MORE("seed=2"));
    assert_int_equal(o.err.code, EXIT_CONFIG);
    assert_true(trainer.agreed);
    free(o.said);
    // a rewind to a checkpoint that was whole when the run began
    world.bad_token = -1, world.bad_step = 2, world.bad_loss = NAN;
    snprintf(world.blocked, sizeof world.blocked, "%s/a/checkpoints/step_00000004/extra", temp_dir);
    o = train(true, "a", MORE("checkpoint.every=0", "guard.policy=rewind"));
    assert_int_equal(o.err.code, EXIT_BAD_DATA);
    assert_int_equal(world.steps, 3);
    assert_true(trainer.agreed);
    free(o.said);
    memset(&world, 0, sizeof world);
    world.memory_limit = UINT64_MAX;
    o = train(true, "a", MORE("log.every=1"));
    assert_int_equal(o.err.code, EXIT_BAD_DATA);
    assert_true(trainer.agreed);
    free(o.said);
}

// Where directories cannot be locked training goes on, and says so; where another one has the lock it does not.
static void locks_are_no_need(void** state) {
    (void)state;
    static const int numbers[] = {ENOSYS, ENOLCK, EOPNOTSUPP};
    for (int i = 0; i < 3; i++) {
        no_locks = numbers[i];
        Outcome o = train(true, i == 0 ? "a" : i == 1 ? "b" : "c", MORE("checkpoint.every=4"));
        no_locks = 0;
        if (!o.ok) fail_msg("%s", o.err.text);
        assert_int_equal(occurrences(o.said, "note: "), 1);
        assert_non_null(strstr(o.said, strerror(numbers[i])));
        free(o.said);
    }
    no_locks = EWOULDBLOCK;
    Outcome o = train(true, "d", MORE("checkpoint.every=4"));
    no_locks = 0;
    assert_int_equal(o.err.code, EXIT_CANNOT_WRITE);
    assert_non_null(strstr(o.err.text, "another process is training"));
    free(o.said);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(checkpoints_hold_their_step),
        TEST(checkpoints_come_by_the_clock),
        TEST(intervals_follow_the_formula),
        TEST(stops_and_goes_on),
        TEST(failed_saves_are_said_once),
        TEST(fast_tier_passes_on),
        TEST(failed_copies_are_made_up_for),
        TEST(intervals_outlast_a_save),
        TEST(lost_saves_end_the_run),
        TEST(errors_of_all_are_agreed_on),
        TEST(locks_are_no_need),
    };
    return cmocka_run_group_tests_name("saves", tests, NULL, NULL);
}
