// Attention for any head size that is a multiple of 8, in either precision, in plain fp32 arithmetic: what
// fp32 builds use, unusual head sizes, and decoding. Correct before it is fast; llmc/attention.cuh has the
// fast kernels. Scores are never stored: the backward pass computes them again from lse.
//
// A warp has a row: of queries in the forward pass and for dq, of keys for dk and dv. 32 scores are computed
// at a time, one to a lane; then all lanes together add up 32 weighted rows, a lane keeping every 32nd
// column.
#pragma once
#include "llmc/attention_shape.cuh" // defines: AttentionShape, KeyValues, head_rows
#include "llmc/cuda_common.cuh"     // defines: floatX, load_vec, warp_sum, warp_max

enum { ATTENTION_MAX_HEAD = 256, GENERAL_WARPS = 4, GENERAL_COLUMNS = ATTENTION_MAX_HEAD / WARP };

// The keys and values of one head: those of position p are at k + p * stride and v + p * stride.
typedef struct {
    const floatX *k, *v;
    size_t stride; // from a position to the next, in elements
    float scale;   // 1 / sqrt(HS)
    int HS;
} Head;

static __device__ inline Head key_head(KeyValues<const floatX> kv, int b, int head,
                                       const AttentionShape& shape) {
    const floatX* k = head_rows(kv.k, b, shape.keys, kv.heads, head, shape.HS);
    Head keys = {k, k + shape.NKV * shape.HS, (size_t)(kv.heads * shape.HS), 1 / sqrtf((float)shape.HS),
                 shape.HS};
    return keys;
}

// Elements from a row of qkv to the next.
static __device__ inline size_t qkv_stride(const AttentionShape& shape) {
    return (size_t)(shape.NH + 2 * shape.NKV) * (size_t)shape.HS;
}

// The row of a warp, rows fastest, then heads, then sequences. t may be T or more: then there is nothing to
// do.
typedef struct {
    int t, head, b;
} WarpPlace;

static __device__ inline WarpPlace warp_place(int T, int heads) {
    int blocks = (T + GENERAL_WARPS - 1) / GENERAL_WARPS, block = (int)blockIdx.x;
    WarpPlace place = {block % blocks * GENERAL_WARPS + (int)threadIdx.x / WARP, block / blocks % heads,
                       block / blocks / heads};
    return place;
}

// Where (B, NH, T) has (b, head, t).
static __device__ inline size_t statistic_at(WarpPlace at, int T, int NH) {
    return ((size_t)at.b * (size_t)NH + (size_t)at.head) * (size_t)T + (size_t)at.t;
}

static __device__ inline float dot_rows(const floatX* a, const floatX* b, int HS) {
    float sum = 0;
    for (int c = 0; c < HS; c += VEC) {
        Vec<floatX> x = load_vec(a + c), y = load_vec(b + c);
        for (int i = 0; i < VEC; i++) sum += to_float(x.at[i]) * to_float(y.at[i]);
    }
    return sum;
}

// sum[j] += weight of lane i * rows[i][lane + 32 j], over `count` rows
static __device__ inline void add_weighted_rows(float sum[GENERAL_COLUMNS], float weight, const floatX* rows,
                                                size_t stride, int count, int HS) {
    int lane = (int)threadIdx.x % WARP;
    for (int i = 0; i < count; i++) {
        const floatX* row = rows + (size_t)i * stride;
        float w = __shfl_sync(0xFFFFFFFFu, weight, i);
#pragma unroll
        for (int j = 0; j < GENERAL_COLUMNS; j++)
            if (lane + j * WARP < HS) sum[j] += w * to_float(row[lane + j * WARP]);
    }
}

static __device__ inline void store_columns(floatX* row, const float sum[GENERAL_COLUMNS], float factor,
                                            int HS) {
#pragma unroll
    for (int j = 0; j < GENERAL_COLUMNS; j++) {
        int c = (int)threadIdx.x % WARP + j * WARP;
        if (c < HS) row[c] = from_float<floatX>(sum[j] * factor);
    }
}

// out (HS) = softmax over keys [begin, end) of scale q k^T, times v; returns the logarithm of the
// denominator.
static __device__ inline float attend(floatX* out, const floatX* q, const Head* h, int begin, int end) {
    int lane = (int)threadIdx.x % WARP;
    float max = -INFINITY, sum = 0, o[GENERAL_COLUMNS] = {0};
    for (int first = begin; first < end; first += WARP) {
        int count = end - first < WARP ? end - first : WARP;
        size_t at = (size_t)first * h->stride, mine = at + (size_t)lane * h->stride;
        float score = lane < count ? h->scale * dot_rows(q, h->k + mine, h->HS) : -INFINITY;
        float new_max = fmaxf(max, warp_max(score)), shrink = expf(max - new_max), p = expf(score - new_max);
        sum = sum * shrink + warp_sum(p);
#pragma unroll
        for (int j = 0; j < GENERAL_COLUMNS; j++) o[j] *= shrink;
        add_weighted_rows(o, p, h->v + at, h->stride, count, h->HS);
        max = new_max;
    }
    store_columns(out, o, 1 / sum, h->HS);
    return max + logf(sum);
}

