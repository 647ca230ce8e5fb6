// train_gpt.cu: the trainer. GPT pre-training in bf16 on GPUs, from a run config to a checkpoint.
//
// The same algorithm as train_gpt.c, layer by layer, under the same names; what differs is where the numbers
// live. Matmuls are cuBLASLt's, every other kernel is ours (llmc/*.cuh). Read it from top to bottom:
//
//     memory      what is kept for a model and a micro-batch; what lays it out is the planner, too
//     buckets     what data-parallel ranks share out, gathered before it is used and summed after (ZeRO)
//     forward     a block is a straight list of layers
//     backward    the same list upside down
//     step        a list of forward and backward passes, norm, update: all on the device, the host waits once
//     decoding    one token at a time, with a cache of keys and values
//     the program what the run asks of it (llmc/program.h), and main
//
// Shapes: B sequences, T positions, N = B * T rows, C hidden size, V vocabulary (Vp padded), L layers, NH
// query heads, NKV key/value heads, HS head size, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF feed-forward size,
// FC = FF, or 2 FF where a gate lies beside it. A gradient's name is its tensor's with a d in front. Grad is
// the element type of parameter gradients: float, or floatX (precision.gradients).
//
// On many GPUs these are a rank's shares: heads, FF, V, L and T are divided by the layout (llmc/layout.h) before
// anything is allocated, and NS = N / tp is its share of the rows between the matmuls.
#include "llmc/adamw.cuh"            // defines: StepControl, adamw_update, update_control
#include "llmc/attention.cuh"        // defines: attention_forward, attention_backward, attention_decode
#include "llmc/activation.cuh"       // defines: activation_forward, activation_backward
#include "llmc/classifier.cuh"       // defines: classifier, classifier_parts
#include "llmc/comm.cuh"             // defines: Comm, comm_all_reduce, comm_all_gather ...
#include "llmc/context_parallel.cuh" // defines: ContextParallel, begin_gathering_keys, gathered_keys ...
#include "llmc/cuda_common.cuh"      // defines: floatX, CUDA_CHECK
#include "llmc/device.cuh"           // defines: Device, device_open
#include "llmc/embedding.cuh"        // defines: embedding_forward, embedding_backward
#include "llmc/flops.h"              // defines: update_bytes
#include "llmc/global_norm.cuh"      // defines: global_norm_squared, add_sum
#include "llmc/layer_norms.cuh"      // defines: LayerMeter, meter_begin, meter_update ...
#include "llmc/matmul.cuh"           // defines: Matmul, matmul_forward, matmul_backward ...
#include "llmc/norm.cuh"             // defines: norm_forward, residual_norm_forward, norm_backward
#include "llmc/replay.cuh"           // defines: Replay, replay_begin, replay_pass, replay_point, replay_first
#include "llmc/rope.cuh"             // defines: rope_forward, rope_backward
#include "llmc/tensor_parallel.cuh"  // defines: column_parallel_forward, row_parallel_forward ...
#include "llmc/weights_hash.cuh"     // defines: hash_add
#include "llmc/dataloader.h"         // defines: document_starts
#include "llmc/probe.cuh"            // defines: probe_rates
#include "llmc/self_test.cuh"        // defines: self_test
#include "llmc/program.h"            // defines: what the run asks of this program
#include "llmc/token_order.h"        // defines: token_order

#include <nvtx3/nvToolsExt.h>

#ifdef TESTING // tests and benchmarks include the model, not main, and take what they need
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

#ifdef PRECISION_FP32
#define PROGRAM_NAME "train_gpt_fp32"
#else
#define PROGRAM_NAME "train_gpt"
#endif

// ----------------------------------------------------------------------------
// memory

// One copy of every parameter (or of its gradient) as the code of a block sees it: the layer's own tensors
// and those outside the layers. Absent tensors are NULL. The order is tensor_table's.
template <typename X> union Parameters {
    struct {
        X *wte, *wpe;                         // (Vp, C) (maxT, C)
        X *ln1w, *ln1b, *qkvw, *qkvb;         // (C) (C) (QKV, C) (QKV)
        X *attprojw, *attprojb, *ln2w, *ln2b; // (C, Q) (C) (C) (C)
        X *fcw, *fcb, *fcprojw, *fcprojb;     // (FC, C) (FC) (C, FF) (C)
        X *lnfw, *lnfb, *lmhead;              // (C) (C) (Vp, C)
    };
    X* at[NUM_TENSORS];
};
static_assert(sizeof(Parameters<float>) == NUM_TENSORS * sizeof(float*), "Parameters lists the tensor table");

// One allocation each.
enum MemoryClass {
    MEMORY_WEIGHTS,
    MEMORY_MASTER,
    MEMORY_GRADIENTS,
    MEMORY_MOMENTS,
    MEMORY_ACTIVATIONS,
    MEMORY_SCRATCH,
    NUM_MEMORY_CLASSES
};
static const char* const memory_class_names[NUM_MEMORY_CLASSES] = {
    "weights", "master weights", "gradients", "optimizer moments", "activations", "scratch"};

// What the backward pass needs of one block's forward pass. What batch.recompute does not keep is the same
// memory in every layer, and computed once more before it is read.
typedef struct {
    floatX* ln1;                // (NS, C)     recomputed from "norm" on
    float *ln1_mean, *ln1_rstd; // (NS) (NS)
    floatX *qkv, *att;          // (N, QKV) (N, Q)  recomputed with "block"
    float* lse;                 // (B, NH, T)  "
    floatX* residual2;          // (NS, C)     "    behind attention
    floatX* ln2;                // (NS, C)     recomputed from "norm" on
    float *ln2_mean, *ln2_rstd; // (NS) (NS)
    floatX* fc;                 // (N, FC)     recomputed with "block"; before the activation
    floatX* act;                // (N, FF)     recomputed from "activation" on
    floatX* residual3;          // (NS, C)     behind the MLP
} LayerActivations;

// Four arrays of integers for a micro-batch, one behind the other, so that one copy brings all of them.
enum BatchArray { BATCH_INPUTS, BATCH_TARGETS, BATCH_DOC_START, BATCH_ORDER, NUM_BATCH_ARRAYS };

// The logits of a whole micro-batch never exist at once: the head works on this much of them at a time.
static const size_t LOGIT_BYTES = (size_t)512 << 20;

// What one micro-batch leaves in a stage between its forward and its backward pass. A pipeline has several.
typedef struct {
    LayerActivations* layers; // of the largest chunk
    floatX* lnf;              // (NS, C): what leaves the last norm
    float *lnf_mean, *lnf_rstd;
    int* batch; // (NUM_BATCH_ARRAYS, N)
} Slot;

// What enters the first layer of a chunk.
typedef struct {
    floatX* residual;           // (NS, C)
    cudaEvent_t received, read; // has come; may be overwritten
} Input;

// State on its way to the host and back goes in pieces of this size.
static const size_t STAGING_ELEMENTS = (size_t)8 << 20;

// Where a bucket's weights or gradients lie while they are whole, if ranks keep only slices of them (ZeRO 2 and 3,
// deterministic): the buckets before and behind the layers have one each, layers take two in turn.
enum { WINDOW_BEFORE, WINDOW_AFTER, WINDOW_LAYER, NUM_WINDOWS = WINDOW_LAYER + 2 };
typedef struct {
    void *weights, *grads;
    int holds;                                // the bucket whose weights are here, -1: none
    cudaEvent_t gathered, used, grads_summed; // weights: may be read; may be overwritten; gradients: the same
} Window;

// Streams of a pipeline: to and from the neighbours, for activations and for gradients.
enum Link { ACTIVATIONS_IN, ACTIVATIONS_OUT, GRADIENTS_IN, GRADIENTS_OUT, NUM_LINKS };

// A forward or backward pass of a chunk: its layers among the stage's, and what else belongs to it.
typedef struct {
    Slot* slot;
    Input* input;
    int first, end; // layers [first, end) of this stage
    bool embedding, head, last_micro_batch;
    bool weights_later; // a backward pass that leaves the gradients of the layers' matrices to another one
} Pass;

struct GPT {
    const RunConfig* run;
    Layout place;       // in the layout
    ModelConfig config; // this rank's share of the model
    ParameterLayout layout;
    BucketTable* tables; // (num_buckets)
    int B, T;            // the micro-batch that the activations have room for
    Positions positions; // of the T rows of each sequence that this rank has
    int recompute;       // a Recompute
    int zero;            // a ZeroStage; nothing is shared out by one rank
    bool grad_windows, deterministic;
    bool split_backward; // the zero-bubble schedule
    bool fused_gelu, moments_bf16, gradients_bf16, split_master;
    floatX* params;      // every bucket, or (ZeRO 3) a slice of each
    int16_t* remainder;  // the low halves of the fp32 master weights; NULL where the weights are the master
    void *grads, *m, *v; // float, or floatX by precision.gradients and precision.moments
    Window windows[NUM_WINDOWS];
    void* ordered; // deterministic: all ranks' parts of a slice
    Slot* slots;
    Input* inputs;
    int num_slots, num_inputs;
    float *all_losses, *losses; // (cp, N) (N): of the ranks that share sequences; the part of this one
    float *rope_cos, *rope_sin; // (maxT, HS / 2), NULL with learned positions
    bool document_mask;
    StepControl* control;
    // scratch: dead when a block is done with it; arrays in one row never live at the same time as those in
    // another, and share memory
    floatX* hidden;                // (NS, C) a branch's output; in the backward pass
    floatX* dnorm;                 // (NS, C) its gradient, in the same place
    floatX* residual_gradients[2]; // (NS, C) a pipeline receives one while it works on the other
    floatX* dresidual;             // (NS, C) gradient of the residual stream: one of these
    floatX* logits;                // (logit_rows, Vp)
    floatX *dact, *dfc;            // (N, FF) (N, FC)
    floatX *datt, *dqkv;           // (N, Q) (N, QKV)
    RowPart* row_parts;            // (tp, logit_rows)
    int logit_rows;
    float* column_scratch; // partial sums of bias and norm gradients
    float* staging;        // (staging_elements) state on its way to the host and back
    size_t staging_elements;
    unsigned long long* hashes; // (ranks) of what data-parallel ranks all have; NULL: nothing
    Replay replay;              // of a step that is computed twice
    LayerMeter meter;
    void *attention_scratch, *matmul_workspace;
    float* bias_scratch;
    Matmul matmul;
    void* memory[NUM_MEMORY_CLASSES]; // the allocations behind all of these
    size_t memory_bytes[NUM_MEMORY_CLASSES];
    // other ranks
    Comm comm;
    TensorParallel tp;
    ContextParallel cp;
    PipelineList list;
    int list_micro_batches, passes; // what the list is for; backward passes so far
    cudaStream_t links[NUM_LINKS], comm_stream;
    cudaEvent_t hand_over, *weights_ready; // (num_buckets)
    cudaEvent_t gradient_received[2], gradient_free[2];
    // the host's side of a step
    Device device;
    cudaStream_t stream, copy_stream;
    cudaEvent_t step_done, snapshot_done;
    cudaEvent_t step_begun, own_work_done; // until others are waited for
    cudaEvent_t update_begun, update_ended;
    int *step_batch[2], *eval_batch; // pinned: the micro-batches of this step and of the next; one more
    int *order_counts, *starts;      // scratch of token_order and of document_starts
    int step_slot, step_micro_batches;
    float* host_losses;        // (cp, N) pinned
    float* row_losses;         // (B, cp T): the same, as rows
    StepControl* host_control; // pinned: what the last step reported
    uint64_t* host_words;      // (2, ranks) the same: hashes, and what replay found
    bool hashed, replayed;     // which of them the step made
    float grad_scale;          // 1 / targets of a step
    bool use_graph, plans_made;
    cudaGraphExec_t micro_step_graph;
    HostState host; // pinned: the tensors that this rank reads and writes
};

// Generates one token at a time from a model, whose activations it does not touch.
struct Decoder {
    GPT* gpt;
    int capacity, length;
    floatX *keys, *values;                        // (L, capacity, NKV * HS)
    floatX *residual, *norm, *qkv, *att, *hidden; // (C) (C) (QKV) (Q) (C)
    floatX *fc, *act, *scores;                    // (FC) (FF) (Vp)
    float *mean, *rstd;                           // (1) (1)
    int* token;
    char* memory;
    floatX* host_scores; // (Vp)
    float* logits;       // (Vp) in fp32
};

// Hands out consecutive pieces of one allocation. Without memory behind it, it only adds up: the function
// that lays memory out is the function that plans it.
typedef struct {
    char* memory;
    size_t used; // bytes
} Arena;

template <typename X> static void arena_take(X** piece, Arena* arena, size_t n) {
    *piece = arena->memory != NULL ? (X*)(void*)(arena->memory + arena->used) : NULL;
    arena->used += ceil_div(n * sizeof(X), 256) * 256;
}

static size_t rows_of(const GPT* g) { return (size_t)g->B * (size_t)g->T; }
static size_t shard_rows(const GPT* g) { return rows_of(g) / (size_t)g->place.tp_size; }
static size_t kv_columns(const GPT* g) { // of qkv: keys and values
    return model_dim(&g->config, DIM_QKV) - model_dim(&g->config, DIM_HEADS);
}
static int num_buckets(const GPT* g) { return g->config.num_hidden_layers + 2; }
static Bucket bucket_at(const GPT* g, int b) {
    return parameter_bucket(&g->layout, g->config.num_hidden_layers, b);
}

// What attention is called with for B sequences.
static AttentionShape attention_shape(const GPT* g, int B) {
    int NH = g->config.num_attention_heads, NKV = g->config.num_key_value_heads;
    AttentionShape shape = {B, g->T, g->T * g->place.cp_size, NH, NKV, g->config.head_dim, g->positions};
    return shape;
}

