// Attention for any head size that is a multiple of 8, in either precision, in plain fp32 arithmetic: what
// fp32 builds use, unusual head sizes, and decoding. Correct before it is fast; llmc/attention.cuh has the fast
// kernels. Scores are never stored: the backward pass computes them again from lse.
//
// A warp has a row: of queries in the forward pass and for dq, of keys for dk and dv. 32 scores are
// computed at a time, one to a lane; then all lanes together add up 32 weighted rows, a lane keeping every 32nd
// column.
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, load_vec, warp_sum, warp_max

enum { ATTENTION_MAX_HEAD = 256, GENERAL_WARPS = 4, GENERAL_COLUMNS = ATTENTION_MAX_HEAD / WARP };

// Where the rows of one head lie: row t of q is at q + t * stride.
typedef struct {
    const floatX *q, *k, *v;
    size_t stride; // of a position, in elements
    float scale;   // 1 / sqrt(HS)
    int HS;
} Head;

static __device__ inline Head head_of_qkv(const floatX* qkv, int b, int h, int T, int NH, int NKV, int HS) {
    size_t stride = (size_t)(NH + 2 * NKV) * (size_t)HS, kv = (size_t)(h / (NH / NKV) * HS);
    const floatX* sequence = qkv + (size_t)b * (size_t)T * stride;
    Head head = {sequence + (size_t)(h * HS),
                 sequence + (size_t)(NH * HS) + kv,
                 sequence + (size_t)((NH + NKV) * HS) + kv,
                 stride,
                 rsqrtf((float)HS),
                 HS};
    return head;
}

static __device__ inline float dot_rows(const floatX* a, const floatX* b, int HS) {
    float sum = 0;
    for (int c = 0; c < HS; c += VEC) {
        Vec<floatX> x = load_vec(a + c), y = load_vec(b + c);
        for (int i = 0; i < VEC; i++) sum += to_float(x.at[i]) * to_float(y.at[i]);
    }
    return sum;
}

// sum[j] += weight_i * rows[i][lane + 32 j] over the 32 rows whose weights the lanes hold (0 beyond `count`)
static __device__ inline void add_weighted_rows(float sum[GENERAL_COLUMNS], float weight, const floatX* rows,
                                                size_t stride, int count, int HS) {
    int lane = (int)threadIdx.x % WARP;
    for (int i = 0; i < count; i++) {
        float w = __shfl_sync(0xFFFFFFFFu, weight, i);
        for (int j = 0; j < GENERAL_COLUMNS; j++)
            if (lane + j * WARP < HS)
                sum[j] += w * to_float(rows[(size_t)i * stride + (size_t)(lane + j * WARP)]);
    }
}

static __device__ inline void store_columns(floatX* row, const float sum[GENERAL_COLUMNS], float factor,
                                            int HS) {
    for (int j = 0; j < GENERAL_COLUMNS; j++) {
        int c = (int)threadIdx.x % WARP + j * WARP;
        if (c < HS) row[c] = from_float<floatX>(sum[j] * factor);
    }
}

// out (HS) = softmax over keys [begin, end) of q k^T scale, times v; returns the logarithm of the sum.
static __device__ inline float attend(floatX* out, const floatX* q, const Head* h, int begin, int end) {
    int lane = (int)threadIdx.x % WARP;
    float max = -INFINITY, sum = 0, o[GENERAL_COLUMNS] = {0};
    for (int first = begin; first < end; first += WARP) {
        int count = end - first < WARP ? end - first : WARP;
        size_t at = (size_t)first * h->stride, mine = at + (size_t)lane * h->stride;
        float score = lane < count ? h->scale * dot_rows(q, h->k + mine, h->HS) : -INFINITY;
        float new_max = fmaxf(max, warp_max(score)), shrink = expf(max - new_max), p = expf(score - new_max);
        sum = sum * shrink + warp_sum(p);
        for (int j = 0; j < GENERAL_COLUMNS; j++) o[j] *= shrink;
        add_weighted_rows(o, p, h->v + at, h->stride, count, h->HS);
        max = new_max;
    }
    store_columns(out, o, 1 / sum, h->HS);
    return max + logf(sum);
}

