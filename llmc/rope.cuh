// Rotary positions, in place on the q and k heads of qkv: (x, y) -> (x cos - y sin, y cos + x sin) for the
// pairs (i, i + HS/2). Nothing is split or permuted: attention reads q, k and v where the matmul wrote them,
// so v is not even read here. Source: Su et al., RoFormer, 2021; the angles: llmc/rope.h.
//     reads and writes (NH + NKV) / (NH + 2 NKV) of qkv once
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, to_float, from_float

enum { ROPE_PAIRS = 4 }; // to a thread: HS / 2 is a multiple of 4, and 4 angles are 16 bytes

typedef struct alignas(ROPE_PAIRS * sizeof(floatX)) {
    floatX at[ROPE_PAIRS];
} RopeVec;

// direction 1 turns forward, -1 back: the gradient of a rotation is the rotation back
static __global__ void rope_kernel(floatX* qkv, const float* cos_table, const float* sin_table, int offset,
                                   int T, int NH, int NKV, int HS, size_t rows, float direction) {
    size_t per_head = (size_t)(HS / 2 / ROPE_PAIRS), heads = (size_t)(NH + NKV);
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * heads * per_head) return;
    size_t pair = i % per_head * ROPE_PAIRS, head = i / per_head % heads, n = i / per_head / heads;
    size_t angle = ((size_t)offset + n % (size_t)T) * (size_t)(HS / 2) + pair;
    floatX* x = qkv + n * (size_t)((NH + 2 * NKV) * HS) + head * (size_t)HS + pair;
    floatX* y = x + HS / 2;
    Vec<float> cosine = load_vec(cos_table + angle), sine = load_vec(sin_table + angle);
    RopeVec a = *(RopeVec*)x, b = *(RopeVec*)y;
    for (int k = 0; k < ROPE_PAIRS; k++) {
        float u = to_float(a.at[k]), v = to_float(b.at[k]), s = direction * sine.at[k];
        a.at[k] = from_float<floatX>(u * cosine.at[k] - v * s);
        b.at[k] = from_float<floatX>(v * cosine.at[k] + u * s);
    }
    *(RopeVec*)x = a, *(RopeVec*)y = b;
}

static inline void rope_rotate(floatX* qkv, const float* cos_table, const float* sin_table, int offset, int B,
                               int T, int NH, int NKV, int HS, float direction, cudaStream_t stream) {
    size_t rows = (size_t)B * (size_t)T, threads = rows * (size_t)((NH + NKV) * (HS / 2 / ROPE_PAIRS));
    rope_kernel<<<(unsigned)ceil_div(threads, 256), 256, 0, stream>>>(qkv, cos_table, sin_table, offset, T,
                                                                      NH, NKV, HS, rows, direction);
    LAUNCH_CHECK();
}

// qkv (B, T, (NH + 2 NKV) * HS); row (b, t) has position offset + t of the tables (positions, HS / 2)
static inline void rope_forward(floatX* qkv, const float* cos_table, const float* sin_table, int offset,
                                int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    rope_rotate(qkv, cos_table, sin_table, offset, B, T, NH, NKV, HS, 1, stream);
}
static inline void rope_backward(floatX* dqkv, const float* cos_table, const float* sin_table, int offset,
                                 int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    rope_rotate(dqkv, cos_table, sin_table, offset, B, T, NH, NKV, HS, -1, stream);
}
