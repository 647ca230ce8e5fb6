// Causal attention with grouped queries: the forward pass on tensor cores, and which kernels take a call.
//
//     S = scale Q K^T      P = softmax(S)      O = P V      scale = 1 / sqrt(HS)
//
// qkv is (B, T, (NH + 2 NKV) * HS): the query heads of a token, then its key heads, then its value heads.
// Query head h reads key and value head h / (NH / NKV). doc_start (B, T), or NULL, is the first key that a
// row may see (packed documents): at most the row's own index, and never decreasing along a sequence. S is
// never stored: a running softmax goes along the keys, and the backward pass computes S again from lse.
//     FLOPs, causal: 2 B NH T^2 HS;  bytes: q, k, v read and out written once, as far as the second-level
//     cache holds the keys of the heads at work
// The softmax is in base 2, its scale and log2(e) folded into one factor. P is rounded to bf16 for P V.
// Source: Dao, FlashAttention-2, 2023; Milakov and Gimelshein, Online normalizer calculation, 2018.
#pragma once
#include "llmc/attention_backward.cuh" // defines: attention_mma_backward, LOG2_E
#include "llmc/attention_general.cuh"  // defines: attention_general_forward, attention_general_backward,
                                       //     attention_delta, attention_decode, ATTENTION_MAX_HEAD
#include "llmc/attention_tiles.cuh"    // defines: load_stage, multiply_rows, add_product, store_rows ...

// ----------------------------------------------------------------------------
// forward

typedef struct {
    float max[2], sum[2]; // of a lane's two rows: over all keys so far; of them, those in the lane's columns
} RunningSoftmax;

// s becomes P = 2^((s - max) scale2); o and the sum so far follow the new maximum.
template <int HS, int N>
static __device__ inline void update_softmax(float s[N / 8][4], float o[HS / 8][4], RunningSoftmax* so_far,
                                             float scale2) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float max = so_far->max[i], sum = 0;
#pragma unroll
        for (int j = 0; j < N / 8; j++) max = fmaxf(max, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, 2));
        float shift = max == -INFINITY ? 0 : max * scale2; // a row that has seen nothing yet: P is 0, not NaN
        float shrink = exp2_approx(so_far->max[i] * scale2 - shift);
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int c = 2 * i; c < 2 * i + 2; c++) {
                s[j][c] = exp2_approx(s[j][c] * scale2 - shift);
                sum += s[j][c];
            }
#pragma unroll
        for (int j = 0; j < HS / 8; j++) o[j][2 * i] *= shrink, o[j][2 * i + 1] *= shrink;
        so_far->max[i] = max;
        so_far->sum[i] = so_far->sum[i] * shrink + sum;
    }
}

template <int HS>
static __global__ void __launch_bounds__(threads_of(sizes_of(ATTENTION_FORWARD, HS)),
                                         sizes_of(ATTENTION_FORWARD, HS).blocks)
    attention_forward_kernel(bf16* out, float* lse, const bf16* qkv, const int* doc_start, int T, int NH,
                             int NKV) {
    constexpr KernelSizes S = sizes_of(ATTENTION_FORWARD, HS);
    constexpr int ROWS = rows_of(S), N = S.columns, THREADS = threads_of(S), STAGE = 2 * N * HS;
    extern __shared__ __align__(128) char shared[];
    bf16 *q_tile = (bf16*)shared, *stages = q_tile + ROWS * HS;

    int tiles = (T + ROWS - 1) / ROWS, heads = NH + 2 * NKV, warp = (int)threadIdx.x / WARP;
    BlockPlace at = block_place(tiles, NH);
    int first = (tiles - 1 - at.tile) * ROWS, end = first + ROWS < T ? first + ROWS : T,
        kv = at.head / (NH / NKV);
    int stride = heads * HS, out_stride = NH * HS; // from a position to the next
    const bf16* k = head_rows(qkv, at.b, T, heads, NH + kv, HS);
    const int* starts = sequence_starts(doc_start, at.b, T);
    int begin = starts != NULL ? starts[first] / N * N : 0; // of the keys

    // load: the rows and the first stages
    load_tile<HS, ROWS, THREADS>(q_tile, head_rows(qkv, at.b, T, heads, at.head, HS), stride, first, T);
    for (int i = 0; i < S.stages - 1; i++) {
        int key = begin + i * N;
        if (key < end)
            load_stage<HS, N, THREADS>(stages + i * STAGE, k, stride, k + NKV * HS, stride, key, T);
        cp_async_commit();
    }
    QueryRows rows = query_rows(starts, first + warp * 16, T);
    cp_async_wait<S.stages - 2>();
    __syncthreads();
    WarpRows<HS, S.keeps_rows> q_rows;
    warp_rows_init(&q_rows, q_tile + warp * 16 * HS);

    RunningSoftmax so_far = {{-INFINITY, -INFINITY}, {0, 0}};
    float o[HS / 8][4] = {}, scale = 1 / sqrtf((float)HS);
    for (int i = 0, key = begin; key < end; i++, key += N) {
        cp_async_wait<S.stages - 2>(); // this stage is there, and the one before is free
        __syncthreads();
        int next = key + (S.stages - 1) * N, place = (i + S.stages - 1) % S.stages;
        if (next < end)
            load_stage<HS, N, THREADS>(stages + place * STAGE, k, stride, k + NKV * HS, stride, next, T);
        cp_async_commit();
        if (!any_seen<N>(&rows, key)) continue;
        const bf16* stage = stages + i % S.stages * STAGE;
        float s[N / 8][4];
        multiply_rows<HS, N>(s, &q_rows, stage);
        hide_keys<N>(s, &rows, key);
        update_softmax<HS, N>(s, o, &so_far, scale * LOG2_E);
        add_product<HS, N>(o, s, stage + N * HS);
    }

    // write: out, then lse by the first lane of each row
    float sum[2];
    for (int i = 0; i < 2; i++) {
        sum[i] = so_far.sum[i] + __shfl_xor_sync(0xFFFFFFFFu, so_far.sum[i], 1);
        sum[i] += __shfl_xor_sync(0xFFFFFFFFu, sum[i], 2);
        int t = rows.first + lane_row() + 8 * i;
        if (lane_column() == 0 && t < T)
            head_statistics(lse, at.b, T, NH, at.head)[t] = so_far.max[i] * scale + logf(sum[i]);
    }
    bf16* out_rows = head_rows(out, at.b, T, NH, at.head, HS) + (size_t)rows.first * (size_t)out_stride;
    store_rows<HS>(out_rows, out_stride, T - rows.first, q_tile + warp * 16 * HS, o, 1 / sum[0], 1 / sum[1]);
}