// A layer's own memory for what batch.recompute keeps; for the rest, that of the first layer of all.
static void lay_out_layer(GPT* g, Slot* slot, int l, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = rows_of(g), NS = shard_rows(g), C = model_dim(c, DIM_HIDDEN);
    LayerActivations *a = &slot->layers[l], *shared = &g->slots[0].layers[0];
    int level = training ? g->recompute : RECOMPUTE_BLOCK;
    bool keep_block = a == shared || level < RECOMPUTE_BLOCK,
         keep_norm = a == shared || level < RECOMPUTE_NORM;
    bool keep_act = a == shared || level < RECOMPUTE_ACTIVATION;
    *a = *shared;
    if (keep_norm) arena_take(&a->ln1, arena, NS * C);
    if (level < RECOMPUTE_NORM)
        arena_take(&a->ln2, arena, NS * C);
    else
        a->ln2 = a->ln1; // computed once more just before it is read, so one place does for both
    if (keep_act) arena_take(&a->act, arena, N * model_dim(c, DIM_FF));
    if (keep_block) {
        arena_take(&a->ln1_mean, arena, NS), arena_take(&a->ln1_rstd, arena, NS);
        arena_take(&a->ln2_mean, arena, NS), arena_take(&a->ln2_rstd, arena, NS);
        arena_take(&a->qkv, arena, N * model_dim(c, DIM_QKV));
        arena_take(&a->att, arena, N * model_dim(c, DIM_HEADS));
        arena_take(&a->lse, arena, N * (size_t)c->num_attention_heads);
        arena_take(&a->residual2, arena, NS * C);
        arena_take(&a->fc, arena, N * model_dim(c, DIM_FC));
    }
    // the residual stream between blocks is what recomputing starts from; without a backward pass two places
    // take turns
    if (training || l < 2)
        arena_take(&a->residual3, arena, NS * C);
    else
        a->residual3 = slot->layers[l - 2].residual3;
}

// Layers of the stage's largest chunk.
static int chunk_size(const GPT* g) {
    int largest = 0, first, end, global;
    for (int c = 0; c < g->place.num_chunks; c++) {
        chunk_layers(&g->place, &g->run->model, c, &first, &end, &global);
        largest = end - first > largest ? end - first : largest;
    }
    return largest;
}

static void lay_out_activations(GPT* g, Arena* arena, bool training) {
    size_t NS = shard_rows(g), C = model_dim(&g->config, DIM_HIDDEN);
    for (int i = 0; i < g->num_inputs; i++) arena_take(&g->inputs[i].residual, arena, NS * C);
    for (int i = 0; i < g->num_slots; i++) {
        Slot* slot = &g->slots[i];
        arena_take(&slot->batch, arena, NUM_BATCH_ARRAYS * rows_of(g));
        for (int l = 0; l < chunk_size(g); l++) lay_out_layer(g, slot, l, arena, training);
        if (!has_head(&g->place)) continue;
        arena_take(&slot->lnf, arena, NS * C);
        arena_take(&slot->lnf_mean, arena, NS), arena_take(&slot->lnf_rstd, arena, NS);
    }
    arena_take(&g->all_losses, arena, (size_t)g->place.cp_size * rows_of(g));
    g->losses = g->all_losses + (size_t)g->place.cp * rows_of(g);
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// Elements of a window: of its bucket, whole.
static size_t window_size(const GPT* g, int w) {
    int b = w == WINDOW_BEFORE ? 0 : w == WINDOW_AFTER ? num_buckets(g) - 1 : 1;
    return bucket_at(g, b).size;
}

// What lives only inside the head, the MLP's backward pass or attention's: one place for whichever it is.
static void lay_out_shared_scratch(GPT* g, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = rows_of(g), Vp = model_dim(c, DIM_VOCAB), begin = arena->used, end = begin;
    if (has_head(&g->place)) {
        size_t rows = LOGIT_BYTES / (Vp * sizeof(floatX)), chunks = ceil_div(N, rows);
        rows = ceil_div(N, chunks);                     // equal chunks
        g->logit_rows = (int)ceil_div(rows, 128) * 128; // whole tiles of the matmul
        arena_take(&g->logits, arena, (size_t)g->logit_rows * Vp);
        size_t parts = g->place.tp_size > 1 ? (size_t)(g->place.tp_size * g->logit_rows) : 0;
        arena_take(&g->row_parts, arena, parts);
        end = arena->used, arena->used = begin;
    }
    char* attention;
    arena_take(&attention, arena, attention_scratch_bytes(attention_shape(g, g->B)));
    g->attention_scratch = attention;
    if (training) {
        arena_take(&g->datt, arena, N * model_dim(c, DIM_HEADS));
        if (!g->split_backward) arena_take(&g->dqkv, arena, N * model_dim(c, DIM_QKV));
        end = larger(end, arena->used), arena->used = begin;
        if (!g->fused_gelu) arena_take(&g->dact, arena, N * model_dim(c, DIM_FF));
        if (!g->split_backward) arena_take(&g->dfc, arena, N * model_dim(c, DIM_FC));
    }
    arena->used = larger(end, arena->used);
}

static void lay_out_scratch(GPT* g, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = rows_of(g), NS = shard_rows(g), C = model_dim(c, DIM_HIDDEN);
    size_t widest = larger(larger(model_dim(c, DIM_QKV), model_dim(c, DIM_FC)), C);
    char* workspace;
    arena_take(&g->control, arena, 1);
    bool replicas = g->place.dp_size > 1 && g->zero != ZERO_PARAMETERS;
    if (training && replicas && g->run->guard.check_every > 0)
        arena_take(&g->hashes, arena, (size_t)g->place.size);
    if (training && g->run->guard.replay_every > 0)
        arena_take(&g->replay.words, arena, g->replay.num_words + (size_t)g->place.size);
    if (training && g->run->log.layers_every > 0) arena_take(&g->meter.sums, arena, g->meter.entries);
    arena_take(&workspace, arena, matmul_workspace_bytes());
    g->matmul_workspace = workspace;
    if (c->family->position == POSITION_ROPE) {
        size_t angles = (size_t)c->max_position_embeddings * (size_t)c->head_dim / 2;
        arena_take(&g->rope_cos, arena, angles), arena_take(&g->rope_sin, arena, angles);
    }
    ParameterLayout all =
        parameter_layout(&g->run->model); // a rank may write a tensor that it has no part of
    g->staging_elements = 0;
    for (int i = 0; i < NUM_TENSORS; i++) g->staging_elements = larger(g->staging_elements, all.size[i]);
    if (g->staging_elements > STAGING_ELEMENTS) g->staging_elements = STAGING_ELEMENTS;
    if (g->staging_elements < SLICE_ALIGN) g->staging_elements = SLICE_ALIGN;
    arena_take(&g->staging, arena, g->staging_elements);
    arena_take(&g->hidden, arena, NS * C);
    g->dnorm = g->hidden;
    for (int i = 0; i < 2; i++) {
        if (g->place.tp_size > 1) arena_take(&g->tp.buffer[i], arena, N * C);
        if (training && (i == 0 || g->place.pp_size > 1))
            arena_take(&g->residual_gradients[i], arena, NS * C);
    }
    size_t keys = (size_t)g->place.cp_size * N * kv_columns(g);
    if (g->place.cp_size > 1) arena_take(&g->cp.parts, arena, keys), arena_take(&g->cp.keys, arena, keys);
    if (g->place.cp_size > 1 && training) arena_take(&g->cp.dkeys, arena, keys);
    if (training) {
        arena_take(&g->bias_scratch, arena, matmul_bias_scratch((int)widest));
        arena_take(&g->column_scratch, arena,
                   larger(norm_backward_scratch((int)C), column_sums_scratch((int)widest)));
    }
    if (g->split_backward) // these change places with activations: see keep_for_weights
        arena_take(&g->dqkv, arena, N * model_dim(c, DIM_QKV)),
            arena_take(&g->dfc, arena, N * model_dim(c, DIM_FC));
    lay_out_shared_scratch(g, arena, training);
}

static size_t moment_bytes(const GPT* g) { return g->moments_bf16 ? sizeof(__nv_bfloat16) : sizeof(float); }
static size_t gradient_bytes(const GPT* g) {
    return g->gradients_bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
}

static void lay_out_weights(GPT* g, Arena* arena) {
    bool sliced = g->zero == ZERO_PARAMETERS;
    arena_take(&g->params, arena, g->layout.num_parameters / (size_t)(sliced ? g->place.dp_size : 1));
    for (int w = 0; sliced && w < NUM_WINDOWS; w++) {
        floatX* weights;
        arena_take(&weights, arena, window_size(g, w));
        g->windows[w].weights = weights;
    }
}

static void lay_out_gradients(GPT* g, Arena* arena) {
    char *grads, *window;
    size_t slices = (size_t)(g->grad_windows ? g->place.dp_size : 1), largest = 0;
    arena_take(&grads, arena, g->layout.num_parameters / slices * gradient_bytes(g));
    g->grads = grads;
    for (int w = 0; g->grad_windows && w < NUM_WINDOWS; w++) {
        arena_take(&window, arena, window_size(g, w) * gradient_bytes(g));
        g->windows[w].grads = window;
        largest = larger(largest, window_size(g, w));
    }
    if (!g->deterministic || g->place.dp_size == 1) return;
    arena_take(&window, arena, largest * gradient_bytes(g));
    g->ordered = window;
}

// Places every array of one class of memory; `training` adds what only the backward pass and the update need.
static void lay_out(GPT* g, int memory_class, Arena* arena, bool training) {
    size_t state = g->layout.num_parameters / (size_t)(g->zero >= ZERO_OPTIMIZER ? g->place.dp_size : 1);
    char *m = NULL, *v = NULL;
    switch (memory_class) {
    case MEMORY_WEIGHTS:
        lay_out_weights(g, arena);
        break;
    case MEMORY_MASTER:
        if (training && g->split_master) arena_take(&g->remainder, arena, state);
        break;
    case MEMORY_GRADIENTS:
        if (training) lay_out_gradients(g, arena);
        break;
    case MEMORY_MOMENTS:
        if (training)
            arena_take(&m, arena, state * moment_bytes(g)), arena_take(&v, arena, state * moment_bytes(g));
        g->m = m, g->v = v;
        break;
    case MEMORY_ACTIVATIONS:
        lay_out_activations(g, arena, training);
        break;
    case MEMORY_SCRATCH:
        lay_out_scratch(g, arena, training);
        break;
    }
}

// The passes of a step.
static PipelineList pass_list(const GPT* g, int micro_batches) {
    const Layout* l = &g->place;
    return pipeline_list(g->run->parallel.pipeline_schedule, l->pp_size, l->pp, l->num_chunks, micro_batches);
}

// What of a run config decides how the model computes and what it keeps. The config must stay.
static void gpt_configure(GPT* g, const RunConfig* run, int B, int T, bool training) {
    memset(g, 0, sizeof *g);
    g->run = run, g->place = run->layout;
    g->config = model_part(&run->model, &g->place);
    g->layout = layout_parameters(&g->config, &g->place);
    g->B = B, g->T = T / g->place.cp_size;
    g->positions = positions_of(T, g->place.cp, g->place.cp_size);
    g->recompute = run->batch.recompute;
    g->zero = g->place.dp_size == 1 ? (int)ZERO_OPTIMIZER : run->parallel.zero_stage;
    g->deterministic = run->parallel.deterministic;
    g->grad_windows = g->zero >= ZERO_GRADIENTS || g->deterministic;
    g->fused_gelu = run->precision.fused_gelu && run->model.family->activation == ACTIVATION_GELU_TANH;
    g->use_graph = run->parallel.cuda_graph;
    g->meter.entries = (size_t)run->model.num_hidden_layers + 2;
    bool weights_are_master = sizeof(floatX) == sizeof(float) || run->precision.master_weights == STORE_BF16;
    g->split_master = !weights_are_master;
    g->gradients_bf16 = run->precision.gradients == STORE_BF16;
    g->moments_bf16 = run->precision.moments == STORE_BF16;
    g->num_slots = g->num_inputs = 1;
    if (training) {
        int micro_batches =
            run->batch.global_batch_size / run->batch.micro_batch_size / num_replicas(&g->place);
        g->list_micro_batches = micro_batches > 0 ? micro_batches : 1;
        g->list = pass_list(g, g->list_micro_batches);
        g->num_slots = g->list.num_slots, g->num_inputs = g->list.num_inputs;
        g->split_backward = run->parallel.pipeline_schedule == PIPELINE_ZERO_BUBBLE;
        replay_configure(&g->replay, &g->place, g->list_micro_batches, run->model.num_hidden_layers);
    }
    g->slots = (Slot*)calloc_check((size_t)g->num_slots, sizeof *g->slots);
    g->inputs = (Input*)calloc_check((size_t)g->num_inputs, sizeof *g->inputs);
    for (int i = 0; i < g->num_slots; i++)
        g->slots[i].layers = (LayerActivations*)calloc_check((size_t)chunk_size(g), sizeof(LayerActivations));
}

// What gpt_configure took.
static void gpt_release(GPT* g) {
    for (int i = 0; i < g->num_slots; i++) free(g->slots[i].layers);
    free(g->slots), free(g->inputs), free(g->list.ops), free(g->tables), free(g->weights_ready);
}

// The exact size of each class in bytes, without allocating any of it.
static void gpt_plan(const RunConfig* run, int B, int T, bool training, size_t bytes[NUM_MEMORY_CLASSES]) {
    GPT* g = (GPT*)calloc_check(1, sizeof *g);
    gpt_configure(g, run, B, T, training);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {NULL, 0};
        lay_out(g, i, &arena, training);
        bytes[i] = arena.used;
    }
    gpt_release(g);
    free(g);
}

