// train_gpt.cu: the trainer. GPT pre-training in bf16 on one GPU, from a run config to a checkpoint.
//
// The same algorithm as train_gpt.c, layer by layer, under the same names; what differs is where the numbers
// live. Matmuls are cuBLASLt's, every other kernel is ours (llmc/*.cuh). Read it from top to bottom:
//
//     memory      what is kept for a model and a micro-batch; what lays it out is the planner, too
//     forward     a block is a straight list of layers
//     backward    the same list upside down
//     step        micro-batches, norm, update: all on the device, the host waits once, for the loss
//     host        checkpoints: a copy of the weights and moments in the host's memory
//     decoding    one token at a time, with a cache of keys and values
//     the program what the run asks of it (llmc/program.h), and main
//
// Shapes: B sequences, T positions, N = B * T rows, C hidden size, V vocabulary (Vp padded), L layers, NH
// query heads, NKV key/value heads, HS head size, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF feed-forward size,
// FC = FF, or 2 FF where a gate lies beside it. A gradient's name is its tensor's with a d in front. Grad is
// the element type of parameter gradients: float, or floatX (precision.gradients).
#include "llmc/adamw.cuh"       // defines: StepControl, adamw_update, update_control
#include "llmc/attention.cuh"   // defines: attention_forward, attention_backward, attention_decode
#include "llmc/activation.cuh"  // defines: activation_forward, activation_backward
#include "llmc/classifier.cuh"  // defines: classifier
#include "llmc/cuda_common.cuh" // defines: floatX, CUDA_CHECK
#include "llmc/device.cuh"      // defines: Device, device_open
#include "llmc/embedding.cuh"   // defines: embedding_forward, embedding_backward
#include "llmc/global_norm.cuh" // defines: global_norm_squared, add_sum
#include "llmc/matmul.cuh"      // defines: Matmul, matmul_forward, matmul_backward ...
#include "llmc/norm.cuh"        // defines: norm_forward, residual_norm_forward, norm_backward
#include "llmc/rope.cuh"        // defines: rope_forward, rope_backward
#include "llmc/dataloader.h"    // defines: document_starts
#include "llmc/probe.cuh"       // defines: probe_rates
#include "llmc/program.h"       // defines: what the run asks of this program
#include "llmc/token_order.h"   // defines: token_order

#ifdef USE_NCCL
#include <nccl.h>
#endif
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
    floatX* ln1;                // (N, C)      recomputed from "norm" on
    float *ln1_mean, *ln1_rstd; // (N) (N)
    floatX *qkv, *att;          // (N, QKV) (N, Q)  recomputed with "block"
    float* lse;                 // (B, NH, T)  "
    floatX* residual2;          // (N, C)      "    behind attention
    floatX* ln2;                // (N, C)      recomputed from "norm" on
    float *ln2_mean, *ln2_rstd; // (N) (N)
    floatX* fc;                 // (N, FC)     recomputed with "block"; before the activation
    floatX* act;                // (N, FF)     recomputed from "activation" on
    floatX* residual3;          // (N, C)      behind the MLP
} LayerActivations;

// Four arrays of integers for a micro-batch, one behind the other, so that one copy brings all of them.
enum BatchArray { BATCH_INPUTS, BATCH_TARGETS, BATCH_DOC_START, BATCH_ORDER, NUM_BATCH_ARRAYS };

// The logits of a whole micro-batch never exist at once: the head works on this much of them at a time.
static const size_t LOGIT_BYTES = (size_t)512 << 20;

