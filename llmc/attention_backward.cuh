// The backward pass of attention on tensor cores, head sizes 64 and 128.
//
//     dV = P^T dO      dP = dO V^T      dS = P * (dP - delta)      delta = rowsum(dO * O)
//     dQ = scale dS K  dK = scale dS^T Q                           P = exp(scale Q K^T - lse), again
//
// Two kernels, each the owner of what it writes: no atomics, the same bits every time, at the price of 7
// products where one kernel that added dQ up across blocks would need 5. P and dS are rounded to bf16 for the
// products.
//     FLOPs, causal: B NH T^2 HS times 3 (dQ) and 4 (dK, dV);  bytes: q, k, v, dout read twice, dqkv written
//     once, as far as the second-level cache holds the heads at work
// Sizes, and what they are made of: llmc/attention_tiles.cuh.
#pragma once
#include "llmc/attention_tiles.cuh" // defines: load_stage, multiply_rows, add_product, store_rows ...

static constexpr float LOG2_E = 1.44269504088896341f;

// ----------------------------------------------------------------------------
// dQ: a block has some queries of a head and streams the keys that they see

// s becomes dS: p * (dp - delta), p = 2^(s * scale2 - lse2); lse2 and delta of the lane's two rows
template <int N>
static __device__ inline void score_gradients_of_rows(float s[N / 8][4], const float dp[N / 8][4],
                                                      const float lse2[2], const float delta[2],
                                                      float scale2) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            s[j][i] = exp2_approx(s[j][i] * scale2 - lse2[i / 2]) * (dp[j][i] - delta[i / 2]);
}

template <int HS>
static __global__ void __launch_bounds__(threads_of(sizes_of(ATTENTION_DQ, HS)),
                                         sizes_of(ATTENTION_DQ, HS).blocks)
    attention_dq_kernel(bf16* dqkv, const bf16* dout, const bf16* qkv, KeyValues<const bf16> kv,
                        const float* lse, const float* delta, const int* doc_start, AttentionShape shape) {
    constexpr KernelSizes S = sizes_of(ATTENTION_DQ, HS);
    constexpr int ROWS = rows_of(S), N = S.columns, THREADS = threads_of(S), STAGE = 2 * N * HS;
    extern __shared__ __align__(128) char shared[];
    bf16 *q_tile = (bf16*)shared, *dout_tile = q_tile + ROWS * HS, *stages = dout_tile + ROWS * HS;

    int T = shape.T, NH = shape.NH, NKV = shape.NKV, heads = NH + 2 * NKV, kv_stride = kv.heads * HS;
    int row = (int)threadIdx.x / WARP * 16; // the warp's first, in the tile
    BlockPlace at = block_place(query_tiles(shape, ROWS), NH);
    QueryTile tile = query_tile<ROWS>(shape, at.tile);
    const bf16 *q = head_rows(qkv, at.b, T, heads, at.head, HS),
               *dy = head_rows(dout, at.b, T, NH, at.head, HS),
               *k = head_rows(kv.k, at.b, shape.keys, kv.heads, at.head / (NH / NKV), HS);
    const int* starts = sequence_starts(doc_start, at.b, T);
    int begin = starts != NULL ? starts[tile.first - tile.ahead] / N * N : 0; // of the keys

    // load: the rows and the first stages
    load_tile<HS, ROWS, THREADS>(q_tile, q, heads * HS, tile.first - tile.ahead, tile.end - tile.ahead);
    load_tile<HS, ROWS, THREADS>(dout_tile, dy, NH * HS, tile.first - tile.ahead, tile.end - tile.ahead);
    for (int i = 0; i < S.stages - 1; i++) {
        int key = begin + i * N;
        if (key < tile.end)
            load_stage<HS, N, THREADS>(stages + i * STAGE, k, kv_stride, k + NKV * HS, kv_stride, key,
                                       shape.keys);
        cp_async_commit();
    }
    QueryRows rows = query_rows(starts, &tile, tile.first + row);
    float row_lse[2], row_delta[2], dq[HS / 8][4] = {}, scale = 1 / sqrtf((float)HS);
    for (int i = 0; i < 2; i++) {
        int q = rows.first + lane_row() + 8 * i, t = (q < tile.end ? q : tile.end - 1) - tile.ahead;
        row_lse[i] = head_statistics(lse, at.b, T, NH, at.head)[t] * LOG2_E;
        row_delta[i] = head_statistics(delta, at.b, T, NH, at.head)[t];
    }
    cp_async_wait<S.stages - 2>();
    __syncthreads();
    WarpRows<HS, S.keeps_rows> q_rows, dout_rows;
    warp_rows_init(&q_rows, q_tile + row * HS);
    warp_rows_init(&dout_rows, dout_tile + row * HS);

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
        float s[N / 8][4], dp[N / 8][4];
        multiply_rows<HS, N>(s, &q_rows, stage);
        hide_keys<N>(s, &rows, key);
        multiply_rows<HS, N>(dp, &dout_rows, stage + N * HS);
        score_gradients_of_rows<N>(s, dp, row_lse, row_delta, scale * LOG2_E);
        add_product<HS, N>(dq, s, stage);
    }
    bf16* dq_rows = head_rows(dqkv, at.b, T, heads, at.head, HS) +
                    (size_t)(rows.first - tile.ahead) * (size_t)(heads * HS);
    store_rows<HS>(dq_rows, heads * HS, tile.end - rows.first, q_tile + row * HS, dq, scale, scale);
}