// ----------------------------------------------------------------------------
// buckets: weights are whole where they are used, state and (ZeRO) more of it in slices. Their collectives run in
// a stream of their own: gathers ahead of the pass, sums behind it. With one data-parallel rank all of this is
// pointer arithmetic.

static Window* window_of(GPT* g, int b) {
    int last = num_buckets(g) - 1;
    return &g->windows[b == 0 ? WINDOW_BEFORE : b == last ? WINDOW_AFTER : WINDOW_LAYER + b % 2];
}

// What a rank keeps of a bucket's optimizer state: elements [first, first + size) of the bucket, at `at` in m and v.
typedef struct {
    size_t at, first, size;
} Slice;

static Slice state_slice(const GPT* g, int b) {
    Bucket bucket = bucket_at(g, b);
    size_t dp = (size_t)g->place.dp_size, share = bucket.size / dp;
    Slice whole = {bucket.begin, 0, bucket.size},
          slice = {bucket.begin / dp, (size_t)g->place.dp * share, share};
    return g->zero >= ZERO_OPTIMIZER ? slice : whole;
}

static floatX* bucket_weights(GPT* g, int b) {
    return g->zero == ZERO_PARAMETERS ? (floatX*)window_of(g, b)->weights : g->params + bucket_at(g, b).begin;
}
template <typename Grad> static Grad* bucket_gradients(GPT* g, int b) {
    return g->grad_windows ? (Grad*)window_of(g, b)->grads : (Grad*)g->grads + bucket_at(g, b).begin;
}
// The weights and the summed gradients that belong to a rank's slice of the state.
static floatX* slice_weights(GPT* g, int b) {
    Slice s = state_slice(g, b);
    return g->zero == ZERO_PARAMETERS ? g->params + s.at : bucket_weights(g, b) + s.first;
}
template <typename Grad> static Grad* slice_gradients(GPT* g, int b) {
    Slice s = state_slice(g, b);
    return g->grad_windows ? (Grad*)g->grads + s.at : bucket_gradients<Grad>(g, b) + s.first;
}

// Every parameter (or its gradient) as layer l of this stage sees it. What every tensor-parallel rank has and only
// the first may add is absent on the others.
template <typename X, typename F> static Parameters<X> parameters_in(const GPT* g, int l, F bucket_memory) {
    Parameters<X> p;
    int L = g->config.num_hidden_layers;
    for (int i = 0; i < NUM_TENSORS; i++) {
        enum TensorId id = (enum TensorId)i;
        int b = tensor_bucket(id, l, L);
        bool absent = g->layout.size[i] == 0 || (tensor_table[i].split == SPLIT_FIRST && g->place.tp != 0);
        p.at[i] =
            absent ? NULL : bucket_memory(b) + (tensor_offset(&g->layout, id, l) - bucket_at(g, b).begin);
    }
    return p;
}
static Parameters<floatX> weights_of(GPT* g, int l) {
    return parameters_in<floatX>(g, l, [=](int b) { return bucket_weights(g, b); });
}
template <typename Grad> static Parameters<Grad> gradients_of(GPT* g, int l) {
    return parameters_in<Grad>(g, l, [=](int b) { return bucket_gradients<Grad>(g, b); });
}

static void hand_over(GPT* g, cudaStream_t from, cudaStream_t to) {
    CUDA_CHECK(cudaEventRecord(g->hand_over, from));
    comm_wait(&g->comm, to, g->hand_over);
}

// ZeRO 3: begins to gather a bucket's weights, unless they are there.
static void fetch_weights(GPT* g, int b) {
    Window* w = window_of(g, b);
    Slice s = state_slice(g, b);
    if (g->zero != ZERO_PARAMETERS || b < 0 || b >= num_buckets(g) || w->holds == b) return;
    CUDA_CHECK(cudaStreamWaitEvent(g->comm_stream, w->used, 0));
    comm_all_gather(&g->comm, AXIS_DP, (floatX*)w->weights, g->params + s.at, s.size, g->comm_stream);
    CUDA_CHECK(cudaEventRecord(w->gathered, g->comm_stream));
    w->holds = b;
}

// From here on the bucket's weights may be read; `next` is the one that will be wanted then.
static void use_weights(GPT* g, int b, int next) {
    if (g->place.dp_size == 1) return;
    fetch_weights(g, b);
    comm_wait(&g->comm, g->stream,
              g->zero == ZERO_PARAMETERS ? window_of(g, b)->gathered : g->weights_ready[b]);
    if (next != b && next > 0 && next < num_buckets(g) - 1) fetch_weights(g, next);
}
static void done_with_weights(GPT* g, int b) {
    if (g->zero == ZERO_PARAMETERS) CUDA_CHECK(cudaEventRecord(window_of(g, b)->used, g->stream));
}

// After the update of slices: whole again on all ranks.
static void gather_weights(GPT* g, int b) {
    Slice s = state_slice(g, b);
    if (g->place.dp_size == 1 || g->zero == ZERO_NONE) return;
    if (g->zero == ZERO_PARAMETERS) {
        window_of(g, b)->holds = -1;
        done_with_weights(g, b);
        return;
    }
    hand_over(g, g->stream, g->comm_stream);
    comm_all_gather(&g->comm, AXIS_DP, bucket_weights(g, b), slice_weights(g, b), s.size, g->comm_stream);
    CUDA_CHECK(cudaEventRecord(g->weights_ready[b], g->comm_stream));
}

// Before a pass adds to a bucket's gradients: a window begins at zero.
static void begin_gradients(GPT* g, int b) {
    Window* w = window_of(g, b);
    if (!g->grad_windows) return;
    comm_wait(&g->comm, g->stream, w->grads_summed);
    CUDA_CHECK(cudaMemsetAsync(w->grads, 0, bucket_at(g, b).size * gradient_bytes(g), g->stream));
}

// Of what tensor-parallel ranks all have, each has the gradient of its rows, or of its heads: their sum.
template <typename Grad> static void sum_replicas(GPT* g, int b) {
    int L = g->config.num_hidden_layers, layer = b > 0 && b <= L ? b - 1 : 0;
    bool kv = kv_replicas(&g->run->model, &g->place) > 1;
    Grad* grads = bucket_gradients<Grad>(g, b);
    if (g->place.tp_size == 1) return;
    comm_begin(&g->comm);
    for (int i = 0; i < NUM_TENSORS; i++) {
        enum TensorId id = (enum TensorId)i;
        int split = tensor_table[i].split;
        if (g->layout.size[i] == 0 || tensor_bucket(id, layer, L) != b) continue;
        Grad* tensor = grads + (tensor_offset(&g->layout, id, layer) - bucket_at(g, b).begin);
        if (split == SPLIT_NONE || split == SPLIT_FIRST)
            comm_all_reduce(&g->comm, AXIS_TP, tensor, g->layout.size[i], g->stream);
        if (!kv || tensor_table[i].rows != DIM_QKV) continue;
        size_t q = model_dim(&g->config, DIM_HEADS) * g->layout.cols[i];
        comm_all_reduce(&g->comm, AXIS_KV, tensor + q, g->layout.size[i] - q, g->stream);
    }
    comm_end(&g->comm);
}

template <typename Grad> static __global__ void add_kernel(Grad* sum, const Grad* x, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * Vec<Grad>::SIZE;
    if (i >= n) return;
    Vec<Grad> a = load_vec(sum + i), b = load_vec(x + i);
    for (int k = 0; k < Vec<Grad>::SIZE; k++)
        a.at[k] = from_float<Grad>(to_float(a.at[k]) + to_float(b.at[k]));
    store_vec(sum + i, a);
}
template <typename Grad> static void add(Grad* sum, const Grad* x, size_t n, cudaStream_t stream) {
    if (n == 0) return;
    add_kernel<<<(unsigned)ceil_div(n, 256 * Vec<Grad>::SIZE), 256, 0, stream>>>(sum, x, n);
    LAUNCH_CHECK();
}

// Adds the slices of all ranks' windows in the order of ranks, that is of micro-batches: the same sums for any
// number of replicas.
template <typename Grad> static void sum_in_order(GPT* g, int b) {
    Slice s = state_slice(g, b);
    Grad *window = (Grad*)window_of(g, b)->grads, *parts = (Grad*)g->ordered,
         *sum = slice_gradients<Grad>(g, b);
    int ranks = g->place.dp_size;
    if (ranks == 1) {
        add(sum, window, s.size, g->comm_stream);
        return;
    }
    comm_begin(&g->comm);
    for (int r = 0; r < ranks; r++) {
        comm_send(&g->comm, AXIS_DP, window + (size_t)r * s.size, s.size, r, g->comm_stream);
        comm_receive(&g->comm, AXIS_DP, parts + (size_t)r * s.size, s.size, r, g->comm_stream);
    }
    comm_end(&g->comm);
    for (int r = 0; r < ranks; r++) add(sum, parts + (size_t)r * s.size, s.size, g->comm_stream);
}

// A bucket's gradients are complete in this pass: sums them over data-parallel ranks, beside what follows. Without
// windows they add up in place, and are summed behind the last micro-batch.
template <typename Grad> static void reduce_gradients(GPT* g, int b, bool last_micro_batch) {
    Bucket bucket = bucket_at(g, b);
    Grad *grads = bucket_gradients<Grad>(g, b), *mine = slice_gradients<Grad>(g, b);
    size_t share = bucket.size / (size_t)g->place.dp_size;
    if (!g->grad_windows && !last_micro_batch) return;
    flight()->layer = b - 1;
    replay_point(g->comm.replay, grads, bucket.size * sizeof(Grad), g->stream);
    sum_replicas<Grad>(g, b);
    if (g->place.dp_size == 1 && !g->grad_windows) return;
    hand_over(g, g->stream, g->comm_stream);
    if (g->deterministic) {
        sum_in_order<Grad>(g, b);
    } else if (g->zero == ZERO_NONE) {
        comm_all_reduce(&g->comm, AXIS_DP, grads, bucket.size, g->comm_stream);
    } else {
        Grad* part = grads + (size_t)g->place.dp * share;
        comm_reduce_scatter(&g->comm, AXIS_DP, part, grads, share, g->comm_stream);
        if (g->grad_windows) add(mine, part, share, g->comm_stream);
    }
    if (g->grad_windows) CUDA_CHECK(cudaEventRecord(window_of(g, b)->grads_summed, g->comm_stream));
}

// ----------------------------------------------------------------------------
// forward

// The head's weight: a matrix of its own, or the embedding once more.
template <typename X> static X* head_of(Parameters<X> p) { return p.lmhead != NULL ? p.lmhead : p.wte; }
// The bucket that it is in.
static int head_bucket(const GPT* g) { return g->config.tie_word_embeddings ? 0 : num_buckets(g) - 1; }

static int* batch_array(const GPT* g, const Slot* slot, enum BatchArray which) {
    return slot->batch + (size_t)which * rows_of(g);
}
static const int* doc_starts(const GPT* g, const Slot* slot) {
    return g->document_mask ? batch_array(g, slot, BATCH_DOC_START) : NULL;
}

static LayerActivations* activations_of(const Pass* pass, int l) {
    return &pass->slot->layers[l - pass->first];
}

// The residual stream that enters layer l (l = end: that leaves the last one).
static floatX* residual_into(const Pass* pass, int l) {
    return l == pass->first ? pass->input->residual : activations_of(pass, l - 1)->residual3;
}

// The norm that reads the residual stream before layer l: the layer's first; the last of all behind the last layer of
// all; none (out is NULL) behind that of a stage that hands it on.
typedef struct {
    floatX* out;
    float *mean, *rstd;
    const floatX *weight, *bias;
} Norm;

static Norm norm_before(GPT* g, const Pass* pass, int l) {
    bool last = l == pass->end;
    Slot* slot = pass->slot;
    Parameters<floatX> p = weights_of(g, last ? 0 : l);
    LayerActivations* a = last ? NULL : activations_of(pass, l);
    Norm none = {NULL, NULL, NULL, NULL, NULL};
    Norm final_norm = {slot->lnf, slot->lnf_mean, slot->lnf_rstd, p.lnfw, p.lnfb};
    if (last) return pass->head ? final_norm : none;
    Norm norm = {a->ln1, a->ln1_mean, a->ln1_rstd, p.ln1w, p.ln1b};
    return norm;
}

// What the layer of bucket b hands on.
static void measure(GPT* g, int b, const floatX* x, int rows) {
    size_t n = (size_t)rows * model_dim(&g->config, DIM_HIDDEN);
    meter_activations(metered(&g->meter, &g->tables[b]), x, n, g->stream);
}

static void mlp_forward(GPT* g, LayerActivations* a, Parameters<floatX> p, int N) {
    int C = g->config.hidden_size, FF = g->config.intermediate_size;
    int FC = (int)model_dim(&g->config, DIM_FC);
    if (g->fused_gelu) {
        column_parallel_gelu_forward(a->act, a->fc, a->ln2, p.fcw, p.fcb, N, C, FC, &g->matmul, &g->tp);
    } else {
        column_parallel_forward(a->fc, a->ln2, p.fcw, p.fcb, N, C, FC, &g->matmul, &g->tp);
        activation_forward(a->act, a->fc, N, FF, g->config.family->activation, g->stream);
    }
}

