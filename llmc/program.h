// What the run (trainer.h, train_loop.h, commands.h) asks of the program it is part of: a model that trains,
// evaluates and generates. train_gpt.c and train_gpt.cu each define these functions for their own GPT.
#pragma once
#include "llmc/config.h"      // defines: RunConfig
#include "llmc/flight.h"      // defines: FLIGHT_RECORDS
#include "llmc/layer_norms.h" // defines: LayerNorms
#include "llmc/planner.h"     // defines: MemoryLine
#include "llmc/rand.h"        // defines: HOST_DEVICE
#include "llmc/rendezvous.h"  // defines: Control

typedef struct GPT GPT;
typedef struct Decoder Decoder;

typedef struct {
    const char *name, *version;
    bool asynchronous; // a step runs beside the host's work, and checkpoints are written from a copy
    GPT* gpt;
    Decoder* decoder;
} Program;

// What a process may ask for behind a step, bits: all of them then do it. REQUEST_SAVE: a checkpoint.
enum StepRequest { REQUEST_STOP = 1, REQUEST_SAVE = 2 };

// A step's outcome; lr and seconds are the loop's.
typedef struct {
    double loss, grad_norm, lr, seconds;
    double device_seconds; // of these, the device's; 0: the host computes itself
    double exposed_share;  // of the device's seconds, those for which computing waited for other processes
    double update_rate;    // bytes a second that the optimizer read and wrote; 0: not known
    bool applied;          // false: the guard rejected the step, and the weights are as before
    int requests;          // StepRequests of some process
    const uint64_t*
        hashes; // of the weights of each rank before the update, until the next step; NULL: none were made
    const uint64_t*
        replay; // of each rank the first of what it computed twice that was not the same, in an order
                // in which causes come first, or REPLAY_SAME; until the next step; NULL: once only
    const LayerNorms* layers; // (L + 2), until the next step's result; NULL: not measured
} StepResult;

// What guards a step, decided before it, the same in all processes (guard.h).
typedef struct {
    double max_loss, max_grad_norm; // it is applied if both are finite and not above these
    bool hash_weights;              // where there are replicas to compare
    bool replay;                    // it is computed twice, and not applied if the two differ (replay.cuh)
    bool measure_layers;            // where there is memory for it
} StepGuard;
static const uint64_t REPLAY_SAME = UINT64_MAX;
static const StepGuard no_guard = {INFINITY, INFINITY, false, false,
                                   false}; // only what is not finite is rejected

// A test on isfinite() beside the comparison, since an infinity is not above a limit that is none; and not on
// `value > limit`, since every comparison with a NaN is false.
static HOST_DEVICE inline bool guard_passes(double value, double limit) {
    return isfinite(value) && value <= limit;
}
static HOST_DEVICE inline bool guard_accepts(const StepGuard* guard, double loss, double grad_norm) {
    return guard_passes(loss, guard->max_loss) && guard_passes(grad_norm, guard->max_grad_norm);
}

// Weights and moments in fp32 in the host's memory: what a checkpoint is read into and written from. Elements
// [begin, end) of parameter_layout of the whole model: all of them, or the whole tensors that this process reads
// and writes. m and v are NULL without training.
typedef struct {
    float *params, *m, *v;
    size_t begin, end;
} HostState;

// ----------------------------------------------------------------------------
// before anything is allocated

// Turns precision.compute = auto into what this program computes in. What a config asks for and the program
// cannot do is an error (EXIT_CONFIG); training: what only training does counts, too.
bool gpt_resolve(RunConfig* run, bool training, Error* err);

enum { MEMORY_LINES_MAX = 16 };
// Everything a run allocates where the model lives, to the byte, into lines; returns how many there are.
int gpt_memory(const RunConfig* run, bool training, MemoryLine lines[MEMORY_LINES_MAX]);
void gpt_choose_device(int local_rank); // of several devices in this machine: before anything else
uint64_t gpt_memory_limit(void);        // bytes there are for it; 0: not known, there is no device here

