// train_gpt.c: the CPU reference. The whole algorithm of GPT pre-training in fp32, in one process.
//
// It is what the CUDA program is held against, so it prefers what is plainly right to what is clever: no
// fast-math, no intrinsics, matmuls through oneDNN (or a plain loop), everything else a loop that the
// compiler vectorises and OpenMP shares out. Read it from top to bottom:
//
//     memory      what is kept for a model and a micro-batch; what lays it out is the planner, too
//     forward     a block is a straight list of layers
//     backward    the same list upside down
//     decoding    one token at a time, with a cache of keys and values
//     the run     weights from somewhere, steps, evaluation, samples, checkpoints
//     commands    train, plan, eval, sample, export, checkpoint
//
// Shapes: B sequences, T positions, N = B * T rows, C hidden size, V vocabulary (Vp padded), L layers, NH
// query heads, NKV key/value heads, HS head size, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF feed-forward size,
// FC = FF, or 2 FF where a gate lies beside it. A gradient's name is its tensor's with a d in front.
#include "llmc/checkpoint.h"      // defines: CheckpointData, TrainState, checkpoint_save, checkpoint_load ...
#include "llmc/checkpoint_tool.h" // defines: checkpoint_verify, checkpoint_info, checkpoint_diff
#include "llmc/config.h"          // defines: RunConfig, config_load
#include "llmc/config_print.h"    // defines: config_print, config_write_json, config_print_reference
#include "llmc/dataloader.h"      // defines: DataLoader, Prefetch, dataloader_row, document_starts
#include "llmc/flops.h"           // defines: flops_per_token
#include "llmc/guard.h"           // defines: guard_accepts
#include "llmc/layers_cpu.h"      // defines: real, embedding_forward ... classifier
#include "llmc/metrics.h"         // defines: Metrics, event_begin ..., print_escaped
#include "llmc/model.h"           // defines: ModelConfig, ParameterLayout, tensor_table
#include "llmc/optimizer_cpu.h"   // defines: adamw_update, global_norm_squared
#include "llmc/probe_cpu.h"       // defines: measure_matmul_rate, measure_copy_rate
#include "llmc/planner.h"         // defines: Plan, MemoryLine, plan_print, physical_memory
#include "llmc/rope.h"            // defines: rope_table
#include "llmc/sampler.h"         // defines: sample_token
#include "llmc/schedule.h"        // defines: learning_rate
#include "llmc/tokenizer.h"       // defines: Tokenizer, Encoder, encode, token_bytes
#include "llmc/tokenizer_files.h" // defines: tokenizer_load

#include <omp.h>
#include <signal.h>
#include <sys/file.h>

#ifdef TESTING // tests and benchmarks include the model, not the run and the commands, and take what they need
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

// ----------------------------------------------------------------------------
// memory

// One copy of every parameter (or of its gradient) as the code of a block sees it: the layer's own tensors
// and those outside the layers. Absent tensors are NULL. The order is tensor_table's.
typedef union {
    struct {
        real *wte, *wpe;                         // (Vp, C) (maxT, C)
        real *ln1w, *ln1b, *qkvw, *qkvb;         // (C) (C) (QKV, C) (QKV)
        real *attprojw, *attprojb, *ln2w, *ln2b; // (C, Q) (C) (C) (C)
        real *fcw, *fcb, *fcprojw, *fcprojb;     // (FC, C) (FC) (C, FF) (C)
        real *lnfw, *lnfb, *lmhead;              // (C) (C) (Vp, C)
    };
    real* at[NUM_TENSORS];
} Parameters;
_Static_assert(sizeof(Parameters) == NUM_TENSORS * sizeof(real*), "Parameters lists the tensor table");

// One allocation each.
enum MemoryClass {
    MEMORY_PARAMETERS,
    MEMORY_GRADIENTS,
    MEMORY_MOMENTS,
    MEMORY_ACTIVATIONS,
    MEMORY_SCRATCH,
    NUM_MEMORY_CLASSES
};
static const char* const memory_class_names[NUM_MEMORY_CLASSES] = {
    "parameters", "gradients", "optimizer moments", "activations", "scratch"};

// What the backward pass needs of one block's forward pass.
typedef struct {
    real *ln1, *ln1_mean, *ln1_rstd; // (N, C) (N) (N)
    real *qkv, *att, *lse;           // (N, QKV) (N, Q) (B, NH, T)
    real* residual2;                 // (N, C) behind attention
    real *ln2, *ln2_mean, *ln2_rstd; // (N, C) (N) (N)
    real* fc;                        // (N, FC) before the activation, which is cheaper to repeat than to keep
    real* residual3;                 // (N, C) behind the MLP
} LayerActivations;

typedef struct {
    ModelConfig config;
    ParameterLayout layout;
    int B, T; // the micro-batch that the activations have room for
    real *params, *grads, *m, *v;
    LayerActivations* layers;
    real *embedded, *lnf, *lnf_mean, *lnf_rstd; // (N, C) (N, C) (N) (N)
    real* losses;                               // (N)
    int* doc_start;                             // (N), NULL without document masking
    float *rope_cos, *rope_sin;                 // (maxT, HS / 2), NULL with learned positions
    // scratch: dead when a block is done with it
    real *act, *dact;       // (N, FF)
    real *hidden, *dnorm;   // (N, C) a branch's output; (N, C) gradient of a norm's output
    real *dresidual, *datt; // (N, C) (N, Q)
    real *dqkv, *dfc;       // (N, QKV) (N, FC)
    real* logits;           // (logit_rows, Vp)
    int logit_rows;
    Matmul matmul; // precision, oneDNN's primitives, and scratch of its own:
    real *matmul_scratch, *attention_scratch;
    uint16_t* head_copy;              // (Vp, C) in bf16, while the head works through its rows
    void* memory[NUM_MEMORY_CLASSES]; // the allocations behind all of these
} GPT;

// The logits of a whole micro-batch never exist at once: the head works on this many rows at a time.
enum { LOGIT_ROWS = 128 };

// Hands out consecutive pieces of one allocation. Without memory behind it, it only adds up: the function
// that lays memory out is the function that plans it.
typedef struct {
    real* memory;
    size_t used; // in elements
} Arena;

static real* arena_take(Arena* arena, size_t n) {
    real* piece = arena->memory != NULL ? arena->memory + arena->used : NULL;
    arena->used += (n + 15) / 16 * 16; // whole cache lines
    return piece;
}

static size_t elements(size_t bytes) { return (bytes + sizeof(real) - 1) / sizeof(real); }

// Bytes that the matmuls of a block and of the head need beside their operands. The head's weight is kept in
// head_copy, so that of its operands only the rows count.
static size_t largest_matmul_scratch(const GPT* g) {
    const ModelConfig* c = &g->config;
    const enum Dim shapes[][2] = {
        {DIM_HIDDEN, DIM_QKV}, {DIM_HEADS, DIM_HIDDEN}, {DIM_HIDDEN, DIM_FC}, {DIM_FF, DIM_HIDDEN}};
    size_t rows = (size_t)g->logit_rows, largest = matmul_pack_bytes();
    if (g->matmul.compute == MATMUL_BF16)
        largest += bf16_copy_bytes(rows * model_dim(c, DIM_VOCAB)) +
                   bf16_copy_bytes(rows * model_dim(c, DIM_HIDDEN));
    for (int i = 0; i < 4; i++) {
        size_t bytes = matmul_scratch_bytes(g->matmul.compute, g->B * g->T, (int)model_dim(c, shapes[i][0]),
                                            (int)model_dim(c, shapes[i][1]));
        largest = bytes > largest ? bytes : largest;
    }
    return largest;
}

