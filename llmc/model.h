// The model's shape: its configuration, and the one table that describes every parameter.
//
// Sizes, initialisation, weight decay, sharding, optimizer state, checkpoints, import and export are loops
// over this table; a new kind of parameter is a new row. Plain C: the planner, the tools and both trainers
// share it, and nothing here allocates.
//
// Memory is layer-major: the parameters of one layer are contiguous, so that a layer is one bucket.
//
//     wte wpe | layer 0: ln1w ln1b qkvw ... fcprojb | layer 1: ... | ... | lnfw lnfb lmhead
//
// Dimensions: V vocabulary, Vp the same padded, C hidden size, L layers, NH query heads, NKV key/value
// heads, HS head size, FF feed-forward size, T positions.
#pragma once
#include <math.h>
#include <stddef.h>

#include "llmc/rand.h"  // defines: random_normal4, RANDOM_INIT
#include "llmc/rope.h"  // defines: RopeConfig
#include "llmc/utils.h" // defines: CHECK

// ----------------------------------------------------------------------------
// configuration: the fields carry Hugging Face's config.json names

enum NormKind { NORM_LAYERNORM, NORM_RMSNORM };
enum PositionKind { POSITION_LEARNED, POSITION_ROPE };
enum ActivationKind { ACTIVATION_GELU_TANH, ACTIVATION_SWIGLU };

// What a model_type fixes and what it only proposes. A family is a row, never a copy of the trainer.
typedef struct {
    const char* model_type;   // config.json: "model_type"
    const char* architecture; // config.json: "architectures"
    enum NormKind norm;
    enum PositionKind position;
    enum ActivationKind activation;
    const char* hidden_act;   // config.json: the activation's name there
    bool conv1d;              // Hugging Face stores the block's matmul weights as (in, out)
    bool bias, qkv_bias;      // defaults: on every matmul and norm; on q, k and v alone
    bool tie_word_embeddings; // default
    double initializer_range, norm_eps;
} ModelFamily;

static const ModelFamily model_families[] = {
    {"gpt2", "GPT2LMHeadModel", NORM_LAYERNORM, POSITION_LEARNED, ACTIVATION_GELU_TANH, "gelu_new", true,
     true, true, true, 0.02, 1e-5},
    {"llama", "LlamaForCausalLM", NORM_RMSNORM, POSITION_ROPE, ACTIVATION_SWIGLU, "silu", false, false, false,
     false, 0.02, 1e-5},
    {"mistral", "MistralForCausalLM", NORM_RMSNORM, POSITION_ROPE, ACTIVATION_SWIGLU, "silu", false, false,
     false, false, 0.02, 1e-5},
    {"qwen2", "Qwen2ForCausalLM", NORM_RMSNORM, POSITION_ROPE, ACTIVATION_SWIGLU, "silu", false, false, true,
     false, 0.02, 1e-6},
};
enum { NUM_MODEL_FAMILIES = sizeof model_families / sizeof model_families[0] };

typedef struct {
    const ModelFamily* family;
    int vocab_size;              // V, as the tokenizer has it
    int hidden_size;             // C
    int num_hidden_layers;       // L
    int num_attention_heads;     // NH
    int num_key_value_heads;     // NKV, divides NH
    int head_dim;                // HS
    int intermediate_size;       // FF
    int max_position_embeddings; // longest T
    double norm_eps;             // layer_norm_epsilon or rms_norm_eps
    double initializer_range;    // standard deviation of the initial weights
    bool attention_bias;         // on q, k and v
    bool attention_output_bias;  // on the projection behind attention
    bool mlp_bias;
    bool norm_bias; // LayerNorm's
    bool tie_word_embeddings;
    RopeConfig rope;                // only for POSITION_ROPE
    int bos_token_id, eos_token_id; // -1: none
} ModelConfig;

// Rows of the vocabulary tensors in memory: a multiple of 128 keeps the largest matmul of the model aligned.
// Padding rows are zero, stay zero (no gradient reaches them) and are never written to a checkpoint's model.
static inline int padded_vocab_size(int vocab_size) { return (vocab_size + 127) / 128 * 128; }

// ----------------------------------------------------------------------------
// the tensor table

