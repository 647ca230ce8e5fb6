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
//     step        micro-batches, norm, update; the loss of tokens, for evaluation
//     the program what llmc/program.h asks of it; the run and its commands are in llmc/commands.h, for this
//                 program and for train_gpt.cu
//
// Shapes: B sequences, T positions, N = B * T rows, C hidden size, V vocabulary (Vp padded), L layers, NH
// query heads, NKV key/value heads, HS head size, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF feed-forward size,
// FC = FF, or 2 FF where a gate lies beside it. A gradient's name is its tensor's with a d in front.
#include "llmc/commands.h"   // defines: program_main; the run, and what it asks of this program (program.h)
#include "llmc/dataloader.h" // defines: document_starts
#include "llmc/layers_cpu.h" // defines: real, embedding_forward ... classifier
#include "llmc/model.h"      // defines: ModelConfig, ParameterLayout, tensor_table
#include "llmc/optimizer_cpu.h" // defines: adamw_update, global_norm_squared
#include "llmc/probe_cpu.h"     // defines: measure_matmul_rate, measure_copy_rate
#include "llmc/rope.h"          // defines: rope_table

#include <omp.h>

#ifdef TESTING // tests and benchmarks include the model, not main, and take what they need
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

struct GPT {
    ModelConfig config;
    ParameterLayout layout;
    int B, T; // the micro-batch that the activations have room for
    real *params, *grads, *m, *v;
    LayerActivations* layers;
    real *embedded, *lnf, *lnf_mean, *lnf_rstd; // (N, C) (N, C) (N) (N)
    real* losses;                               // (N)
    const int* doc_start;                       // (N), NULL without document masking
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
    real* old_params;                 // before the update, where layers are measured; else NULL
    uint16_t* head_copy;              // (Vp, C) in bf16, while the head works through its rows
    int *inputs, *targets, *starts;   // (N) each: the micro-batch that split_rows made
    void* memory[NUM_MEMORY_CLASSES]; // the allocations behind all of these
    const int32_t* rows;              // (num_rows, T + 1) of the next step, from gpt_load_batch
    int num_rows, eot_id;
    bool document_mask, measures;
    LayerNorms* layer_norms; // (L + 2)
    StepResult result;       // of the last step
};

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
    g->inputs = (int*)(void*)arena_take(arena, elements(N * sizeof(int)));
    g->targets = (int*)(void*)arena_take(arena, elements(N * sizeof(int)));
    g->starts = (int*)(void*)arena_take(arena, elements(N * sizeof(int)));
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
    if (g->measures) g->old_params = arena_take(arena, g->layout.num_parameters);
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

// What a run config says about the model; no memory yet.
static void gpt_configure(GPT* g, const RunConfig* run, int B, int T) {
    memset(g, 0, sizeof *g);
    g->config = run->model;
    g->layout = parameter_layout(&run->model);
    g->B = B, g->T = T;
    g->matmul.compute = run->precision.compute == COMPUTE_BF16 ? MATMUL_BF16 : MATMUL_FP32;
    g->measures = run->log.layers_every > 0;
    g->layers = calloc_check((size_t)run->model.num_hidden_layers, sizeof *g->layers);
    g->layer_norms = calloc_check((size_t)run->model.num_hidden_layers + 2, sizeof *g->layer_norms);
}

// The exact size of each class in bytes, without allocating any of it.
static void gpt_plan(const RunConfig* run, int B, int T, bool training, size_t bytes[NUM_MEMORY_CLASSES]) {
    GPT g;
    gpt_configure(&g, run, B, T);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {0};
        lay_out(&g, i, &arena, training);
        bytes[i] = arena.used * sizeof(real);
    }
    free(g.layers), free(g.layer_norms);
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
static void gpt_forward(GPT* g, const int* tokens, const int* doc_start, int B) {
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

// training: with gradients, moments and what a backward pass needs.
bool gpt_create(GPT* g, const RunConfig* run, int B, int T, bool training, Error* err) {
    (void)err; // where memory ends the program ends (calloc_check)
    gpt_configure(g, run, B, T);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) {
        Arena arena = {0};
        lay_out(g, i, &arena, training);
        if (arena.used == 0) continue;
        arena = (Arena){g->memory[i] = aligned_zeros(arena.used * sizeof(real)), 0};
        lay_out(g, i, &arena, training);
    }
    matmul_init(&g->matmul, g->matmul.compute, g->matmul_scratch, largest_matmul_scratch(g));
    if (g->rope_cos != NULL)
        rope_table(g->rope_cos, g->rope_sin, &run->model.rope, run->model.max_position_embeddings,
                   run->model.head_dim);
    return true;
}