static void lay_out_activations(GPT* g, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = (size_t)g->B * (size_t)g->T, C = model_dim(c, DIM_HIDDEN), Q = model_dim(c, DIM_HEADS);
    g->embedded = arena_take(arena, N * C);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        LayerActivations* a = &g->layers[l];
        if (l > 0 && !training) { // without a backward pass, all layers share the first one's memory
            *a = g->layers[0];
            continue;
        }
        a->ln1 = arena_take(arena, N * C);
        a->ln1_mean = arena_take(arena, N), a->ln1_rstd = arena_take(arena, N);
        a->qkv = arena_take(arena, N * model_dim(c, DIM_QKV));
        a->att = arena_take(arena, N * Q);
        a->lse = arena_take(arena, N * (size_t)c->num_attention_heads);
        a->residual2 = arena_take(arena, N * C);
        a->ln2 = arena_take(arena, N * C);
        a->ln2_mean = arena_take(arena, N), a->ln2_rstd = arena_take(arena, N);
        a->fc = arena_take(arena, N * model_dim(c, DIM_FC));
        a->residual3 = arena_take(arena, N * C);
    }
    g->lnf = arena_take(arena, N * C);
    g->lnf_mean = arena_take(arena, N), g->lnf_rstd = arena_take(arena, N);
    g->losses = arena_take(arena, N);
}

static void lay_out_scratch(GPT* g, Arena* arena, bool training) {
    const ModelConfig* c = &g->config;
    size_t N = (size_t)g->B * (size_t)g->T, C = model_dim(c, DIM_HIDDEN), Vp = model_dim(c, DIM_VOCAB);
    g->act = arena_take(arena, N * model_dim(c, DIM_FF));
    g->hidden = arena_take(arena, N * C);
    g->logit_rows = N < LOGIT_ROWS ? (int)N : LOGIT_ROWS;
    g->logits = arena_take(arena, (size_t)g->logit_rows * Vp);
    if (c->family->position == POSITION_ROPE) {
        size_t angles = (size_t)c->max_position_embeddings * (size_t)c->head_dim / 2;
        g->rope_cos = (float*)(void*)arena_take(arena, angles);
        g->rope_sin = (float*)(void*)arena_take(arena, angles);
    }
    g->attention_scratch = arena_take(arena, elements(attention_scratch_bytes(g->T, c->head_dim)));
    g->matmul_scratch = arena_take(arena, elements(largest_matmul_scratch(g)));
    if (g->matmul.compute == MATMUL_BF16)
        g->head_copy = (uint16_t*)(void*)arena_take(arena, elements(sizeof(uint16_t) * Vp * C));
    if (!training) return;
    g->dact = arena_take(arena, N * model_dim(c, DIM_FF));
    g->dnorm = arena_take(arena, N * C);
    g->dresidual = arena_take(arena, N * C);
    g->datt = arena_take(arena, N * model_dim(c, DIM_HEADS));
    g->dqkv = arena_take(arena, N * model_dim(c, DIM_QKV));
    g->dfc = arena_take(arena, N * model_dim(c, DIM_FC));
}

// Places every array of one class of memory; `training` adds what only the backward pass and the update need.
static void lay_out(GPT* g, int memory_class, Arena* arena, bool training) {
    size_t weights = g->layout.num_parameters;
    if (memory_class == MEMORY_PARAMETERS) g->params = arena_take(arena, weights);
    if (memory_class == MEMORY_GRADIENTS && training) g->grads = arena_take(arena, weights);
    if (memory_class == MEMORY_MOMENTS && training) g->m = arena_take(arena, weights);
    if (memory_class == MEMORY_MOMENTS && training) g->v = arena_take(arena, weights);
    if (memory_class == MEMORY_ACTIVATIONS) lay_out_activations(g, arena, training);
    if (memory_class == MEMORY_SCRATCH) lay_out_scratch(g, arena, training);
}

// The exact size of each class in bytes, without allocating any of it.
static void gpt_plan(const ModelConfig* config, int B, int T, int compute, bool training,
                     size_t bytes[NUM_MEMORY_CLASSES]) {
    GPT g = {
        .config = *config, .layout = parameter_layout(config), .B = B, .T = T, .matmul.compute = compute};
    g.layers = calloc_check((size_t)config->num_hidden_layers, sizeof *g.layers);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {0};
        lay_out(&g, i, &arena, training);
        bytes[i] = arena.used * sizeof(real);
    }
    free(g.layers);
}

// ----------------------------------------------------------------------------
// forward

// Every parameter of `memory` (the weights, or the gradients) as layer l sees it.
static Parameters parameters_of(const GPT* g, real* memory, int l) {
    Parameters p;
    for (int i = 0; i < NUM_TENSORS; i++)
        p.at[i] = g->layout.size[i] != 0 ? memory + tensor_offset(&g->layout, i, l) : NULL;
    return p;
}

// The head's weight: a matrix of its own, or the embedding once more.
static real* head_of(Parameters p) { return p.lmhead != NULL ? p.lmhead : p.wte; }

// The residual stream that enters layer l (l = L: that leaves the last one).
static real* residual_into(const GPT* g, int l) { return l == 0 ? g->embedded : g->layers[l - 1].residual3; }

static void block_forward(GPT* g, int l, int B) {
    const ModelConfig* c = &g->config;
    const ModelFamily* family = c->family;
    int T = g->T, N = B * T, C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads;
    int HS = c->head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF = c->intermediate_size;
    int FC = (int)model_dim(c, DIM_FC);
    real eps = (real)c->norm_eps;
    Parameters p = parameters_of(g, g->params, l);
    LayerActivations* a = &g->layers[l];
    real* residual = residual_into(g, l);
    Matmul* mm = &g->matmul;

    norm_forward(a->ln1, a->ln1_mean, a->ln1_rstd, residual, p.ln1w, p.ln1b, N, C, eps, family->norm);
    matmul_forward(a->qkv, a->ln1, p.qkvw, p.qkvb, N, C, QKV, mm);
    if (g->rope_cos != NULL) rope_forward(a->qkv, g->rope_cos, g->rope_sin, 0, B, T, NH, NKV, HS);
    attention_forward(a->att, a->lse, g->attention_scratch, a->qkv, g->doc_start, B, T, NH, NKV, HS);
    matmul_forward(g->hidden, a->att, p.attprojw, p.attprojb, N, Q, C, mm);
    residual_norm_forward(a->residual2, a->ln2, a->ln2_mean, a->ln2_rstd, residual, g->hidden, p.ln2w, p.ln2b,
                          N, C, eps, family->norm);

    matmul_forward(a->fc, a->ln2, p.fcw, p.fcb, N, C, FC, mm);
    activation_forward(g->act, a->fc, N, FF, family->activation);
    matmul_forward(g->hidden, g->act, p.fcprojw, p.fcprojb, N, FF, C, mm);
    residual_forward(a->residual3, a->residual2, g->hidden, (size_t)N * (size_t)C);
}

// tokens (B, T) -> lnf (B, T, C), what the head reads. doc_start (B, T) as in attention_forward, or NULL.
static void gpt_forward(GPT* g, const int* tokens, int* doc_start, int B) {
    const ModelConfig* c = &g->config;
    CHECK(B <= g->B);
    Parameters p = parameters_of(g, g->params, 0);
    g->doc_start = doc_start;
    embedding_forward(g->embedded, tokens, p.wte, p.wpe, B, g->T, c->hidden_size);
    for (int l = 0; l < c->num_hidden_layers; l++) block_forward(g, l, B);
    norm_forward(g->lnf, g->lnf_mean, g->lnf_rstd, residual_into(g, c->num_hidden_layers), p.lnfw, p.lnfb,
                 B * g->T, c->hidden_size, (real)c->norm_eps, c->family->norm);
}

// Cross-entropy of every row against targets (B, T) into g->losses (a negative target is masked: loss 0);
// returns their sum. With grad_scale != 0 also the head's backward pass, since the logits of a chunk of rows
// exist only here: g->dnorm (B, T, C) = grad_scale * d(sum of losses) / d lnf.
static double gpt_loss(GPT* g, const int* targets, int B, real grad_scale) {
    int N = B * g->T, C = g->config.hidden_size, V = g->config.vocab_size, Vp = padded_vocab_size(V);
    real* head = head_of(parameters_of(g, g->params, 0));
    Matmul* mm = &g->matmul;
    matmul_keep(mm, head, (size_t)Vp * (size_t)C, g->head_copy);
    for (int row = 0; row < N; row += g->logit_rows) {
        int rows = N - row < g->logit_rows ? N - row : g->logit_rows;
        real* lnf = g->lnf + (size_t)row * (size_t)C;
        matmul_forward(g->logits, lnf, head, NULL, rows, C, Vp, mm);
        classifier(g->losses + row, g->logits, targets + row, grad_scale, rows, V, Vp, grad_scale != 0);
        if (grad_scale == 0) continue;
        real* dhead = head_of(parameters_of(g, g->grads, 0));
        matmul_backward(g->dnorm + (size_t)row * (size_t)C, dhead, NULL, g->logits, lnf, head, rows, C, Vp,
                        mm);
    }
    matmul_release(mm);
    double sum = 0;
    for (int n = 0; n < N; n++) sum += g->losses[n];
    return sum;
}