static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    attention_general_forward_kernel(floatX* out, float* lse, const floatX* qkv, const int* doc_start, int T,
                                     int NH, int NKV, int HS) {
    int t = (int)blockIdx.x * GENERAL_WARPS + (int)threadIdx.x / WARP, h = (int)blockIdx.y,
        b = (int)blockIdx.z;
    if (t >= T) return;
    Head head = head_of_qkv(qkv, b, h, T, NH, NKV, HS);
    size_t row = (size_t)b * (size_t)T + (size_t)t;
    int begin = doc_start != NULL ? doc_start[row] : 0;
    float l = attend(out + row * (size_t)(NH * HS) + (size_t)(h * HS), head.q + (size_t)t * head.stride,
                     &head, begin, t + 1);
    if (threadIdx.x % WARP == 0) lse[((size_t)b * (size_t)NH + (size_t)h) * (size_t)T + (size_t)t] = l;
}

// delta (B, NH, T) = the sum over a head's columns of dout * out
static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    attention_delta_kernel(float* delta, const floatX* dout, const floatX* out, int T, int NH, int HS) {
    int t = (int)blockIdx.x * GENERAL_WARPS + (int)threadIdx.x / WARP, h = (int)blockIdx.y,
        b = (int)blockIdx.z;
    if (t >= T) return;
    size_t row = (((size_t)b * (size_t)T + (size_t)t) * (size_t)NH + (size_t)h) * (size_t)HS;
    float sum = 0;
    for (int c = (int)threadIdx.x % WARP * VEC; c < HS; c += WARP * VEC) {
        Vec<floatX> x = load_vec(dout + row + c), y = load_vec(out + row + c);
        for (int i = 0; i < VEC; i++) sum += to_float(x.at[i]) * to_float(y.at[i]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) delta[((size_t)b * (size_t)NH + (size_t)h) * (size_t)T + (size_t)t] = sum;
}

// p = exp(s - lse) and ds = scale * p * (dout . v - delta) for query row t and one key
static __device__ inline float2 score_gradient(const Head* h, const floatX* q, const floatX* dout,
                                               const floatX* k, const floatX* v, float lse, float delta) {
    float p = expf(h->scale * dot_rows(q, k, h->HS) - lse);
    return make_float2(p, h->scale * p * (dot_rows(dout, v, h->HS) - delta));
}

static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    attention_general_dq_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse,
                                const float* delta, const int* doc_start, int T, int NH, int NKV, int HS) {
    int t = (int)blockIdx.x * GENERAL_WARPS + (int)threadIdx.x / WARP, h = (int)blockIdx.y,
        b = (int)blockIdx.z;
    if (t >= T) return;
    int lane = (int)threadIdx.x % WARP;
    Head head = head_of_qkv(qkv, b, h, T, NH, NKV, HS);
    size_t row = (size_t)b * (size_t)T + (size_t)t;
    size_t statistic = ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T + (size_t)t;
    const floatX *q = head.q + (size_t)t * head.stride,
                 *dy = dout + (row * (size_t)NH + (size_t)h) * (size_t)HS;
    float dq[GENERAL_COLUMNS] = {0};
    for (int first = doc_start != NULL ? doc_start[row] : 0; first <= t; first += WARP) {
        int count = t + 1 - first < WARP ? t + 1 - first : WARP;
        size_t at = (size_t)first * head.stride, mine = at + (size_t)lane * head.stride;
        float ds = lane < count ? score_gradient(&head, q, dy, head.k + mine, head.v + mine, lse[statistic],
                                                 delta[statistic])
                                      .y
                                : 0;
        add_weighted_rows(dq, ds, head.k + at, head.stride, count, HS);
    }
    store_columns(dqkv + row * head.stride + (size_t)(h * HS), dq, 1, HS);
}