// From ln1 to the activation: as much of a block as its backward pass reads, and recomputes.
static void block_forward_inside(GPT* g, const Pass* pass, int l, int B) {
    const ModelConfig* c = &g->config;
    int T = g->T, N = B * T, C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads;
    int HS = c->head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, NS = N / g->place.tp_size;
    Parameters<floatX> p = weights_of(g, l);
    LayerActivations* a = activations_of(pass, l);
    const int* starts = doc_starts(g, pass->slot);
    Matmul* mm = &g->matmul;
    TensorParallel* tp = &g->tp;
    cudaStream_t stream = g->stream;

    column_parallel_forward(a->qkv, a->ln1, p.qkvw, p.qkvb, N, C, QKV, mm, tp);
    if (g->rope_cos != NULL)
        rope_forward(a->qkv, g->rope_cos, g->rope_sin, g->positions, B, T, NH, NKV, HS, stream);
    begin_gathering_keys(&g->cp, a->qkv, B, T, QKV, QKV - Q, false);
    attention_forward(a->att, a->lse, a->qkv, gathered_keys(&g->cp), starts, attention_shape(g, B), stream);
    row_parallel_forward(g->hidden, a->att, p.attprojw, p.attprojb, N, Q, C, mm, tp);
    residual_norm_forward(a->residual2, a->ln2, a->ln2_mean, a->ln2_rstd, residual_into(pass, l), g->hidden,
                          p.ln2w, p.ln2b, NS, C, (float)c->norm_eps, c->family->norm, stream);
    mlp_forward(g, a, p, N);
}

// ln1 was taken of the residual stream when it was written: by the block before, or behind the embedding.
static void block_forward(GPT* g, const Pass* pass, int l, int B) {
    const ModelConfig* c = &g->config;
    int N = B * g->T, NS = N / g->place.tp_size, C = c->hidden_size, FF = c->intermediate_size;

    nvtxRangePushA("block_forward");
    flight()->layer = l;
    use_weights(g, 1 + l, 2 + l);
    block_forward_inside(g, pass, l, B);
    LayerActivations* a = activations_of(pass, l);
    Parameters<floatX> p = weights_of(g, l);
    row_parallel_forward(g->hidden, a->act, p.fcprojw, p.fcprojb, N, FF, C, &g->matmul, &g->tp);
    done_with_weights(g, 1 + l);
    if (l + 1 < pass->end || pass->head) use_weights(g, 2 + l, 2 + l);
    Norm next = norm_before(g, pass, l + 1);
    if (next.out != NULL)
        residual_norm_forward(a->residual3, next.out, next.mean, next.rstd, a->residual2, g->hidden,
                              next.weight, next.bias, NS, C, (float)c->norm_eps, c->family->norm, g->stream);
    else
        residual_forward(a->residual3, a->residual2, g->hidden, (size_t)NS * (size_t)C, g->stream);
    measure(g, 1 + l, a->residual3, NS);
    nvtxRangePop();
}

// The first chunk: the batch's tokens; the others: what the chunk before sent. The last chunk leaves
// lnf (NS, C), which the head reads; the others the residual stream.
static void chunk_forward(GPT* g, const Pass* pass, int B) {
    const ModelConfig* c = &g->config;
    int T = g->T, N = B * T, NS = N / g->place.tp_size, C = c->hidden_size;
    Slot* slot = pass->slot;
    CHECK(B <= g->B);
    if (pass->embedding) {
        use_weights(g, 0, 1 + pass->first);
        Parameters<floatX> p = weights_of(g, pass->first);
        tp_scatter(&g->tp, pass->input->residual, g->tp.buffer[1], N, C, [&](int row, int, floatX* out) {
            if (row > 0) return; // all of it at once
            embedding_forward(out, batch_array(g, slot, BATCH_INPUTS), p.wte, p.wpe, g->positions, B, T, C,
                              g->stream);
        });
        measure(g, 0, pass->input->residual, NS);
    }
    use_weights(g, 1 + pass->first, 2 + pass->first);
    Norm first = norm_before(g, pass, pass->first);
    norm_forward(first.out, first.mean, first.rstd, pass->input->residual, first.weight, first.bias, NS, C,
                 (float)c->norm_eps, c->family->norm, g->stream);
    for (int l = pass->first; l < pass->end; l++) block_forward(g, pass, l, B);
    if (pass->head) measure(g, num_buckets(g) - 1, slot->lnf, NS);
}

// Cross-entropy of every row into g->losses (a negative target is masked: loss 0). With dhead also the
// head's backward pass, since the logits of a chunk of rows exist only here: dhead +=, and
// g->dnorm (NS, C) = g->grad_scale * d(sum of losses) / d lnf.
template <typename Grad> static void gpt_loss(GPT* g, const Slot* slot, Grad* dhead, int B) {
    int N = B * g->T, C = g->config.hidden_size, Vp = (int)model_dim(&g->config, DIM_VOCAB);
    int V = vocab_used(&g->run->model, &g->place), ranks = g->place.tp_size, first_token = g->place.tp * Vp;
    const int* targets = batch_array(g, slot, BATCH_TARGETS);
    nvtxRangePushA("head");
    use_weights(g, head_bucket(g), head_bucket(g));
    floatX* head = head_of(weights_of(g, 0));
    floatX* dall = ranks > 1 ? g->tp.buffer[1] : g->dnorm;
    const floatX* all = tp_gather(&g->tp, g->tp.buffer[0], slot->lnf, N, C, [](int, int, const floatX*) {});
    for (int row = 0; row < N; row += g->logit_rows) {
        int rows = N - row < g->logit_rows ? N - row : g->logit_rows;
        const floatX* lnf = all + (size_t)row * (size_t)C;
        RowPart* parts = ranks > 1 ? g->row_parts : NULL;
        matmul_forward(g->logits, lnf, head, NULL, rows, C, Vp, &g->matmul);
        if (ranks > 1) {
            RowPart* mine = parts + g->place.tp * rows;
            size_t floats = (size_t)rows * sizeof *mine / sizeof(float);
            classifier_parts(mine, g->logits, targets + row, first_token, rows, V, Vp, g->stream);
            comm_all_gather(&g->comm, AXIS_TP, (float*)parts, (const float*)mine, floats, g->stream);
        }
        classifier(g->losses + row, g->logits, targets + row, parts, ranks, first_token, g->grad_scale, rows,
                   V, Vp, dhead != NULL, g->stream);
        if (dhead != NULL)
            matmul_backward(dall + (size_t)row * (size_t)C, dhead, (Grad*)NULL, g->logits, lnf, head, rows, C,
                            Vp, &g->matmul);
    }
    if (dhead != NULL) tp_scatter(&g->tp, g->dnorm, dall, N, C, [](int, int, floatX*) {});
    nvtxRangePop();
}

// ----------------------------------------------------------------------------
// backward: parameter gradients are +=, so that micro-batches accumulate; the residual stream's gradient is
// +=, since every block adds to the stream; all other activation gradients are =

template <typename Grad>
static void mlp_backward(GPT* g, LayerActivations* a, Parameters<Grad> dp, Parameters<floatX> p, int N) {
    int C = g->config.hidden_size, FF = g->config.intermediate_size;
    Matmul* mm = &g->matmul;
    if (g->fused_gelu) {
        row_parallel_gelu_backward(g->dfc, dp.fcprojw, dp.fcprojb, g->dresidual, a->act, p.fcprojw, a->fc, N,
                                   FF, C, mm, &g->tp);
    } else {
        row_parallel_backward(g->dact, dp.fcprojw, dp.fcprojb, g->dresidual, a->act, p.fcprojw, N, FF, C, mm,
                              &g->tp);
        activation_backward(g->dfc, g->dact, a->fc, N, FF, g->config.family->activation, g->stream);
    }
}

// What batch.recompute did not keep of a block, again: the same kernels on the same numbers, so the same
// bits. Norms follow one by one in block_backward, as they share their memory.
static void block_recompute(GPT* g, const Pass* pass, int l, int B) {
    const ModelConfig* c = &g->config;
    LayerActivations* a = activations_of(pass, l);
    Norm norm = norm_before(g, pass, l);
    int N = B * g->T;
    if (l == pass->end - 1 && g->num_slots == 1) return; // it was the last to write what all layers share
    if (g->recompute == RECOMPUTE_BLOCK) {
        norm_forward(norm.out, norm.mean, norm.rstd, residual_into(pass, l), norm.weight, norm.bias,
                     N / g->place.tp_size, c->hidden_size, (float)c->norm_eps, c->family->norm, g->stream);
        block_forward_inside(g, pass, l, B);
    } else if (g->recompute >= RECOMPUTE_ACTIVATION) {
        activation_forward(a->act, a->fc, N, c->intermediate_size, c->family->activation, g->stream);
    }
}

// Of a pass that puts weight gradients off: what one needs besides the activations, in the place of activations that
// nobody will read. The residual stream's gradient, which the next norm changes, is copied; `gradient` changes places.
static void keep_for_weights(GPT* g, const Pass* pass, floatX* residual, floatX** activations,
                             floatX** gradient) {
    size_t bytes = shard_rows(g) * model_dim(&g->config, DIM_HIDDEN) * sizeof(floatX);
    floatX* kept = *gradient;
    if (!pass->weights_later) return;
    CUDA_CHECK(cudaMemcpyAsync(residual, g->dresidual, bytes, cudaMemcpyDeviceToDevice, g->stream));
    *gradient = *activations, *activations = kept;
}

template <typename Grad> static void block_backward(GPT* g, const Pass* pass, int l, int B) {
    const ModelConfig* c = &g->config;
    int T = g->T, N = B * T, C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads;
    int HS = c->head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, norm = c->family->norm;
    int FC = (int)model_dim(c, DIM_FC), NS = N / g->place.tp_size;
    float eps = (float)c->norm_eps;
    LayerActivations* a = activations_of(pass, l);
    floatX* residual = residual_into(pass, l);
    const int* starts = doc_starts(g, pass->slot);
    Matmul* mm = &g->matmul;
    TensorParallel* tp = &g->tp;
    cudaStream_t stream = g->stream;
    bool norms_again = g->recompute >= RECOMPUTE_NORM;

    nvtxRangePushA("block_backward");
    flight()->layer = l;
    use_weights(g, 1 + l, l);
    begin_gradients(g, 1 + l);
    Parameters<floatX> p = weights_of(g, l);
    Parameters<Grad> dp = gradients_of<Grad>(g, l), none = {}, dw = pass->weights_later ? none : dp;
    block_recompute(g, pass, l, B);
    begin_gathering_keys(&g->cp, a->qkv, B, T, QKV, QKV - Q, true);
    mlp_backward(g, a, dw, p, N);
    if (norms_again)
        norm_forward(a->ln2, a->ln2_mean, a->ln2_rstd, a->residual2, p.ln2w, p.ln2b, NS, C, eps, norm,
                     stream);
    column_parallel_backward(g->dnorm, dw.fcw, dw.fcb, g->dfc, a->ln2, p.fcw, N, C, FC, mm, tp);
    keep_for_weights(g, pass, a->residual3, &a->fc, &g->dfc);
    norm_backward(g->dresidual, dp.ln2w, dp.ln2b, g->column_scratch, g->dnorm, a->residual2, p.ln2w,
                  a->ln2_mean, a->ln2_rstd, NS, C, norm, stream);

    row_parallel_backward(g->datt, dw.attprojw, dw.attprojb, g->dresidual, a->att, p.attprojw, N, Q, C, mm,
                          tp);
    attention_backward(g->dqkv, g->cp.dkeys, g->attention_scratch, g->datt, a->qkv, gathered_keys(&g->cp),
                       a->att, a->lse, starts, attention_shape(g, B), stream);
    scatter_key_gradients(&g->cp, g->dqkv, B, T, QKV, QKV - Q);
    if (g->rope_cos != NULL)
        rope_backward(g->dqkv, g->rope_cos, g->rope_sin, g->positions, B, T, NH, NKV, HS, stream);
    if (norms_again)
        norm_forward(a->ln1, a->ln1_mean, a->ln1_rstd, residual, p.ln1w, p.ln1b, NS, C, eps, norm, stream);
    column_parallel_backward(g->dnorm, dw.qkvw, dw.qkvb, g->dqkv, a->ln1, p.qkvw, N, C, QKV, mm, tp);
    keep_for_weights(g, pass, a->residual2, &a->qkv, &g->dqkv);
    norm_backward(g->dresidual, dp.ln1w, dp.ln1b, g->column_scratch, g->dnorm, residual, p.ln1w, a->ln1_mean,
                  a->ln1_rstd, NS, C, norm, stream);
    done_with_weights(g, 1 + l);
    if (!pass->weights_later) reduce_gradients<Grad>(g, 1 + l, pass->last_micro_batch);
    nvtxRangePop();
}

// What a pass with weights_later left out: the gradients of a layer's matrices and their biases.
template <typename Grad> static void block_weight_gradients(GPT* g, const Pass* pass, int l) {
    const ModelConfig* c = &g->config;
    int N = (int)rows_of(g), C = c->hidden_size, FF = c->intermediate_size, FC = (int)model_dim(c, DIM_FC);
    int Q = (int)model_dim(c, DIM_HEADS), QKV = (int)model_dim(c, DIM_QKV);
    Parameters<Grad> dp = gradients_of<Grad>(g, l);
    LayerActivations* a = activations_of(pass, l);
    const floatX *dfcproj = a->residual3, *dfc = a->fc, *dattproj = a->residual2, *dqkv = a->qkv;
    Matmul* mm = &g->matmul;
    TensorParallel* tp = &g->tp;

    nvtxRangePushA("block_weight_gradients");
    flight()->layer = l;
    row_parallel_weight_gradient(dp.fcprojw, dp.fcprojb, dfcproj, a->act, N, FF, C, mm, tp);
    column_parallel_weight_gradient(dp.fcw, dp.fcb, dfc, a->ln2, N, C, FC, mm, tp);
    row_parallel_weight_gradient(dp.attprojw, dp.attprojb, dattproj, a->att, N, Q, C, mm, tp);
    column_parallel_weight_gradient(dp.qkvw, dp.qkvb, dqkv, a->ln1, N, C, QKV, mm, tp);
    reduce_gradients<Grad>(g, 1 + l, pass->last_micro_batch);
    nvtxRangePop();
}