double
gpt_peak_flops(const RunConfig* run); // dense peak of the device for precision.compute, FLOP/s; 0: not known
// What a matmul of this model's feed-forward layer (FLOP/s) and a copy (bytes read and written a second)
// reach here and now; 0: not known.
void gpt_measure(const RunConfig* run, double* matmul_rate, double* copy_rate);
// Does the device compute, and remember, what it should? *bad: no, it is broken (err says how).
bool gpt_self_test(const RunConfig* run, bool* bad, Error* err);

void gpt_print_device(FILE* out); // one line: what the model is computed on
bool gpt_bus_id(char out[32]);    // of the GPU it is computed on, as NVML calls it; false: there is none
void program_versions(FILE* out); // a line for each library
enum { PREFETCH_DEPTH = 2 };      // batches (global_batch_size, T + 1) that a thread has ready

// ----------------------------------------------------------------------------
// the model's life

// Room for B sequences of T tokens, with all of a run config that decides how the model computes. After a
// failure, too, gpt_free takes it.
bool gpt_create(GPT* g, const RunConfig* run, int B, int T, bool training, Error* err);
void gpt_free(GPT* g);
// Connects the processes of run->layout; where there is one it need not be called.
bool gpt_connect(GPT* g, Control* control, Error* err);

// How far the device is with what the flight recorder holds (OperationProgress of each record, phases excepted). For
// another thread, at any time of the model's life.
void gpt_look(GPT* g, uint8_t progress[FLIGHT_RECORDS]);

HostState gpt_host_state(GPT* g);
void gpt_from_host(GPT* g);     // the host's state, just read, becomes the model's
void gpt_snapshot(GPT* g);      // begins to copy the model's state to the host's
void gpt_snapshot_wait(GPT* g); // until it is there; called by the thread that writes the checkpoint

// ----------------------------------------------------------------------------
// a step: load, start, finish; the next one may be loaded between start and finish

// The rows (num_rows, T + 1) of the next step, num_rows a multiple of B. They stay as they are until the step
// has been started. document_mask: attention stays inside documents, which begin with eot_id.
void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id);
// One optimizer step; applied_steps: those that were applied before it; requests: this process's StepRequests, which
// the step's result then says on all of them.
void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps, int requests,
                    StepGuard guard);
StepResult gpt_finish_step(GPT* g);

// The loss of every token of at most B rows (num_rows, T + 1), for evaluation: (num_rows, T), valid until the
// next call. NULL in a process that does not have the model's head, or that helps another one to them.
const float* gpt_losses(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id);

// ----------------------------------------------------------------------------
// generating: one token at a time, at most capacity of them

void decoder_create(Decoder* d, GPT* g, int capacity);
void decoder_step(Decoder* d, int token);      // appends it
const float* decoder_logits(const Decoder* d); // (Vp): scores the token that follows those appended
void decoder_free(Decoder* d);

// ----------------------------------------------------------------------------

// Random weights and zero moments, the same for a seed in every layout.
static inline void init_weights(GPT* g, const ModelConfig* model, uint64_t seed) {
    ParameterLayout p = parameter_layout(model);
    HostState host = gpt_host_state(g);
    for (int i = 0; i < NUM_TENSORS; i++)
        for (int l = 0; l < tensor_copies(model, (enum TensorId)i); l++) {
            size_t at = tensor_offset(&p, (enum TensorId)i, l);
            if (p.size[i] != 0 && at >= host.begin && at < host.end)
                init_tensor(host.params + (at - host.begin), model, (enum TensorId)i, l, seed);
        }
    size_t bytes = (host.end - host.begin) * sizeof(float);
    if (host.m != NULL) memset(host.m, 0, bytes), memset(host.v, 0, bytes);
    gpt_from_host(g);
}