// ----------------------------------------------------------------------------
// backward: parameter gradients are +=, so that micro-batches accumulate; the residual stream's gradient is
// +=, since every block adds to the stream; all other activation gradients are =

static void block_backward(GPT* g, int l, int B) {
    const ModelConfig* c = &g->config;
    const ModelFamily* family = c->family;
    int T = g->T, N = B * T, C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads;
    int HS = c->head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF = c->intermediate_size;
    int FC = (int)model_dim(c, DIM_FC);
    Parameters p = parameters_of(g, g->params, l), dp = parameters_of(g, g->grads, l);
    LayerActivations* a = &g->layers[l];
    real* residual = residual_into(g, l);
    Matmul* mm = &g->matmul;

    activation_forward(g->act, a->fc, N, FF, family->activation); // once more: it was not kept
    matmul_backward(g->dact, dp.fcprojw, dp.fcprojb, g->dresidual, g->act, p.fcprojw, N, FF, C, mm);
    activation_backward(g->dfc, g->dact, a->fc, N, FF, family->activation);
    matmul_backward(g->dnorm, dp.fcw, dp.fcb, g->dfc, a->ln2, p.fcw, N, C, FC, mm);
    norm_backward(g->dresidual, dp.ln2w, dp.ln2b, g->dnorm, a->residual2, p.ln2w, a->ln2_mean, a->ln2_rstd, N,
                  C, family->norm);

    matmul_backward(g->datt, dp.attprojw, dp.attprojb, g->dresidual, a->att, p.attprojw, N, Q, C, mm);
    attention_backward(g->dqkv, g->attention_scratch, g->datt, a->qkv, a->att, a->lse, g->doc_start, B, T, NH,
                       NKV, HS);
    if (g->rope_cos != NULL) rope_backward(g->dqkv, g->rope_cos, g->rope_sin, 0, B, T, NH, NKV, HS);
    matmul_backward(g->dnorm, dp.qkvw, dp.qkvb, g->dqkv, a->ln1, p.qkvw, N, C, QKV, mm);
    norm_backward(g->dresidual, dp.ln1w, dp.ln1b, g->dnorm, residual, p.ln1w, a->ln1_mean, a->ln1_rstd, N, C,
                  family->norm);
}

// After gpt_forward and gpt_loss with a grad_scale on the same tokens: adds to every gradient.
static void gpt_backward(GPT* g, const int* tokens, int B) {
    const ModelConfig* c = &g->config;
    int L = c->num_hidden_layers, N = B * g->T, C = c->hidden_size;
    Parameters p = parameters_of(g, g->params, 0), dp = parameters_of(g, g->grads, 0);
    memset(g->dresidual, 0, (size_t)N * (size_t)C * sizeof(real));
    norm_backward(g->dresidual, dp.lnfw, dp.lnfb, g->dnorm, residual_into(g, L), p.lnfw, g->lnf_mean,
                  g->lnf_rstd, N, C, c->family->norm);
    for (int l = L - 1; l >= 0; l--) block_backward(g, l, B);
    embedding_backward(dp.wte, dp.wpe, g->dresidual, tokens, B, g->T, C);
}

// AdamW on every tensor, decay where the table says so; also sets the gradients to zero for the next step.
static void gpt_update(GPT* g, const RunConfig* run, double lr, double grad_scale, uint64_t step) {
    for (int i = 0; i < NUM_TENSORS; i++) {
        for (int l = 0; l < tensor_copies(&g->config, i); l++) {
            size_t at = tensor_offset(&g->layout, i, l);
            double decay = tensor_table[i].decay ? run->optimizer.weight_decay : 0.0;
            adamw_update(g->params + at, g->grads + at, g->m + at, g->v + at, g->layout.size[i], lr,
                         run->optimizer.beta1, run->optimizer.beta2, run->optimizer.eps, decay, grad_scale,
                         step);
        }
    }
}

// ----------------------------------------------------------------------------
// a model's life

// compute: a MatmulCompute. training: with gradients, moments and what a backward pass needs.
static void gpt_create(GPT* g, const ModelConfig* config, int B, int T, int compute, bool training) {
    memset(g, 0, sizeof *g);
    g->config = *config;
    g->matmul.compute = compute;
    g->layout = parameter_layout(config);
    g->B = B, g->T = T;
    g->layers = calloc_check((size_t)config->num_hidden_layers, sizeof *g->layers);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {0};
        lay_out(g, i, &arena, training);
        if (arena.used == 0) continue;
        arena = (Arena){g->memory[i] = aligned_zeros(arena.used * sizeof(real)), 0};
        lay_out(g, i, &arena, training);
    }
    matmul_init(&g->matmul, compute, g->matmul_scratch, largest_matmul_scratch(g));
    if (g->rope_cos != NULL)
        rope_table(g->rope_cos, g->rope_sin, &config->rope, config->max_position_embeddings,
                   config->head_dim);
}

static void gpt_free(GPT* g) {
    if (g->layers != NULL) matmul_free(&g->matmul);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) free(g->memory[i]);
    free(g->layers);
    memset(g, 0, sizeof *g);
}

#ifdef REAL_IS_FLOAT // init_tensor's type
static void gpt_init_weights(GPT* g, uint64_t seed) {
    for (int i = 0; i < NUM_TENSORS; i++)
        for (int l = 0; l < tensor_copies(&g->config, i); l++)
            init_tensor(g->params + tensor_offset(&g->layout, i, l), &g->config, i, l, seed);
}
#endif

// ----------------------------------------------------------------------------
// decoding: one token at a time; keys and values of the past are kept, so that a token costs one row

typedef struct {
    GPT* gpt; // whose weights are read; its activations are not touched
    int capacity, length;
    real *keys, *values;                        // (L, capacity, NKV * HS)
    real *residual, *norm, *qkv, *att, *hidden; // (C) (C) (QKV) (Q) (C)
    real *fc, *act, *logits;                    // (FC) (FF) (Vp)
    Matmul matmul; // always fp32: to round a weight for one row costs more than the product
    real *matmul_scratch, *memory;
} Decoder;

static size_t decoder_lay_out(Decoder* d, Arena* arena) {
    const ModelConfig* c = &d->gpt->config;
    size_t kv = (model_dim(c, DIM_QKV) - model_dim(c, DIM_HEADS)) / 2;
    size_t cache = (size_t)c->num_hidden_layers * (size_t)d->capacity * kv;
    d->keys = arena_take(arena, cache), d->values = arena_take(arena, cache);
    d->residual = arena_take(arena, model_dim(c, DIM_HIDDEN));
    d->norm = arena_take(arena, model_dim(c, DIM_HIDDEN));
    d->qkv = arena_take(arena, model_dim(c, DIM_QKV));
    d->att = arena_take(arena, model_dim(c, DIM_HEADS));
    d->hidden = arena_take(arena, model_dim(c, DIM_HIDDEN));
    d->fc = arena_take(arena, model_dim(c, DIM_FC)), d->act = arena_take(arena, model_dim(c, DIM_FF));
    d->logits = arena_take(arena, model_dim(c, DIM_VOCAB));
    d->matmul_scratch = arena_take(arena, elements(matmul_pack_bytes()));
    return arena->used;
}

static void decoder_create(Decoder* d, GPT* g, int capacity) {
    Arena arena = {0};
    *d = (Decoder){.gpt = g, .capacity = capacity};
    arena.memory = d->memory = aligned_zeros(decoder_lay_out(d, &arena) * sizeof(real));
    arena.used = 0;
    decoder_lay_out(d, &arena);
    matmul_init(&d->matmul, MATMUL_FP32, d->matmul_scratch, matmul_pack_bytes());
}