static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    general_forward_kernel(floatX* out, float* lse, const floatX* qkv, KeyValues<const floatX> kv,
                           const int* doc_start, AttentionShape shape) {
    int T = shape.T, NH = shape.NH, HS = shape.HS;
    WarpPlace at = warp_place(T, NH);
    if (at.t >= T) return;
    Head head = key_head(kv, at.b, at.head / (NH / shape.NKV), shape);
    size_t row = (size_t)at.b * (size_t)T + (size_t)at.t;
    int begin = doc_start != NULL ? doc_start[row] : 0;
    float log_sum = attend(out + (row * (size_t)NH + (size_t)at.head) * (size_t)HS,
                           qkv + row * qkv_stride(shape) + (size_t)(at.head * HS), &head, begin,
                           position_at(shape.at, at.t) + 1);
    if (threadIdx.x % WARP == 0) lse[statistic_at(at, T, NH)] = log_sum;
}

// ----------------------------------------------------------------------------
// backward

enum { DELTA_THREADS = 256 };

// delta (B, NH, T) = the sums over a head's columns of dout * out (B, T, NH, HS). A row has `lanes`
// neighbouring lanes, a power of two, so that at head size 64 a warp reads four rows at a time. Reads 2 N NH
// HS elements.
static __global__ void __launch_bounds__(DELTA_THREADS)
    attention_delta_kernel(float* delta, const floatX* dout, const floatX* out, size_t rows, int T, int NH,
                           int HS, int lanes) {
    size_t row = ((size_t)blockIdx.x * DELTA_THREADS + threadIdx.x) / (size_t)lanes;
    int lane = (int)threadIdx.x % lanes;
    float sum = 0;
    for (int c = lane * VEC; c < HS && row < rows; c += lanes * VEC) {
        Vec<floatX> x = load_vec(dout + row * (size_t)HS + c), y = load_vec(out + row * (size_t)HS + c);
        for (int i = 0; i < VEC; i++) sum += to_float(x.at[i]) * to_float(y.at[i]);
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
    if (lane != 0 || row >= rows) return;
    size_t head = row % (size_t)NH, n = row / (size_t)NH, b = n / (size_t)T, t = n % (size_t)T;
    delta[(b * (size_t)NH + head) * (size_t)T + t] = sum;
}

// p = exp(s - lse) and ds = scale * p * (dout . v - delta) of one query and one key
static __device__ inline float2 score_gradient(const Head* h, const floatX* q, const floatX* dout,
                                               const floatX* k, const floatX* v, float lse, float delta) {
    float p = expf(h->scale * dot_rows(q, k, h->HS) - lse);
    return make_float2(p, h->scale * p * (dot_rows(dout, v, h->HS) - delta));
}

static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    general_dq_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, KeyValues<const floatX> kv,
                      const float* lse, const float* delta, const int* doc_start, AttentionShape shape) {
    int T = shape.T, NH = shape.NH, HS = shape.HS;
    WarpPlace at = warp_place(T, NH);
    if (at.t >= T) return;
    int lane = (int)threadIdx.x % WARP, end = position_at(shape.at, at.t) + 1; // of the keys
    Head head = key_head(kv, at.b, at.head / (NH / shape.NKV), shape);
    size_t row = (size_t)at.b * (size_t)T + (size_t)at.t, statistic = statistic_at(at, T, NH);
    size_t q_at = row * qkv_stride(shape) + (size_t)(at.head * HS);
    const floatX* dy = dout + (row * (size_t)NH + (size_t)at.head) * (size_t)HS;
    float dq[GENERAL_COLUMNS] = {0};
    for (int first = doc_start != NULL ? doc_start[row] : 0; first < end; first += WARP) {
        int count = end - first < WARP ? end - first : WARP;
        size_t keys = (size_t)first * head.stride, mine = keys + (size_t)lane * head.stride;
        float2 s = make_float2(0, 0);
        if (lane < count)
            s = score_gradient(&head, qkv + q_at, dy, head.k + mine, head.v + mine, lse[statistic],
                               delta[statistic]);
        add_weighted_rows(dq, s.y, head.k + keys, head.stride, count, HS);
    }
    store_columns(dqkv + q_at, dq, 1, HS);
}

