// Causal attention with grouped queries: the forward pass on tensor cores, and which kernels take a call.
//
//     S = scale Q K^T      P = softmax(S)      O = P V      scale = 1 / sqrt(HS)
//
// qkv is (B, T, (NH + 2 NKV) * HS): the query heads of a token, then its key heads, then its value heads.
// Query head h reads key and value head h / (NH / NKV). Where ranks share sequences by positions, a rank has
// T rows of each (llmc/positions.h), and all its keys and values in another array: kv (B, keys, 2 NKV * HS).
// Row t, at position p, sees keys 0 .. p, or from doc_start (B, T) on if that is not NULL (packed documents):
// a position, at most p, and never decreasing over the rows of a sequence. S is never stored: a running
// softmax goes along the keys, and the backward pass computes S again from lse.
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
        float here = -INFINITY, sum = 0;
#pragma unroll
        for (int j = 0; j < N / 8; j++) here = fmaxf(here, fmaxf(s[j][2 * i], s[j][2 * i + 1]));
        here = fmaxf(here, __shfl_xor_sync(0xFFFFFFFFu, here, 1));
        here = fmaxf(here, __shfl_xor_sync(0xFFFFFFFFu, here, 2));
        float max = fmaxf(so_far->max[i], here);
        float shift = max == -INFINITY ? 0 : max * scale2; // a row that has seen nothing yet: P is 0, not NaN
        // a tile of which the row sees nothing changes nothing; the power may be a rounding away from 1
        float shrink = here == -INFINITY ? 1 : exp2_approx(so_far->max[i] * scale2 - shift);
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
    attention_forward_kernel(bf16* out, float* lse, const bf16* qkv, KeyValues<const bf16> kv,
                             const int* doc_start, AttentionShape shape) {
    constexpr KernelSizes S = sizes_of(ATTENTION_FORWARD, HS);
    constexpr int ROWS = rows_of(S), N = S.columns, THREADS = threads_of(S), STAGE = 2 * N * HS;
    extern __shared__ __align__(128) char shared[];
    bf16 *q_tile = (bf16*)shared, *stages = q_tile + ROWS * HS;

    int T = shape.T, NH = shape.NH, NKV = shape.NKV, heads = NH + 2 * NKV, kv_stride = kv.heads * HS;
    int row = (int)threadIdx.x / WARP * 16; // the warp's first, in the tile
    BlockPlace at = block_place(query_tiles(shape, ROWS), NH);
    QueryTile tile = query_tile<ROWS>(shape, at.tile);
    const bf16 *q = head_rows(qkv, at.b, T, heads, at.head, HS),
               *k = head_rows(kv.k, at.b, shape.keys, kv.heads, at.head / (NH / NKV), HS);
    const int* starts = sequence_starts(doc_start, at.b, T);
    int begin = starts != NULL ? starts[tile.first - tile.ahead] / N * N : 0; // of the keys

    // load: the rows and the first stages
    load_tile<HS, ROWS, THREADS>(q_tile, q, heads * HS, tile.first - tile.ahead, tile.end - tile.ahead);
    for (int i = 0; i < S.stages - 1; i++) {
        int key = begin + i * N;
        if (key < tile.end)
            load_stage<HS, N, THREADS>(stages + i * STAGE, k, kv_stride, k + NKV * HS, kv_stride, key,
                                       shape.keys);
        cp_async_commit();
    }
    QueryRows rows = query_rows(starts, &tile, tile.first + row);
    cp_async_wait<S.stages - 2>();
    __syncthreads();
    WarpRows<HS, S.keeps_rows> q_rows;
    warp_rows_init(&q_rows, q_tile + row * HS);

    RunningSoftmax so_far = {{-INFINITY, -INFINITY}, {0, 0}};
    float o[HS / 8][4] = {}, scale = 1 / sqrtf((float)HS);
    for (int i = 0, key = begin; key < tile.end; i++, key += N) {
        cp_async_wait<S.stages - 2>(); // this stage is there, and the one before is free
        __syncthreads();
        int next = key + (S.stages - 1) * N, place = (i + S.stages - 1) % S.stages;
        if (next < tile.end)
            load_stage<HS, N, THREADS>(stages + place * STAGE, k, kv_stride, k + NKV * HS, kv_stride, next,
                                       shape.keys);
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
        int q = rows.first + lane_row() + 8 * i;
        if (lane_column() == 0 && q < tile.end)
            head_statistics(lse, at.b, T, NH, at.head)[q - tile.ahead] = so_far.max[i] * scale + logf(sum[i]);
    }
    bf16* out_rows =
        head_rows(out, at.b, T, NH, at.head, HS) + (size_t)(rows.first - tile.ahead) * (size_t)(NH * HS);
    store_rows<HS>(out_rows, NH * HS, tile.end - rows.first, q_tile + row * HS, o, 1 / sum[0], 1 / sum[1]);
}