static void decoder_free(Decoder* d) {
    matmul_free(&d->matmul);
    free(d->memory);
}

// Appends one token; d->logits (Vp) then scores the next one. The same layers as gpt_forward, on one row.
static void decoder_step(Decoder* d, int token) {
    GPT* g = d->gpt;
    const ModelConfig* c = &g->config;
    const ModelFamily* family = c->family;
    int C = c->hidden_size, NH = c->num_attention_heads, NKV = c->num_key_value_heads, HS = c->head_dim;
    int Q = NH * HS, KV = NKV * HS, FF = c->intermediate_size, FC = (int)model_dim(c, DIM_FC);
    real eps = (real)c->norm_eps, mean, rstd;
    Matmul* mm = &d->matmul;
    CHECK(d->length < d->capacity);
    size_t past = (size_t)d->length * (size_t)KV, cache = (size_t)d->capacity * (size_t)KV;
    Parameters p = parameters_of(g, g->params, 0);
    real* position = p.wpe != NULL ? p.wpe + (size_t)d->length * (size_t)C : NULL;
    embedding_forward(d->residual, &token, p.wte, position, 1, 1, C);
    for (int l = 0; l < c->num_hidden_layers; l++) {
        p = parameters_of(g, g->params, l);
        real *keys = d->keys + (size_t)l * cache, *values = d->values + (size_t)l * cache;
        norm_forward(d->norm, &mean, &rstd, d->residual, p.ln1w, p.ln1b, 1, C, eps, family->norm);
        matmul_forward(d->qkv, d->norm, p.qkvw, p.qkvb, 1, C, Q + 2 * KV, mm);
        if (g->rope_cos != NULL) rope_forward(d->qkv, g->rope_cos, g->rope_sin, d->length, 1, 1, NH, NKV, HS);
        memcpy(keys + past, d->qkv + Q, (size_t)KV * sizeof(real));
        memcpy(values + past, d->qkv + Q + KV, (size_t)KV * sizeof(real));
        attention_decode(d->att, d->qkv, keys, values, d->length + 1, NH, NKV, HS);
        matmul_forward(d->hidden, d->att, p.attprojw, p.attprojb, 1, Q, C, mm);
        residual_norm_forward(d->residual, d->norm, &mean, &rstd, d->residual, d->hidden, p.ln2w, p.ln2b, 1,
                              C, eps, family->norm);
        matmul_forward(d->fc, d->norm, p.fcw, p.fcb, 1, C, FC, mm);
        activation_forward(d->act, d->fc, 1, FF, family->activation);
        matmul_forward(d->hidden, d->act, p.fcprojw, p.fcprojb, 1, FF, C, mm);
        residual_forward(d->residual, d->residual, d->hidden, (size_t)C);
    }
    norm_forward(d->norm, &mean, &rstd, d->residual, p.lnfw, p.lnfb, 1, C, eps, family->norm);
    matmul_forward(d->logits, d->norm, head_of(p), NULL, 1, C, padded_vocab_size(c->vocab_size), mm);
    d->length++;
}

#ifndef TESTING
// ----------------------------------------------------------------------------
// the run: what the commands share

typedef struct {
    RunConfig run;
    GPT gpt;
    Tokenizer tokenizer;
    char tokenizer_json[PATH_MAX]; // what checkpoints take along; "": no tokenizer
    int run_dir_fd;                // locked while training
    DataLoader train, validation;
    int *inputs, *targets, *doc_start; // (B, T) of the current micro-batch
    int eot_id;                        // begins every document in the shards; -1: not known
    TrainState state;
    uint64_t saved_step; // of the newest checkpoint
    Metrics metrics;
    String config_json;      // as resolved, on one line
    double seconds_per_step; // a mean at first, then an exponential average over about 20 steps
    double bits_per_byte;    // of the last evaluation; NaN before the first
} Trainer;

typedef struct {
    double loss, perplexity, bits_per_byte; // bits_per_byte is NaN without a tokenizer
    uint64_t tokens;
} Evaluation;

// Signals that ask for a stop are blocked in every thread while training, and looked for between steps. There is
// no handler, since its frame could land on live data: oneDNN's generated gemm points the stack register into its
// work area on the heap (2.6.3; a few signals in a hundred corrupted it). Ctrl-\ and SIGKILL still end the
// program at once, which costs the steps since the last checkpoint and nothing else.
static int stop_signal = 0; // the one that came

static sigset_t stop_signals(void) {
    sigset_t set;
    struct sigaction hangup;
    sigemptyset(&set);
    sigaddset(&set, SIGINT), sigaddset(&set, SIGTERM);
    if (sigaction(SIGHUP, NULL, &hangup) == 0 && hangup.sa_handler != SIG_IGN)
        sigaddset(&set, SIGHUP); // no nohup
    return set;
}

// Before the first parallel region, so that all threads inherit it.
static void block_stop_signals(void) {
    sigset_t set = stop_signals();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN); // `train_gpt_cpu ... | head` ends the reader, not the run
}

static bool stop_requested(void) {
    sigset_t set = stop_signals();
    const struct timespec no_wait = {0, 0};
    int signal_number = stop_signal == 0 ? sigtimedwait(&set, NULL, &no_wait) : 0;
    if (signal_number > 0) stop_signal = signal_number;
    return stop_signal != 0;
}

static const char* checkpoints_directory(const Trainer* t, char out[PATH_MAX], Error* err) {
    return path_join(out, t->run.log.run_dir, "checkpoints", err) ? out : NULL;
}

static CheckpointData checkpoint_data(Trainer* t) {
    return (CheckpointData){.model = &t->gpt.config,
                            .params = t->gpt.params,
                            .m = t->gpt.m,
                            .v = t->gpt.v,
                            .state = t->state,
                            .config_json = t->config_json.data,
                            .tokenizer_path = t->tokenizer_json};
}

enum WeightsFrom { WEIGHTS_NOWHERE, WEIGHTS_RUN, WEIGHTS_ELSEWHERE };

// The newest checkpoint of the run; where there is none, checkpoint.load_from. Moments are read where there
// is memory for them. t->state is what the checkpoint says, zeros for a foreign model.
static bool load_weights(Trainer* t, enum WeightsFrom* from, Error* err) {
    char directory[PATH_MAX];
    CheckpointData data = checkpoint_data(t);
    bool found = false;
    if (checkpoints_directory(t, directory, err) == NULL) return false;
    if (!checkpoint_load_newest(directory, &data, &found, err)) return false;
    const char* load_from = t->run.checkpoint.load_from;
    *from = found ? WEIGHTS_RUN : load_from[0] != '\0' ? WEIGHTS_ELSEWHERE : WEIGHTS_NOWHERE;
    if (*from == WEIGHTS_NOWHERE) return true;
    if (*from == WEIGHTS_ELSEWHERE) {
        data.m = data.v = NULL;
        if (!checkpoint_load(load_from, &data, err)) return false;
    }
    t->state = data.state;
    fprintf(stderr, "weights from %s, step %llu\n", found ? directory : load_from,
            (unsigned long long)t->state.step);
    return true;
}

// The weights a training run starts with: its own newest checkpoint, else checkpoint.load_from, else random.
static bool load_or_init(Trainer* t, bool* resumed, Error* err) {
    enum WeightsFrom from;
    if (!load_weights(t, &from, err)) return false;
    *resumed = from == WEIGHTS_RUN;
    if (from == WEIGHTS_NOWHERE) gpt_init_weights(&t->gpt, t->run.seed);
    if (!*resumed) t->state = (TrainState){.data_fingerprint = t->train.fingerprint};
    t->saved_step = t->state.step;
    if (t->state.data_fingerprint == t->train.fingerprint) return true;
    return fail(
        err, EXIT_CONFIG,
        "the training data are not those that the newest checkpoint in %s was trained on (fingerprint "
        "%016llx, now %016llx): restore data.train, batch.sequence_length and seed, or start another run "
        "with checkpoint.load_from and a new log.run_dir",
        t->run.log.run_dir, (unsigned long long)t->state.data_fingerprint,
        (unsigned long long)t->train.fingerprint);
}