struct GPT {
    ModelConfig config;
    ParameterLayout layout;
    int B, T;      // the micro-batch that the activations have room for
    int recompute; // a Recompute
    bool fused_gelu, moments_bf16, gradients_bf16, split_master;
    floatX* params;
    int16_t* remainder;  // the low halves of the fp32 master weights; NULL where the weights are the master
    void *grads, *m, *v; // float, or floatX by precision.gradients and precision.moments
    LayerActivations* layers;
    floatX *embedded, *lnf;     // (N, C) (N, C)
    float *lnf_mean, *lnf_rstd; // (N) (N)
    float* losses;              // (N)
    float *rope_cos, *rope_sin; // (maxT, HS / 2), NULL with learned positions
    int* batch;                 // (NUM_BATCH_ARRAYS, N)
    bool document_mask;
    StepControl* control;
    double* norm_partials;
    // scratch: dead when a block is done with it; arrays in one row never live at the same time as those in
    // another, and share memory
    floatX* hidden;      // (N, C) a branch's output; in the backward pass
    floatX* dnorm;       // (N, C) its gradient, in the same place
    floatX* dresidual;   // (N, C) gradient of the residual stream
    floatX* logits;      // (logit_rows, Vp)
    floatX *dact, *dfc;  // (N, FF) (N, FC)
    floatX *datt, *dqkv; // (N, Q) (N, QKV)
    int logit_rows;
    float* column_scratch; // partial sums of bias and norm gradients
    void *attention_scratch, *matmul_workspace;
    float* bias_scratch;
    Matmul matmul;
    void* memory[NUM_MEMORY_CLASSES]; // the allocations behind all of these
    // the host's side of a step
    Device device;
    cudaStream_t stream, copy_stream;
    cudaEvent_t step_done, snapshot_done;
    int *step_batch[2], *eval_batch; // pinned: the micro-batches of this step and of the next; one more
    int* order_counts;               // scratch of token_order
    int step_slot, step_micro_batches;
    float* host_losses;        // (N) pinned
    StepControl* host_control; // pinned: what the last step reported
    float grad_scale;          // 1 / targets of a step
    bool use_graph, plans_made;
    cudaGraphExec_t micro_step_graph;
    HostState host; // pinned, made when a checkpoint is first read or written
    int16_t* host_remainder;
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

// A layer's own memory for what batch.recompute keeps; for the rest, layer 0's.
static void lay_out_layer(GPT* g, int l, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = rows_of(g), C = model_dim(c, DIM_HIDDEN);
    LayerActivations *a = &g->layers[l], *first = &g->layers[0];
    int level = training ? g->recompute : RECOMPUTE_BLOCK;
    bool keep_block = l == 0 || level < RECOMPUTE_BLOCK, keep_norm = l == 0 || level < RECOMPUTE_NORM;
    bool keep_act = l == 0 || level < RECOMPUTE_ACTIVATION;
    *a = *first;
    if (keep_norm) arena_take(&a->ln1, arena, N * C);
    if (level < RECOMPUTE_NORM)
        arena_take(&a->ln2, arena, N * C);
    else
        a->ln2 = a->ln1; // computed once more just before it is read, so one place does for both
    if (keep_act) arena_take(&a->act, arena, N * model_dim(c, DIM_FF));
    if (keep_block) {
        arena_take(&a->ln1_mean, arena, N), arena_take(&a->ln1_rstd, arena, N);
        arena_take(&a->ln2_mean, arena, N), arena_take(&a->ln2_rstd, arena, N);
        arena_take(&a->qkv, arena, N * model_dim(c, DIM_QKV));
        arena_take(&a->att, arena, N * model_dim(c, DIM_HEADS));
        arena_take(&a->lse, arena, N * (size_t)c->num_attention_heads);
        arena_take(&a->residual2, arena, N * C);
        arena_take(&a->fc, arena, N * model_dim(c, DIM_FC));
    }
    // the residual stream between blocks is what recomputing starts from; without a backward pass two places
    // take turns
    if (training || l < 2)
        arena_take(&a->residual3, arena, N * C);
    else
        a->residual3 = g->layers[l - 2].residual3;
}

static void lay_out_activations(GPT* g, Arena* arena, bool training) {
    size_t N = rows_of(g), C = model_dim(&g->config, DIM_HIDDEN);
    arena_take(&g->embedded, arena, N * C);
    for (int l = 0; l < g->config.num_hidden_layers; l++) lay_out_layer(g, l, arena, training);
    arena_take(&g->lnf, arena, N * C);
    arena_take(&g->lnf_mean, arena, N), arena_take(&g->lnf_rstd, arena, N);
    arena_take(&g->losses, arena, N);
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

// What lives only inside the head, the MLP's backward pass or attention's: one place for whichever it is.
static void lay_out_shared_scratch(GPT* g, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = rows_of(g), Vp = model_dim(c, DIM_VOCAB), begin = arena->used, end;
    size_t rows = LOGIT_BYTES / (Vp * sizeof(floatX)), chunks = ceil_div(N, rows);
    rows = ceil_div(N, chunks);                     // equal chunks
    g->logit_rows = (int)ceil_div(rows, 128) * 128; // whole tiles of the matmul
    arena_take(&g->logits, arena, (size_t)g->logit_rows * Vp);
    end = arena->used, arena->used = begin;
    char* attention;
    arena_take(
        &attention, arena,
        attention_scratch_bytes(g->B, g->T, c->num_attention_heads, c->num_key_value_heads, c->head_dim));
    g->attention_scratch = attention;
    if (training) {
        arena_take(&g->datt, arena, N * model_dim(c, DIM_HEADS));
        arena_take(&g->dqkv, arena, N * model_dim(c, DIM_QKV));
        end = larger(end, arena->used), arena->used = begin;
        if (!g->fused_gelu) arena_take(&g->dact, arena, N * model_dim(c, DIM_FF));
        arena_take(&g->dfc, arena, N * model_dim(c, DIM_FC));
    }
    arena->used = larger(end, arena->used);
}

static void lay_out_scratch(GPT* g, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = rows_of(g), C = model_dim(c, DIM_HIDDEN);
    size_t widest = larger(larger(model_dim(c, DIM_QKV), model_dim(c, DIM_FC)), C);
    char* workspace;
    arena_take(&g->batch, arena, NUM_BATCH_ARRAYS * N);
    arena_take(&g->control, arena, 1);
    arena_take(&workspace, arena, matmul_workspace_bytes());
    g->matmul_workspace = workspace;
    if (c->family->position == POSITION_ROPE) {
        size_t angles = (size_t)c->max_position_embeddings * (size_t)c->head_dim / 2;
        arena_take(&g->rope_cos, arena, angles), arena_take(&g->rope_sin, arena, angles);
    }
    arena_take(&g->hidden, arena, N * C);
    g->dnorm = g->hidden;
    if (training) {
        arena_take(&g->dresidual, arena, N * C);
        arena_take(&g->norm_partials, arena, NORM_PARTIALS);
        arena_take(&g->bias_scratch, arena, matmul_bias_scratch((int)widest));
        arena_take(&g->column_scratch, arena,
                   larger(norm_backward_scratch((int)C), column_sums_scratch((int)widest)));
    }
    lay_out_shared_scratch(g, arena, training);
}

// Places every array of one class of memory; `training` adds what only the backward pass and the update need.
static void lay_out(GPT* g, int memory_class, Arena* arena, bool training) {
    size_t weights = g->layout.num_parameters;
    size_t moment = g->moments_bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
    size_t gradient = g->gradients_bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
    char *grads = NULL, *m = NULL, *v = NULL;
    switch (memory_class) {
    case MEMORY_WEIGHTS:
        arena_take(&g->params, arena, weights);
        break;
    case MEMORY_MASTER:
        if (training && g->split_master) arena_take(&g->remainder, arena, weights);
        break;
    case MEMORY_GRADIENTS:
        if (training) arena_take(&grads, arena, weights * gradient);
        g->grads = grads;
        break;
    case MEMORY_MOMENTS:
        if (training) arena_take(&m, arena, weights * moment), arena_take(&v, arena, weights * moment);
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

// What of a run config decides how the model computes and what it keeps.
static void gpt_configure(GPT* g, const RunConfig* run, int B, int T) {
    memset(g, 0, sizeof *g);
    g->config = run->model;
    g->layout = parameter_layout(&run->model);
    g->B = B, g->T = T;
    g->recompute = run->batch.recompute;
    g->fused_gelu = run->precision.fused_gelu && run->model.family->activation == ACTIVATION_GELU_TANH;
    g->use_graph = run->parallel.cuda_graph;
    bool weights_are_master = sizeof(floatX) == sizeof(float) || run->precision.master_weights == STORE_BF16;
    g->split_master = !weights_are_master;
    g->gradients_bf16 = run->precision.gradients == STORE_BF16;
    g->moments_bf16 = run->precision.moments == STORE_BF16;
}

// The exact size of each class in bytes, without allocating any of it.
static void gpt_plan(const RunConfig* run, int B, int T, bool training, size_t bytes[NUM_MEMORY_CLASSES]) {
    GPT* g = (GPT*)calloc_check(1, sizeof *g);
    gpt_configure(g, run, B, T);
    g->layers = (LayerActivations*)calloc_check((size_t)run->model.num_hidden_layers, sizeof *g->layers);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {NULL, 0};
        lay_out(g, i, &arena, training);
        bytes[i] = arena.used;
    }
    free(g->layers);
    free(g);
}

// ----------------------------------------------------------------------------
// forward

// Every parameter of `memory` (the weights, or the gradients) as layer l sees it.
template <typename X> static Parameters<X> parameters_of(const GPT* g, X* memory, int l) {
    Parameters<X> p;
    for (int i = 0; i < NUM_TENSORS; i++)
        p.at[i] = g->layout.size[i] != 0 ? memory + tensor_offset(&g->layout, (enum TensorId)i, l) : NULL;
    return p;
}

// The head's weight: a matrix of its own, or the embedding once more.
template <typename X> static X* head_of(Parameters<X> p) { return p.lmhead != NULL ? p.lmhead : p.wte; }

static int* batch_array(const GPT* g, enum BatchArray which) { return g->batch + (size_t)which * rows_of(g); }
static const int* doc_starts(const GPT* g) {
    return g->document_mask ? batch_array(g, BATCH_DOC_START) : NULL;
}

// The residual stream that enters layer l (l = L: that leaves the last one).
static floatX* residual_into(const GPT* g, int l) {
    return l == 0 ? g->embedded : g->layers[l - 1].residual3;
}

// The norm that reads the residual stream before layer l: the layer's first, or the last of all (l = L).
typedef struct {
    floatX* out;
    float *mean, *rstd;
    const floatX *weight, *bias;
} Norm;

static Norm norm_before(const GPT* g, int l) {
    bool last = l == g->config.num_hidden_layers;
    Parameters<floatX> p = parameters_of(g, g->params, last ? 0 : l);
    LayerActivations* a = last ? NULL : &g->layers[l];
    Norm final_norm = {g->lnf, g->lnf_mean, g->lnf_rstd, p.lnfw, p.lnfb};
    if (last) return final_norm;
    Norm norm = {a->ln1, a->ln1_mean, a->ln1_rstd, p.ln1w, p.ln1b};
    return norm;
}

static void mlp_forward(const GPT* g, LayerActivations* a, Parameters<floatX> p, int N, Matmul* mm) {
    int C = g->config.hidden_size, FF = g->config.intermediate_size;
    int FC = (int)model_dim(&g->config, DIM_FC);
    if (g->fused_gelu) {
        matmul_gelu_forward(a->act, a->fc, a->ln2, p.fcw, p.fcb, N, C, FC, mm);
    } else {
        matmul_forward(a->fc, a->ln2, p.fcw, p.fcb, N, C, FC, mm);
        activation_forward(a->act, a->fc, N, FF, g->config.family->activation, g->stream);
    }
}

// From ln1 to the activation: as much of a block as its backward pass reads, and recomputes.
static void block_forward_inside(GPT* g, int l, int B) {
    const ModelConfig* c = &g->config;
    int T = g->T, N = B * T, C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads;
    int HS = c->head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS;
    Parameters<floatX> p = parameters_of(g, g->params, l);
    LayerActivations* a = &g->layers[l];
    Matmul* mm = &g->matmul;
    cudaStream_t stream = g->stream;

    matmul_forward(a->qkv, a->ln1, p.qkvw, p.qkvb, N, C, QKV, mm);
    if (g->rope_cos != NULL) rope_forward(a->qkv, g->rope_cos, g->rope_sin, 0, B, T, NH, NKV, HS, stream);
    attention_forward(a->att, a->lse, g->attention_scratch, a->qkv, doc_starts(g), B, T, NH, NKV, HS, stream);
    matmul_forward(g->hidden, a->att, p.attprojw, p.attprojb, N, Q, C, mm);
    residual_norm_forward(a->residual2, a->ln2, a->ln2_mean, a->ln2_rstd, residual_into(g, l), g->hidden,
                          p.ln2w, p.ln2b, N, C, (float)c->norm_eps, c->family->norm, stream);
    mlp_forward(g, a, p, N, mm);
}

// ln1 was taken of the residual stream when it was written: by the block before, or behind the embedding.
static void block_forward(GPT* g, int l, int B) {
    const ModelConfig* c = &g->config;
    int N = B * g->T, C = c->hidden_size, FF = c->intermediate_size;
    Parameters<floatX> p = parameters_of(g, g->params, l);
    LayerActivations* a = &g->layers[l];
    Norm next = norm_before(g, l + 1);

    nvtxRangePushA("block_forward");
    block_forward_inside(g, l, B);
    matmul_forward(g->hidden, a->act, p.fcprojw, p.fcprojb, N, FF, C, &g->matmul);
    residual_norm_forward(a->residual3, next.out, next.mean, next.rstd, a->residual2, g->hidden, next.weight,
                          next.bias, N, C, (float)c->norm_eps, c->family->norm, g->stream);
    nvtxRangePop();
}

// g->batch -> lnf (B, T, C), what the head reads.
static void gpt_forward(GPT* g, int B) {
    const ModelConfig* c = &g->config;
    int N = B * g->T, C = c->hidden_size;
    CHECK(B <= g->B);
    Parameters<floatX> p = parameters_of(g, g->params, 0);
    Norm first = norm_before(g, 0);
    embedding_forward(g->embedded, batch_array(g, BATCH_INPUTS), p.wte, p.wpe, B, g->T, C, g->stream);
    norm_forward(first.out, first.mean, first.rstd, g->embedded, first.weight, first.bias, N, C,
                 (float)c->norm_eps, c->family->norm, g->stream);
    for (int l = 0; l < c->num_hidden_layers; l++) block_forward(g, l, B);
}

// Cross-entropy of every row into g->losses (a negative target is masked: loss 0). With dhead also the
// head's backward pass, since the logits of a chunk of rows exist only here: dhead +=, and
// g->dnorm (B, T, C) = g->grad_scale * d(sum of losses) / d lnf.
template <typename Grad> static void gpt_loss(GPT* g, Grad* dhead, int B) {
    int N = B * g->T, C = g->config.hidden_size, V = g->config.vocab_size, Vp = padded_vocab_size(V);
    floatX* head = head_of(parameters_of(g, g->params, 0));
    const int* targets = batch_array(g, BATCH_TARGETS);
    nvtxRangePushA("head");
    for (int row = 0; row < N; row += g->logit_rows) {
        int rows = N - row < g->logit_rows ? N - row : g->logit_rows;
        floatX *lnf = g->lnf + (size_t)row * (size_t)C, *dlnf = g->dnorm + (size_t)row * (size_t)C;
        matmul_forward(g->logits, lnf, head, NULL, rows, C, Vp, &g->matmul);
        classifier(g->losses + row, g->logits, targets + row, g->grad_scale, rows, V, Vp, dhead != NULL,
                   g->stream);
        if (dhead != NULL)
            matmul_backward(dlnf, dhead, (Grad*)NULL, g->logits, lnf, head, rows, C, Vp, &g->matmul);
    }
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
        matmul_gelu_backward(g->dfc, dp.fcprojw, dp.fcprojb, g->dresidual, a->act, p.fcprojw, a->fc, N, FF, C,
                             mm);
    } else {
        matmul_backward(g->dact, dp.fcprojw, dp.fcprojb, g->dresidual, a->act, p.fcprojw, N, FF, C, mm);
        activation_backward(g->dfc, g->dact, a->fc, N, FF, g->config.family->activation, g->stream);
    }
}

// What batch.recompute did not keep of a block, again: the same kernels on the same numbers, so the same
// bits. Norms follow one by one in block_backward, as they share their memory.
static void block_recompute(GPT* g, int l, int B) {
    const ModelConfig* c = &g->config;
    LayerActivations* a = &g->layers[l];
    Norm norm = norm_before(g, l);
    int N = B * g->T;
    if (l == c->num_hidden_layers - 1) return; // it was the last to write what all layers share
    if (g->recompute == RECOMPUTE_BLOCK) {
        norm_forward(norm.out, norm.mean, norm.rstd, residual_into(g, l), norm.weight, norm.bias, N,
                     c->hidden_size, (float)c->norm_eps, c->family->norm, g->stream);
        block_forward_inside(g, l, B);
    } else if (g->recompute >= RECOMPUTE_ACTIVATION) {
        activation_forward(a->act, a->fc, N, c->intermediate_size, c->family->activation, g->stream);
    }
}

template <typename Grad> static void block_backward(GPT* g, int l, int B) {
    const ModelConfig* c = &g->config;
    int T = g->T, N = B * T, C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads;
    int HS = c->head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, norm = c->family->norm;
    int FC = (int)model_dim(c, DIM_FC);
    float eps = (float)c->norm_eps;
    Parameters<floatX> p = parameters_of(g, g->params, l);
    Parameters<Grad> dp = parameters_of(g, (Grad*)g->grads, l);
    LayerActivations* a = &g->layers[l];
    floatX* residual = residual_into(g, l);
    Matmul* mm = &g->matmul;
    cudaStream_t stream = g->stream;
    bool norms_again = g->recompute >= RECOMPUTE_NORM;

    nvtxRangePushA("block_backward");
    block_recompute(g, l, B);
    mlp_backward(g, a, dp, p, N);
    if (norms_again)
        norm_forward(a->ln2, a->ln2_mean, a->ln2_rstd, a->residual2, p.ln2w, p.ln2b, N, C, eps, norm, stream);
    matmul_backward(g->dnorm, dp.fcw, dp.fcb, g->dfc, a->ln2, p.fcw, N, C, FC, mm);
    norm_backward(g->dresidual, dp.ln2w, dp.ln2b, g->column_scratch, g->dnorm, a->residual2, p.ln2w,
                  a->ln2_mean, a->ln2_rstd, N, C, norm, stream);

    matmul_backward(g->datt, dp.attprojw, dp.attprojb, g->dresidual, a->att, p.attprojw, N, Q, C, mm);
    attention_backward(g->dqkv, g->attention_scratch, g->datt, a->qkv, a->att, a->lse, doc_starts(g), B, T,
                       NH, NKV, HS, stream);
    if (g->rope_cos != NULL) rope_backward(g->dqkv, g->rope_cos, g->rope_sin, 0, B, T, NH, NKV, HS, stream);
    if (norms_again)
        norm_forward(a->ln1, a->ln1_mean, a->ln1_rstd, residual, p.ln1w, p.ln1b, N, C, eps, norm, stream);
    matmul_backward(g->dnorm, dp.qkvw, dp.qkvb, g->dqkv, a->ln1, p.qkvw, N, C, QKV, mm);
    norm_backward(g->dresidual, dp.ln1w, dp.ln1b, g->column_scratch, g->dnorm, residual, p.ln1w, a->ln1_mean,
                  a->ln1_rstd, N, C, norm, stream);
    nvtxRangePop();
}

// After gpt_forward and gpt_loss with a dhead on the same batch: adds to every gradient.
template <typename Grad> static void gpt_backward(GPT* g, int B) {
    const ModelConfig* c = &g->config;
    int L = c->num_hidden_layers, N = B * g->T, C = c->hidden_size;
    Parameters<floatX> p = parameters_of(g, g->params, 0);
    Parameters<Grad> dp = parameters_of(g, (Grad*)g->grads, 0);
    CUDA_CHECK(cudaMemsetAsync(g->dresidual, 0, (size_t)N * (size_t)C * sizeof(floatX), g->stream));
    norm_backward(g->dresidual, dp.lnfw, dp.lnfb, g->column_scratch, g->dnorm, residual_into(g, L), p.lnfw,
                  g->lnf_mean, g->lnf_rstd, N, C, c->family->norm, g->stream);
    for (int l = L - 1; l >= 0; l--) block_backward<Grad>(g, l, B);
    embedding_backward(dp.wte, dp.wpe, g->dresidual, batch_array(g, BATCH_INPUTS),
                       batch_array(g, BATCH_ORDER), B, g->T, C, g->stream);
}

// ----------------------------------------------------------------------------
// step: everything is enqueued at once; the only wait is for what the step reports

// Forward, loss and backward of the micro-batch in g->batch.
template <typename Grad> static void micro_step_launch(GPT* g) {
    Parameters<Grad> dp = parameters_of(g, (Grad*)g->grads, 0);
    gpt_forward(g, g->B);
    gpt_loss(g, head_of(dp), g->B);
    add_sum(&g->control->loss_sum, g->losses, (int)rows_of(g), g->stream);
    gpt_backward<Grad>(g, g->B);
}

static void micro_step(GPT* g) {
    if (g->gradients_bf16)
        micro_step_launch<__nv_bfloat16>(g);
    else
        micro_step_launch<float>(g);
}

// The same through a CUDA graph, recorded at the second call: the first makes the plans of all matmuls, and
// autotuning cannot be recorded. grad_scale is part of it: every step of a run has as many targets.
static void micro_step_through_graph(GPT* g) {
    if (!g->plans_made) {
        micro_step(g);
        g->plans_made = true;
        return;
    }
    if (g->micro_step_graph == NULL) {
        cudaGraph_t graph;
        CUDA_CHECK(cudaStreamBeginCapture(g->stream, cudaStreamCaptureModeThreadLocal));
        micro_step(g);
        CUDA_CHECK(cudaStreamEndCapture(g->stream, &graph));
        CUDA_CHECK(cudaGraphInstantiate(&g->micro_step_graph, graph, 0));
        CUDA_CHECK(cudaGraphDestroy(graph));
    }
    CUDA_CHECK(cudaGraphLaunch(g->micro_step_graph, g->stream));
}

// rows (B, T + 1) -> the arrays of one micro-batch: inputs and targets, one shifted against the other, where
// documents start, and the positions in the order of their tokens, by which the embedding's gradient is summed.
static void fill_batch(GPT* g, int* batch, const int32_t* rows, int num_rows, bool document_mask,
                       int eot_id) {
    size_t N = rows_of(g), T = (size_t)g->T;
    for (size_t b = 0; b < (size_t)num_rows; b++) {
        const int32_t* row = rows + b * (T + 1);
        memcpy(batch + BATCH_INPUTS * N + b * T, row, T * sizeof(int));
        memcpy(batch + BATCH_TARGETS * N + b * T, row + 1, T * sizeof(int));
        if (document_mask) document_starts(batch + BATCH_DOC_START * N + b * T, row, g->T, eot_id);
    }
    token_order(batch + BATCH_ORDER * N, batch + BATCH_INPUTS * N, num_rows * g->T, g->config.vocab_size,
                g->order_counts);
    g->document_mask = document_mask;
}

static void upload_batch(GPT* g, const int* batch) {
    CUDA_CHECK(cudaMemcpyAsync(g->batch, batch, NUM_BATCH_ARRAYS * rows_of(g) * sizeof(int),
                               cudaMemcpyHostToDevice, g->stream));
}

// Prepares the rows of the next step (num_rows, T + 1) while the device works on the current one.
void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    size_t micro_batch = NUM_BATCH_ARRAYS * rows_of(g), row = (size_t)(g->T + 1);
    g->step_slot = !g->step_slot; // the other one is being read
    g->step_micro_batches = num_rows / g->B;
    g->grad_scale = (float)(1.0 / ((double)num_rows * g->T)); // training masks no target
    for (int i = 0; i < g->step_micro_batches; i++)
        fill_batch(g, g->step_batch[g->step_slot] + (size_t)i * micro_batch, rows + (size_t)(i * g->B) * row,
                   g->B, document_mask, eot_id);
}

template <typename Grad, typename Moment>
static void update_launch(GPT* g, const RunConfig* run, double num_targets) {
    size_t n = g->layout.num_parameters;
    global_norm_squared(g->norm_partials, (const Grad*)g->grads, n, g->stream);
    update_control(g->control, g->norm_partials, global_norm_parts<Grad>(n), num_targets,
                   run->optimizer.grad_clip, run->optimizer.beta1, run->optimizer.beta2, g->stream);
    CUDA_CHECK(cudaStreamWaitEvent(g->stream, g->snapshot_done, 0)); // weights may still be being copied
    adamw_update(g->params, g->remainder, (Grad*)g->grads, (Moment*)g->m, (Moment*)g->v, &g->layout, run,
                 g->control, g->stream);
}

static void update(GPT* g, const RunConfig* run, double num_targets) {
    nvtxRangePushA("update");
    if (g->gradients_bf16 && g->moments_bf16)
        update_launch<__nv_bfloat16, __nv_bfloat16>(g, run, num_targets);
    else if (g->gradients_bf16)
        update_launch<__nv_bfloat16, float>(g, run, num_targets);
    else if (g->moments_bf16)
        update_launch<float, __nv_bfloat16>(g, run, num_targets);
    else
        update_launch<float, float>(g, run, num_targets);
    nvtxRangePop();
}

// Enqueues one optimizer step on the rows of gpt_load_batch. applied_steps: those before this one.
void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps) {
    size_t micro_batch = NUM_BATCH_ARRAYS * rows_of(g);
    nvtxRangePushA("step");
    step_control_begin(g->control, lr, applied_steps, g->stream);
    for (int i = 0; i < g->step_micro_batches; i++) {
        upload_batch(g, g->step_batch[g->step_slot] + (size_t)i * micro_batch);
        if (g->use_graph)
            micro_step_through_graph(g);
        else
            micro_step(g);
    }
    update(g, run, (double)g->step_micro_batches * (double)rows_of(g));
    CUDA_CHECK(
        cudaMemcpyAsync(g->host_control, g->control, sizeof *g->control, cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaEventRecord(g->step_done, g->stream));
    nvtxRangePop();
}

StepResult gpt_finish_step(GPT* g) {
    StepResult r;
    CUDA_CHECK(cudaEventSynchronize(g->step_done));
    memset(&r, 0, sizeof r);
    r.loss = g->host_control->loss, r.grad_norm = g->host_control->grad_norm;
    r.applied = g->host_control->applied != 0;
    return r;
}

// The loss of every token of at most B rows (num_rows, T + 1), for evaluation; valid until the next call.
const float* gpt_losses(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    fill_batch(g, g->eval_batch, rows, num_rows, document_mask, eot_id);
    upload_batch(g, g->eval_batch);
    gpt_forward(g, num_rows);
    gpt_loss(g, (float*)NULL, num_rows);
    CUDA_CHECK(cudaMemcpyAsync(g->host_losses, g->losses, (size_t)(num_rows * g->T) * sizeof(float),
                               cudaMemcpyDeviceToHost, g->stream));
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    return g->host_losses;
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
    g->order_counts = (int*)malloc_check(((size_t)g->config.vocab_size + 1) * sizeof(int));
    return allocate_pinned((void**)&g->step_batch[0], step, "batches", err) &&
           allocate_pinned((void**)&g->step_batch[1], step, "batches", err) &&
           allocate_pinned((void**)&g->eval_batch, micro_batch, "batches", err) &&
           allocate_pinned((void**)&g->host_losses, rows_of(g) * sizeof(float), "losses", err) &&
           allocate_pinned((void**)&g->host_control, sizeof *g->host_control, "step's report", err);
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

// training: with gradients, moments and what a backward pass needs.
bool gpt_create(GPT* g, const RunConfig* run, int B, int T, bool training, Error* err) {
    gpt_configure(g, run, B, T);
    g->layers = (LayerActivations*)calloc_check((size_t)run->model.num_hidden_layers, sizeof *g->layers);
    if (!device_open(&g->device, err)) return false;
    CUDA_CHECK(cudaStreamCreateWithFlags(&g->stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaStreamCreateWithFlags(&g->copy_stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaEventCreateWithFlags(&g->step_done, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventCreateWithFlags(&g->snapshot_done, cudaEventDisableTiming));
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {NULL, 0};
        lay_out(g, i, &arena, training);
        if (arena.used == 0) continue;
        if (!allocate(&g->memory[i], arena.used, memory_class_names[i], err)) return false;
        // gradients and moments start at zero, and so do the padding rows of the vocabulary
        if (i < MEMORY_ACTIVATIONS) CUDA_CHECK(cudaMemsetAsync(g->memory[i], 0, arena.used, g->stream));
        Arena real_arena = {(char*)g->memory[i], 0};
        lay_out(g, i, &real_arena, training);
    }
    if (!create_host_buffers(g, training ? run->batch.global_batch_size : 0, err)) return false;
    if (g->rope_cos != NULL) upload_rope_table(g);
    CUDA_CHECK(cudaDeviceSynchronize());
    char choices[PATH_MAX];
    bool tune = training && run->parallel.autotune;
    return (!tune || path_join(choices, run->log.run_dir, "matmul_algorithms.txt", err)) &&
           matmul_init(&g->matmul, run->precision.compute, g->matmul_workspace, g->bias_scratch,
                       tune ? choices : NULL, g->stream, err);
}

void gpt_free(GPT* g) {
    if (g->layers == NULL) return;
    if (g->stream != NULL) {
        CUDA_CHECK(cudaDeviceSynchronize());
        matmul_free(&g->matmul);
        if (g->micro_step_graph != NULL) CUDA_CHECK(cudaGraphExecDestroy(g->micro_step_graph));
        for (int i = 0; i < NUM_MEMORY_CLASSES; i++) CUDA_CHECK(cudaFree(g->memory[i]));
        void* pinned[] = {g->step_batch[0], g->step_batch[1], g->eval_batch,
                          g->host_losses,   g->host_control,  g->host.params,
                          g->host.m,        g->host.v,        g->host_remainder};
        for (size_t i = 0; i < sizeof pinned / sizeof pinned[0]; i++)
            if (pinned[i] != NULL) CUDA_CHECK(cudaFreeHost(pinned[i]));
        CUDA_CHECK(cudaEventDestroy(g->step_done));
        CUDA_CHECK(cudaEventDestroy(g->snapshot_done));
        CUDA_CHECK(cudaStreamDestroy(g->stream));
        CUDA_CHECK(cudaStreamDestroy(g->copy_stream));
    }
    free(g->order_counts);
    free(g->layers);
    memset(g, 0, sizeof *g);
}

// ----------------------------------------------------------------------------
// host: checkpoints are read into and written from a copy in fp32 in the host's memory

// Elements [first, first + count) of the weights from fp32: rounded, and what is left where that is kept.
static void upload_weights(GPT* g, size_t first, const float* from, size_t count) {
    const size_t PIECE = (size_t)1 << 20;
    if (sizeof(floatX) == sizeof(float)) {
        CUDA_CHECK(cudaMemcpy(g->params + first, from, count * sizeof *from, cudaMemcpyHostToDevice));
        return;
    }
    uint16_t* high = (uint16_t*)malloc_check(PIECE * sizeof *high);
    int16_t* low = (int16_t*)malloc_check(PIECE * sizeof *low);
    for (size_t at = 0; at < count; at += PIECE) {
        size_t n = count - at < PIECE ? count - at : PIECE, bytes = n * sizeof *high;
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) split_float(&high[i], &low[i], from[at + i]);
        CUDA_CHECK(cudaMemcpy(g->params + first + at, high, bytes, cudaMemcpyHostToDevice));
        if (g->remainder != NULL)
            CUDA_CHECK(cudaMemcpy(g->remainder + first + at, low, bytes, cudaMemcpyHostToDevice));
    }
    free(high), free(low);
}

static void upload_moment(GPT* g, void* moment, const float* from, size_t count) {
    const size_t PIECE = (size_t)1 << 20;
    if (!g->moments_bf16) {
        CUDA_CHECK(cudaMemcpy(moment, from, count * sizeof *from, cudaMemcpyHostToDevice));
        return;
    }
    __nv_bfloat16* rounded = (__nv_bfloat16*)malloc_check(PIECE * sizeof *rounded);
    for (size_t at = 0; at < count; at += PIECE) {
        size_t n = count - at < PIECE ? count - at : PIECE;
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) rounded[i] = __float2bfloat16_rn(from[at + i]);
        CUDA_CHECK(
            cudaMemcpy((__nv_bfloat16*)moment + at, rounded, n * sizeof *rounded, cudaMemcpyHostToDevice));
    }
    free(rounded);
}

void gpt_init_weights(GPT* g, uint64_t seed) {
    size_t largest = 0;
    for (int i = 0; i < NUM_TENSORS; i++) largest = larger(largest, g->layout.size[i]);
    float* tensor = (float*)malloc_check(largest * sizeof *tensor);
    for (int i = 0; i < NUM_TENSORS; i++) {
        enum TensorId id = (enum TensorId)i;
        for (int l = 0; l < tensor_copies(&g->config, id); l++) {
            init_tensor(tensor, &g->config, id, l, seed);
            upload_weights(g, tensor_offset(&g->layout, id, l), tensor, g->layout.size[i]);
        }
    }
    CUDA_CHECK(cudaDeviceSynchronize()); // no other stream waits for copies out of pageable memory
    free(tensor);
}

// Made when it is first asked for: a run that never saves does without.
HostState gpt_host_state(GPT* g) {
    Error err = {0, {0}};
    size_t n = g->layout.num_parameters, bytes = n * sizeof(float);
    if (g->host.params != NULL) return g->host;
    bool ok = allocate_pinned((void**)&g->host.params, bytes, "checkpoint", &err);
    if (ok && g->remainder != NULL)
        ok = allocate_pinned((void**)&g->host_remainder, n * sizeof(int16_t), "checkpoint", &err);
    if (ok && g->m != NULL)
        ok = allocate_pinned((void**)&g->host.m, bytes, "checkpoint", &err) &&
             allocate_pinned((void**)&g->host.v, bytes, "checkpoint", &err);
    if (!ok) exit_with(&err);
    return g->host;
}

// After a checkpoint was read into the host's copy.
void gpt_from_host(GPT* g) {
    size_t n = g->layout.num_parameters;
    upload_weights(g, 0, g->host.params, n);
    if (g->m != NULL) {
        upload_moment(g, g->m, g->host.m, n);
        upload_moment(g, g->v, g->host.v, n);
    }
    CUDA_CHECK(cudaDeviceSynchronize()); // as in gpt_init_weights
}

// The device's bf16 array lies in the upper half of the fp32 one, which it becomes, with low halves if there
// are any.
//
//     out   |  0   1   2   3  ...          n-1 |      out[i] begins at byte 4 i
//     in    |                | 0 1 2 3 ... n-1 |      in[i] begins at byte 2 n + 2 i
//
// Front to back, in pieces that end where what is written would reach what is still to be read.
static void widen_in_place(float* out, const int16_t* low, size_t n) {
    const uint16_t* in = (const uint16_t*)(const void*)out + n;
    for (size_t first = 0, end; first < n; first = end) {
        end = (n + first) / 2;
        end = end > first ? end : first + 1;
#pragma omp parallel for schedule(static)
        for (size_t i = first; i < end; i++) out[i] = join_float(in[i], low != NULL ? low[i] : 0);
    }
}

// Where the bytes of the device's array land so that widen_in_place finds them.
static void* landing(float* array, size_t n, size_t element) {
    return element == sizeof(float) ? (void*)array : (void*)((uint16_t*)(void*)array + n);
}

// Begins to copy weights and moments to the host; the next step's update waits for it, nothing else does.
void gpt_snapshot(GPT* g) {
    size_t n = g->layout.num_parameters, moment = g->moments_bf16 ? sizeof(__nv_bfloat16) : sizeof(float);
    HostState host = gpt_host_state(g);
    CUDA_CHECK(cudaStreamWaitEvent(g->copy_stream, g->step_done, 0));
    CUDA_CHECK(cudaMemcpyAsync(landing(host.params, n, sizeof(floatX)), g->params, n * sizeof(floatX),
                               cudaMemcpyDeviceToHost, g->copy_stream));
    if (g->remainder != NULL)
        CUDA_CHECK(cudaMemcpyAsync(g->host_remainder, g->remainder, n * sizeof(int16_t),
                                   cudaMemcpyDeviceToHost, g->copy_stream));
    CUDA_CHECK(cudaMemcpyAsync(landing(host.m, n, moment), g->m, n * moment, cudaMemcpyDeviceToHost,
                               g->copy_stream));
    CUDA_CHECK(cudaMemcpyAsync(landing(host.v, n, moment), g->v, n * moment, cudaMemcpyDeviceToHost,
                               g->copy_stream));
    CUDA_CHECK(cudaEventRecord(g->snapshot_done, g->copy_stream));
}

// Until the host's copy is whole, in fp32. Called by the thread that writes it.
void gpt_snapshot_wait(GPT* g) {
    size_t n = g->layout.num_parameters;
    CUDA_CHECK(cudaEventSynchronize(g->snapshot_done));
    if (sizeof(floatX) != sizeof(float))
        widen_in_place(g->host.params, g->remainder != NULL ? g->host_remainder : NULL, n);
    if (!g->moments_bf16) return;
    widen_in_place(g->host.m, NULL, n);
    widen_in_place(g->host.v, NULL, n);
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
    Parameters<floatX> p = parameters_of(g, g->params, 0);
    floatX* position = p.wpe != NULL ? p.wpe + (size_t)d->length * (size_t)C : NULL;
    LayerActivations mlp = {};
    mlp.ln2 = d->norm, mlp.fc = d->fc, mlp.act = d->act;
    embedding_forward(d->residual, d->token, p.wte, position, 1, 1, C, stream);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        p = parameters_of(g, g->params, l);
        floatX *keys = d->keys + (size_t)l * cache, *values = d->values + (size_t)l * cache;
        norm_forward(d->norm, d->mean, d->rstd, d->residual, p.ln1w, p.ln1b, 1, C, eps, norm, stream);
        matmul_forward(d->qkv, d->norm, p.qkvw, p.qkvb, 1, C, Q + 2 * KV, mm);
        if (g->rope_cos != NULL)
            rope_forward(d->qkv, g->rope_cos, g->rope_sin, d->length, 1, 1, NH, NKV, HS, stream);
        CUDA_CHECK(cudaMemcpyAsync(keys + past, d->qkv + Q, row, cudaMemcpyDeviceToDevice, stream));
        CUDA_CHECK(cudaMemcpyAsync(values + past, d->qkv + Q + KV, row, cudaMemcpyDeviceToDevice, stream));
        attention_decode(d->att, d->qkv, keys, values, d->length + 1, NH, NKV, HS, stream);
        matmul_forward(d->hidden, d->att, p.attprojw, p.attprojb, 1, Q, C, mm);
        residual_norm_forward(d->residual, d->norm, d->mean, d->rstd, d->residual, d->hidden, p.ln2w, p.ln2b,
                              1, C, eps, norm, stream);
        mlp_forward(g, &mlp, p, 1, mm);
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
