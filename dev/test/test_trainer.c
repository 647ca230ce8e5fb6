// The steps of a run: their batches, what is said of them, and the way on from a bad one. What is saved is in
// test_saves.c.
#include "dev/test/pretend_gpt.h" // defines: world, train, expect_ok, slurp, occurrences, weight_after, TEST

// Each batch is loaded while the step before it runs, in the order of the data, whoever computes.
static void batches_arrive_in_order(void** state) {
    (void)state;
    static int32_t expected[10];
    for (int asynchronous = 0; asynchronous <= 1; asynchronous++) {
        expect_ok(train(asynchronous, asynchronous ? "a" : "s", MORE("log.every=1")));
        assert_int_equal(world.steps, 10);
        assert_false(world.loaded_while_running[10]); // no batch for a step that will not be
        for (int i = 0; i < 10; i++) {
            assert_int_equal(world.loaded_while_running[i], i > 0);
            assert_int_equal(world.applied_steps[i], i);
        }
        if (asynchronous) assert_memory_equal(world.first_token, expected, sizeof expected);
        memcpy(expected, world.first_token, sizeof expected);
        assert_int_not_equal(expected[0], expected[1]);
    }
}

// A step is reported during the next one where that hides the time it takes, else at once.
static void reports_overlap_steps(void** state) {
    (void)state;
    expect_ok(train(true, "a", MORE("log.every=1", "eval.every=4", "checkpoint.every=3")));
    for (int i = 0; i < 10; i++) { // i steps are done
        bool at_once = i % 4 == 0 || i % 3 == 0;
        assert_int_equal(world.lines_at_start[i], at_once ? i : i - 1);
        assert_int_equal(world.lines_at_finish[i], i);
    }
    assert_int_equal(step_lines(), 10);
    expect_ok(train(false, "s", MORE("log.every=1")));
    for (int i = 0; i < 10; i++) assert_int_equal(world.lines_at_start[i], i);
    char* log = slurp(world.log);
    assert_int_equal(occurrences(log, "\"mfu\":"), 10);
    assert_int_equal(occurrences(log, "\"event\":\"eval\""), 1);
    free(log);
    char* out = slurp(temp_path("stdout"));
    assert_int_equal(occurrences(out, "| MFU "), 10);
    free(out);
}

// A run that is over says so, and leaves the config of the steps that were done.
static void finished_runs_keep_their_config(void** state) {
    (void)state;
    expect_ok(train(true, "a", MORE("log.every=1")));
    char* before = slurp(temp_path("a/run_config.json"));
    expect_ok(train(true, "a", MORE("schedule.max_steps=5", "optimizer.learning_rate=0.5")));
    assert_int_equal(world.steps, 0);
    char* after = slurp(temp_path("a/run_config.json"));
    assert_string_equal(before, after);
    free(before), free(after);
    expect_ok(train(true, "a", MORE("schedule.max_steps=12", "optimizer.learning_rate=0.5")));
    assert_int_equal(world.steps, 2);
    after = slurp(temp_path("a/run_config.json"));
    assert_non_null(strstr(after, "\"learning_rate\": 0.5"));
    free(after);
}