static bool open_train(Trainer* t, Error* err) {
    const RunConfig* run = &t->run;
    DataSource sources[MAX_DATA_SOURCES];
    for (int i = 0; i < run->data.num_sources; i++) {
        const DataSourceConfig* s = &run->data.sources[i];
        sources[i] = (DataSource){s->name, s->path, s->weight};
    }
    return dataloader_open(&t->train, sources, run->data.num_sources, run->batch.sequence_length,
                           (uint32_t)run->model.vocab_size, run->seed, true, err);
}

// Two loaders, or a loader and the tokenizer, must speak the same tokens: hashes are compared where both are
// known.
static bool same_tokenizer(const uint64_t a[2], const uint64_t b[2], const char* what, Error* err) {
    if ((a[0] | a[1]) == 0 || (b[0] | b[1]) == 0 || (a[0] == b[0] && a[1] == b[1])) return true;
    return fail(err, EXIT_CONFIG,
                "%s: another tokenizer (hash %016llx%016llx) than the data were encoded with "
                "(%016llx%016llx); encode the data anew or name their tokenizer.json",
                what, (unsigned long long)a[1], (unsigned long long)a[0], (unsigned long long)b[1],
                (unsigned long long)b[0]);
}

// Checkpoints hold a tokenizer.json: the one that was named, or the same tokenizer written anew into the run
// directory when it came from another format.
static bool choose_tokenizer_json(Trainer* t, Error* err) {
    const char* path = t->run.data.tokenizer;
    size_t n = strlen(path);
    if (n == 0) return true;
    const char* slash = strrchr(path, '/');
    bool is_json = n > 5 && strcmp(path + n - 5, ".json") == 0;
    if (is_json && strcmp(slash != NULL ? slash + 1 : path, "encoder.json") != 0) {
        snprintf(t->tokenizer_json, sizeof t->tokenizer_json, "%s", path);
        return true;
    }
    if (path_join(t->tokenizer_json, path, "tokenizer.json", err) && access(t->tokenizer_json, R_OK) == 0)
        return true;
    return make_directories(t->run.log.run_dir, err) &&
           path_join(t->tokenizer_json, t->run.log.run_dir, "tokenizer.json", err) &&
           tokenizer_save_json(&t->tokenizer, t->tokenizer_json, err);
}

static bool open_tokenizer(Trainer* t, Error* err) {
    if (!tokenizer_load(&t->tokenizer, t->run.data.tokenizer, err)) return false;
    if (t->tokenizer.vocab_size <= (uint32_t)t->run.model.vocab_size) return true;
    return fail(err, EXIT_CONFIG,
                "%s has %u tokens, more than model.vocab_size, %d: it is not this model's tokenizer",
                t->run.data.tokenizer, t->tokenizer.vocab_size, t->run.model.vocab_size);
}

static bool open_data(Trainer* t, bool training, Error* err) {
    const RunConfig* run = &t->run;
    uint32_t vocab_size = (uint32_t)run->model.vocab_size;
    int T = run->batch.sequence_length;
    DataSource validation = {"validation", run->data.validation, 1.0};
    if (training && !open_train(t, err)) return false;
    if (run->data.validation[0] != '\0' &&
        !dataloader_open(&t->validation, &validation, 1, T, vocab_size, 0, false, err))
        return false;
    const DataLoader* loader = training ? &t->train : &t->validation;
    if (!same_tokenizer(t->validation.tokenizer_hash, loader->tokenizer_hash, "data.validation", err))
        return false;
    t->eot_id = loader->eot_id;
    if (run->data.document_mask && t->eot_id < 0)
        return fail(err, EXIT_CONFIG,
                    "data.document_mask is true but the shards do not say which token begins a "
                    "document: encode them with `corpus encode`, or set it to false");
    if (run->data.tokenizer[0] == '\0') return true;
    if (!open_tokenizer(t, err)) return false;
    TokenizerHash hash = tokenizer_hash(&t->tokenizer);
    uint64_t words[2] = {hash.low, hash.high};
    return same_tokenizer(words, loader->tokenizer_hash, run->data.tokenizer, err);
}

static void trainer_close(Trainer* t) {
    dataloader_close(&t->train);
    dataloader_close(&t->validation);
    tokenizer_free(&t->tokenizer);
    gpt_free(&t->gpt);
    metrics_close(&t->metrics);
    free(t->inputs), free(t->targets), free(t->doc_start), free(t->config_json.data);
}

// The arrays of one micro-batch that gpt_forward and gpt_loss read.
static void create_batch(Trainer* t) {
    size_t N = (size_t)t->gpt.B * (size_t)t->gpt.T;
    t->inputs = calloc_check(N, sizeof(int));
    t->targets = calloc_check(N, sizeof(int));
    t->doc_start = calloc_check(N, sizeof(int));
}

// The memory of a training run, line by line: the classes of gpt_plan, and the batches. Returns the sum.
enum { PREFETCH_DEPTH = 2, MEMORY_BATCHES = NUM_MEMORY_CLASSES, NUM_MEMORY_LINES };

static uint64_t memory_plan(const RunConfig* run, MemoryLine lines[NUM_MEMORY_LINES]) {
    size_t bytes[NUM_MEMORY_CLASSES];
    uint64_t T = (uint64_t)run->batch.sequence_length, total = 0;
    gpt_plan(&run->model, run->batch.micro_batch_size, (int)T, run->precision.compute, true, bytes);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) lines[i] = (MemoryLine){memory_class_names[i], bytes[i]};
    uint64_t ready = PREFETCH_DEPTH * (uint64_t)run->batch.global_batch_size * (T + 1) * sizeof(int32_t);
    uint64_t current = 3 * (uint64_t)run->batch.micro_batch_size * T * sizeof(int); // create_batch
    lines[MEMORY_BATCHES] = (MemoryLine){"batches", ready + current};
    for (int i = 0; i < NUM_MEMORY_LINES; i++) total += lines[i].bytes;
    return total;
}

// rows (B, T + 1) -> inputs and targets (B, T), one shifted against the other, and where documents start.
static void split_rows(Trainer* t, const int32_t* rows, int B) {
    int T = t->gpt.T;
    for (int b = 0; b < B; b++) {
        const int32_t* row = rows + (size_t)b * (size_t)(T + 1);
        size_t at = (size_t)b * (size_t)T;
        memcpy(t->inputs + at, row, (size_t)T * sizeof(int));
        memcpy(t->targets + at, row + 1, (size_t)T * sizeof(int));
        if (t->run.data.document_mask) document_starts(t->doc_start + at, row, T, t->eot_id);
    }
}

// Mean loss over the validation set, or over its first eval.batches micro-batches. A stop signal cuts it
// short, and its result is then worth nothing.
static bool evaluate(Trainer* t, Evaluation* e, Error* err) {
    int B = t->gpt.B, T = t->gpt.T;
    uint64_t num_rows = t->validation.rows, limit = (uint64_t)t->run.eval.batches * (uint64_t)B;
    if (limit != 0 && limit < num_rows) num_rows = limit;
    int32_t* rows = malloc_check((size_t)B * (size_t)(T + 1) * sizeof *rows);
    double loss = 0, byte_loss = 0, bytes = 0;
    bool ok = true;
    for (uint64_t first = 0; ok && first < num_rows && !stop_requested(); first += (uint64_t)B) {
        int now = num_rows - first < (uint64_t)B ? (int)(num_rows - first) : B;
        for (int b = 0; ok && b < now; b++)
            ok = dataloader_row(&t->validation, first + (uint64_t)b, rows + (size_t)b * (size_t)(T + 1), err);
        if (!ok) break;
        split_rows(t, rows, now);
        gpt_forward(&t->gpt, t->inputs, t->run.data.document_mask ? t->doc_start : NULL, now);
        loss += gpt_loss(&t->gpt, t->targets, now, 0);
        for (int i = 0; i < now * T; i++) {
            uint32_t length = token_byte_length(&t->tokenizer, (uint32_t)t->targets[i]);
            bytes += length;
            if (length != 0) byte_loss += t->gpt.losses[i];
        }
    }
    free(rows);
    e->tokens = num_rows * (uint64_t)T;
    e->loss = loss / (double)e->tokens;
    e->perplexity = exp(e->loss);
    e->bits_per_byte = bytes > 0 ? byte_loss / bytes / M_LN2 : NAN;
    return ok;
}