// After chunk_forward on the same batch: adds to every gradient of the chunk. The last chunk begins with the head; the
// others with what the chunk behind them sent, in g->dresidual, where every chunk leaves what it sends on.
template <typename Grad> static void chunk_backward(GPT* g, const Pass* pass, int B) {
    const ModelConfig* c = &g->config;
    int N = B * g->T, NS = N / g->place.tp_size, C = c->hidden_size, behind = num_buckets(g) - 1;
    bool first_bucket = pass->embedding || (pass->head && c->tie_word_embeddings);
    Slot* slot = pass->slot;
    if (first_bucket) begin_gradients(g, 0);
    if (pass->head) {
        begin_gradients(g, behind);
        Parameters<Grad> dp = gradients_of<Grad>(g, 0);
        gpt_loss(g, slot, head_of(dp), B);
        if (g->place.tp == 0) add_sum(&g->control->sums.loss, g->losses, N, g->stream);
        Parameters<floatX> p = weights_of(g, 0);
        CUDA_CHECK(cudaMemsetAsync(g->dresidual, 0, (size_t)NS * (size_t)C * sizeof(floatX), g->stream));
        norm_backward(g->dresidual, dp.lnfw, dp.lnfb, g->column_scratch, g->dnorm,
                      residual_into(pass, pass->end), p.lnfw, slot->lnf_mean, slot->lnf_rstd, NS, C,
                      c->family->norm, g->stream);
        reduce_gradients<Grad>(g, behind, pass->last_micro_batch);
    }
    for (int l = pass->end - 1; l >= pass->first; l--) block_backward<Grad>(g, pass, l, B);
    if (pass->embedding) {
        Parameters<Grad> dp = gradients_of<Grad>(g, 0);
        const floatX* dout =
            tp_gather(&g->tp, g->tp.buffer[0], g->dresidual, N, C, [](int, int, const floatX*) {});
        embedding_backward(dp.wte, dp.wpe, dout, batch_array(g, slot, BATCH_INPUTS),
                           batch_array(g, slot, BATCH_ORDER), g->positions, B, g->T, C, g->stream);
    }
    if (first_bucket) reduce_gradients<Grad>(g, 0, pass->last_micro_batch);
}

// ----------------------------------------------------------------------------
// step: everything is enqueued at once; the only wait is for what the step reports

// The communicator of the link from a stage to the next: neighbours must not have the same one.
static int link_axis(const GPT* g, int direction, int from) {
    return direction + (from == g->place.pp_size - 1 ? 2 : from % 2);
}

// Sends or receives (NS, C) in a stream of its own: behind what `stream` did so far, or ahead of what it does next.
static void send_to(GPT* g, enum Link link, const floatX* data, int axis, int to, size_t n) {
    replay_point(g->comm.replay, data, n * sizeof *data, g->stream);
    hand_over(g, g->stream, g->links[link]);
    comm_send(&g->comm, axis, data, n, to, g->links[link]);
}
static void receive_from(GPT* g, enum Link link, floatX* data, int axis, int from, size_t n, cudaEvent_t free,
                         cudaEvent_t done) {
    CUDA_CHECK(cudaStreamWaitEvent(g->links[link], free, 0));
    comm_receive(&g->comm, axis, data, n, from, g->links[link]);
    CUDA_CHECK(cudaEventRecord(done, g->links[link]));
    comm_wait(&g->comm, g->stream, done);
}

static int stage_after(const GPT* g) { return (g->place.pp + 1) % g->place.pp_size; }
static int stage_before(const GPT* g) { return (g->place.pp + g->place.pp_size - 1) % g->place.pp_size; }

static Pass pass_of(GPT* g, const PipelineOp* op, int micro_batches) {
    Pass pass;
    int global;
    chunk_layers(&g->place, &g->run->model, op->chunk, &pass.first, &pass.end, &global);
    int stage = virtual_stage(&g->place, op->chunk);
    pass.slot = &g->slots[op->slot], pass.input = &g->inputs[op->input];
    pass.embedding = stage == 0, pass.head = stage == num_virtual_stages(&g->place) - 1;
    pass.last_micro_batch = op->micro_batch == micro_batches - 1;
    pass.weights_later = op->kind == PIPELINE_BACKWARD_INPUT;
    return pass;
}

static void upload_batch(GPT* g, const Slot* slot, const int* batch) {
    CUDA_CHECK(cudaMemcpyAsync(slot->batch, batch, NUM_BATCH_ARRAYS * rows_of(g) * sizeof(int),
                               cudaMemcpyHostToDevice, g->stream));
}

static void forward_pass(GPT* g, const Pass* pass, const int* batch, int B) {
    Slot* slot = pass->slot;
    size_t n = (size_t)B * (size_t)g->T / (size_t)g->place.tp_size * model_dim(&g->config, DIM_HIDDEN);
    int before = stage_before(g), after = stage_after(g);
    upload_batch(g, slot, batch);
    if (!pass->embedding)
        receive_from(g, ACTIVATIONS_IN, pass->input->residual, link_axis(g, AXIS_FORWARD, before), before, n,
                     pass->input->read, pass->input->received);
    int record = comm_begin_compute(&g->comm, "forward", g->stream);
    chunk_forward(g, pass, B);
    comm_end_compute(&g->comm, record, g->stream);
    if (pass->head) return;
    send_to(g, ACTIVATIONS_OUT, residual_into(pass, pass->end), link_axis(g, AXIS_FORWARD, g->place.pp),
            after, n);
}

template <typename Grad> static void backward_pass(GPT* g, const Pass* pass) {
    size_t n = shard_rows(g) * model_dim(&g->config, DIM_HIDDEN);
    int before = stage_before(g), after = stage_after(g), turn = g->place.pp_size > 1 ? g->passes++ % 2 : 0;
    g->dresidual = g->residual_gradients[turn];
    if (g->place.pp_size > 1) comm_wait(&g->comm, g->stream, g->gradient_free[turn]);
    if (!pass->head)
        receive_from(g, GRADIENTS_IN, g->dresidual, link_axis(g, AXIS_BACKWARD, g->place.pp), after, n,
                     g->gradient_free[turn], g->gradient_received[turn]);
    int record = comm_begin_compute(&g->comm, "backward", g->stream);
    chunk_backward<Grad>(g, pass, g->B);
    comm_end_compute(&g->comm, record, g->stream);
    CUDA_CHECK(cudaEventRecord(pass->input->read, g->stream));
    if (!pass->embedding)
        send_to(g, GRADIENTS_OUT, g->dresidual, link_axis(g, AXIS_BACKWARD, before), before, n);
    CUDA_CHECK(
        cudaEventRecord(g->gradient_free[turn], pass->embedding ? g->stream : g->links[GRADIENTS_OUT]));
}

// Any operation of the schedule's list.
template <typename Grad> static void run_pass(GPT* g, const PipelineOp* op, const int* batch) {
    Pass pass = pass_of(g, op, g->step_micro_batches);
    int record;
    replay_pass(g->comm.replay, &g->place, op);
    switch (op->kind) {
    case PIPELINE_FORWARD:
        forward_pass(g, &pass, batch, g->B);
        break;
    case PIPELINE_BACKWARD:
    case PIPELINE_BACKWARD_INPUT:
        backward_pass<Grad>(g, &pass);
        break;
    case PIPELINE_BACKWARD_WEIGHT:
        record = comm_begin_compute(&g->comm, "weight gradients", g->stream);
        for (int l = pass.end - 1; l >= pass.first; l--) block_weight_gradients<Grad>(g, &pass, l);
        comm_end_compute(&g->comm, record, g->stream);
        break;
    }
}

// Forward, loss and backward of the micro-batch in the first slot: all of a step's passes where there is one stage.
template <typename Grad> static void micro_step_launch(GPT* g, bool last_micro_batch) {
    const PipelineOp op = {PIPELINE_FORWARD, 0, 0, 0, 0};
    Pass pass = pass_of(g, &op, 1);
    pass.last_micro_batch = last_micro_batch;
    chunk_forward(g, &pass, g->B);
    g->dresidual = g->residual_gradients[0];
    chunk_backward<Grad>(g, &pass, g->B);
}

static void micro_step(GPT* g, bool last_micro_batch) {
    if (g->gradients_bf16)
        micro_step_launch<__nv_bfloat16>(g, last_micro_batch);
    else
        micro_step_launch<float>(g, last_micro_batch);
}

// The same through a CUDA graph, recorded at the second call: the first makes the plans of all matmuls, and
// autotuning cannot be recorded. grad_scale is part of it: every step of a run has as many targets.
static void micro_step_through_graph(GPT* g) {
    if (!g->plans_made) {
        micro_step(g, false);
        g->plans_made = true;
        return;
    }
    if (g->micro_step_graph == NULL) {
        cudaGraph_t graph;
        CUDA_CHECK(cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeThreadLocal));
        micro_step(g, false);
        CUDA_CHECK(cudaStreamEndCapture(g->stream, &graph));
        CUDA_CHECK(cudaGraphInstantiate(&g->micro_step_graph, graph, 0));
        CUDA_CHECK(cudaGraphDestroy(graph));
    }
    CUDA_CHECK(cudaGraphLaunch(g->micro_step_graph, g->stream));
}

// Every pass of a step, in the order of the schedule.
static void run_passes(GPT* g) {
    size_t micro_batch = NUM_BATCH_ARRAYS * rows_of(g);
    const int* batches = g->step_batch[g->step_slot];
    if (g->list_micro_batches != g->step_micro_batches) {
        free(g->list.ops);
        g->list_micro_batches = g->step_micro_batches;
        g->list = pass_list(g, g->step_micro_batches);
        CHECK(g->list.num_slots <= g->num_slots && g->list.num_inputs <= g->num_inputs);
    }
    for (int i = 0; i < g->list.count; i++) {
        const PipelineOp* op = &g->list.ops[i];
        const int* batch = batches + (size_t)op->micro_batch * micro_batch;
        if (g->gradients_bf16)
            run_pass<__nv_bfloat16>(g, op, batch);
        else
            run_pass<float>(g, op, batch);
    }
}

// rows (B, cp T + 1) -> the arrays of one micro-batch, of this rank's positions: inputs and targets, one shifted against
// the other, where documents start, and the rows in the order of their tokens, by which the embedding's gradient is
// summed. Inputs are rows of this rank's part of the embedding.
static void fill_batch(GPT* g, int* batch, const int32_t* rows, int num_rows, bool document_mask,
                       int eot_id) {
    size_t N = rows_of(g), T = (size_t)g->T, whole = T * (size_t)g->place.cp_size;
    int V = g->config.vocab_size, first = g->place.tp_size > 1 ? g->place.tp * V : 0;
    int *inputs = batch + BATCH_INPUTS * N, *targets = batch + BATCH_TARGETS * N;
    for (size_t b = 0; b < (size_t)num_rows; b++) {
        const int32_t* row = rows + b * (whole + 1);
        if (document_mask) document_starts(g->starts, row, (int)whole, eot_id);
        for (size_t t = 0; t < T; t++) {
            int position = position_at(g->positions, (int)t);
            inputs[b * T + t] = row[position], targets[b * T + t] = row[position + 1];
            if (document_mask) batch[BATCH_DOC_START * N + b * T + t] = g->starts[position];
        }
    }
    for (size_t i = 0; g->place.tp_size > 1 && i < (size_t)num_rows * T; i++)
        inputs[i] = inputs[i] >= first && inputs[i] < first + V ? inputs[i] - first : -1;
    token_order(batch + BATCH_ORDER * N, inputs, num_rows * g->T, V, g->order_counts);
    g->document_mask = document_mask;
}

// Prepares the rows of the next step (num_rows, T + 1) while the device works on the current one.
void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    size_t micro_batch = NUM_BATCH_ARRAYS * rows_of(g), row = (size_t)(g->T * g->place.cp_size + 1);
    g->step_slot = !g->step_slot; // the other one is being read
    g->step_micro_batches = num_rows / g->B;
    // training masks no target
    g->grad_scale = (float)(1.0 / ((double)num_rows * g->place.dp_size * g->T));
    for (int i = 0; i < g->step_micro_batches; i++)
        fill_batch(g, g->step_batch[g->step_slot] + (size_t)i * micro_batch, rows + (size_t)(i * g->B) * row,
                   g->B, document_mask, eot_id);
}

// The first of a step's two runs. Its gradients are thrown away, and the step goes on as any other.
static void run_passes_first(GPT* g) {
    g->comm.replay = &g->replay;
    replay_begin(&g->replay, g->stream);
    run_passes(g);
    hand_over(g, g->comm_stream, g->stream);
    size_t bytes = g->memory_bytes[MEMORY_GRADIENTS];
    CUDA_CHECK(cudaMemsetAsync(g->memory[MEMORY_GRADIENTS], 0, bytes, g->stream));
    g->replay.again = true;
}

// words (ranks): one that each rank made, to all of them and their hosts.
static void share_words(GPT* g, unsigned long long* words, uint64_t* host) {
    const long long* mine = (const long long*)words + g->place.rank;
    size_t bytes = (size_t)g->place.size * sizeof *words;
    comm_all_gather(&g->comm, AXIS_WORLD, (long long*)words, mine, 1, g->stream);
    CUDA_CHECK(cudaMemcpyAsync(host, words, bytes, cudaMemcpyDeviceToHost, g->stream));
}

static void compare_runs(GPT* g) {
    g->comm.replay = NULL;
    unsigned long long* found =
        replay_first(&g->replay, &g->control->sums.deviating, g->place.rank, g->stream);
    share_words(g, found, g->host_words + g->place.size);
}