// Key row j of a kv head: over the query heads of its group, and over the queries that see it.
static __global__ void __launch_bounds__(GENERAL_WARPS* WARP)
    attention_general_dkv_kernel(floatX* dqkv, const floatX* dout, const floatX* qkv, const float* lse,
                                 const float* delta, const int* doc_start, int T, int NH, int NKV, int HS) {
    int j = (int)blockIdx.x * GENERAL_WARPS + (int)threadIdx.x / WARP, kv = (int)blockIdx.y,
        b = (int)blockIdx.z;
    if (j >= T) return;
    int lane = (int)threadIdx.x % WARP, group = NH / NKV;
    size_t sequence = (size_t)b * (size_t)T, out_stride = (size_t)(NH * HS);
    float dk[GENERAL_COLUMNS] = {0}, dv[GENERAL_COLUMNS] = {0};
    for (int h = kv * group; h < (kv + 1) * group; h++) {
        Head head = head_of_qkv(qkv, b, h, T, NH, NKV, HS);
        const floatX *k = head.k + (size_t)j * head.stride, *v = head.v + (size_t)j * head.stride;
        const float *row_lse = lse + ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T,
                    *row_delta = delta + ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T;
        for (int first = j; first < T; first += WARP) {
            int count = T - first < WARP ? T - first : WARP, t = first + lane;
            bool sees = lane < count && (doc_start == NULL || doc_start[sequence + (size_t)t] <= j);
            const floatX* dy = dout + (sequence + (size_t)first) * out_stride + (size_t)(h * HS);
            float2 s = make_float2(0, 0);
            if (sees)
                s = score_gradient(&head, head.q + (size_t)t * head.stride, dy + (size_t)lane * out_stride, k,
                                   v, row_lse[t], row_delta[t]);
            add_weighted_rows(dk, s.y, head.q + (size_t)first * head.stride, head.stride, count, HS);
            add_weighted_rows(dv, s.x, dy, out_stride, count, HS);
        }
    }
    size_t stride = (size_t)(NH + 2 * NKV) * (size_t)HS;
    floatX* row = dqkv + (sequence + (size_t)j) * stride + (size_t)((NH + kv) * HS);
    store_columns(row, dk, 1, HS);
    store_columns(row + (size_t)(NKV * HS), dv, 1, HS);
}

// out (NH*HS) = one query row q (NH*HS) against `length` rows of k_cache and v_cache (NKV*HS)
static __global__ void attention_decode_kernel(floatX* out, const floatX* q, const floatX* k_cache,
                                               const floatX* v_cache, int length, int NH, int NKV, int HS) {
    int h = (int)blockIdx.x, kv = h / (NH / NKV) * HS;
    Head head = {q + h * HS, k_cache + kv, v_cache + kv, (size_t)(NKV * HS), rsqrtf((float)HS), HS};
    attend(out + h * HS, head.q, &head, 0, length);
}

// ----------------------------------------------------------------------------
// launchers: arguments as in attention.cuh

static inline dim3 general_grid(int rows, int heads, int B) {
    return dim3((unsigned)ceil_div((size_t)rows, GENERAL_WARPS), (unsigned)heads, (unsigned)B);
}

static inline void attention_general_forward(floatX* out, float* lse, const floatX* qkv, const int* doc_start,
                                             int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    attention_general_forward_kernel<<<general_grid(T, NH, B), GENERAL_WARPS * WARP, 0, stream>>>(
        out, lse, qkv, doc_start, T, NH, NKV, HS);
    LAUNCH_CHECK();
}

// delta: (B, NH, T) floats
static inline void attention_delta(float* delta, const floatX* dout, const floatX* out, int B, int T, int NH,
                                   int HS, cudaStream_t stream) {
    attention_delta_kernel<<<general_grid(T, NH, B), GENERAL_WARPS * WARP, 0, stream>>>(delta, dout, out, T,
                                                                                        NH, HS);
    LAUNCH_CHECK();
}

static inline void attention_general_backward(floatX* dqkv, const floatX* dout, const floatX* qkv,
                                              const float* lse, const float* delta, const int* doc_start,
                                              int B, int T, int NH, int NKV, int HS, cudaStream_t stream) {
    attention_general_dq_kernel<<<general_grid(T, NH, B), GENERAL_WARPS * WARP, 0, stream>>>(
        dqkv, dout, qkv, lse, delta, doc_start, T, NH, NKV, HS);
    LAUNCH_CHECK();
    attention_general_dkv_kernel<<<general_grid(T, NKV, B), GENERAL_WARPS * WARP, 0, stream>>>(
        dqkv, dout, qkv, lse, delta, doc_start, T, NH, NKV, HS);
    LAUNCH_CHECK();
}

static inline void attention_decode(floatX* out, const floatX* q, const floatX* k_cache,
                                    const floatX* v_cache, int length, int NH, int NKV, int HS,
                                    cudaStream_t stream) {
    attention_decode_kernel<<<(unsigned)NH, WARP, 0, stream>>>(out, q, k_cache, v_cache, length, NH, NKV, HS);
    LAUNCH_CHECK();
}