// The prompt's tokens, behind the token that begins every document in our shards. The caller frees
// tokens->data.
static bool prompt_tokens(const Trainer* t, Tokens* tokens, Error* err) {
    const char* prompt = t->run.sample.prompt;
    int room = t->run.model.max_position_embeddings;
    uint32_t eot = (uint32_t)t->tokenizer.eot_id;
    Encoder encoder;
    encoder_init(&encoder, &t->tokenizer);
    if (t->tokenizer.eot_id >= 0) tokens_append(tokens, &eot, 1);
    encode(&encoder, prompt, strlen(prompt), tokens);
    encoder_free(&encoder);
    if (tokens->size > 0 && tokens->size < (size_t)room) return true;
    return fail(err, EXIT_CONFIG, "sample.prompt is %zu tokens long; 1 to %d are possible with this model",
                tokens->size, room - 1);
}

// Continues the prompt; the text (decoded, prompt included) is appended to out.
static bool generate(Trainer* t, int number, String* out, Error* err) {
    const RunConfig* run = &t->run;
    int V = run->model.vocab_size, room = run->model.max_position_embeddings;
    int64_t eot = t->tokenizer.eot_id;
    Tokens tokens = {0};
    if (!prompt_tokens(t, &tokens, err)) {
        free(tokens.data);
        return false;
    }
    int capacity = (int)tokens.size + run->sample.max_new_tokens;
    Decoder decoder;
    decoder_create(&decoder, &t->gpt, capacity < room ? capacity : room);
    Candidate* candidates = malloc_check((size_t)V * sizeof *candidates);
    for (size_t i = 0; i < tokens.size; i++) {
        decoder_step(&decoder, (int)tokens.data[i]);
        if (tokens.data[i] != (uint32_t)eot) {
            size_t size;
            const char* bytes = token_bytes(&t->tokenizer, tokens.data[i], &size);
            string_append_bytes(out, bytes, size);
        }
        if (i + 1 < tokens.size || decoder.length == decoder.capacity) continue;
        double u = random_uniform(run->sample.seed, RANDOM_SAMPLE, (uint64_t)number, tokens.size);
        int next = sample_token(decoder.logits, V, run->sample.temperature, run->sample.top_k,
                                run->sample.top_p, u, candidates);
        if (next == eot || next == run->model.eos_token_id) break;
        uint32_t id = (uint32_t)next;
        tokens_append(&tokens, &id, 1);
    }
    free(candidates), free(tokens.data);
    decoder_free(&decoder);
    return true;
}

// ----------------------------------------------------------------------------
// training

typedef struct {
    double loss, grad_norm, lr, seconds;
    bool applied;
} StepResult;

// One optimizer step on rows (global_batch_size, T + 1).
static StepResult train_step(Trainer* t, const int32_t* rows) {
    const RunConfig* run = &t->run;
    GPT* g = &t->gpt;
    int B = g->B, T = g->T, num_rows = run->batch.global_batch_size;
    double num_targets = (double)num_rows * T, loss = 0; // training masks no target
    for (int row = 0; row < num_rows; row += B) {
        split_rows(t, rows + (size_t)row * (size_t)(T + 1), B);
        gpt_forward(g, t->inputs, run->data.document_mask ? t->doc_start : NULL, B);
        loss += gpt_loss(g, t->targets, B, (real)(1.0 / num_targets));
        gpt_backward(g, t->inputs, B);
    }
    StepResult r = {.loss = loss / num_targets, .lr = learning_rate(run, t->state.step)};
    r.grad_norm = sqrt(global_norm_squared(g->grads, g->layout.num_parameters));
    r.applied = guard_accepts(&t->state, r.loss, r.grad_norm);
    double clip = run->optimizer.grad_clip;
    double grad_scale = clip > 0 && r.grad_norm > clip ? clip / r.grad_norm : 1.0;
    if (r.applied)
        gpt_update(g, run, r.lr, grad_scale, t->state.step - t->state.skipped_steps + 1);
    else
        memset(g->grads, 0, g->layout.num_parameters * sizeof(real));
    t->state.step++;
    t->state.rows += (uint64_t)num_rows;
    t->state.tokens += (uint64_t)num_rows * (uint64_t)T;
    return r;
}

static void report_step(Trainer* t, const StepResult* r) {
    const RunConfig* run = &t->run;
    double seconds_per_step = t->seconds_per_step;
    double tokens = (double)run->batch.global_batch_size * run->batch.sequence_length;
    double rate = tokens / seconds_per_step;
    double gflops = rate * flops_per_token(&run->model, run->batch.sequence_length, FLOPS_CAUSAL) / 1e9;
    char left[24], bpb[16] = "-";
    format_duration(left, (double)((uint64_t)run->schedule.max_steps - t->state.step) * seconds_per_step);
    if (isfinite(t->bits_per_byte)) snprintf(bpb, sizeof bpb, "%.4f", t->bits_per_byte);
    printf("step %6llu/%d | loss %7.4f | val bpb %s | norm %6.3f | lr %.2e | %7.0f tok/s | %6.1f GFLOP/s | "
           "left %s%s\n",
           (unsigned long long)t->state.step, run->schedule.max_steps, r->loss, bpb, r->grad_norm, r->lr,
           rate, gflops, left, r->applied ? "" : " | SKIPPED: not finite");
    fflush(stdout);
    String line = event_begin("step", t->state.step);
    event_number(&line, "loss", r->loss);
    event_number(&line, "grad_norm", r->grad_norm);
    event_number(&line, "learning_rate", r->lr);
    event_number(&line, "tokens", (double)t->state.tokens);
    event_number(&line, "tokens_per_second", rate);
    event_number(&line, "step_seconds", r->seconds);
    event_number(&line, "gflops", gflops);
    event_number(&line, "skipped_steps", (double)t->state.skipped_steps);
    event_end(&t->metrics, &line);
}

static bool report_evaluation(Trainer* t, Error* err) {
    Evaluation e;
    double start = seconds_now();
    if (!evaluate(t, &e, err)) return false;
    if (stop_requested()) return true;
    t->bits_per_byte = e.bits_per_byte;
    printf("eval %6llu | val loss %.4f | perplexity %.2f", (unsigned long long)t->state.step, e.loss,
           e.perplexity);
    if (isfinite(e.bits_per_byte)) printf(" | %.4f bits per byte", e.bits_per_byte);
    printf(" | %llu tokens in %.1f s\n", (unsigned long long)e.tokens, seconds_now() - start);
    String line = event_begin("eval", t->state.step);
    event_number(&line, "loss", e.loss);
    event_number(&line, "perplexity", e.perplexity);
    if (isfinite(e.bits_per_byte)) event_number(&line, "bits_per_byte", e.bits_per_byte);
    event_end(&t->metrics, &line);
    return true;
}

static bool report_samples(Trainer* t, Error* err) {
    for (int i = 0; i < t->run.sample.num_samples; i++) {
        String text = {NULL, 0, 0};
        if (!generate(t, i, &text, err)) return false;
        printf("---- sample %d at step %llu\n", i + 1, (unsigned long long)t->state.step);
        print_escaped(stdout, text.data, text.size);
        printf("\n----\n");
        String line = event_begin("sample", t->state.step);
        event_bytes(&line, "text", text.data, text.size);
        event_end(&t->metrics, &line);
        free(text.data);
    }
    return true;
}

static bool save(Trainer* t, Error* err) {
    char directory[PATH_MAX];
    double start = seconds_now();
    CheckpointData data = checkpoint_data(t);
    if (checkpoints_directory(t, directory, err) == NULL ||
        !checkpoint_save(directory, &data, t->run.checkpoint.keep_last,
                         (uint64_t)t->run.checkpoint.permanent_every, err))
        return false;
    t->saved_step = t->state.step;
    printf("save %6llu | %s/step_%08llu in %.1f s\n", (unsigned long long)t->state.step, directory,
           (unsigned long long)t->state.step, seconds_now() - start);
    String line = event_begin("checkpoint", t->state.step);
    event_text(&line, "directory", directory);
    event_number(&line, "seconds", seconds_now() - start);
    event_end(&t->metrics, &line);
    return true;
}