// What would fit is found by planning it: 1000 bytes a sequence less 200 a level, 8000 or 6000 of state.
static void memory_advice_fits(void** state) {
    (void)state;
    static const struct {
        uint64_t limit;
        const char* advice;
    } cases[] = {
        {18000, NULL},
        {16500, "set batch.recompute=activation, or batch.recompute=norm, or batch.micro_batch_size=5 ("},
        {14000, "set batch.recompute=norm, or batch.micro_batch_size=5, or batch.recompute=block ("},
        {8200, "set batch.recompute=block batch.micro_batch_size=1 precision.moments=bf16 ("},
        {1000, "take a smaller model"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        RunConfig* run = malloc_check(sizeof *run);
        char* overrides[] = {"batch.micro_batch_size=10", "batch.global_batch_size=20"};
        Error err = {0};
        CHECK(config_load(run, "configs/tiny_llama.json", 2, overrides, &err));
        world.memory_limit = cases[i].limit;
        bool ok = check_memory(run, true, &err);
        assert_int_equal(ok, cases[i].advice == NULL);
        if (!ok && strstr(err.text, cases[i].advice) == NULL)
            fail_msg("limit %d: %s", (int)cases[i].limit, err.text);
        free(run);
    }
}

// ----------------------------------------------------------------------------
// steps that are bad

// A step that is not finite is not counted as applied, is always reported, and does not end the run.
static void skipped_steps_are_counted(void** state) {
    (void)state;
    expect_ok(train(true, "whole", MORE("log.every=1")));
    world.bad_token = world.first_token[2], world.bad_loss = NAN;
    Outcome o = train(true, "a", MORE("log.every=100"));
    assert_true(o.ok && o.state.skipped_steps == 1 && o.state.consecutive_skipped == 0);
    free(o.said);
    assert_int_equal(step_lines(), 2); // it and the last
    assert_true(world.applied_steps[2] == 2 && world.applied_steps[3] == 2 && world.applied_steps[9] == 8);
    o = train(true, "b", MORE("guard.max_skipped_steps=1", "checkpoint.every=2"));
    assert_int_equal(o.err.code, EXIT_INTERNAL);
    free(o.said);
    assert_int_equal(access(temp_path("b/checkpoints/step_00000002"), F_OK), 0);
    assert_int_not_equal(access(temp_path("b/checkpoints/step_00000003"), F_OK), 0);
}

// The batches that the steps of a run were made of, and what a checkpoint says of it.
static void expect_batches(const int32_t* all, const int* batches, int count) {
    assert_int_equal(world.steps, count);
    for (int i = 0; i < count; i++) assert_int_equal(world.first_token[i], all[batches[i]]);
}

static float weight_after_batches(const int32_t* all, const int* batches, int count) {
    for (int i = 0; i < count; i++) world.first_token[i] = all[batches[i]];
    return weight_after(count);
}

static TrainState saved_state(const char* run_dir, int step, float* weight) {
    char path[PATH_MAX];
    RunConfig* run = malloc_check(sizeof *run);
    Error err = {0};
    CHECK(config_load(run, "configs/tiny_llama.json", 0, NULL, &err));
    float* params = calloc_check(parameter_layout(&run->model).num_parameters, sizeof *params);
    CheckpointData data = {.model = &run->model, .params = params};
    snprintf(path, sizeof path, "%s/%s/checkpoints/step_%08d", temp_dir, run_dir, step);
    if (!checkpoint_load(path, &data, &err)) fail_msg("%s", err.text);
    *weight = params[0];
    free(params), free(run);
    return data.state;
}

static const int32_t* all_batches(void) {
    static int32_t all[20];
    expect_ok(train(true, "all", MORE("schedule.max_steps=20")));
    memcpy(all, world.first_token, sizeof all);
    return all;
}

// A bad batch sends the run back to its newest checkpoint, which may just be being written, and on behind the batch.
static void rewinds_skip_what_was_bad(void** state) {
    (void)state;
    const int32_t* all = all_batches();
    const int near[] = {0, 1, 2, 3, 4, /* back to 4 */ 5, 6, 7, 8, 9, 10};
    const int after_near[] = {0, 1, 2, 3, 5, 6, 7, 8, 9, 10};
    const int far[] = {0, 1, 2, 3, 4, /* back to 4, seven batches on */ 11, 12, 13, 14, 15, 16};
    const int from_start[] = {0, 1, 2, 3, 4, /* back to 0 */ 5, 6, 7, 8, 9, 10, 11, 12, 13, 14};
    char dir[16];
    for (int i = 0; i < 8; i++) { // twice each: the same bits
        bool asynchronous = i % 2, infinite = i / 4;
        TrainState s;
        float weight;
        snprintf(dir, sizeof dir, "near%d", i);
        world.bad_token = all[4], world.bad_loss = infinite ? INFINITY : NAN;
        world.snapshot_seconds = 0.02;
        bool fast = i / 2 % 2; // it is in the fast tier alone
        expect_ok(train(asynchronous, dir,
                        MORE(fast ? "checkpoint.fast_every=4" : "checkpoint.every=4", "guard.policy=rewind",
                             fast ? fast_dir : NULL)));
        expect_batches(all, near, 11);
        assert_int_equal(world.applied_steps[5], 4);
        s = saved_state(dir, 10, &weight);
        assert_true(s.rewinds == 1 && s.rows == 11 * ROWS && s.skipped_steps == 0 && s.loss.count == 10);
        assert_true(weight == weight_after_batches(all, after_near, 10));
        char* log = slurp(world.log);
        assert_int_equal(occurrences(log, "\"action\":\"rewind\""), 1);
        assert_int_equal(occurrences(log, "\"event\":\"rewind\""), 1);
        assert_int_equal(occurrences(log, "\"first_row\":16,\"rows\":4,\"batch\":[{\"row\":16,"), 1);
        free(log);
    }
    expect_ok(train(true, "far", MORE("checkpoint.every=4", "guard.policy=rewind", "guard.rewind_skip=7")));
    expect_batches(all, far, 11);
    expect_ok(train(true, "start", MORE("guard.policy=rewind")));
    expect_batches(all, from_start, 15);
    assert_int_equal(world.applied_steps[5], 0);
    const int due[] = {0, 1, 2, 3, 4, 5, 6, 7, /* back to 4, not to what is due now */ 8, 9, 10, 11, 12, 13};
    world.bad_token = all[7];
    expect_ok(train(true, "due", MORE("checkpoint.every=4", "guard.policy=rewind")));
    expect_batches(all, due, 14);
}

// Stopped with a rewind or behind it, before the next checkpoint by the step, and killed there: in the end the same state.
static void rewinds_survive_a_resume(void** state) {
    (void)state;
    const int32_t* all = all_batches();
    float weight, resumed_weight;
    Outcome o;
    world.bad_token = all[4], world.bad_loss = NAN;
    expect_ok(train(true, "whole", MORE("checkpoint.every=4", "guard.policy=rewind")));
    TrainState s = saved_state("whole", 10, &weight);
    const struct {
        const char* run;
        int stop, left; // the program's step at whose end the signal comes; steps of the resumed run
    } stopped[] = {{"stopped", 7, 4},
                   {"at_once", 5, 5}}; // two steps behind the rewind; in the step that leads to it
    TrainState resumed;
    for (int i = 0; i < 2; i++) {
        world.stop_step = stopped[i].stop;
        o = train(true, stopped[i].run, MORE("checkpoint.every=4", "guard.policy=rewind"));
        assert_int_equal(o.err.code, EXIT_STOPPED);
        free(o.said);
        world.stop_step = 0;
        expect_ok(train(true, stopped[i].run, MORE("checkpoint.every=4", "guard.policy=rewind")));
        assert_int_equal(world.steps, stopped[i].left);
        resumed = saved_state(stopped[i].run, 10, &resumed_weight);
        assert_memory_equal(&s, &resumed, sizeof s);
        assert_true(weight == resumed_weight);
    }
    world.stop_step = 4; // as after a kill: only the checkpoint of step 4 is left
    o = train(true, "killed", MORE("checkpoint.every=4", "guard.policy=rewind"));
    free(o.said);
    world.stop_step = 0;
    expect_ok(train(true, "killed", MORE("checkpoint.every=4", "guard.policy=rewind")));
    resumed = saved_state("killed", 10, &resumed_weight);
    assert_memory_equal(&s, &resumed, sizeof s);
    assert_true(weight == resumed_weight);
}

static void rewinds_end(void** state) {
    (void)state;
    world.bad_token = -1, world.bad_step = 6, world.bad_loss = NAN;
    Outcome o = train(true, "a", MORE("checkpoint.every=4", "guard.policy=rewind", "guard.rewind_max=3"));
    assert_int_equal(o.err.code, EXIT_INTERNAL);
    assert_non_null(strstr(o.err.text, "guard.rewind_max"));
    assert_int_equal(world.steps, 6 + 1 + 3); // one bad step, and one after each rewind
    assert_int_equal(o.state.rewinds, 3);
    free(o.said);
    assert_int_not_equal(access(temp_path("a/checkpoints/step_00000005"), F_OK), 0);
}

// A spike is judged by what came before it, alike on all that resume; what is done is the policy's.
static void spikes_follow_the_policy(void** state) {
    (void)state;
    static const struct {
        const char *policy, *action;
        int steps, code, skipped;
    } cases[] = {{"guard.policy=warn", "applied", 20, 0, 0},
                 {"guard.policy=skip", "skipped", 20, 0, 1},
                 {"guard.policy=rewind", "rewind", 15 + 10, 0, 0},
                 {"guard.policy=stop", "stop", 15, EXIT_INTERNAL, 1}};
    const int32_t* all = all_batches();
    for (int i = 0; i < 4; i++) {
        char policy[32];
        world.bad_token = all[14], world.bad_loss = 5.2; // five deviations above the mean
        snprintf(policy, sizeof policy, "%s", cases[i].policy);
        Outcome o = train(
            true, policy,
            MORE("schedule.max_steps=20", "checkpoint.every=10", "guard.sigma=4", "guard.window=10", policy));
        assert_int_equal(o.err.code, cases[i].code);
        assert_int_equal(world.steps, cases[i].steps);
        assert_int_equal(o.state.skipped_steps, cases[i].skipped);
        free(o.said);
        char* log = slurp(world.log);
        char action[32];
        snprintf(action, sizeof action, "\"action\":\"%s\"", cases[i].action);
        assert_int_equal(occurrences(log, "\"event\":\"guard\""), 1);
        assert_int_equal(occurrences(log, action), 1);
        free(log);
    }
    // in a window that is not full there are no spikes
    expect_ok(train(true, "early", MORE("schedule.max_steps=20", "guard.sigma=4", "guard.window=15")));
    expect_ok(train(true, "off", MORE("schedule.max_steps=20", "guard.policy=stop")));
    char* log = slurp(world.log);
    assert_int_equal(occurrences(log, "\"event\":\"guard\""), 0);
    free(log);
    // a detector that was saved judges as one that was not
    Outcome o = train(true, "saved", MORE("schedule.max_steps=20", "guard.sigma=4", "guard.window=10"));
    world.stop_step = 12;
    Outcome stopped =
        train(true, "resumed", MORE("schedule.max_steps=20", "guard.sigma=4", "guard.window=10"));
    world.stop_step = 0;
    Outcome resumed =
        train(true, "resumed", MORE("schedule.max_steps=20", "guard.sigma=4", "guard.window=10"));
    assert_int_equal(o.state.skipped_steps, 1);
    assert_memory_equal(&o.state, &resumed.state, sizeof o.state);
    free(o.said), free(stopped.said), free(resumed.said);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(batches_arrive_in_order),         TEST(reports_overlap_steps),
        TEST(finished_runs_keep_their_config), TEST(memory_advice_fits),
        TEST(skipped_steps_are_counted),       TEST(rewinds_skip_what_was_bad),
        TEST(rewinds_survive_a_resume),        TEST(rewinds_end),
        TEST(spikes_follow_the_policy),
    };
    return cmocka_run_group_tests_name("trainer", tests, NULL, NULL);
}
