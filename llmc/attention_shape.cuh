// What the attention kernels are told: sizes, the positions of the rows, and where keys and values lie.
#pragma once
#include "llmc/cuda_common.cuh" // defines: what all kernels stand on
#include "llmc/positions.h"     // defines: Positions, position_at, first_row_at

// T rows, the queries, and `keys` keys of each of B sequences. One rank alone has all rows: T == keys.
typedef struct {
    int B, T, keys, NH, NKV, HS;
    Positions at; // of the rows
} AttentionShape;

// Keys and values, or their gradients: of the `heads` heads that an array (B, keys, heads, HS) has of a
// position, key head 0 is at k, and its value NKV heads behind it.
template <typename X> struct KeyValues {
    X* k;
    int heads;
};

// Those in qkv (B, T, (NH + 2 NKV) * HS) if kv is NULL, else those in kv (B, keys, 2 NKV * HS).
template <typename X> static inline KeyValues<X> key_values(X* qkv, X* kv, const AttentionShape& shape) {
    KeyValues<X> inside = {qkv + shape.NH * shape.HS, shape.NH + 2 * shape.NKV}, apart = {kv, 2 * shape.NKV};
    return kv != NULL ? apart : inside;
}

// A head of sequence b in an array (B, T, heads, HS): its row t is t * heads * HS further.
template <typename X> static __device__ inline X* head_rows(X* x, int b, int T, int heads, int head, int HS) {
    return x + ((size_t)b * (size_t)T * (size_t)heads + (size_t)head) * (size_t)HS;
}