// Is `step` one of every, 2 every, ... or the last? every 0 means only the last.
static bool is_due(int every, uint64_t step, bool last) {
    return last || (every > 0 && step % (uint64_t)every == 0);
}

// What is due after a step: the checkpoint before what reads and may fail.
static bool after_step(Trainer* t, const StepResult* r, Error* err) {
    const RunConfig* run = &t->run;
    uint64_t step = t->state.step;
    bool last = step == (uint64_t)run->schedule.max_steps;
    if (is_due(run->log.every, step, last) || !r->applied) report_step(t, r);
    if (t->state.consecutive_skipped >= (uint64_t)run->guard.max_skipped_steps)
        return fail(
            err, EXIT_INTERNAL,
            "training diverged: loss or gradient norm was not finite in %d steps in a row up to step %llu; "
            "lower optimizer.learning_rate or look at the data, and resume from the last checkpoint "
            "(guard.max_skipped_steps is the limit)",
            run->guard.max_skipped_steps, (unsigned long long)step);
    if (is_due(run->checkpoint.every, step, last) && !save(t, err)) {
        // a full disk must not end a run that may go on for days: say it, keep training, try again later
        if (last) return false;
        fprintf(stderr, "warning: no checkpoint at step %llu: %s\n", (unsigned long long)step, err->text);
        *err = (Error){0};
    }
    if (!stop_requested() && t->validation.rows > 0 && is_due(run->eval.every, step, last) &&
        !report_evaluation(t, err))
        return false;
    bool sample_due = run->sample.every > 0 && is_due(run->sample.every, step, last);
    return !sample_due || stop_requested() || report_samples(t, err);
}

static bool train_loop(Trainer* t, Error* err) {
    const RunConfig* run = &t->run;
    Prefetch prefetch;
    int rows_per_step = run->batch.global_batch_size;
    if (!prefetch_start(&prefetch, &t->train, t->state.rows, (uint64_t)rows_per_step, 0, rows_per_step,
                        PREFETCH_DEPTH, err))
        return false;
    bool ok = true;
    for (int done = 1; ok && !stop_requested() && t->state.step < (uint64_t)run->schedule.max_steps; done++) {
        double start = seconds_now();
        const int32_t* rows = prefetch_next(&prefetch, err);
        ok = rows != NULL;
        if (!ok) break;
        StepResult r = train_step(t, rows);
        r.seconds = seconds_now() - start; // the wait for data included
        t->seconds_per_step += (done < 20 ? 1.0 / done : 0.05) * (r.seconds - t->seconds_per_step);
        ok = after_step(t, &r, err);
    }
    prefetch_stop(&prefetch);
    // Whatever ended the run, what it has learnt is kept; but not what diverged.
    Error unsaved = {0};
    if (t->saved_step == t->state.step || err->code == EXIT_INTERNAL || save(t, &unsaved)) return ok;
    if (ok)
        *err = unsaved;
    else
        fprintf(stderr, "warning: no checkpoint at step %llu: %s\n", (unsigned long long)t->state.step,
                unsaved.text);
    return false;
}

// What a run looks like before its first step: enough to see a wrong tokenizer, a wrong shard, a wrong size.
static void print_start(const Trainer* t, bool resumed) {
    config_print(&t->run, stdout);
    dataloader_describe(&t->train, stdout);
    if (t->validation.rows > 0) dataloader_describe(&t->validation, stdout);
    if (resumed)
        printf("resumed at step %llu, after %llu tokens\n", (unsigned long long)t->state.step,
               (unsigned long long)t->state.tokens);
    if (t->state.step >= (uint64_t)t->run.schedule.max_steps)
        printf("nothing to do: schedule.max_steps is %d\n", t->run.schedule.max_steps);
    if (t->run.data.tokenizer[0] == '\0') return;
    int T = t->run.batch.sequence_length;
    int32_t* row = malloc_check((size_t)(T + 1) * sizeof *row);
    Error ignored = {0};
    if (dataloader_row(&t->train, t->state.rows, row, &ignored)) {
        printf("---- the data, decoded: row %llu begins\n", (unsigned long long)t->state.rows);
        for (int i = 0; i < T && i < 60; i++) {
            size_t size;
            const char* bytes = token_bytes(&t->tokenizer, (uint32_t)row[i], &size);
            print_escaped(stdout, bytes, size);
        }
        printf("\n----\n");
    }
    free(row);
}

static void log_start(Trainer* t, bool resumed) {
    String line = event_begin(resumed ? "resume" : "start", t->state.step);
    event_text(&line, "version", VERSION);
    event_number(&line, "parameters", (double)model_num_parameters(&t->run.model));
    event_number(&line, "threads", omp_get_max_threads());
    string_append(&line, ",\"config\":%s", t->config_json.data);
    event_end(&t->metrics, &line);
}

// `reason` is done, signal or error.
static void log_stop(Trainer* t, const char* reason, const Error* err) {
    String line = event_begin("stop", t->state.step);
    event_text(&line, "reason", reason);
    if (err->code != 0) event_text(&line, "error", err->text);
    event_end(&t->metrics, &line);
}