template <int HS>
static inline void attention_mma_forward(bf16* out, float* lse, const bf16* qkv, const int* doc_start, int B,
                                         int T, int NH, int NKV, cudaStream_t stream) {
    constexpr KernelSizes S = sizes_of(ATTENTION_FORWARD, HS);
    constexpr int SHARED = shared_bytes(ATTENTION_FORWARD, HS);
    allow_shared((const void*)attention_forward_kernel<HS>, SHARED);
    attention_forward_kernel<HS><<<tile_blocks(T, rows_of(S), NH, B), threads_of(S), SHARED, stream>>>(
        out, lse, qkv, doc_start, T, NH, NKV);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------
// which kernels take a call: by element type and head size, here alone. Kernels of one architecture (wgmma,
// sm_90a) will be one more line. Templates, so that a build in fp32 does not look into kernels for bf16.

template <typename X>
static inline void forward_dispatch(X* out, float* lse, const X* qkv, const int* doc_start, int B, int T,
                                    int NH, int NKV, int HS, cudaStream_t stream) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (HS == 64) return attention_mma_forward<64>(out, lse, qkv, doc_start, B, T, NH, NKV, stream);
        if (HS == 128) return attention_mma_forward<128>(out, lse, qkv, doc_start, B, T, NH, NKV, stream);
    }
    attention_general_forward(out, lse, qkv, doc_start, B, T, NH, NKV, HS, stream);
}

template <typename X>
static inline void backward_dispatch(X* dqkv, const X* dout, const X* qkv, const float* lse,
                                     const float* delta, const int* doc_start, int B, int T, int NH, int NKV,
                                     int HS, cudaStream_t stream) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (HS == 64)
            return attention_mma_backward<64>(dqkv, dout, qkv, lse, delta, doc_start, B, T, NH, NKV, stream);
        if (HS == 128)
            return attention_mma_backward<128>(dqkv, dout, qkv, lse, delta, doc_start, B, T, NH, NKV, stream);
    }
    attention_general_backward(dqkv, dout, qkv, lse, delta, doc_start, B, T, NH, NKV, HS, stream);
}

// Bytes of scratch for both functions below.
static inline size_t attention_scratch_bytes(int B, int T, int NH, int NKV, int HS) {
    (void)NKV, (void)HS;
    return (size_t)B * (size_t)T * (size_t)NH * sizeof(float); // delta
}

// out (B, T, NH*HS) =; lse (B, NH, T) = log of the softmax's denominator, for the backward pass
static inline void attention_forward(floatX* out, float* lse, void* scratch, const floatX* qkv,
                                     const int* doc_start, int B, int T, int NH, int NKV, int HS,
                                     cudaStream_t stream) {
    (void)scratch;
    forward_dispatch(out, lse, qkv, doc_start, B, T, NH, NKV, HS, stream);
}

// dqkv (B, T, (NH + 2 NKV) * HS) =, from dout and out (B, T, NH*HS), the forward pass's qkv and lse
static inline void attention_backward(floatX* dqkv, void* scratch, const floatX* dout, const floatX* qkv,
                                      const floatX* out, const float* lse, const int* doc_start, int B, int T,
                                      int NH, int NKV, int HS, cudaStream_t stream) {
    float* delta = (float*)scratch; // (B, NH, T)
    attention_delta(delta, dout, out, B, T, NH, HS, stream);
    backward_dispatch(dqkv, dout, qkv, lse, delta, doc_start, B, T, NH, NKV, HS, stream);
}