enum Dim { DIM_1, DIM_VOCAB, DIM_POSITIONS, DIM_HIDDEN, DIM_HEADS, DIM_QKV, DIM_FF, DIM_FC };
enum Presence { ALWAYS, IF_LEARNED, IF_NORM_BIAS, IF_QKV_BIAS, IF_OUT_BIAS, IF_MLP_BIAS, IF_UNTIED };
enum Init { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_RESIDUAL }; // RESIDUAL: normal / sqrt(2 L), GPT-2 sec. 2.3
// Across tensor-parallel ranks. FIRST: all have it, the first alone adds it, to what is then summed over ranks.
enum TensorSplit { SPLIT_NONE, SPLIT_FIRST, SPLIT_ROWS, SPLIT_COLUMNS, SPLIT_VOCAB };
enum Place { BEFORE_LAYERS, PER_LAYER, AFTER_LAYERS };

typedef struct {
    const char* name;
    enum Place place;
    enum Presence presence;
    enum Dim rows, cols; // row-major (rows, cols), a matmul weight is (out, in); a vector has DIM_1 columns
    enum Init init;
    bool decay; // AdamW's weight decay
    enum TensorSplit split;
    const char* gpt2;     // Hugging Face's name; a layer's behind "transformer.h.N."
    const char* llama[3]; // the same, behind "model.layers.N."; fused tensors list their parts by rows
} TensorSpec;

enum TensorId {
    WTE,
    WPE,
    LN1W,
    LN1B,
    QKVW,
    QKVB,
    ATTPROJW,
    ATTPROJB,
    LN2W,
    LN2B,
    FCW,
    FCB,
    FCPROJW,
    FCPROJB,
    LNFW,
    LNFB,
    LMHEAD,
    NUM_TENSORS
};