// Every rank's hash of what all of its data-parallel group should have: the weights, and with ZeRO 0 the optimizer's
// state. Before the update: behind it, what ranks gather from each other hides that one of them differs.
static void hash_replicas(GPT* g) {
    size_t n = g->layout.num_parameters;
    unsigned long long* mine = g->hashes + g->place.rank;
    CUDA_CHECK(cudaMemsetAsync(mine, 0, sizeof *mine, g->stream));
    hash_add(mine, g->params, n * sizeof(floatX), 1, g->stream);
    if (g->zero == ZERO_NONE) {
        if (g->remainder != NULL) hash_add(mine, g->remainder, n * sizeof(int16_t), 2, g->stream);
        hash_add(mine, g->m, n * moment_bytes(g), 3, g->stream);
        hash_add(mine, g->v, n * moment_bytes(g), 4, g->stream);
    }
    share_words(g, g->hashes, g->host_words);
}

// From complete gradients to new weights. A tied embedding is in the first and the last stage, and each has what it
// added to the gradient.
template <typename Grad, typename Moment>
static void update_launch(GPT* g, const RunConfig* run, double num_targets, StepGuard guard) {
    const Layout* l = &g->place;
    CUDA_CHECK(cudaEventRecord(g->own_work_done, g->stream));
    hand_over(g, g->comm_stream, g->stream);
    int record = comm_begin_compute(&g->comm, "update", g->stream);
    if (g->replayed) compare_runs(g);
    if (g->hashed) hash_replicas(g);
    if (g->config.tie_word_embeddings && (has_embedding(l) || has_head(l)))
        comm_all_reduce(&g->comm, AXIS_TIED, slice_gradients<Grad>(g, 0), state_slice(g, 0).size, g->stream);
    for (int b = 0; b < num_buckets(g); b++) { // each rank counts a share, also where it has more
        size_t share = bucket_at(g, b).size / (size_t)l->dp_size, first = share * (size_t)l->dp;
        const Grad* grads = slice_gradients<Grad>(g, b) + (g->zero == ZERO_NONE ? first : 0);
        global_norm_squared(&g->control->sums.norm_squared, grads, share, first, &g->tables[b], g->stream);
        if (LayerSums* layer = metered(&g->meter, &g->tables[b]))
            global_norm_squared(&layer->of[LAYER_GRAD_NORM], grads, share, first, &g->tables[b], g->stream);
    }
    comm_all_reduce(&g->comm, AXIS_WORLD, (long long*)&g->control->sums, STEP_SUMS, g->stream);
    update_control(g->control, num_targets, guard, run->optimizer.grad_clip, run->optimizer.beta1,
                   run->optimizer.beta2, g->stream);
    CUDA_CHECK(cudaStreamWaitEvent(g->stream, g->snapshot_done, 0)); // weights may still be being copied
    CUDA_CHECK(cudaEventRecord(g->update_begun, g->stream));
    for (int b = 0; b < num_buckets(g); b++) {
        Slice s = state_slice(g, b);
        size_t share = bucket_at(g, b).size / (size_t)l->dp_size, begin = share * (size_t)l->dp - s.first;
        Counted counted = {begin, begin + share};
        meter_update(metered(&g->meter, &g->tables[b]), counted, g->staging, g->staging_elements,
                     slice_weights(g, b), g->remainder != NULL ? g->remainder + s.at : NULL,
                     slice_gradients<Grad>(g, b), (Moment*)g->m + s.at, (Moment*)g->v + s.at, s.size, s.first,
                     &g->tables[b], run, g->control, g->stream);
        if (!g->grad_windows && s.size != bucket_at(g, b).size)
            CUDA_CHECK(cudaMemsetAsync(bucket_gradients<Grad>(g, b), 0, bucket_at(g, b).size * sizeof(Grad),
                                       g->stream));
        gather_weights(g, b);
    }
    CUDA_CHECK(cudaEventRecord(g->update_ended, g->stream));
    meter_collect(&g->meter, &g->comm, g->stream);
    comm_end_compute(&g->comm, record, g->stream);
}

static void update(GPT* g, const RunConfig* run, double num_targets, StepGuard guard) {
    nvtxRangePushA("update");
    if (g->gradients_bf16 && g->moments_bf16)
        update_launch<__nv_bfloat16, __nv_bfloat16>(g, run, num_targets, guard);
    else if (g->gradients_bf16)
        update_launch<__nv_bfloat16, float>(g, run, num_targets, guard);
    else if (g->moments_bf16)
        update_launch<float, __nv_bfloat16>(g, run, num_targets, guard);
    else
        update_launch<float, float>(g, run, num_targets, guard);
    nvtxRangePop();
}