// ----------------------------------------------------------------------------
// dK, dV: a block has some keys of a key head and streams, for each query head of its group, the queries that
// see them

// Behind the tiles of q and dout in a stage: for each of their N rows
template <int N> struct QueryColumns {
    float lse[N], delta[N];
    int start[N]; // of its document; 0 where there are none
};

template <int N, int THREADS>
static __device__ inline void load_columns(QueryColumns<N>* columns, const float* lse, const float* delta,
                                           const int* starts, int first, int T) {
    for (int i = (int)threadIdx.x; i < N; i += THREADS) {
        int t = first + i;
        bool inside = t < T; // beyond: p becomes 1, dout and delta are 0, so that nothing is added
        cp_async_or_zero<4>(&columns->lse[i], lse + t, inside);
        cp_async_or_zero<4>(&columns->delta[i], delta + t, inside);
        bool documents = inside && starts != NULL;
        cp_async_or_zero<4>(&columns->start[i], documents ? (const void*)(starts + t) : lse, documents);
    }
}

// Hides of s (16 keys from `key` on, N queries from row `first` on) what is not seen. The queries may be of
// both runs.
template <int N>
static __device__ inline void hide_queries(float s[N / 8][4], const QueryColumns<N>* columns, int key,
                                           int first, const AttentionShape& shape) {
    int last = shape.T - first < N ? shape.T - first - 1 : N - 1;
    if (position_at(shape.at, first) >= key + 15 && columns->start[last] <= key) return; // most tiles
    int k = key + lane_row();
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = lane_column() + 8 * j + i % 2, row = k + i / 2 * 8;
            if (row > position_at(shape.at, first + column) || row < columns->start[column])
                s[j][i] = -INFINITY;
        }
}

// s becomes P and dp becomes dS, of keys (rows) and queries (columns)
template <int N>
static __device__ inline void score_gradients_of_columns(float s[N / 8][4], float dp[N / 8][4],
                                                         const QueryColumns<N>* columns, float scale2) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = lane_column() + 8 * j + i % 2;
            s[j][i] = exp2_approx(s[j][i] * scale2 - columns->lse[column] * LOG2_E);
            dp[j][i] = s[j][i] * (dp[j][i] - columns->delta[column]);
        }
}