template <int HS>
static inline void attention_mma_forward(bf16* out, float* lse, const bf16* qkv, KeyValues<const bf16> kv,
                                         const int* doc_start, const AttentionShape& shape,
                                         cudaStream_t stream) {
    constexpr KernelSizes S = sizes_of(ATTENTION_FORWARD, HS);
    constexpr int SHARED = shared_bytes(ATTENTION_FORWARD, HS);
    allow_shared((const void*)attention_forward_kernel<HS>, SHARED);
    unsigned blocks = tile_blocks(query_tiles(shape, rows_of(S)), shape.NH, shape.B);
    attention_forward_kernel<HS>
        <<<blocks, threads_of(S), SHARED, stream>>>(out, lse, qkv, kv, doc_start, shape);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------
// which kernels take a call: by element type and head size, here alone. Kernels of one architecture (wgmma,
// sm_90a) will be one more line. Templates, so that a build in fp32 does not look into kernels for bf16.

template <typename X>
static inline void forward_dispatch(X* out, float* lse, const X* qkv, KeyValues<const X> kv,
                                    const int* doc_start, const AttentionShape& shape, cudaStream_t stream) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (shape.HS == 64) return attention_mma_forward<64>(out, lse, qkv, kv, doc_start, shape, stream);
        if (shape.HS == 128) return attention_mma_forward<128>(out, lse, qkv, kv, doc_start, shape, stream);
    }
    attention_general_forward(out, lse, qkv, kv, doc_start, shape, stream);
}

template <typename X>
static inline void backward_dispatch(X* dqkv, KeyValues<X> dkv, const X* dout, const X* qkv,
                                     KeyValues<const X> kv, const float* lse, const float* delta,
                                     const int* doc_start, const AttentionShape& shape, cudaStream_t stream) {
    if constexpr (std::is_same_v<X, bf16>) {
        if (shape.HS == 64)
            return attention_mma_backward<64>(dqkv, dkv, dout, qkv, kv, lse, delta, doc_start, shape, stream);
        if (shape.HS == 128)
            return attention_mma_backward<128>(dqkv, dkv, dout, qkv, kv, lse, delta, doc_start, shape,
                                               stream);
    }
    attention_general_backward(dqkv, dkv, dout, qkv, kv, lse, delta, doc_start, shape, stream);
}

// Bytes of scratch for the backward pass.
static inline size_t attention_scratch_bytes(const AttentionShape& shape) {
    return (size_t)shape.B * (size_t)shape.T * (size_t)shape.NH * sizeof(float); // delta
}

// out (B, T, NH*HS) =; lse (B, NH, T) = log of the softmax's denominator, for the backward pass. kv is NULL
// where keys and values are those in qkv; otherwise those in qkv are not read.
static inline void attention_forward(floatX* out, float* lse, const floatX* qkv, const floatX* kv,
                                     const int* doc_start, AttentionShape shape, cudaStream_t stream) {
    CHECK(kv != NULL || shape.T == shape.keys);
    forward_dispatch(out, lse, qkv, key_values(qkv, kv, shape), doc_start, shape, stream);
}

// dqkv (B, T, (NH + 2 NKV) * HS) =, from dout and out (B, T, NH*HS), the forward pass's qkv and lse. With kv,
// only dq is written there, and dkv (B, keys, 2 NKV * HS) = the gradients of all keys and values as far as
// they come from these rows: 0 where none sees the key.
static inline void attention_backward(floatX* dqkv, floatX* dkv, void* scratch, const floatX* dout,
                                      const floatX* qkv, const floatX* kv, const floatX* out,
                                      const float* lse, const int* doc_start, AttentionShape shape,
                                      cudaStream_t stream) {
    CHECK((dkv != NULL) == (kv != NULL) && (kv != NULL || shape.T == shape.keys));
    float* delta = (float*)scratch; // (B, NH, T)
    attention_delta(delta, dout, out, shape, stream);
    backward_dispatch(dqkv, key_values(dqkv, dkv, shape), dout, qkv, key_values(qkv, kv, shape), lse, delta,
                      doc_start, shape, stream);
}