// Enqueues one optimizer step on the rows of gpt_load_batch. applied_steps: those before this one.
void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps, int requests,
                    StepGuard guard) {
    size_t micro_batch = NUM_BATCH_ARRAYS * rows_of(g);
    double num_targets = (double)g->step_micro_batches * (double)rows_of(g) * g->place.dp_size;
    nvtxRangePushA("step");
    CUDA_CHECK(cudaEventRecord(g->step_begun, g->stream));
    exposed_begin_step(&g->comm.exposed);
    g->hashed = guard.hash_weights && g->hashes != NULL;
    g->replayed = guard.replay && g->replay.words != NULL;
    // which does not measure; and both runs of a step that is computed twice launch the same kernels
    bool through_graph = g->use_graph && !guard.measure_layers && !g->replayed;
    if (g->replayed) run_passes_first(g);
    step_control_begin(g->control, lr, applied_steps, requests, g->stream);
    meter_begin(&g->meter, guard.measure_layers, num_targets * g->config.hidden_size, g->stream);
    for (int i = 0; through_graph && i < g->step_micro_batches; i++) {
        upload_batch(g, &g->slots[0], g->step_batch[g->step_slot] + (size_t)i * micro_batch);
        micro_step_through_graph(g);
    }
    if (!through_graph) run_passes(g);
    update(g, run, num_targets, guard);
    CUDA_CHECK(
        cudaMemcpyAsync(g->host_control, g->control, sizeof *g->control, cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaEventRecord(g->step_done, g->stream));
    nvtxRangePop();
}

static double seconds_between(cudaEvent_t begin, cudaEvent_t end) {
    float milliseconds;
    CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    return 1e-3 * (double)milliseconds;
}

// Read and written between the two events of the update, which other ranks' slices of gradients are set to zero in, too.
static size_t bytes_of_update(const GPT* g) {
    size_t bytes = 0, grad = gradient_bytes(g), rest = g->remainder != NULL ? sizeof *g->remainder : 0;
    for (int b = 0; b < num_buckets(g); b++) {
        size_t mine = state_slice(g, b).size, all = bucket_at(g, b).size;
        bytes += update_bytes(mine, sizeof(floatX) + rest, grad, moment_bytes(g));
        bytes += !g->grad_windows && mine != all ? all * grad : 0;
    }
    return bytes;
}

StepResult gpt_finish_step(GPT* g) {
    StepResult r;
    CUDA_CHECK(cudaEventSynchronize(g->step_done));
    memset(&r, 0, sizeof r);
    if (!g->replayed) flight_own_work(seconds_between(g->step_begun, g->own_work_done));
    r.device_seconds = seconds_between(g->step_begun, g->step_done);
    r.exposed_share = exposed_share(&g->comm.exposed, r.device_seconds);
    r.loss = g->host_control->loss, r.grad_norm = g->host_control->grad_norm;
    r.applied = g->host_control->applied != 0;
    r.layers = meter_result(&g->meter);
    double seconds = seconds_between(g->update_begun, g->update_ended);
    if (r.applied && r.layers == NULL && seconds > 0) r.update_rate = (double)bytes_of_update(g) / seconds;
    r.requests = requests_of_sum(g->host_control->sums.requests);
    r.hashes = g->hashed ? g->host_words : NULL;
    r.replay = g->replayed ? g->host_words + g->place.size : NULL;
    return r;
}

// The loss of every token of at most B rows (num_rows, cp T + 1), for evaluation; valid until the next call. NULL where
// another stage of the pipeline has them, or another rank that shares the rows returns them.
const float* gpt_losses(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    size_t N = rows_of(g), ranks = (size_t)g->place.cp_size;
    fill_batch(g, g->eval_batch, rows, num_rows, document_mask, eot_id);
    for (int chunk = 0; chunk < g->place.num_chunks; chunk++) {
        const PipelineOp op = {PIPELINE_FORWARD, 0, chunk, 0, 0};
        Pass pass = pass_of(g, &op, 1);
        forward_pass(g, &pass, g->eval_batch, num_rows);
        CUDA_CHECK(cudaEventRecord(pass.input->read, g->stream));
        if (!pass.head) continue;
        gpt_loss(g, pass.slot, (float*)NULL, num_rows);
        comm_all_gather(&g->comm, AXIS_CP, g->all_losses, g->losses, N, g->stream);
        CUDA_CHECK(cudaMemcpyAsync(g->host_losses, g->all_losses, ranks * N * sizeof(float),
                                   cudaMemcpyDeviceToHost, g->stream));
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    if (!has_head(&g->place) || g->place.cp != 0) return NULL;
    for (size_t i = 0; i < ranks * N; i++) {
        size_t r = i / N, b = i % N / (size_t)g->T;
        Positions at = positions_of(g->T * g->place.cp_size, (int)r, g->place.cp_size);
        size_t position = (size_t)position_at(at, (int)(i % (size_t)g->T));
        g->row_losses[b * (size_t)g->T * ranks + position] = g->host_losses[i];
    }
    return g->row_losses;
}

// ----------------------------------------------------------------------------
// a model's life

static bool allocate(void** memory, size_t bytes, const char* what, Error* err) {
    cudaError_t status = cudaMalloc(memory, bytes != 0 ? bytes : 1);
    if (status == cudaSuccess) return true;
    cudaGetLastError(); // it was this one
    return fail(err, EXIT_OS, "cannot allocate %zu bytes of GPU memory for the %s: %s (%zu bytes are free)",
                bytes, what, cudaGetErrorString(status), device_free_memory());
}

static bool allocate_pinned(void** memory, size_t bytes, const char* what, Error* err) {
    cudaError_t status = cudaMallocHost(memory, bytes != 0 ? bytes : 1);
    if (status == cudaSuccess) return true;
    cudaGetLastError();
    return fail(err, EXIT_OS, "cannot allocate %zu bytes of pinned host memory for the %s: %s", bytes, what,
                cudaGetErrorString(status));
}

// The host's side of batches and losses, pinned, so that copies run beside the device's work.
static bool create_host_buffers(GPT* g, int rows_per_step, Error* err) {
    size_t micro_batch = NUM_BATCH_ARRAYS * rows_of(g) * sizeof(int);
    size_t step = micro_batch * (size_t)(rows_per_step / g->B);
    size_t losses = (size_t)g->place.cp_size * rows_of(g) * sizeof(float);
    g->order_counts = (int*)malloc_check(((size_t)g->config.vocab_size + 2) * sizeof(int));
    g->starts = (int*)malloc_check((size_t)(g->T * g->place.cp_size) * sizeof(int));
    g->row_losses = (float*)malloc_check(losses);
    g->meter.norms = (LayerNorms*)malloc_check(g->meter.entries * sizeof *g->meter.norms);
    return allocate_pinned((void**)&g->step_batch[0], step, "batches", err) &&
           allocate_pinned((void**)&g->step_batch[1], step, "batches", err) &&
           allocate_pinned((void**)&g->eval_batch, micro_batch, "batches", err) &&
           allocate_pinned((void**)&g->host_losses, losses, "losses", err) &&
           allocate_pinned((void**)&g->host_control, sizeof *g->host_control, "step's report", err) &&
           allocate_pinned((void**)&g->host_words, 2 * (size_t)g->place.size * sizeof *g->host_words,
                           "step's report", err) &&
           (g->meter.sums == NULL ||
            allocate_pinned((void**)&g->meter.host, g->meter.entries * sizeof *g->meter.host, "step's report",
                            err));
}

static void upload_rope_table(GPT* g) {
    const ModelConfig* c = &g->config;
    size_t angles = (size_t)c->max_position_embeddings * (size_t)c->head_dim / 2;
    float* table = (float*)malloc_check(2 * angles * sizeof *table);
    rope_table(table, table + angles, &c->rope, c->max_position_embeddings, c->head_dim);
    CUDA_CHECK(cudaMemcpy(g->rope_cos, table, angles * sizeof *table, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(g->rope_sin, table + angles, angles * sizeof *table, cudaMemcpyHostToDevice));
    free(table);
}

// Every stream (create) or every event of a model: made, or done away with.
static void for_streams(GPT* g, bool create) {
    // what communicates comes before the two that compute and copy; the driver clamps priorities
    enum { COMPUTE = 2, FIRST = -5 };
    cudaStream_t* streams[] = {&g->stream,
                               &g->copy_stream,
                               &g->comm_stream,
                               &g->tp.comm_stream,
                               &g->cp.comm_stream,
                               &g->links[ACTIVATIONS_IN],
                               &g->links[ACTIVATIONS_OUT],
                               &g->links[GRADIENTS_IN],
                               &g->links[GRADIENTS_OUT]};
    for (size_t i = 0; i < sizeof streams / sizeof streams[0]; i++) {
        if (create)
            CUDA_CHECK(
                cudaStreamCreateWithPriority(streams[i], cudaStreamNonBlocking, i < COMPUTE ? 0 : FIRST));
        else
            CUDA_CHECK(cudaStreamDestroy(*streams[i]));
    }
}

static void for_event(cudaEvent_t* event, bool create, unsigned flags = cudaEventDisableTiming) {
    if (create)
        CUDA_CHECK(cudaEventCreateWithFlags(event, flags));
    else
        CUDA_CHECK(cudaEventDestroy(*event));
}

static void for_events(GPT* g, bool create) {
    cudaEvent_t* events[] = {&g->snapshot_done, &g->hand_over, &g->tp.ready, &g->cp.ready, &g->cp.gathered};
    cudaEvent_t* timed[] = {&g->step_begun, &g->own_work_done, &g->update_begun, &g->update_ended,
                            &g->step_done};
    for (size_t i = 0; i < sizeof events / sizeof events[0]; i++) for_event(events[i], create);
    for (size_t i = 0; i < sizeof timed / sizeof timed[0]; i++) for_event(timed[i], create, cudaEventDefault);
    for (int k = 0; k < TP_PIECES; k++) for_event(&g->tp.arrived[k], create);
    for (int b = 0; b < num_buckets(g); b++) for_event(&g->weights_ready[b], create);
    for (int i = 0; i < 2; i++)
        for_event(&g->gradient_received[i], create), for_event(&g->gradient_free[i], create);
    for (int i = 0; i < g->num_inputs; i++)
        for_event(&g->inputs[i].received, create), for_event(&g->inputs[i].read, create);
    for (int w = 0; w < NUM_WINDOWS; w++) {
        Window* window = &g->windows[w];
        window->holds = -1;
        for_event(&window->gathered, create), for_event(&window->used, create);
        for_event(&window->grads_summed, create);
    }
}

// What the update knows of each bucket: its tensors, by the number of its layer in the whole model.
static void make_bucket_tables(GPT* g) {
    const ModelConfig* whole = &g->run->model;
    int L = g->config.num_hidden_layers, first, end, global;
    g->tables = (BucketTable*)calloc_check((size_t)L + 2, sizeof *g->tables);
    g->tables[0] = bucket_table(whole, &g->place, -1);
    g->tables[L + 1] = bucket_table(whole, &g->place, whole->num_hidden_layers);
    for (int c = 0; c < g->place.num_chunks; c++) {
        chunk_layers(&g->place, whole, c, &first, &end, &global);
        for (int l = first; l < end; l++)
            g->tables[1 + l] = bucket_table(whole, &g->place, global + l - first);
    }
}

static bool create_memory(GPT* g, bool training, Error* err) {
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {NULL, 0};
        lay_out(g, i, &arena, training);
        if (arena.used == 0) continue;
        if (!allocate(&g->memory[i], arena.used, memory_class_names[i], err)) return false;
        g->memory_bytes[i] = arena.used;
        // gradients and moments start at zero, and so does the padding of the vocabulary and of buckets
        if (i < MEMORY_ACTIVATIONS) CUDA_CHECK(cudaMemsetAsync(g->memory[i], 0, arena.used, g->stream));
        Arena real_arena = {(char*)g->memory[i], 0};
        lay_out(g, i, &real_arena, training);
    }
    return true;
}

// training: with gradients, moments and what a backward pass needs. With several processes gpt_connect follows.
bool gpt_create(GPT* g, const RunConfig* run, int B, int T, bool training, Error* err) {
    gpt_configure(g, run, B, T, training);
    if (!device_open(&g->device, err)) return false;
    make_bucket_tables(g);
    g->weights_ready = (cudaEvent_t*)calloc_check((size_t)num_buckets(g), sizeof *g->weights_ready);
    for_streams(g, true);
    for_events(g, true);
    comm_reset(&g->comm, &g->place);
    g->tp.comm = &g->comm, g->tp.size = g->place.tp_size, g->tp.stream = g->stream;
    g->cp.comm = &g->comm, g->cp.rank = g->place.cp, g->cp.size = g->place.cp_size, g->cp.stream = g->stream;
    if (!create_memory(g, training, err) ||
        !create_host_buffers(g, training ? run->batch.global_batch_size / num_replicas(&g->place) : 0, err))
        return false;
    if (g->rope_cos != NULL) upload_rope_table(g);
    CUDA_CHECK(cudaDeviceSynchronize());
    char choices[PATH_MAX];
    bool tune = training && run->parallel.autotune;
    return (!tune || path_join(choices, run->log.run_dir, "matmul_algorithms.txt", err)) &&
           matmul_init(&g->matmul, run->precision.compute, g->matmul_workspace, g->bias_scratch,
                       tune ? choices : NULL, g->stream, err);
}

bool gpt_connect(GPT* g, Control* control, Error* err) {
    if (!comm_open(&g->comm, &g->place, kv_replicas(&g->run->model, &g->place), control, err)) return false;
    g->comm.exposed.stream = g->place.size > 1 ? g->stream : NULL;
    return true;
}

void gpt_look(GPT* g, uint8_t progress[FLIGHT_RECORDS]) {
    if (g->comm.watched) cudaSetDevice(g->device.number); // this thread's, which would otherwise be the first
    comm_look(&g->comm, progress);
}

void gpt_free(GPT* g) {
    if (g->slots == NULL) return;
    if (g->stream != NULL) {
        CUDA_CHECK(cudaDeviceSynchronize());
        comm_close(&g->comm);
        matmul_free(&g->matmul);
        if (g->micro_step_graph != NULL) CUDA_CHECK(cudaGraphExecDestroy(g->micro_step_graph));
        for (int i = 0; i < NUM_MEMORY_CLASSES; i++) CUDA_CHECK(cudaFree(g->memory[i]));
        void* pinned[] = {g->step_batch[0], g->step_batch[1], g->eval_batch,  g->host_losses, g->host_control,
                          g->host_words,    g->meter.host,    g->host.params, g->host.m,      g->host.v};
        for (size_t i = 0; i < sizeof pinned / sizeof pinned[0]; i++)
            if (pinned[i] != NULL) CUDA_CHECK(cudaFreeHost(pinned[i]));
        for_events(g, false);
        for_streams(g, false);
    }
    free(g->order_counts), free(g->starts), free(g->row_losses), free(g->meter.norms);
    gpt_release(g);
    memset(g, 0, sizeof *g);
}

// ----------------------------------------------------------------------------
// host: checkpoints are read into and written from the host's memory, in fp32, by whole tensors, which each have one
// process that reads and writes them. State travels between that one and the ranks that compute with it:
//
//     rank's slice of weights or moments -> staging, in fp32 -> the owner's staging -> its place in the whole tensor

// Made when it is first asked for.
HostState gpt_host_state(GPT* g) {
    Error err = {0, {0}};
    HostState* host = &g->host;
    if (host->params != NULL) return *host;
    tensors_owned(&g->run->model, g->place.rank, g->place.size, &host->begin, &host->end);
    size_t bytes = (host->end - host->begin) * sizeof(float);
    bool ok = allocate_pinned((void**)&host->params, bytes, "checkpoint", &err);
    if (ok && g->m != NULL)
        ok = allocate_pinned((void**)&host->m, bytes, "checkpoint", &err) &&
             allocate_pinned((void**)&host->v, bytes, "checkpoint", &err);
    if (!ok) exit_with(&err);
    return *host;
}

enum StateArray { STATE_WEIGHTS, STATE_M, STATE_V, NUM_STATE_ARRAYS };

static __global__ void split_kernel(floatX* weights, int16_t* remainder, const float* in, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    uint16_t high;
    int16_t low;
    split_float(&high, &low, in[i]);
    float rounded = float_of_bits((uint32_t)high << 16);
    weights[i] = from_float<floatX>(sizeof(floatX) == sizeof(float) ? in[i] : rounded);
    if (remainder != NULL) remainder[i] = low;
}

template <typename To, typename From>
static __global__ void convert_kernel(To* out, const From* in, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = from_float<To>(to_float(in[i]));
}

// Elements [at, at + n) of this rank's slice of a bucket's state, in fp32, out of the model or into it.
static void stage(GPT* g, enum StateArray array, int b, size_t at, size_t n, bool out) {
    Slice s = state_slice(g, b);
    unsigned blocks = (unsigned)ceil_div(n, 256);
    cudaStream_t stream = g->copy_stream;
    float* staging = g->staging;
    floatX* weights = slice_weights(g, b) + at;
    int16_t* remainder = g->remainder != NULL ? g->remainder + s.at + at : NULL;
    char* moment = (char*)(array == STATE_M ? g->m : g->v) + (s.at + at) * moment_bytes(g);
    if (array == STATE_WEIGHTS && out)
        join_weights(staging, weights, remainder, n, false, stream);
    else if (array == STATE_WEIGHTS)
        split_kernel<<<blocks, 256, 0, stream>>>(weights, remainder, staging, n);
    else if (g->moments_bf16 && out)
        convert_kernel<<<blocks, 256, 0, stream>>>(staging, (const __nv_bfloat16*)(void*)moment, n);
    else if (g->moments_bf16)
        convert_kernel<<<blocks, 256, 0, stream>>>((__nv_bfloat16*)(void*)moment, staging, n);
    else
        CUDA_CHECK(cudaMemcpyAsync(out ? (void*)staging : moment, out ? moment : (char*)(void*)staging,
                                   n * sizeof(float), cudaMemcpyDeviceToDevice, stream));
    LAUNCH_CHECK();
}

// Elements [at, at + n) of a part, row by row, between staging and their places in the whole tensor (cols wide).
static void copy_rectangle(GPT* g, float* tensor, size_t cols, const TensorPart* part, size_t at, size_t n,
                           bool to_host) {
    const float* staged = g->staging;
    while (n > 0) { // the rest of a row, whole rows, the start of a row
        size_t row = at / part->cols, col = at % part->cols,
               rows = col == 0 && n >= part->cols ? n / part->cols : 1;
        size_t width = col == 0 && n >= part->cols ? part->cols : part->cols - col < n ? part->cols - col : n;
        if (part->cols == cols && rows > 1) width *= rows, rows = 1; // they lie one behind the other
        float* place = tensor + (part->row + row) * cols + part->col + col;
        size_t bytes = width * sizeof(float), pitch = cols * sizeof(float);
        if (to_host)
            CUDA_CHECK(cudaMemcpy2DAsync(place, larger(pitch, bytes), staged, bytes, bytes, rows,
                                         cudaMemcpyDeviceToHost, g->copy_stream));
        else
            CUDA_CHECK(cudaMemcpy2DAsync((void*)staged, bytes, place, larger(pitch, bytes), bytes, rows,
                                         cudaMemcpyHostToDevice, g->copy_stream));
        staged += rows * width, at += rows * width, n -= rows * width;
    }
}

// One piece on its way: elements [at, at + n) of a part of tensor (id, layer), which a rank has from element `in_slice`
// of its slice of bucket b on.
typedef struct {
    const ParameterLayout* whole;
    enum StateArray array;
    enum TensorId id;
    int layer, rank, owner, bucket;
    const TensorPart* part;
    size_t in_slice, at, n;
} StatePiece;

static void move_piece(GPT* g, const StatePiece* p, bool to_host) {
    const ParameterLayout* whole = p->whole;
    int me = g->place.rank;
    CHECK(p->n <= g->staging_elements);
    float* arrays[NUM_STATE_ARRAYS] = {g->host.params, g->host.m, g->host.v};
    float* tensor =
        me != p->owner ? NULL : arrays[p->array] + (tensor_offset(whole, p->id, p->layer) - g->host.begin);
    if (to_host && me == p->rank) stage(g, p->array, p->bucket, p->in_slice, p->n, true);
    if (!to_host && me == p->owner)
        copy_rectangle(g, tensor, whole->cols[p->id], p->part, p->at, p->n, false);
    int from = to_host ? p->rank : p->owner, to = to_host ? p->owner : p->rank;
    if (from != to && me == from) comm_send(&g->comm, AXIS_STATE, g->staging, p->n, to, g->copy_stream);
    if (from != to && me == to) comm_receive(&g->comm, AXIS_STATE, g->staging, p->n, from, g->copy_stream);
    if (to_host && me == p->owner) copy_rectangle(g, tensor, whole->cols[p->id], p->part, p->at, p->n, true);
    if (!to_host && me == p->rank) stage(g, p->array, p->bucket, p->in_slice, p->n, false);
}

// All that one rank (tp, dp, pp) has of a tensor. Everybody goes through all pieces in the same order.
static void move_shard(GPT* g, enum StateArray array, enum TensorId id, int layer, int local, int rank,
                       const ParameterLayout* all, bool to_host) {
    const ModelConfig* whole = &g->run->model;
    int owner = tensor_owner(all, tensor_offset(all, id, layer), g->place.size);
    if (g->place.rank != rank && g->place.rank != owner) return;
    Layout l = layout_at(g->place, rank);
    ModelConfig config = model_part(whole, &l);
    ParameterLayout layout = layout_parameters(&config, &l);
    int b = tensor_bucket(id, local, config.num_hidden_layers);
    Bucket bucket = parameter_bucket(&layout, config.num_hidden_layers, b);
    size_t share = bucket.size / (size_t)l.dp_size, begin = share * (size_t)l.dp;
    bool whole_state = g->zero == ZERO_NONE;
    if (whole_state) begin = 0, share = bucket.size;
    TensorPart parts[3];
    int count = tensor_parts(parts, whole, &l, id);
    for (int k = 0; k < count; k++) {
        if (to_host && (!parts[k].counted || (whole_state && l.dp > 0))) continue;
        size_t first =
            tensor_offset(&layout, id, local) - bucket.begin + parts[k].local_row * layout.cols[id];
        size_t from = larger(first, begin), end = first + parts[k].rows * layout.cols[id];
        if (end > begin + share) end = begin + share;
        for (size_t n; from < end; from += n) {
            n = end - from < STAGING_ELEMENTS ? end - from : STAGING_ELEMENTS;
            StatePiece piece = {all, array,     id,           layer,        rank, owner,
                                b,   &parts[k], from - begin, from - first, n};
            move_piece(g, &piece, to_host);
        }
    }
}

static void move_state(GPT* g, enum StateArray array, bool to_host) {
    const ModelConfig* whole = &g->run->model;
    const Layout* l = &g->place;
    ParameterLayout all = parameter_layout(whole);
    for (int i = 0; i < NUM_TENSORS; i++)
        for (int layer = 0; layer < tensor_copies(whole, (enum TensorId)i) && all.size[i] != 0; layer++) {
            int place = tensor_table[i].place, stage = place == BEFORE_LAYERS ? 0 : l->pp_size - 1, local = 0;
            if (place == PER_LAYER) find_layer(l, whole, layer, &stage, &local);
            // the last stage has the first bucket, too, where the head is tied to it
            bool twice = place == BEFORE_LAYERS && whole->tie_word_embeddings && l->pp_size > 1 && !to_host;
            for (int pp = stage; pp < l->pp_size; pp += twice ? l->pp_size - 1 : l->pp_size)
                for (int r = layout_rank(l, 0, 0, pp); r < layout_rank(l, 0, 0, pp + 1); r++)
                    move_shard(g, array, (enum TensorId)i, layer, local, r, &all, to_host);
        }
}

// After the host's state was read, or made.
void gpt_from_host(GPT* g) {
    CUDA_CHECK(cudaDeviceSynchronize()); // in a rewind, the last step's weights may still be being gathered
    for (int a = 0; a < NUM_STATE_ARRAYS && (a == 0 || g->m != NULL); a++)
        move_state(g, (enum StateArray)a, false);
    CUDA_CHECK(cudaDeviceSynchronize());
    for (int b = 0; b < num_buckets(g); b++) gather_weights(g, b);
    CUDA_CHECK(cudaDeviceSynchronize());
}

// Begins to copy weights and moments to the host; the next step's update waits for it, nothing else does.
void gpt_snapshot(GPT* g) {
    gpt_host_state(g);
    CUDA_CHECK(cudaStreamWaitEvent(g->copy_stream, g->step_done, 0));
    for (int a = 0; a < NUM_STATE_ARRAYS && (a == 0 || g->m != NULL); a++)
        move_state(g, (enum StateArray)a, true);
    CUDA_CHECK(cudaEventRecord(g->snapshot_done, g->copy_stream));
}

// Until the host's copy is whole. Called by the thread that writes it.
void gpt_snapshot_wait(GPT* g) {
    CUDA_CHECK(cudaSetDevice(g->device.number)); // this thread's, which would otherwise be the first
    CUDA_CHECK(cudaEventSynchronize(g->snapshot_done));
}

// ----------------------------------------------------------------------------
// decoding: one token at a time; keys and values of the past are kept, so that a token costs one row

static void decoder_lay_out(Decoder* d, Arena* arena) {
    const ModelConfig* c = &d->gpt->config;
    size_t kv = (model_dim(c, DIM_QKV) - model_dim(c, DIM_HEADS)) / 2, C = model_dim(c, DIM_HIDDEN);
    size_t cache = (size_t)c->num_hidden_layers * (size_t)d->capacity * kv;
    arena_take(&d->keys, arena, cache), arena_take(&d->values, arena, cache);
    arena_take(&d->residual, arena, C), arena_take(&d->norm, arena, C);
    arena_take(&d->qkv, arena, model_dim(c, DIM_QKV));
    arena_take(&d->att, arena, model_dim(c, DIM_HEADS));
    arena_take(&d->hidden, arena, C);
    arena_take(&d->fc, arena, model_dim(c, DIM_FC)), arena_take(&d->act, arena, model_dim(c, DIM_FF));
    arena_take(&d->scores, arena, model_dim(c, DIM_VOCAB));
    arena_take(&d->mean, arena, 1), arena_take(&d->rstd, arena, 1), arena_take(&d->token, arena, 1);
}

void decoder_create(Decoder* d, GPT* g, int capacity) {
    Error err = {0, {0}};
    Arena arena = {NULL, 0};
    void* memory;
    memset(d, 0, sizeof *d);
    CUDA_CHECK(cudaDeviceSynchronize()); // weights may still be being gathered
    d->gpt = g, d->capacity = capacity;
    decoder_lay_out(d, &arena);
    if (!allocate(&memory, arena.used, "sample", &err)) exit_with(&err);
    d->memory = (char*)memory;
    arena.memory = d->memory, arena.used = 0;
    decoder_lay_out(d, &arena);
    size_t Vp = model_dim(&g->config, DIM_VOCAB);
    d->host_scores = (floatX*)malloc_check(Vp * sizeof(floatX));
    d->logits = (float*)malloc_check(Vp * sizeof(float));
}

void decoder_free(Decoder* d) {
    CUDA_CHECK(cudaFree(d->memory));
    free(d->host_scores), free(d->logits);
}

// Appends one token; d->logits (Vp) then scores the next one. The same layers as gpt_forward, on one row.
void decoder_step(Decoder* d, int token) {
    GPT* g = d->gpt;
    const ModelConfig* c = &g->config;
    int C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads, HS = c->head_dim;
    int Q = NH * HS, KV = NKV * HS, FF = c->intermediate_size, Vp = padded_vocab_size(c->vocab_size);
    int norm = c->family->norm;
    float eps = (float)c->norm_eps;
    size_t row = (size_t)KV * sizeof(floatX), cache = (size_t)d->capacity * (size_t)KV;
    size_t past = (size_t)d->length * (size_t)KV;
    Matmul* mm = &g->matmul;
    cudaStream_t stream = g->stream;
    CHECK(d->length < d->capacity);
    CUDA_CHECK(cudaMemcpyAsync(d->token, &token, sizeof token, cudaMemcpyHostToDevice, stream));
    Parameters<floatX> p = weights_of(g, 0);
    Positions here = {1, {d->length, d->length + 1}};
    LayerActivations mlp = {};
    mlp.ln2 = d->norm, mlp.fc = d->fc, mlp.act = d->act;
    embedding_forward(d->residual, d->token, p.wte, p.wpe, here, 1, 1, C, stream);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        p = weights_of(g, l);
        floatX *keys = d->keys + (size_t)l * cache, *values = d->values + (size_t)l * cache;
        norm_forward(d->norm, d->mean, d->rstd, d->residual, p.ln1w, p.ln1b, 1, C, eps, norm, stream);
        matmul_forward(d->qkv, d->norm, p.qkvw, p.qkvb, 1, C, Q + 2 * KV, mm);
        if (g->rope_cos != NULL)
            rope_forward(d->qkv, g->rope_cos, g->rope_sin, here, 1, 1, NH, NKV, HS, stream);
        CUDA_CHECK(cudaMemcpyAsync(keys + past, d->qkv + Q, row, cudaMemcpyDeviceToDevice, stream));
        CUDA_CHECK(cudaMemcpyAsync(values + past, d->qkv + Q + KV, row, cudaMemcpyDeviceToDevice, stream));
        attention_decode(d->att, d->qkv, keys, values, d->length + 1, NH, NKV, HS, stream);
        matmul_forward(d->hidden, d->att, p.attprojw, p.attprojb, 1, Q, C, mm);
        residual_norm_forward(d->residual, d->norm, d->mean, d->rstd, d->residual, d->hidden, p.ln2w, p.ln2b,
                              1, C, eps, norm, stream);
        mlp_forward(g, &mlp, p, 1);
        matmul_forward(d->hidden, d->act, p.fcprojw, p.fcprojb, 1, FF, C, mm);
        residual_forward(d->residual, d->residual, d->hidden, (size_t)C, stream);
    }
    norm_forward(d->norm, d->mean, d->rstd, d->residual, p.lnfw, p.lnfb, 1, C, eps, norm, stream);
    matmul_forward(d->scores, d->norm, head_of(p), NULL, 1, C, Vp, mm);
    CUDA_CHECK(cudaMemcpyAsync(d->host_scores, d->scores, (size_t)Vp * sizeof(floatX), cudaMemcpyDeviceToHost,
                               stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int v = 0; v < Vp; v++) d->logits[v] = to_float(d->host_scores[v]);
    d->length++;
}

const float* decoder_logits(const Decoder* d) { return d->logits; }

// ----------------------------------------------------------------------------
// the program: what the run asks of it before there is a model, and main

static const char* const precision_names[] = {"auto", "fp32", "tf32",
                                              "bf16"}; // in the order of ComputePrecision

// Kernels read 16 bytes at a time, so every row of every array must be a multiple of that.
static bool check_sizes(const ModelConfig* c, Error* err) {
    const struct {
        const char* key;
        int value;
    } sizes[] = {{"hidden_size (n_embd)", c->hidden_size},
                 {"head_dim (hidden_size / num_attention_heads)", c->head_dim},
                 {"intermediate_size", c->intermediate_size}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        if (sizes[i].value % 8 != 0)
            return fail(
                err, EXIT_CONFIG,
                "model.%s is %d: %s needs a multiple of 8, as it reads 16 bytes at a time; change it, or "
                "use train_gpt_cpu",
                sizes[i].key, sizes[i].value, PROGRAM_NAME);
    if (c->hidden_size > NORM_MAX_COLUMNS)
        return fail(err, EXIT_CONFIG, "hidden_size (n_embd) is %d: %s has norms for at most %d",
                    c->hidden_size, PROGRAM_NAME, NORM_MAX_COLUMNS);
    if (c->head_dim <= ATTENTION_MAX_HEAD) return true;
    return fail(err, EXIT_CONFIG, "head_dim is %d: %s has attention for at most %d", c->head_dim,
                PROGRAM_NAME, ATTENTION_MAX_HEAD);
}

// precision.compute: auto becomes what this program was built for; what it cannot honour is refused.
bool gpt_resolve(RunConfig* run, bool training, Error* err) {
    const bool fp32 = sizeof(floatX) == sizeof(float);
    int* compute = &run->precision.compute;
    if (*compute == COMPUTE_AUTO) *compute = fp32 ? COMPUTE_FP32 : COMPUTE_BF16;
    if (fp32 == (*compute == COMPUTE_BF16))
        return fail(err, EXIT_CONFIG,
                    "precision.compute is %s, and %s computes in %s: leave the key out, or use %s",
                    precision_names[*compute], PROGRAM_NAME, fp32 ? "fp32 or tf32" : "bf16",
                    fp32 ? "train_gpt" : "train_gpt_fp32 (or train_gpt_cpu)");
    if (fp32 && training && run->precision.gradients != STORE_FP32)
        return fail(
            err, EXIT_CONFIG,
            "precision.gradients is bf16: cuBLASLt has no fp32 product with a bf16 result, so %s adds them up "
            "in fp32; leave the key out, or use train_gpt",
            PROGRAM_NAME);
    return check_sizes(&run->model, err);
}

// Streams that share a hardware queue wait for each other: there are as many queues as can be had, unless somebody
// has said otherwise.
void gpt_choose_device(int local_rank) {
    setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
    *device_local_rank() = local_rank;
}

uint64_t gpt_memory_limit(void) {
    Device device;
    Error none = {0, {0}};
    return device_open(&device, &none) ? device_free_memory() : 0;
}

int gpt_memory(const RunConfig* run, bool training, MemoryLine lines[MEMORY_LINES_MAX]) {
    size_t bytes[NUM_MEMORY_CLASSES];
    int count = 0;
    gpt_plan(run, run->batch.micro_batch_size, run->batch.sequence_length, training, bytes);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        if (bytes[i] == 0) continue;
        lines[count].name = memory_class_names[i], lines[count].bytes = bytes[i];
        count++;
    }
    return count;
}

double gpt_peak_flops(const RunConfig* run) {
    Device device;
    Error none = {0, {0}};
    return device_open(&device, &none) ? gpu_peak_flops(device.name, run->precision.compute) : 0;
}

void gpt_print_device(FILE* out) {
    Device device;
    Error none = {0, {0}};
    if (!device_open(&device, &none)) {
        fprintf(out, "no GPU: %s\n", none.text);
        return;
    }
    fprintf(out, "%s, sm_%d, %.1f GB (%.1f GB free), driver for CUDA %d.%d\n", device.name,
            device.architecture, (double)device.memory / 1e9, (double)device_free_memory() / 1e9,
            device.driver / 1000, device.driver % 1000 / 10);
}

bool gpt_bus_id(char out[32]) {
    cudaDeviceProp properties;
    int number;
    if (cudaGetDevice(&number) != cudaSuccess || cudaGetDeviceProperties(&properties, number) != cudaSuccess)
        return false;
    snprintf(out, 32, "%08x:%02x:%02x.0", properties.pciDomainID, properties.pciBusID,
             properties.pciDeviceID);
    return true;
}

void program_versions(FILE* out) {
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);
    fprintf(out, "CUDA runtime %d.%d\ncuBLASLt %zu\n", runtime / 1000, runtime % 1000 / 10,
            cublasLtGetVersion());
#ifdef USE_NCCL
    int nccl = 0;
    ncclGetVersion(&nccl);
    fprintf(out, "NCCL %d.%d.%d\n", nccl / 10000, nccl % 10000 / 100, nccl % 100);
#else
    fprintf(out, "built without NCCL\n");
#endif
}

bool gpt_self_test(const RunConfig* run, bool* bad, Error* err) {
    Device device;
    return device_open(&device, err) && self_test(run->precision.compute, bad, err);
}

// What a large matmul of this model and a copy reach on this GPU now, in a tenth of a second.
void gpt_measure(const RunConfig* run, double* matmul_rate, double* copy_rate) {
    Device device;
    Error none = {0, {0}};
    *matmul_rate = *copy_rate = 0;
    if (device_open(&device, &none)) probe_rates(run, matmul_rate, copy_rate);
}

#ifndef TESTING
#include "llmc/commands.h" // defines: program_main

int main(int argc, char** argv) {
    static GPT gpt;
    static Decoder decoder;
    const Program program = {PROGRAM_NAME, VERSION, true, &gpt, &decoder};
    return program_main(&program, argc, argv);
}
#endif
