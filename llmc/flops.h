// How many floating-point operations a token costs, and bytes an update. Plain C.
//
// A multiply-add is two. Training costs three forward passes (forward, gradient of the inputs, gradient of
// the weights). Two conventions are in use for attention, and a utilisation means nothing without the name:
//   causal  6 N + 6 L T (NH HS): each query meets T / 2 keys on average, what a causal kernel has to compute
//   PaLM    6 N + 12 L T (NH HS): all T x T pairs, as if nothing were masked (arXiv 2204.02311, appendix B)
// MFU counts the causal FLOPs; HFU counts, besides, the matmuls and attention that batch.recompute does again
// (PaLM, appendix B), and not what attention's backward pass recomputes of itself.
// N counts the weights that take part in a matmul, the head included and embedding look-ups excluded.
#pragma once
#include "llmc/config_knobs.h" // defines: RunConfig
#include "llmc/model.h"        // defines: ModelConfig, model_dim

static inline double matmul_parameters(const ModelConfig* c) {
    double hidden = (double)model_dim(c, DIM_HIDDEN), heads = (double)model_dim(c, DIM_HEADS);
    double layer = hidden * (double)model_dim(c, DIM_QKV) + heads * hidden +
                   hidden * (double)model_dim(c, DIM_FC) + (double)model_dim(c, DIM_FF) * hidden;
    return c->num_hidden_layers * layer + (double)c->vocab_size * hidden;
}

enum FlopConvention { FLOPS_CAUSAL = 6, FLOPS_PALM = 12 }; // the attention term's factor

// FLOPs of one token's training step (forward and backward) in sequences of T tokens.
static inline double flops_per_token(const ModelConfig* c, int T, enum FlopConvention convention) {
    double attention = (double)c->num_hidden_layers * T * (double)model_dim(c, DIM_HEADS);
    return 6.0 * matmul_parameters(c) + (double)convention * attention;
}

#define FLOPS_FORMULA                                                                                        \
    "a token: 6 N + 6 L T Q (causal attention); N weights in matmuls, Q = heads * head size; "               \
    "hfu adds what is recomputed"

// FLOPs of one token's forward passes that the backward passes do again: with batch.recompute "block" the
// matmuls and the attention of a block but the last product, in all blocks, or, without a pipeline, all but the
// last one, which is still there. The other levels recompute no product.
static inline double flops_recomputed(const RunConfig* run) {
    const ModelConfig* c = &run->model;
    double hidden = (double)model_dim(c, DIM_HIDDEN), heads = (double)model_dim(c, DIM_HEADS);
    double weights =
        hidden * (double)model_dim(c, DIM_QKV) + heads * hidden + hidden * (double)model_dim(c, DIM_FC);
    int blocks = c->num_hidden_layers - (run->layout.pp_size == 1 ? 1 : 0);
    if (run->batch.recompute != RECOMPUTE_BLOCK) return 0;
    return blocks * (2 * weights + 2.0 * run->batch.sequence_length * heads);
}

// Bytes that AdamW must read and write for n parameters, from the bytes of each one's fp32 weight in all its parts, of
// its gradient, which becomes zero, and of one of its two moments.
static inline size_t update_bytes(size_t n, size_t weight, size_t gradient, size_t moment) {
    return 2 * n * (weight + gradient + 2 * moment);
}