// The end of the tiles of `step` queries, the first at row `first`, whose queries may see a key up to `last`:
// starts never decrease, so the first tile that begins in a later document ends the search.
static __device__ inline int end_of_queries(const int* starts, int first, int last, int T, int step) {
    if (starts == NULL) return T;
    for (int t = first; t < T; t += WARP * step) {
        int mine = t + (int)threadIdx.x % WARP * step;
        unsigned behind = __ballot_sync(0xFFFFFFFFu, mine >= T || starts[mine] > last);
        if (behind != 0) return t + (__ffs((int)behind) - 1) * step;
    }
    return T;
}

// What the dK, dV kernel streams: tiles of the query heads of a group, one head after the other.
typedef struct {
    const bf16 *q, *dout; // of the first head, as lse and delta are
    const float *lse, *delta;
    const int* starts;
    int stride, out_stride;
    int T, first, tiles; // queries first .. of each head, in so many tiles
} QueryStream;

static __device__ inline int stream_query(const QueryStream* in, int i, int N) {
    return in->first + i % in->tiles * N;
}

template <int HS, int N, int THREADS>
static __device__ inline void load_queries(bf16* stage, const QueryStream* in, int i) {
    int head = i / in->tiles, first = stream_query(in, i, N);
    load_stage<HS, N, THREADS>(stage, in->q + head * HS, in->stride, in->dout + head * HS, in->out_stride,
                               first, in->T);
    size_t statistic = (size_t)head * (size_t)in->T;
    load_columns<N, THREADS>((QueryColumns<N>*)(stage + 2 * N * HS), in->lse + statistic,
                             in->delta + statistic, in->starts, first, in->T);
}

template <int HS>
static __global__ void __launch_bounds__(threads_of(sizes_of(ATTENTION_DKV, HS)),
                                         sizes_of(ATTENTION_DKV, HS).blocks)
    attention_dkv_kernel(KeyValues<bf16> dkv, const bf16* dout, const bf16* qkv, KeyValues<const bf16> kv,
                         const float* lse, const float* delta, const int* doc_start, AttentionShape shape) {
    constexpr KernelSizes S = sizes_of(ATTENTION_DKV, HS);
    constexpr int ROWS = rows_of(S), N = S.columns, THREADS = threads_of(S);
    constexpr int STAGE = stage_bytes(ATTENTION_DKV, HS) / (int)sizeof(bf16);
    extern __shared__ __align__(128) char shared[];
    bf16 *k_tile = (bf16*)shared, *v_tile = k_tile + ROWS * HS, *stages = v_tile + ROWS * HS;

    int T = shape.T, NH = shape.NH, NKV = shape.NKV, heads = NH + 2 * NKV, group = NH / NKV;
    BlockPlace at = block_place(tiles_of(shape.keys, ROWS), NKV);
    int first = at.tile * ROWS, last = (first + ROWS < shape.keys ? first + ROWS : shape.keys) - 1;
    int row = (int)threadIdx.x / WARP * 16, key = first + row; // the warp's first, in the tile and of all
    const int* starts = sequence_starts(doc_start, at.b, T);
    QueryStream in = {head_rows(qkv, at.b, T, heads, at.head * group, HS),
                      head_rows(dout, at.b, T, NH, at.head * group, HS),
                      head_statistics(lse, at.b, T, NH, at.head * group),
                      head_statistics(delta, at.b, T, NH, at.head * group),
                      starts,
                      heads * HS,
                      NH * HS,
                      T,
                      first_row_at(shape.at, first),
                      0};
    in.tiles = (end_of_queries(starts, in.first, last, T, N) - in.first + N - 1) / N;
    int count = in.tiles * group;

    // load: the rows and the first stages
    const bf16* k = head_rows(kv.k, at.b, shape.keys, kv.heads, at.head, HS);
    int kv_stride = kv.heads * HS;
    load_tile<HS, ROWS, THREADS>(k_tile, k, kv_stride, first, shape.keys);
    load_tile<HS, ROWS, THREADS>(v_tile, k + NKV * HS, kv_stride, first, shape.keys);
    for (int i = 0; i < S.stages - 1; i++) {
        if (i < count) load_queries<HS, N, THREADS>(stages + i * STAGE, &in, i);
        cp_async_commit();
    }
    cp_async_wait<S.stages - 2>();
    __syncthreads();
    WarpRows<HS, S.keeps_rows> k_rows, v_rows;
    warp_rows_init(&k_rows, k_tile + row * HS);
    warp_rows_init(&v_rows, v_tile + row * HS);

    float dk[HS / 8][4] = {}, dv[HS / 8][4] = {}, scale = 1 / sqrtf((float)HS);
    for (int i = 0; i < count; i++) {
        cp_async_wait<S.stages - 2>(); // this stage is there, and the one before is free
        __syncthreads();
        int next = i + S.stages - 1;
        if (next < count) load_queries<HS, N, THREADS>(stages + next % S.stages * STAGE, &in, next);
        cp_async_commit();
        const bf16* stage = stages + i % S.stages * STAGE;
        const QueryColumns<N>* columns = (const QueryColumns<N>*)(stage + 2 * N * HS);
        int query = stream_query(&in, i, N);
        bool before = position_at(shape.at, query + N - 1) < key;
        if (before || columns->start[0] > key + 15) continue; // none sees the warp's keys
        float s[N / 8][4], dp[N / 8][4];
        multiply_rows<HS, N>(s, &k_rows, stage);
        hide_queries<N>(s, columns, key, query, shape);
        multiply_rows<HS, N>(dp, &v_rows, stage + N * HS);
        score_gradients_of_columns<N>(s, dp, columns, scale * LOG2_E);
        add_product<HS, N>(dv, s, stage + N * HS);
        add_product<HS, N>(dk, dp, stage);
    }
    bf16* dk_rows =
        head_rows(dkv.k, at.b, shape.keys, dkv.heads, at.head, HS) + (size_t)key * (size_t)kv_stride;
    store_rows<HS>(dk_rows, kv_stride, shape.keys - key, k_tile + row * HS, dk, scale, scale);
    store_rows<HS>(dk_rows + NKV * HS, kv_stride, shape.keys - key, v_tile + row * HS, dv, 1, 1);
}

