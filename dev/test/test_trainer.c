// The run (commands.h, train_loop.h, trainer.h, saver.h, fit.h) on a program that only pretends to compute: its
// weights after a step are a function of the rows it was given, it runs beside the host or not, its snapshots
// are slow. So the order of things, what checkpoints hold and what is said can be told exactly.
#include "llmc/commands.h" // defines: command_train, program_main, Trainer

#include "dev/test/shard_fixtures.h" // defines: make_temp_dir, temp_path, write_counting_shard

#include <setjmp.h>
#include <cmocka.h>

enum { T = 8, ROWS = 4, STEPS_RECORDED = 64 };

// ----------------------------------------------------------------------------
// the program

struct GPT {
    size_t count;     // of parameters
    float* device;    // params, m, v, one behind the other
    float* in_flight; // what a snapshot has taken and not yet handed over
    HostState host;
    const int32_t* rows;
    bool running, writing; // between start and finish; between gpt_snapshot and the end of the wait
    StepResult result;
};

struct Decoder {
    int length;
};

// What the tests set, and what they read afterwards.
static struct {
    double step_seconds, snapshot_seconds;
    int stop_step; // at whose end SIGTERM comes
    int bad_token; // that begins a batch whose loss is bad_loss; 0: none does, -1: from bad_step on all do
    int bad_step;
    double bad_loss;
    uint64_t memory_limit;
    int steps; // finished in this process
    bool loaded_while_running[STEPS_RECORDED];
    int lines_at_start[STEPS_RECORDED], lines_at_finish[STEPS_RECORDED]; // step lines in the log by then
    int32_t first_token[STEPS_RECORDED];
    uint64_t applied_steps[STEPS_RECORDED];
    int started_while_writing;
    double started[STEPS_RECORDED], finished[STEPS_RECORDED]; // when steps were
    double saved[STEPS_RECORDED]; // when a snapshot was begun behind so many steps; 0: none was
    char log[PATH_MAX];
    char blocked[PATH_MAX + 32]; // a file with this name appears at the end of the first step
} world;

static Trainer trainer;

static int step_lines(void) {
    size_t size;
    int lines = 0;
    Error none = {0};
    assert_true(line_queue_flush(&trainer.metrics.queue, 60));
    char* text = read_file(world.log, 1 << 20, &size, &none);
    for (const char* at = text; at != NULL && (at = strstr(at, "\"event\":\"step\"")) != NULL; at++) lines++;
    free(text);
    return lines;
}

static void pause_for(double seconds) { usleep((useconds_t)(1e6 * seconds)); }

bool gpt_resolve(RunConfig* run, bool training, Error* err) {
    if (run->precision.compute == COMPUTE_AUTO) run->precision.compute = COMPUTE_FP32;
    return !training || run->precision.gradients == STORE_FP32 || (fail)(err, EXIT_CONFIG, "not here");
}

// 1000 bytes a sequence, less with recompute; 8000 bytes of state, less with small moments.
int gpt_memory(const RunConfig* run, bool training, MemoryLine lines[MEMORY_LINES_MAX]) {
    uint64_t sequence = 1000 - 200 * (uint64_t)run->batch.recompute;
    uint64_t state = training ? 2000 * (4 - (uint64_t)run->precision.moments) : 0;
    lines[0] = (MemoryLine){"activations", sequence * (uint64_t)run->batch.micro_batch_size};
    lines[1] = (MemoryLine){"state", state};
    return 2;
}
uint64_t gpt_memory_limit(void) { return world.memory_limit; }
double gpt_peak_flops(const RunConfig* run) {
    (void)run;
    return 1e9;
}
void gpt_measure(const RunConfig* run, double* matmul_rate, double* copy_rate) {
    (void)run;
    *matmul_rate = *copy_rate = 0;
}
bool gpt_self_test(const RunConfig* run, bool* bad, Error* err) {
    (void)run, (void)bad;
    return err->code == 0;
}
void gpt_print_device(FILE* out) { fprintf(out, "none\n"); }
bool gpt_bus_id(char out[32]) {
    (void)out;
    return false;
}
void program_versions(FILE* out) { (void)out; }

bool gpt_create(GPT* g, const RunConfig* run, int B, int rows, bool training, Error* err) {
    (void)B, (void)rows, (void)training, (void)err;
    memset(g, 0, sizeof *g);
    g->count = parameter_layout(&run->model).num_parameters;
    g->device = calloc_check(3 * g->count, sizeof(float));
    g->in_flight = calloc_check(3 * g->count, sizeof(float));
    return true;
}

void gpt_free(GPT* g) {
    free(g->device), free(g->in_flight), free(g->host.params);
    memset(g, 0, sizeof *g);
}

void gpt_choose_device(int local_rank) { (void)local_rank; }
bool gpt_connect(GPT* g, Control* control, Error* err) {
    (void)g, (void)control, (void)err;
    return true;
}