void gpt_free(GPT* g) {
    if (g->layers != NULL) matmul_free(&g->matmul);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++) free(g->memory[i]);
    free(g->layers), free(g->layer_norms);
    memset(g, 0, sizeof *g);
}

// ----------------------------------------------------------------------------
// decoding: one token at a time; keys and values of the past are kept, so that a token costs one row

struct Decoder {
    GPT* gpt; // whose weights are read; its activations are not touched
    int capacity, length;
    real *keys, *values;                        // (L, capacity, NKV * HS)
    real *residual, *norm, *qkv, *att, *hidden; // (C) (C) (QKV) (Q) (C)
    real *fc, *act, *logits;                    // (FC) (FF) (Vp)
    Matmul matmul; // always fp32: to round a weight for one row costs more than the product
    real *matmul_scratch, *memory;
};

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

void decoder_create(Decoder* d, GPT* g, int capacity) {
    Arena arena = {0};
    *d = (Decoder){.gpt = g, .capacity = capacity};
    arena.memory = d->memory = aligned_zeros(decoder_lay_out(d, &arena) * sizeof(real));
    arena.used = 0;
    decoder_lay_out(d, &arena);
    matmul_init(&d->matmul, MATMUL_FP32, d->matmul_scratch, matmul_pack_bytes());
}

void decoder_free(Decoder* d) {
    matmul_free(&d->matmul);
    free(d->memory);
}

// Appends one token; d->logits (Vp) then scores the next one. The same layers as gpt_forward, on one row.
void decoder_step(Decoder* d, int token) {
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

// ----------------------------------------------------------------------------
// step

// rows (B, T + 1) -> inputs and targets (B, T), one shifted against the other, and where documents start: the
// last is returned for gpt_forward, NULL without document masking.
static const int* split_rows(GPT* g, const int32_t* rows, int B, bool document_mask, int eot_id) {
    size_t T = (size_t)g->T;
    for (size_t b = 0; b < (size_t)B; b++) {
        const int32_t* row = rows + b * (T + 1);
        memcpy(g->inputs + b * T, row, T * sizeof(int));
        memcpy(g->targets + b * T, row + 1, T * sizeof(int));
        if (document_mask) document_starts(g->starts + b * T, row, g->T, eot_id);
    }
    return document_mask ? g->starts : NULL;
}

// In a step that is measured layer_norms holds sums of squares until finish_measuring: += of what each layer hands on
// of a micro-batch.
static void measure_activations(GPT* g, int B) {
    int L = g->config.num_hidden_layers;
    size_t n = (size_t)(B * g->T) * model_dim(&g->config, DIM_HIDDEN);
    for (int i = 0; i < L + 2; i++)
        g->layer_norms[i].of[LAYER_ACTIVATION_RMS] +=
            global_norm_squared(i <= L ? residual_into(g, i) : g->lnf, n);
}

// = of gradients, weights or what weights have changed by, bucket by bucket.
static void measure_buckets(GPT* g, enum LayerNorm which, const real* x) {
    int L = g->config.num_hidden_layers;
    for (int i = 0; i < L + 2; i++) {
        Bucket bucket = parameter_bucket(&g->layout, L, i);
        g->layer_norms[i].of[which] = global_norm_squared(x + bucket.begin, bucket.size);
    }
}

// Behind the update. activations: numbers in the residual stream of the step.
static const LayerNorms* finish_measuring(GPT* g, double activations) {
    real* difference = g->old_params;
    for (size_t i = 0; i < g->layout.num_parameters; i++) difference[i] = g->params[i] - difference[i];
    measure_buckets(g, LAYER_UPDATE_NORM, difference);
    measure_buckets(g, LAYER_WEIGHT_NORM, g->params);
    for (int i = 0; i < g->config.num_hidden_layers + 2; i++)
        for (int k = 0; k < NUM_LAYER_NORMS; k++) {
            double* norm = &g->layer_norms[i].of[k];
            *norm = sqrt(k == LAYER_ACTIVATION_RMS ? *norm / activations : *norm);
        }
    return g->layer_norms;
}

// The rows stay the caller's, and are read when the step is computed.
void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    g->rows = rows, g->num_rows = num_rows;
    g->document_mask = document_mask, g->eot_id = eot_id;
}

