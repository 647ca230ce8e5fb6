// A program that only pretends to compute, and runs of it (commands.h, train_loop.h, trainer.h, saver.h,
// fit.h): its weights after a step are a function of the rows it was given, it runs beside the host or not,
// its snapshots are slow. So the order of things, what checkpoints hold and what is said can be told exactly.
#pragma once
#include "llmc/commands.h"           // defines: command_train, program_main, Trainer
#include "dev/test/shard_fixtures.h" // defines: make_temp_dir, temp_path, write_counting_shard
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

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
    bool lost;                   // the process that saves with this one does not answer
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
    if (world.lost) {
        trainer.save_control.size = 2, trainer.save_control.sockets = malloc_check(2 * sizeof(int));
        trainer.save_control.sockets[0] = trainer.save_control.sockets[1] = -1;
    }
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

#define MORE(...) ((char* const[]){__VA_ARGS__, NULL})
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, remove_temp_dir)