HostState gpt_host_state(GPT* g) {
    if (g->host.params == NULL) g->host.params = malloc_check(3 * g->count * sizeof(float));
    g->host.m = g->host.params + g->count, g->host.v = g->host.m + g->count;
    g->host.end = g->count;
    return g->host;
}

void gpt_from_host(GPT* g) { memcpy(g->device, g->host.params, 3 * g->count * sizeof(float)); }

void gpt_snapshot(GPT* g) {
    assert_false(g->running);
    gpt_host_state(g);
    world.saved[world.steps] = seconds_now();
    memcpy(g->in_flight, g->device, 3 * g->count * sizeof(float));
    memset(g->host.params, 0xFF, 3 * g->count * sizeof(float)); // a write that does not wait shows
    __atomic_store_n(&g->writing, true, __ATOMIC_SEQ_CST);
}

void gpt_snapshot_wait(GPT* g) {
    pause_for(world.snapshot_seconds);
    memcpy(g->host.params, g->in_flight, 3 * g->count * sizeof(float));
    __atomic_store_n(&g->writing, false, __ATOMIC_SEQ_CST);
}

void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    (void)document_mask, (void)eot_id;
    assert_int_equal(num_rows, ROWS);
    world.loaded_while_running[world.steps + g->running] = g->running;
    g->rows = rows;
}

// A loss that varies a little, as a detector needs it.
static double loss_of(int token) {
    bool bad = world.bad_token == token || (world.bad_token < 0 && world.steps >= world.bad_step);
    return bad ? world.bad_loss : 5 + 0.01 * (token % 7);
}

void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps, int requests,
                    StepGuard guard) {
    (void)lr;
    assert_true(!g->running && g->rows != NULL && world.steps + 1 < STEPS_RECORDED);
    world.started[world.steps] = seconds_now();
    world.lines_at_start[world.steps] = step_lines();
    world.first_token[world.steps] = g->rows[0];
    world.applied_steps[world.steps] = applied_steps;
    world.started_while_writing += __atomic_load_n(&g->writing, __ATOMIC_SEQ_CST);
    if (applied_steps == 0) g->device[0] = (float)run->seed; // a number that is easy to follow
    g->result = (StepResult){.loss = loss_of(g->rows[0]), .grad_norm = 1, .requests = requests};
    g->result.applied = guard_accepts(&guard, g->result.loss, 1);
    if (g->result.applied) {
        g->device[0] = 31 * g->device[0] + (float)g->rows[0];
        g->device[0] -= 4096 * floorf(g->device[0] / 4096);
        g->device[3 * g->count - 1] += 1;
    }
    g->rows = NULL;
    g->running = true;
}

StepResult gpt_finish_step(GPT* g) {
    assert_true(g->running);
    pause_for(world.step_seconds);
    world.finished[world.steps] = seconds_now();
    world.lines_at_finish[world.steps++] = step_lines();
    if (world.steps == 1 && world.blocked[0] != '\0') write_file(world.blocked, "", 0);
    if (world.steps == world.stop_step) raise(SIGTERM);
    g->running = false;
    return g->result;
}

const float* gpt_losses(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    static float losses[ROWS * T];
    (void)rows, (void)document_mask, (void)eot_id;
    assert_false(g->running);
    for (int i = 0; i < num_rows * T; i++) losses[i] = 3;
    return losses;
}

void decoder_create(Decoder* d, GPT* g, int capacity) { (void)d, (void)g, (void)capacity; }
void decoder_step(Decoder* d, int token) { d->length += token >= 0; }
const float* decoder_logits(const Decoder* d) { return d->length >= 0 ? NULL : NULL; }
void decoder_free(Decoder* d) { (void)d; }

// ----------------------------------------------------------------------------
// a run of it

typedef struct {
    bool ok;
    Error err;
    char* said; // on stderr
    TrainState state;
} Outcome;

static char* slurp(const char* path) {
    size_t size;
    Error err = {0};
    char* text = read_file(path, 1 << 20, &size, &err);
    if (text == NULL) fail_msg("%s", err.text);
    return text;
}