void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps, int requests,
                    StepGuard guard) {
    int B = g->B;
    double num_targets = (double)g->num_rows * g->T, loss = 0; // training masks no target
    bool measured = guard.measure_layers && g->old_params != NULL;
    for (int i = 0; i < g->config.num_hidden_layers + 2; i++) g->layer_norms[i].of[LAYER_ACTIVATION_RMS] = 0;
    for (int row = 0; row < g->num_rows; row += B) {
        const int32_t* rows = g->rows + (size_t)row * (size_t)(g->T + 1);
        const int* doc_start = split_rows(g, rows, B, g->document_mask, g->eot_id);
        gpt_forward(g, g->inputs, doc_start, B);
        if (measured) measure_activations(g, B);
        loss += gpt_loss(g, g->targets, B, (real)(1.0 / num_targets));
        gpt_backward(g, g->inputs, B);
    }
    StepResult r = {.loss = loss / num_targets, .requests = requests};
    r.grad_norm = sqrt(global_norm_squared(g->grads, g->layout.num_parameters));
    r.applied = guard_accepts(&guard, r.loss, r.grad_norm);
    double clip = run->optimizer.grad_clip;
    double grad_scale = clip > 0 && r.grad_norm > clip ? clip / r.grad_norm : 1.0;
    if (measured) {
        measure_buckets(g, LAYER_GRAD_NORM, g->grads);
        memcpy(g->old_params, g->params, g->layout.num_parameters * sizeof(real));
    }
    double start = seconds_now();
    size_t bytes = update_bytes(g->layout.num_parameters, sizeof(real), sizeof(real), sizeof(real));
    if (r.applied) {
        gpt_update(g, run, lr, grad_scale, applied_steps + 1);
        r.update_rate = (double)bytes / (seconds_now() - start);
    } else {
        memset(g->grads, 0, g->layout.num_parameters * sizeof(real));
    }
    if (measured) r.layers = finish_measuring(g, num_targets * g->config.hidden_size);
    g->result = r;
}

StepResult gpt_finish_step(GPT* g) { return g->result; }

#ifdef REAL_IS_FLOAT // what follows hands out numbers as they are
const float* gpt_losses(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    const int* doc_start = split_rows(g, rows, num_rows, document_mask, eot_id);
    gpt_forward(g, g->inputs, doc_start, num_rows);
    gpt_loss(g, g->targets, num_rows, 0);
    return g->losses;
}

// ----------------------------------------------------------------------------
// the program

const float* decoder_logits(const Decoder* d) { return d->logits; }

// The model lies in the host's memory: nothing to copy, and training stands still while it is written.
HostState gpt_host_state(GPT* g) { return (HostState){g->params, g->m, g->v, 0, g->layout.num_parameters}; }
void gpt_from_host(GPT* g) { (void)g; }
void gpt_look(GPT* g, uint8_t progress[FLIGHT_RECORDS]) { // there is no device
    (void)g;
    memset(progress, OPERATION_ISSUED, FLIGHT_RECORDS);
}
void gpt_snapshot(GPT* g) { (void)g; }
void gpt_snapshot_wait(GPT* g) { (void)g; }