// A key row of a key head: over the query heads of its group, and over the queries that see it.
static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    general_dkv_kernel(KeyValues<floatX> dkv, const floatX* dout, const floatX* qkv,
                       KeyValues<const floatX> kv, const float* lse, const float* delta, const int* doc_start,
                       AttentionShape shape) {
    int T = shape.T, NH = shape.NH, HS = shape.HS;
    WarpPlace at = warp_place(shape.keys, shape.NKV);
    if (at.t >= shape.keys) return;
    int lane = (int)threadIdx.x % WARP, group = NH / shape.NKV, key = at.t;
    size_t sequence = (size_t)at.b * (size_t)T, out_stride = (size_t)(NH * HS), stride = qkv_stride(shape);
    Head head = key_head(kv, at.b, at.head, shape);
    const floatX *k = head.k + (size_t)key * head.stride, *v = head.v + (size_t)key * head.stride;
    float dk[GENERAL_COLUMNS] = {0}, dv[GENERAL_COLUMNS] = {0};
    for (int h = at.head * group; h < (at.head + 1) * group; h++) {
        WarpPlace top = {0, h, at.b};
        const float *row_lse = lse + statistic_at(top, T, NH), *row_delta = delta + statistic_at(top, T, NH);
        for (int first = first_row_at(shape.at, key); first < T; first += WARP) {
            int count = T - first < WARP ? T - first : WARP, t = first + lane;
            const floatX* q = qkv + (sequence + (size_t)first) * stride + (size_t)(h * HS);
            const floatX* dy = dout + (sequence + (size_t)first) * out_stride + (size_t)(h * HS);
            float2 s = make_float2(0, 0);
            if (lane < count && (doc_start == NULL || doc_start[sequence + (size_t)t] <= key))
                s = score_gradient(&head, q + (size_t)lane * stride, dy + (size_t)lane * out_stride, k, v,
                                   row_lse[t], row_delta[t]);
            add_weighted_rows(dk, s.y, q, stride, count, HS);
            add_weighted_rows(dv, s.x, dy, out_stride, count, HS);
        }
    }
    floatX* row = head_rows(dkv.k, at.b, shape.keys, dkv.heads, at.head, HS) + (size_t)key * head.stride;
    store_columns(row, dk, 1, HS);
    store_columns(row + shape.NKV * HS, dv, 1, HS);
}

// ----------------------------------------------------------------------------
// decoding

// out (NH*HS) = one query row q (NH*HS) against `length` rows of k_cache and v_cache (NKV*HS)
static __global__ void attention_decode_kernel(floatX* out, const floatX* q, const floatX* k_cache,
                                               const floatX* v_cache, int length, int NH, int NKV, int HS) {
    int h = (int)blockIdx.x, kv = h / (NH / NKV) * HS;
    Head head = {k_cache + kv, v_cache + kv, (size_t)(NKV * HS), 1 / sqrtf((float)HS), HS};
    attend(out + h * HS, q + h * HS, &head, 0, length);
}

// ----------------------------------------------------------------------------
// launchers: arguments as in attention.cuh

static inline unsigned general_blocks(int T, int heads, int B) {
    return (unsigned)(ceil_div((size_t)T, GENERAL_WARPS) * (size_t)heads * (size_t)B);
}

static inline void attention_general_forward(floatX* out, float* lse, const floatX* qkv,
                                             KeyValues<const floatX> kv, const int* doc_start,
                                             const AttentionShape& shape, cudaStream_t stream) {
    general_forward_kernel<<<general_blocks(shape.T, shape.NH, shape.B), GENERAL_WARPS * WARP, 0, stream>>>(
        out, lse, qkv, kv, doc_start, shape);
    LAUNCH_CHECK();
}

// delta: (B, NH, T) floats, =; both paths' backward needs it
static inline void attention_delta(float* delta, const floatX* dout, const floatX* out,
                                   const AttentionShape& shape, cudaStream_t stream) {
    int lanes = 1;
    while (lanes < WARP && lanes * VEC < shape.HS) lanes *= 2;
    size_t rows = (size_t)shape.B * (size_t)shape.T * (size_t)shape.NH;
    unsigned blocks = (unsigned)ceil_div(rows * (size_t)lanes, DELTA_THREADS);
    attention_delta_kernel<<<blocks, DELTA_THREADS, 0, stream>>>(delta, dout, out, rows, shape.T, shape.NH,
                                                                 shape.HS, lanes);
    LAUNCH_CHECK();
}

static inline void attention_general_backward(floatX* dqkv, KeyValues<floatX> dkv, const floatX* dout,
                                              const floatX* qkv, KeyValues<const floatX> kv, const float* lse,
                                              const float* delta, const int* doc_start,
                                              const AttentionShape& shape, cudaStream_t stream) {
    general_dq_kernel<<<general_blocks(shape.T, shape.NH, shape.B), GENERAL_WARPS * WARP, 0, stream>>>(
        dqkv, dout, qkv, kv, lse, delta, doc_start, shape);
    LAUNCH_CHECK();
    general_dkv_kernel<<<general_blocks(shape.keys, shape.NKV, shape.B), GENERAL_WARPS * WARP, 0, stream>>>(
        dkv, dout, qkv, kv, lse, delta, doc_start, shape);
    LAUNCH_CHECK();
}

// One new token against the keys and values so far. out, q (NH*HS); k_cache, v_cache (length or more,
// NKV*HS): a row of each per position, the new token's own among them; length is 1 or more.
static inline void attention_decode(floatX* out, const floatX* q, const floatX* k_cache,
                                    const floatX* v_cache, int length, int NH, int NKV, int HS,
                                    cudaStream_t stream) {
    attention_decode_kernel<<<(unsigned)NH, WARP, 0, stream>>>(out, q, k_cache, v_cache, length, NH, NKV, HS);
    LAUNCH_CHECK();
}