// One trainer at a time: two in one run directory would take turns in overwriting each other's checkpoints.
static bool lock_run_directory(Trainer* t, Error* err) {
    const char* run_dir = t->run.log.run_dir;
    if (!make_directories(run_dir, err)) return false;
    t->run_dir_fd = open(run_dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (t->run_dir_fd < 0)
        return fail(err, EXIT_CANNOT_WRITE, "cannot open %s: %s", run_dir, strerror(errno));
    if (flock(t->run_dir_fd, LOCK_EX | LOCK_NB) == 0) return true;
    return fail(err, EXIT_CANNOT_WRITE,
                "another process is training in %s: wait for it, stop it, or name another "
                "log.run_dir",
                run_dir);
}

// run_config.json in the run directory; when it was there before, says what is different now.
static bool write_run_config(Trainer* t, Error* err) {
    char path[PATH_MAX];
    size_t size;
    Error none = {0};
    if (!path_join(path, t->run.log.run_dir, "run_config.json", err)) return false;
    char* before = read_file(path, JSON_MAX_BYTES, &size, &none);
    if (before != NULL) config_print_changes(before, t->config_json.data, stdout);
    free(before);
    return replace_file(path, t->config_json.data, t->config_json.size, err);
}

static bool check_memory(const Trainer* t, Error* err) {
    MemoryLine lines[NUM_MEMORY_LINES];
    uint64_t total = memory_plan(&t->run, lines), there = physical_memory();
    if (total <= there) return true;
    return fail(
        err, EXIT_OS,
        "this run needs %.2f GB of memory and the machine has %.2f GB: halve "
        "batch.micro_batch_size (the global batch can stay) or take a smaller model; `plan` says what needs "
        "how much",
        (double)total / 1e9, (double)there / 1e9);
}

static bool command_train(Trainer* t, const char* argument, Error* err) {
    (void)argument;
    RunConfig* run = &t->run;
    bool resumed = false;
    Tokens prompt = {0};
    block_stop_signals();
    if (!check_memory(t, err) || !lock_run_directory(t, err) || !open_data(t, true, err)) return false;
    bool prompt_ok =
        run->sample.every == 0 || prompt_tokens(t, &prompt, err); // rather now than after an hour
    free(prompt.data);
    if (!prompt_ok || !choose_tokenizer_json(t, err)) return false;
    gpt_create(&t->gpt, &run->model, run->batch.micro_batch_size, run->batch.sequence_length,
               run->precision.compute, true);
    create_batch(t);
    config_write_json(run, &t->config_json);
    if (!load_or_init(t, &resumed, err) || !write_run_config(t, err) ||
        !metrics_open(&t->metrics, run->log.run_dir, err))
        return false;
    print_start(t, resumed);
    log_start(t, resumed);
    bool ok = train_loop(t, err), done = t->state.step >= (uint64_t)run->schedule.max_steps;
    if (ok && !done)
        fail(err, EXIT_STOPPED,
             "stopped by signal %d at step %llu, which is saved; the same command goes on from there",
             stop_signal, (unsigned long long)t->state.step);
    log_stop(t, !ok ? "error" : done ? "done" : "signal", err);
    if (ok && done)
        printf("done: step %llu; model directory %s/checkpoints/step_%08llu\n",
               (unsigned long long)t->state.step, run->log.run_dir, (unsigned long long)t->state.step);
    return ok && done;
}

// Opens what evaluating, sampling and exporting need: a model without room for a backward pass.
static bool open_model(Trainer* t, int B, int T, Error* err) {
    enum WeightsFrom from;
    gpt_create(&t->gpt, &t->run.model, B, T, t->run.precision.compute, false);
    create_batch(t);
    if (!load_weights(t, &from, err)) return false;
    return from != WEIGHTS_NOWHERE ||
           fail(err, EXIT_NO_INPUT,
                "no checkpoint in %s/checkpoints: train first, or name a model directory with "
                "checkpoint.load_from=DIR",
                t->run.log.run_dir);
}

static bool command_eval(Trainer* t, const char* argument, Error* err) {
    (void)argument;
    Evaluation e;
    if (t->run.data.validation[0] == '\0')
        return fail(err, EXIT_CONFIG, "data.validation is empty: eval needs the shards to evaluate on");
    if (!open_data(t, false, err)) return false;
    if (!open_model(t, t->run.batch.micro_batch_size, t->run.batch.sequence_length, err)) return false;
    if (!evaluate(t, &e, err)) return false;
    printf("{\"step\":%llu,\"tokens\":%llu,\"loss\":%.9g,\"perplexity\":%.9g",
           (unsigned long long)t->state.step, (unsigned long long)e.tokens, e.loss, e.perplexity);
    if (isfinite(e.bits_per_byte)) printf(",\"bits_per_byte\":%.9g", e.bits_per_byte);
    printf("}\n");
    return true;
}

static bool command_sample(Trainer* t, const char* argument, Error* err) {
    (void)argument;
    if (t->run.data.tokenizer[0] == '\0')
        return fail(err, EXIT_CONFIG, "data.tokenizer is empty: sample needs it to read and write text");
    if (!open_tokenizer(t, err) || !open_model(t, 1, 1, err)) return false;
    for (int i = 0; i < t->run.sample.num_samples; i++) {
        String text = {NULL, 0, 0};
        if (!generate(t, i, &text, err)) return false;
        if (i > 0) printf("----\n");
        print_escaped(stdout, text.data, text.size);
        printf("\n");
        free(text.data);
    }
    return true;
}

static bool command_export(Trainer* t, const char* argument, Error* err) {
    if (t->run.data.tokenizer[0] != '\0' && (!open_tokenizer(t, err) || !choose_tokenizer_json(t, err)))
        return false;
    if (!open_model(t, 1, 1, err)) return false;
    CheckpointData data = checkpoint_data(t);
    data.m = data.v = NULL;
    if (!checkpoint_export(argument, &data, err)) return false;
    printf("wrote the model of step %llu to %s\n", (unsigned long long)t->state.step, argument);
    return true;
}

static bool command_plan(Trainer* t, const char* argument, Error* err) {
    (void)argument, (void)err;
    const RunConfig* run = &t->run;
    MemoryLine lines[NUM_MEMORY_LINES];
    memory_plan(run, lines);
    int rows = run->batch.micro_batch_size * run->batch.sequence_length;
    Plan plan = {
        .run = run, .num_memory = NUM_MEMORY_LINES, .memory = lines, .threads = omp_get_max_threads()};
    plan.matmul_rate = measure_matmul_rate(rows < 1024 ? rows : 1024, run->model.hidden_size,
                                           (int)model_dim(&run->model, DIM_FC), run->precision.compute);
    plan.copy_rate = measure_copy_rate();
    // a plan is made before there are data, too: without them it says nothing about epochs
    Error no_data = {0};
    if (open_train(t, &no_data))
        plan.train_tokens = t->train.tokens;
    else
        fprintf(stderr, "note: %s\n", no_data.text);
    plan_print(&plan, stdout);
    return true;
}

// ----------------------------------------------------------------------------
// the command line

typedef struct {
    const char* name;
    bool (*run)(Trainer*, const char* argument, Error*);
    const char* argument; // what stands behind RUN.json; NULL: nothing
    const char* does;
} Command;

static const Command commands[] = {
    {"train", command_train, NULL, "train, or resume if a checkpoint is there (the word may be left out)"},
    {"plan", command_plan, NULL, "say what it would take: parameters, FLOPs, memory, time"},
    {"eval", command_eval, NULL, "loss, perplexity and bits per byte on data.validation, as JSON"},
    {"sample", command_sample, NULL, "generate text from sample.prompt"},
    {"export", command_export, "OUT_DIR", "write a Hugging Face model directory"},
};
enum { NUM_COMMANDS = sizeof commands / sizeof commands[0] };

static void print_usage(FILE* out, const char* program) {
    fprintf(out, "usage: %s [COMMAND] RUN.json [section.key=value ...]\n\n", program);
    for (int i = 0; i < NUM_COMMANDS; i++)
        fprintf(out, "  %-6s RUN.json %-8s %s\n", commands[i].name,
                commands[i].argument != NULL ? commands[i].argument : "", commands[i].does);
    fprintf(out,
            "  checkpoint verify|info|diff DIR [DIR]   check, describe or compare checkpoints\n"
            "  help config                             every key of a run config, as a table\n\n"
            "exit codes: 0 done, 64 usage, 65 damaged data, 66 missing file, 70 diverged or internal,\n"
            "            71 out of memory, 73 cannot create, 74 I/O error, 75 stopped by a signal after\n"
            "            saving (run again to go on), 78 run config\n");
}

static int run_checkpoint_command(int argc, char** argv) {
    if (argc == 2 && strcmp(argv[0], "verify") == 0) return checkpoint_verify(argv[1]);
    if (argc == 2 && strcmp(argv[0], "info") == 0) return checkpoint_info(argv[1]);
    if (argc == 3 && strcmp(argv[0], "diff") == 0) return checkpoint_diff(argv[1], argv[2]);
    fprintf(stderr, "error: checkpoint takes: verify DIR, info DIR, or diff DIR DIR\n");
    return EXIT_USAGE;
}

int main(int argc, char** argv) {
    const char* program = argv[0];
    if (argc >= 2 &&
        (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0)) {
        if (argc == 3 && strcmp(argv[2], "config") == 0)
            config_print_reference(stdout);
        else
            print_usage(stdout, program);
        return EXIT_OK;
    }
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        printf("pretrain.c %s\n", VERSION);
        return EXIT_OK;
    }
    if (argc >= 2 && strcmp(argv[1], "checkpoint") == 0) return run_checkpoint_command(argc - 2, argv + 2);
    const Command* command = &commands[0];
    argc--, argv++;
    for (int i = 0; argc > 0 && i < NUM_COMMANDS; i++) {
        if (strcmp(argv[0], commands[i].name) != 0) continue;
        command = &commands[i];
        argc--, argv++;
        break;
    }
    if (argc > 0 && strchr(argv[0], '.') == NULL && access(argv[0], R_OK) != 0) {
        fprintf(stderr, "error: %s is neither a command nor a run config; %s --help lists the commands\n",
                argv[0], program);
        return EXIT_USAGE;
    }
    int needed = command->argument != NULL ? 2 : 1;
    if (argc < needed) {
        print_usage(stderr, program);
        return EXIT_USAGE;
    }
    static Trainer trainer;
    Error err = {0};
    trainer.bits_per_byte = NAN, trainer.metrics.fd = -1;
    if (!config_load(&trainer.run, argv[0], argc - needed, argv + needed, &err)) exit_with(&err);
    if (trainer.run.parallel.threads > 0) omp_set_num_threads(trainer.run.parallel.threads);
    bool ok = command->run(&trainer, needed == 2 ? argv[1] : NULL, &err);
    trainer_close(&trainer);
    // what the other commands print is their result; a training run has its log
    if (ok && command->run != command_train && fflush(stdout) != 0)
        ok = fail(&err, EXIT_IO, "cannot write to standard output: %s", strerror(errno));
    if (!ok) exit_with(&err);
    return EXIT_OK;
}
#endif