// `train` in RUN_DIR with up to five overrides, NULL behind the last. said is the caller's.
static Outcome train(bool asynchronous, const char* run_dir, char* const* more) {
    static GPT gpt;
    static Decoder decoder;
    static char data[PATH_MAX + 16], validation[PATH_MAX + 32], directory[PATH_MAX + 16];
    char* overrides[16] = {data,
                           validation,
                           directory,
                           "data.tokenizer=",
                           "batch.sequence_length=8",
                           "batch.micro_batch_size=2",
                           "batch.global_batch_size=4",
                           "schedule.warmup_steps=0",
                           "schedule.max_steps=10"};
    int count = 9;
    while (*more != NULL) overrides[count++] = *more++;
    snprintf(data, sizeof data, "data.train=%s", temp_path("train.bin"));
    snprintf(validation, sizeof validation, "data.validation=%s", temp_path("validation.bin"));
    snprintf(directory, sizeof directory, "log.run_dir=%s", temp_path(run_dir));
    snprintf(world.log, sizeof world.log, "%s/%s/log.jsonl", temp_dir, run_dir);

    Program program = {"test", "0", asynchronous, &gpt, &decoder};
    Outcome o = {0};
    world.steps = world.started_while_writing = 0;
    memset(world.saved, 0, sizeof world.saved);
    stop_signal = 0;
    fflush(stdout), fflush(stderr);
    int out = dup(1), errors = dup(2);
    CHECK(freopen(temp_path("stdout"), "w", stdout) != NULL);
    CHECK(freopen(temp_path("stderr"), "w", stderr) != NULL);
    trainer_init(&trainer, &program);
    o.ok = config_load(&trainer.run, "configs/tiny_llama.json", count, overrides, &o.err) &&
           gpt_resolve(&trainer.run, true, &o.err) && command_train(&trainer, NULL, &o.err);
    o.state = trainer.state;
    trainer_close(&trainer);
    fflush(stdout), fflush(stderr);
    CHECK(dup2(out, 1) >= 0 && dup2(errors, 2) >= 0);
    close(out), close(errors);
    o.said = slurp(temp_path("stderr"));
    return o;
}

static void expect_ok(Outcome o) {
    if (!o.ok) fail_msg("%s", o.err.text);
    free(o.said);
}

static int occurrences(const char* text, const char* what) {
    int n = 0;
    for (; (text = strstr(text, what)) != NULL; text++) n++;
    return n;
}

// The first weight after each step, and the count of steps in the last moment, as the program computes them.
static float weight_after(int step) {
    float weight = 1; // the seed
    for (int i = 0; i < step; i++) {
        weight = 31 * weight + (float)world.first_token[i];
        weight -= 4096 * floorf(weight / 4096);
    }
    return weight;
}

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

static char fast_dir[PATH_MAX + 32]; // the knob

static int set_up(void** state) {
    memset(&world, 0, sizeof world);
    world.memory_limit = UINT64_MAX;
    if (make_temp_dir(state) != 0) return 1;
    write_counting_shard(temp_path("train.bin"), 2, 512, 0, 4096);
    write_counting_shard(temp_path("validation.bin"), 2, 512, 0, 64 + 1);
    snprintf(fast_dir, sizeof fast_dir, "checkpoint.fast_dir=%s", temp_path("fast"));
    return mkdir(temp_path("fast"), 0777);
}

// ----------------------------------------------------------------------------
// tests

#define MORE(...) ((char* const[]){__VA_ARGS__, NULL})

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

// Stopped behind a rewind, before the next checkpoint by the step, and killed there: in the end the same state.
static void rewinds_survive_a_resume(void** state) {
    (void)state;
    const int32_t* all = all_batches();
    float weight, resumed_weight;
    world.bad_token = all[4], world.bad_loss = NAN;
    expect_ok(train(true, "whole", MORE("checkpoint.every=4", "guard.policy=rewind")));
    TrainState s = saved_state("whole", 10, &weight);
    world.stop_step = 7; // two steps behind the rewind
    Outcome o = train(true, "stopped", MORE("checkpoint.every=4", "guard.policy=rewind"));
    assert_int_equal(o.err.code, EXIT_STOPPED);
    free(o.said);
    world.stop_step = 0;
    expect_ok(train(true, "stopped", MORE("checkpoint.every=4", "guard.policy=rewind")));
    assert_int_equal(world.steps, 4);
    TrainState resumed = saved_state("stopped", 10, &resumed_weight);
    assert_memory_equal(&s, &resumed, sizeof s);
    assert_true(weight == resumed_weight);
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

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, remove_temp_dir)
    const struct CMUnitTest tests[] = {
        TEST(batches_arrive_in_order),
        TEST(reports_overlap_steps),
        TEST(checkpoints_hold_their_step),
        TEST(stops_and_goes_on),
        TEST(skipped_steps_are_counted),
        TEST(failed_saves_are_said_once),
        TEST(fast_tier_passes_on),
        TEST(failed_copies_are_made_up_for),
        TEST(finished_runs_keep_their_config),
        TEST(memory_advice_fits),
        TEST(checkpoints_come_by_the_clock),
        TEST(intervals_follow_the_formula),
        TEST(rewinds_skip_what_was_bad),
        TEST(rewinds_survive_a_resume),
        TEST(rewinds_end),
        TEST(spikes_follow_the_policy),
    };
    return cmocka_run_group_tests_name("trainer", tests, NULL, NULL);
}
