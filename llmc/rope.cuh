// Rotary positions, in place on the q and k heads of qkv: (x, y) -> (x cos - y sin, y cos + x sin) for the
// pairs (i, i + HS/2). Nothing is split or permuted: attention reads q, k and v where the matmul wrote them,
// so v is not even read here. Source: Su et al., RoFormer, 2021; the angles: llmc/rope.h.
//     reads and writes (NH + NKV) / (NH + 2 NKV) of qkv once
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, to_float, from_float
#include "llmc/positions.h"     // defines: Positions, position_at

enum { ROPE_THREADS = 128 };

// 16 bytes of elements, or half of that where HS / 2 is no multiple of it.
template <int PAIRS> struct alignas(PAIRS * sizeof(floatX)) RopeVec { floatX at[PAIRS]; };

// A block has row n. direction 1 turns forward, -1 back: the gradient of a rotation is the rotation back
template <int PAIRS>
static __global__ void rope_kernel(floatX* qkv, const float* cos_table, const float* sin_table, Positions at,
                                   int T, int NH, int NKV, int HS, float direction) {
    int n = (int)blockIdx.x, half = HS / 2, per_head = half / PAIRS;
    size_t angles = (size_t)position_at(at, n % T) * (size_t)half;
    floatX* row = qkv + (size_t)n * (size_t)((NH + 2 * NKV) * HS);
    for (int i = (int)threadIdx.x; i < (NH + NKV) * per_head; i += ROPE_THREADS) {
        int pair = i % per_head * PAIRS;
        RopeVec<PAIRS>* x = reinterpret_cast<RopeVec<PAIRS>*>(row + i / per_head * HS + pair);
        RopeVec<PAIRS>* y = reinterpret_cast<RopeVec<PAIRS>*>(row + i / per_head * HS + half + pair);
        RopeVec<PAIRS> a = *x, b = *y;
        for (int first = 0; first < PAIRS; first += Vec<float>::SIZE) {
            Vec<float> cosine = load_vec(cos_table + angles + pair + first);
            Vec<float> sine = load_vec(sin_table + angles + pair + first);
            for (int k = 0; k < Vec<float>::SIZE; k++) {
                float u = to_float(a.at[first + k]), v = to_float(b.at[first + k]),
                      s = direction * sine.at[k];
                a.at[first + k] = from_float<floatX>(u * cosine.at[k] - v * s);
                b.at[first + k] = from_float<floatX>(v * cosine.at[k] + u * s);
            }
        }
        *x = a, *y = b;
    }
}

static inline void rope_rotate(floatX* qkv, const float* cos_table, const float* sin_table, Positions at,
                               int B, int T, int NH, int NKV, int HS, float direction, cudaStream_t stream) {
    auto kernel = HS / 2 % VEC == 0 ? rope_kernel<VEC> : rope_kernel<4>; // HS is a multiple of 8
    kernel<<<(unsigned)(B * T), ROPE_THREADS, 0, stream>>>(qkv, cos_table, sin_table, at, T, NH, NKV, HS,
                                                           direction);
    LAUNCH_CHECK();
}

// qkv (B, T, (NH + 2 NKV) * HS); row (b, t) turns by row position_at(at, t) of the tables (positions, HS / 2)
static inline void rope_forward(floatX* qkv, const float* cos_table, const float* sin_table, Positions at,
                                int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    rope_rotate(qkv, cos_table, sin_table, at, B, T, NH, NKV, HS, 1, stream);
}
static inline void rope_backward(floatX* dqkv, const float* cos_table, const float* sin_table, Positions at,
                                 int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    rope_rotate(dqkv, cos_table, sin_table, at, B, T, NH, NKV, HS, -1, stream);
}