static const char program_name[] = "train_gpt_cpu";

bool gpt_resolve(RunConfig* run, bool training, Error* err) {
    const struct {
        const char* key;
        int stored;
    } states[] = {{"master_weights", run->precision.master_weights},
                  {"gradients", run->precision.gradients},
                  {"moments", run->precision.moments}};
    if (run->layout.size > 1)
        return fail(err, EXIT_CONFIG,
                    "%d processes were started, and %s is one: start it once, or use train_gpt",
                    run->layout.size, program_name);
    if (run->precision.compute == COMPUTE_AUTO) run->precision.compute = COMPUTE_FP32;
    if (run->precision.compute == COMPUTE_TF32)
        return fail(
            err, EXIT_CONFIG,
            "precision.compute is \"tf32\": %s has no such numbers; set precision.compute=fp32 or bf16",
            program_name);
    for (int i = 0; training && i < 3; i++)
        if (states[i].stored != STORE_FP32)
            return fail(err, EXIT_CONFIG,
                        "precision.%s is \"bf16\": %s trains with all of its state in fp32; set "
                        "precision.%s=fp32, or train with train_gpt",
                        states[i].key, program_name, states[i].key);
    return true;
}

// The classes of memory, and the batches that the loader's thread has ready.
int gpt_memory(const RunConfig* run, bool training, MemoryLine lines[MEMORY_LINES_MAX]) {
    size_t bytes[NUM_MEMORY_CLASSES];
    int count = 0;
    uint64_t rows = (uint64_t)run->batch.global_batch_size, T = (uint64_t)run->batch.sequence_length;
    gpt_plan(run, run->batch.micro_batch_size, (int)T, training, bytes);
    for (int i = 0; i < NUM_MEMORY_CLASSES; i++)
        if (bytes[i] != 0) lines[count++] = (MemoryLine){memory_class_names[i], bytes[i]};
    if (training) lines[count++] = (MemoryLine){"batches", PREFETCH_DEPTH * rows * (T + 1) * sizeof(int32_t)};
    return count;
}

void gpt_choose_device(int local_rank) { (void)local_rank; }
bool gpt_connect(GPT* g, Control* control, Error* err) {
    (void)g, (void)err;
    return control->size == 1;
}
uint64_t gpt_memory_limit(void) { return physical_memory(); }
double gpt_peak_flops(const RunConfig* run) {
    (void)run;
    return 0;
}

bool gpt_self_test(const RunConfig* run, bool* bad, Error* err) {
    (void)run, (void)bad;
    return err->code == 0; // there is no device
}
void gpt_measure(const RunConfig* run, double* matmul_rate, double* copy_rate) {
    int rows = run->batch.micro_batch_size * run->batch.sequence_length;
    int compute = run->precision.compute == COMPUTE_BF16 ? MATMUL_BF16 : MATMUL_FP32;
    *matmul_rate = measure_matmul_rate(rows < 1024 ? rows : 1024, run->model.hidden_size,
                                       (int)model_dim(&run->model, DIM_FC), compute);
    *copy_rate = measure_copy_rate();
}

void gpt_print_device(FILE* out) { fprintf(out, "CPU, %d threads\n", omp_get_max_threads()); }

bool gpt_bus_id(char out[32]) {
    (void)out;
    return false;
}

void program_versions(FILE* out) {
#ifdef USE_DNNL
    const dnnl_version_t* v = dnnl_version();
    fprintf(out, "oneDNN %d.%d.%d\n", v->major, v->minor, v->patch);
#else
    fprintf(out, "built without oneDNN\n");
#endif
}
#endif

#ifndef TESTING
int main(int argc, char** argv) {
    static GPT gpt;
    static Decoder decoder;
    Program program = {
        .name = program_name, .version = VERSION, .asynchronous = false, .gpt = &gpt, .decoder = &decoder};
    return program_main(&program, argc, argv);
}
#endif