// ----------------------------------------------------------------------------
// launchers: arguments as in attention.cuh

template <int HS>
static inline void attention_mma_backward(bf16* dqkv, KeyValues<bf16> dkv, const bf16* dout, const bf16* qkv,
                                          KeyValues<const bf16> kv, const float* lse, const float* delta,
                                          const int* doc_start, const AttentionShape& shape,
                                          cudaStream_t stream) {
    constexpr KernelSizes Q = sizes_of(ATTENTION_DQ, HS), KV = sizes_of(ATTENTION_DKV, HS);
    constexpr int Q_SHARED = shared_bytes(ATTENTION_DQ, HS), KV_SHARED = shared_bytes(ATTENTION_DKV, HS);
    allow_shared((const void*)attention_dq_kernel<HS>, Q_SHARED);
    allow_shared((const void*)attention_dkv_kernel<HS>, KV_SHARED);
    unsigned kv_blocks = tile_blocks(tiles_of(shape.keys, rows_of(KV)), shape.NKV, shape.B);
    attention_dkv_kernel<HS>
        <<<kv_blocks, threads_of(KV), KV_SHARED, stream>>>(dkv, dout, qkv, kv, lse, delta, doc_start, shape);
    LAUNCH_CHECK();
    unsigned q_blocks = tile_blocks(query_tiles(shape, rows_of(Q)), shape.NH, shape.B);
    attention_dq_kernel<HS>
        <<<q_blocks, threads_of(Q), Q_SHARED, stream>>>(dqkv, dout, qkv, kv, lse, delta, doc_start, shape);
    LAUNCH_CHECK();
}