// clang-format off
static const TensorSpec tensor_table[NUM_TENSORS] = {
    // name       place          presence      rows           cols         init           decay  split
    {"wte",      BEFORE_LAYERS, ALWAYS,       DIM_VOCAB,     DIM_HIDDEN,  INIT_NORMAL,   true,  SPLIT_VOCAB,
        "transformer.wte.weight",  {"model.embed_tokens.weight", NULL, NULL}},
    {"wpe",      BEFORE_LAYERS, IF_LEARNED,   DIM_POSITIONS, DIM_HIDDEN,  INIT_NORMAL,   true,  SPLIT_FIRST,
        "transformer.wpe.weight",  {NULL, NULL, NULL}},
    {"ln1w",     PER_LAYER,     ALWAYS,       DIM_HIDDEN,    DIM_1,       INIT_ONE,      false, SPLIT_NONE,
        "ln_1.weight",             {"input_layernorm.weight", NULL, NULL}},
    {"ln1b",     PER_LAYER,     IF_NORM_BIAS, DIM_HIDDEN,    DIM_1,       INIT_ZERO,     false, SPLIT_NONE,
        "ln_1.bias",               {NULL, NULL, NULL}},
    {"qkvw",     PER_LAYER,     ALWAYS,       DIM_QKV,       DIM_HIDDEN,  INIT_NORMAL,   true,  SPLIT_ROWS,
        "attn.c_attn.weight",
        {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"}},
    {"qkvb",     PER_LAYER,     IF_QKV_BIAS,  DIM_QKV,       DIM_1,       INIT_ZERO,     false, SPLIT_ROWS,
        "attn.c_attn.bias",
        {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}},
    {"attprojw", PER_LAYER,     ALWAYS,       DIM_HIDDEN,    DIM_HEADS,   INIT_RESIDUAL, true,  SPLIT_COLUMNS,
        "attn.c_proj.weight",      {"self_attn.o_proj.weight", NULL, NULL}},
    {"attprojb", PER_LAYER,     IF_OUT_BIAS,  DIM_HIDDEN,    DIM_1,       INIT_ZERO,     false, SPLIT_FIRST,
        "attn.c_proj.bias",        {"self_attn.o_proj.bias", NULL, NULL}},
    {"ln2w",     PER_LAYER,     ALWAYS,       DIM_HIDDEN,    DIM_1,       INIT_ONE,      false, SPLIT_NONE,
        "ln_2.weight",             {"post_attention_layernorm.weight", NULL, NULL}},
    {"ln2b",     PER_LAYER,     IF_NORM_BIAS, DIM_HIDDEN,    DIM_1,       INIT_ZERO,     false, SPLIT_NONE,
        "ln_2.bias",               {NULL, NULL, NULL}},
    {"fcw",      PER_LAYER,     ALWAYS,       DIM_FC,        DIM_HIDDEN,  INIT_NORMAL,   true,  SPLIT_ROWS,
        "mlp.c_fc.weight",         {"mlp.gate_proj.weight", "mlp.up_proj.weight", NULL}},
    {"fcb",      PER_LAYER,     IF_MLP_BIAS,  DIM_FC,        DIM_1,       INIT_ZERO,     false, SPLIT_ROWS,
        "mlp.c_fc.bias",           {"mlp.gate_proj.bias", "mlp.up_proj.bias", NULL}},
    {"fcprojw",  PER_LAYER,     ALWAYS,       DIM_HIDDEN,    DIM_FF,      INIT_RESIDUAL, true,  SPLIT_COLUMNS,
        "mlp.c_proj.weight",       {"mlp.down_proj.weight", NULL, NULL}},
    {"fcprojb",  PER_LAYER,     IF_MLP_BIAS,  DIM_HIDDEN,    DIM_1,       INIT_ZERO,     false, SPLIT_FIRST,
        "mlp.c_proj.bias",         {"mlp.down_proj.bias", NULL, NULL}},
    {"lnfw",     AFTER_LAYERS,  ALWAYS,       DIM_HIDDEN,    DIM_1,       INIT_ONE,      false, SPLIT_NONE,
        "transformer.ln_f.weight", {"model.norm.weight", NULL, NULL}},
    {"lnfb",     AFTER_LAYERS,  IF_NORM_BIAS, DIM_HIDDEN,    DIM_1,       INIT_ZERO,     false, SPLIT_NONE,
        "transformer.ln_f.bias",   {NULL, NULL, NULL}},
    {"lmhead",   AFTER_LAYERS,  IF_UNTIED,    DIM_VOCAB,     DIM_HIDDEN,  INIT_NORMAL,   true,  SPLIT_VOCAB,
        "lm_head.weight",          {"lm_head.weight", NULL, NULL}},
};
// clang-format on

// ----------------------------------------------------------------------------
// sizes and places, by loops over the table

static inline size_t model_dim(const ModelConfig* c, enum Dim dim) {
    size_t heads = (size_t)c->num_attention_heads * (size_t)c->head_dim;
    size_t kv_heads = (size_t)c->num_key_value_heads * (size_t)c->head_dim;
    size_t ff = (size_t)c->intermediate_size;
    switch (dim) {
    case DIM_1:
        return 1;
    case DIM_VOCAB:
        return (size_t)padded_vocab_size(c->vocab_size);
    case DIM_POSITIONS:
        return (size_t)c->max_position_embeddings;
    case DIM_HIDDEN:
        return (size_t)c->hidden_size;
    case DIM_HEADS:
        return heads;
    case DIM_QKV:
        return heads + 2 * kv_heads;
    case DIM_FF:
        return ff;
    case DIM_FC:
        return c->family->activation == ACTIVATION_SWIGLU ? 2 * ff : ff;
    }
    CHECK(!"a dimension the table does not know");
    return 0;
}

static inline bool tensor_present(const ModelConfig* c, enum TensorId id) {
    switch (tensor_table[id].presence) {
    case ALWAYS:
        return true;
    case IF_LEARNED:
        return c->family->position == POSITION_LEARNED;
    case IF_NORM_BIAS:
        return c->norm_bias;
    case IF_QKV_BIAS:
        return c->attention_bias;
    case IF_OUT_BIAS:
        return c->attention_output_bias;
    case IF_MLP_BIAS:
        return c->mlp_bias;
    case IF_UNTIED:
        return !c->tie_word_embeddings;
    }
    return false;
}

// Where everything lies in the flat parameter memory, in elements. The same layout serves gradients and
// optimizer moments. What lies before the layers, each layer, and what lies behind them is a bucket, which data-
// parallel ranks share out evenly: a multiple of `align` elements, the last of which may be padding.
//
//     | wte wpe | ln1w ln1b qkvw ... | ln1w ln1b qkvw ... | ... | lnfw lnfb lmhead |
//     0         layer_begin          + layer_size               layer_end          num_parameters
typedef struct {
    size_t rows[NUM_TENSORS], cols[NUM_TENSORS];
    size_t size[NUM_TENSORS];   // rows * cols of one copy; 0 when the model does not have the tensor
    size_t offset[NUM_TENSORS]; // of layer 0's copy
    size_t layer_begin, layer_size, layer_end;
    size_t num_parameters;
} ParameterLayout;

// first, last: is this the part of the model with the embedding, that with the head? With a tied head the last
// part has what lies before the layers, too.
static inline ParameterLayout parameter_layout_of(const ModelConfig* c, bool first, bool last, size_t align) {
    ParameterLayout p;
    memset(&p, 0, sizeof p);
    size_t next = 0;
    for (int place = BEFORE_LAYERS; place <= AFTER_LAYERS; place++) {
        size_t begin = next;
        for (int i = 0; i < NUM_TENSORS; i++) {
            const TensorSpec* t = &tensor_table[i];
            if ((int)t->place != place) continue;
            bool before = first || (last && c->tie_word_embeddings);
            bool here = place == BEFORE_LAYERS ? before : place == AFTER_LAYERS ? last : true;
            p.rows[i] = model_dim(c, t->rows), p.cols[i] = model_dim(c, t->cols);
            p.size[i] = here && tensor_present(c, (enum TensorId)i) ? p.rows[i] * p.cols[i] : 0;
            p.offset[i] = next;
            next += p.size[i];
        }
        next = begin + (next - begin + align - 1) / align * align;
        if (place == PER_LAYER) {
            p.layer_begin = begin, p.layer_size = next - begin;
            next = p.layer_end = begin + p.layer_size * (size_t)c->num_hidden_layers;
        }
    }
    p.num_parameters = next;
    return p;
}

// Of a whole model in one process.
static inline ParameterLayout parameter_layout(const ModelConfig* c) {
    return parameter_layout_of(c, true, true, 1);
}

// Bucket 0 lies before the layers, 1 .. L are the layers, L + 1 lies behind them.
typedef struct {
    size_t begin, size;
} Bucket;

static inline Bucket parameter_bucket(const ParameterLayout* p, int num_layers, int b) {
    Bucket before = {0, p->layer_begin}, after = {p->layer_end, p->num_parameters - p->layer_end};
    Bucket layer = {p->layer_begin + (size_t)(b - 1) * p->layer_size, p->layer_size};
    return b == 0 ? before : b <= num_layers ? layer : after;
}
static inline int tensor_bucket(enum TensorId id, int layer, int num_layers) {
    int place = tensor_table[id].place;
    return place == BEFORE_LAYERS ? 0 : place == PER_LAYER ? 1 + layer : num_layers + 1;
}

static inline int tensor_copies(const ModelConfig* c, enum TensorId id) {
    return tensor_table[id].place == PER_LAYER ? c->num_hidden_layers : 1;
}

static inline size_t tensor_offset(const ParameterLayout* p, enum TensorId id, int layer) {
    return p->offset[id] + (tensor_table[id].place == PER_LAYER ? (size_t)layer * p->layer_size : 0);
}

// Parameters that a checkpoint holds: without the padding of the vocabulary.
static inline uint64_t model_num_parameters(const ModelConfig* c) {
    ParameterLayout p = parameter_layout(c);
    size_t padding = (size_t)(padded_vocab_size(c->vocab_size) - c->vocab_size) * (size_t)c->hidden_size;
    return p.num_parameters - padding * (c->tie_word_embeddings ? 1 : 2);
}

// "wte", "h.3.qkvw": the name of one copy of a tensor in our own files and messages
static inline void tensor_name(char out[32], enum TensorId id, int layer) {
    if (tensor_table[id].place == PER_LAYER)
        snprintf(out, 32, "h.%d.%s", layer, tensor_table[id].name);
    else
        snprintf(out, 32, "%s", tensor_table[id].name);
}

// ----------------------------------------------------------------------------
// Hugging Face's view of the same memory

// One tensor of a Hugging Face checkpoint and the rows of our memory that it stands for.
typedef struct {
    char name[96];
    int num_dims;
    uint64_t dims[2];  // as in the file
    bool transposed;   // the file holds (cols, rows)
    bool absent;       // Hugging Face has it and this model does not (a GPT-2 without biases): zeros there
    size_t offset;     // of element (0, 0) in the parameter memory
    size_t rows, cols; // as in memory, without vocabulary padding
} HfTensor;

// How many rows of a fused tensor its part has in a Llama checkpoint: q, k and v, or gate and up.
static inline size_t hf_part_rows(const ModelConfig* c, const TensorSpec* t, int part) {
    size_t q = model_dim(c, DIM_HEADS);
    if (t->rows == DIM_QKV) return part == 0 ? q : (model_dim(c, DIM_QKV) - q) / 2;
    if (t->rows == DIM_FC) return model_dim(c, DIM_FF);
    return model_dim(c, t->rows);
}

// Describes rows [first_row, first_row + rows) of one copy of a tensor under the name that Hugging Face has
// for them.
static inline void hf_tensor_fill(HfTensor* h, const ModelConfig* c, const ParameterLayout* p, int id,
                                  int layer, const char* suffix, size_t first_row, size_t rows) {
    const TensorSpec* t = &tensor_table[id];
    const char* stem = c->family->conv1d ? "transformer.h" : "model.layers";
    if (t->place == PER_LAYER)
        snprintf(h->name, sizeof h->name, "%s.%d.%s", stem, layer, suffix);
    else
        snprintf(h->name, sizeof h->name, "%s", suffix);
    h->rows = rows, h->cols = p->cols[id];
    h->num_dims = t->cols == DIM_1 ? 1 : 2;
    h->transposed = c->family->conv1d && t->place == PER_LAYER && h->num_dims == 2;
    h->dims[0] = h->transposed ? h->cols : h->rows;
    h->dims[1] = h->num_dims == 1 ? 1 : h->transposed ? h->rows : h->cols;
    h->absent = p->size[id] == 0;
    h->offset = tensor_offset(p, (enum TensorId)id, layer) + first_row * p->cols[id];
}

// One copy of one tensor: a single Hugging Face tensor for GPT-2, up to three for the others, none where
// neither has it. A GPT-2 without biases still has them there, as zeros. Returns how many, and fills out if
// it is not NULL.
static inline int hf_tensor_parts(HfTensor* out, const ModelConfig* c, const ParameterLayout* p, int id,
                                  int layer) {
    const TensorSpec* t = &tensor_table[id];
    bool gpt2 = c->family->conv1d, fused = !gpt2 && t->llama[1] != NULL;
    if (p->size[id] == 0 && !(gpt2 && t->init == INIT_ZERO)) return 0;
    int parts = 0;
    size_t row = 0;
    while (parts < (fused ? 3 : 1) && (gpt2 || t->llama[parts] != NULL)) {
        size_t whole = t->rows == DIM_VOCAB ? (size_t)c->vocab_size : p->rows[id];
        size_t rows = fused ? hf_part_rows(c, t, parts) : whole;
        if (out != NULL)
            hf_tensor_fill(out + parts, c, p, id, layer, gpt2 ? t->gpt2 : t->llama[parts], row, rows);
        row += rows;
        parts++;
    }
    return parts;
}

// Fills out[] (or only counts when out is NULL) in the order of memory; returns how many there are.
static inline int model_hf_tensors(const ModelConfig* c, HfTensor* out) {
    ParameterLayout p = parameter_layout(c);
    int count = 0;
    for (int place = BEFORE_LAYERS; place <= AFTER_LAYERS; place++)
        for (int layer = 0; layer < (place == PER_LAYER ? c->num_hidden_layers : 1); layer++)
            for (int id = 0; id < NUM_TENSORS; id++)
                if ((int)tensor_table[id].place == place)
                    count += hf_tensor_parts(out != NULL ? out + count : NULL, c, &p, id, layer);
    return count;
}

// ----------------------------------------------------------------------------
// initial weights: a function of (seed, tensor, layer, element), the same in every layout

static inline void init_tensor(float* out, const ModelConfig* c, enum TensorId id, int layer, uint64_t seed) {
    ParameterLayout p = parameter_layout(c);
    const TensorSpec* t = &tensor_table[id];
    size_t size = p.size[id];
    if (size == 0) return; // a tensor that this model does not have
    if (t->init == INIT_ZERO || t->init == INIT_ONE) {
        for (size_t i = 0; i < size; i++) out[i] = t->init == INIT_ONE ? 1.0f : 0.0f;
        return;
    }
    double std = c->initializer_range / (t->init == INIT_RESIDUAL ? sqrt(2.0 * c->num_hidden_layers) : 1.0);
    uint64_t which = (uint64_t)id * 65536u + (uint64_t)layer;
    size_t filled = t->rows == DIM_VOCAB ? (size_t)c->vocab_size * p.cols[id] : size;
    for (size_t i = filled; i < size; i++) out[i] = 0.0f;
#pragma omp parallel for schedule(static)
    for (size_t block = 0; block < (filled + 3) / 4; block++) {
        float normal[4];
        random_normal4(normal, seed, RANDOM_INIT, which, block);
        for (size_t i = 4 * block; i < 4 * block + 4 && i < filled; i++)
            out[i] = (float)std * normal[i - 4 * block];
    }
}
