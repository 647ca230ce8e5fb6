// Small models with known weights, and temporary directories, for the tests of checkpoints.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "llmc/model.h"          // defines: ModelConfig, model_families, parameter_layout
#include "llmc/rand.h"           // defines: random_uniform, RANDOM_INIT
#include "llmc/stored_tensors.h" // defines: zero_vocabulary_padding

// One of each kind that is stored differently: transposed or not, split q/k/v or not, biases, a tied head.
static const struct {
    const char* family;
    int V, C, L, NH, NKV, HS, FF;
    bool bias, tied;
} tiny_models[] = {
    {"gpt2", 131, 8, 2, 2, 2, 4, 24, true, true},     {"gpt2", 130, 8, 1, 2, 2, 4, 32, false, false},
    {"llama", 129, 12, 2, 3, 1, 6, 20, false, false}, {"llama", 7, 8, 1, 2, 1, 4, 12, true, true},
    {"qwen2", 128, 8, 2, 2, 1, 4, 20, true, true},
};
enum { NUM_TINY_MODELS = sizeof tiny_models / sizeof tiny_models[0] };

static inline ModelConfig tiny_model(int which) {
    ModelConfig c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(model_families[i].model_type, tiny_models[which].family) == 0)
            c.family = &model_families[i];
    bool gpt2 = c.family->conv1d, bias = tiny_models[which].bias;
    c.vocab_size = tiny_models[which].V, c.hidden_size = tiny_models[which].C;
    c.num_hidden_layers = tiny_models[which].L, c.num_attention_heads = tiny_models[which].NH;
    c.num_key_value_heads = tiny_models[which].NKV, c.head_dim = tiny_models[which].HS;
    c.intermediate_size = tiny_models[which].FF, c.max_position_embeddings = 16;
    c.norm_eps = c.family->norm_eps, c.initializer_range = c.family->initializer_range;
    c.attention_bias = bias, c.attention_output_bias = bias && !c.family->qkv_bias;
    c.mlp_bias = bias && !c.family->qkv_bias, c.norm_bias = bias && gpt2;
    if (gpt2) c.attention_output_bias = c.mlp_bias = bias;
    c.tie_word_embeddings = tiny_models[which].tied;
    c.rope.theta = 10000.0;
    c.bos_token_id = 0, c.eos_token_id = 1;
    return c;
}

typedef struct {
    ModelConfig model;
    size_t count;
    float *params, *m, *v;
} Weights;

// Memory full of a pattern that no test expects.
static inline Weights weights_new(const ModelConfig* model) {
    Weights w = {*model, parameter_layout(model).num_parameters, NULL, NULL, NULL};
    float** parts[3] = {&w.params, &w.m, &w.v};
    for (int k = 0; k < 3; k++) *parts[k] = (float*)memset(malloc_check(w.count * 4), 0xAB, w.count * 4);
    return w;
}

static inline void weights_free(Weights* w) {
    free(w->params);
    free(w->m);
    free(w->v);
}

// Values that depend on the seed, the kind and the place; some are numbers that arithmetic would not keep.
static inline void weights_fill(Weights* w, uint64_t seed) {
    static const uint32_t odd_bits[4] = {0x80000000, 0x00000001, 0xFF800000,
                                         0x7FC12345}; // -0, 1e-45, -inf, NaN
    float* parts[3] = {w->params, w->m, w->v};
    for (int k = 0; k < 3; k++) {
        for (size_t i = 0; i < w->count; i++) {
            parts[k][i] = (float)random_uniform(seed, RANDOM_INIT, (uint64_t)k, i) - 0.5f;
            if (i % 97 == 13) memcpy(&parts[k][i], &odd_bits[i / 97 % 4], 4);
        }
        zero_vocabulary_padding(&w->model, parts[k], 0, w->count);
    }
}

static inline bool weights_equal(const Weights* a, const Weights* b) {
    return a->count == b->count && memcmp(a->params, b->params, a->count * 4) == 0 &&
           memcmp(a->m, b->m, a->count * 4) == 0 && memcmp(a->v, b->v, a->count * 4) == 0;
}

// ----------------------------------------------------------------------------
// temporary directories

enum { TEMPORARY_PATH = 256 };

static inline void temporary_directory(char out[TEMPORARY_PATH]) {
    const char* where = getenv("TMPDIR");
    snprintf(out, TEMPORARY_PATH, "%s/checkpoint.XXXXXX", where != NULL ? where : "/tmp");
    CHECK(mkdtemp(out) != NULL);
}
