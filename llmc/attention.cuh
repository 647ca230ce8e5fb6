// Causal attention with grouped queries and documents, forward and backward.
//   out = softmax(q k^T / sqrt(HS)) v over the keys up to the query's own position, from doc_start on
// Nothing of size T x T is stored. Query head h reads key/value head h / (NH / NKV).
#pragma once
#include "llmc/attention_general.cuh" // defines: attention_general_forward, attention_decode ...

static inline size_t attention_scratch_bytes(int B, int T, int NH, int NKV, int HS) {
    (void)NKV, (void)HS;
    return (size_t)B * (size_t)NH * (size_t)T * sizeof(float); // delta
}

// out (B, T, NH*HS), lse (B, NH, T) =; qkv (B, T, (NH + 2 NKV) * HS); doc_start (B, T): the first key that a
// query sees, or NULL
static inline void attention_forward(floatX* out, float* lse, void* scratch, const floatX* qkv,
                                     const int* doc_start, int B, int T, int NH, int NKV, int HS,
                                     cudaStream_t stream) {
    (void)scratch;
    attention_general_forward(out, lse, qkv, doc_start, B, T, NH, NKV, HS, stream);
}

// dqkv =, every element; dout, out (B, T, NH*HS); qkv, lse as the forward pass left them
static inline void attention_backward(floatX* dqkv, void* scratch, const floatX* dout, const floatX* qkv,
                                      const floatX* out, const float* lse, const int* doc_start, int B, int T,
                                      int NH, int NKV, int HS, cudaStream_t stream) {
    float* delta = (float*)scratch;
    attention_delta(delta, dout, out, B, T, NH, HS, stream);
    attention_general_backward(dqkv, dout, qkv, lse, delta, doc_start, B, T, NH, NKV, HS, stream);
}
