// The residual stream and its norms.
//   LayerNorm  out = (x - mean) * rstd * weight + bias    mean = E[x]  rstd = 1 / sqrt(E[(x - mean)^2] + eps)
//   RMSNorm    out = x * rstd * weight                    rstd = 1 / sqrt(E[x^2] + eps)
// Source: Ba et al., 2016; Zhang and Sennrich, 2019.
//
// Bytes that must move, in elements of floatX for N rows of C:  norm forward 2 N C;  residual and norm 4 N C
// (two terms in, their sum and the norm out);  norm backward 4 N C (dout and inp in, dinp in and out).
#pragma once
#include "llmc/column_sums.cuh" // defines: add_parts, store_floats
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, store_vec, warp_sum
#include "llmc/model.h"         // defines: NormKind

// Chosen by counting, not yet measured. Forward: a thread keeps up to 32 elements of its row in registers, so
// a warp has a row of 1024 alone and waits for no other; NORM_ROWS such warps are a block. Backward: all
// blocks run at once, with the threads that 128 multiprocessors hold at 64 registers a thread: equal shares,
// no tail.
enum { NORM_VECS = 32 / VEC, NORM_ROWS = 4, NORM_MAX_THREADS = 1024, NORM_BACKWARD_THREADS = 128 * 1024 };
enum { NORM_MAX_COLUMNS = NORM_MAX_THREADS * NORM_VECS * VEC };

// ----------------------------------------------------------------------------
// forward: a row is read once and stays in registers

// The sum of x over the threads of a row, in every one of them. of_warp: a place used for nothing else.
static __device__ inline float row_sum(float x, float* of_warp) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, warps = (int)blockDim.x / WARP;
    x = warp_sum(x);
    if (warps == 1) return x;
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? of_warp[lane] : 0.0f);
}

// A thread's loads of its row lie `step` columns apart. The norm is taken of the sum as it is stored, so that
// it comes out the same to the bit when it is taken again, of the stored sum. MAX_THREADS: of a block; below
// 1024 they may have more registers.
template <int MAX_THREADS>
static __global__ void __launch_bounds__(MAX_THREADS)
    norm_forward_kernel(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* a,
                        const floatX* b, const floatX* weight, const floatX* bias, int N, int C, float eps,
                        int kind) {
    __shared__ float of_warp[2][WARP];
    int n = (int)(blockIdx.x * blockDim.y + threadIdx.y), step = (int)blockDim.x * VEC;
    int first = (int)threadIdx.x * VEC;
    if (n >= N) return; // only in blocks of several rows, whose warps do not wait for one another
    size_t row = (size_t)n * (size_t)C;
    Vec<floatX> x[NORM_VECS] = {}, y[NORM_VECS] = {};
#pragma unroll
    for (int v = 0, c = first; v < NORM_VECS && c < C; v++, c += step) {
        x[v] = load_vec(a + row + c);
        if (b != NULL) y[v] = load_vec(b + row + c);
    }
    float sum = 0, square = 0;
#pragma unroll
    for (int v = 0, c = first; v < NORM_VECS && c < C; v++, c += step) {
        if (b != NULL) {
            for (int i = 0; i < VEC; i++)
                x[v].at[i] = from_float<floatX>(to_float(x[v].at[i]) + to_float(y[v].at[i]));
            store_vec(residual + row + c, x[v]);
        }
        for (int i = 0; i < VEC; i++) sum += to_float(x[v].at[i]);
    }
    float center = kind == NORM_LAYERNORM ? row_sum(sum, of_warp[0]) / (float)C : 0;
#pragma unroll
    for (int v = 0, c = first; v < NORM_VECS && c < C; v++, c += step)
        for (int i = 0; i < VEC; i++) {
            float d = to_float(x[v].at[i]) - center;
            square += d * d;
        }
    float scale = 1 / sqrtf(row_sum(square, of_warp[1]) / (float)C + eps);
#pragma unroll
    for (int v = 0, c = first; v < NORM_VECS && c < C; v++, c += step) {
        Vec<floatX> w = load_vec(weight + c), shift = {};
        if (bias != NULL) shift = load_vec(bias + c);
        for (int i = 0; i < VEC; i++)
            x[v].at[i] = from_float<floatX>((to_float(x[v].at[i]) - center) * scale * to_float(w.at[i]) +
                                            to_float(shift.at[i]));
        store_vec(out + row + c, x[v]);
    }
    if (threadIdx.x != 0) return;
    if (kind == NORM_LAYERNORM) mean[n] = center;
    rstd[n] = scale;
}

static __global__ void residual_forward_kernel(floatX* out, const floatX* a, const floatX* b, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Vec<floatX> v = load_vec(a + i), w = load_vec(b + i);
    for (int k = 0; k < VEC; k++) v.at[k] = from_float<floatX>(to_float(v.at[k]) + to_float(w.at[k]));
    store_vec(out + i, v);
}

// out = a + b, n elements, a multiple of 8; out may be a or b
static inline void residual_forward(floatX* out, const floatX* a, const floatX* b, size_t n,
                                    cudaStream_t stream) {
    residual_forward_kernel<<<(unsigned)ceil_div(n, 256 * VEC), 256, 0, stream>>>(out, a, b, n);
    LAUNCH_CHECK();
}

// residual (N, C) = a + b, then its norm: out (N, C), mean (N; not touched and may be NULL for RMSNorm), rstd
// (N) =; weight and bias (C; bias may be NULL). residual may be a or b. Without b: the norm of a alone.
static inline void residual_norm_forward(floatX* residual, floatX* out, float* mean, float* rstd,
                                         const floatX* a, const floatX* b, const floatX* weight,
                                         const floatX* bias, int N, int C, float eps, int kind,
                                         cudaStream_t stream) {
    CHECK(C <= NORM_MAX_COLUMNS);
    unsigned warps = (unsigned)ceil_div((size_t)C, WARP * NORM_VECS * VEC), rows = warps == 1 ? NORM_ROWS : 1;
    auto kernel = warps <= 16 ? norm_forward_kernel<512> : norm_forward_kernel<NORM_MAX_THREADS>;
    kernel<<<(unsigned)ceil_div((size_t)N, rows), dim3(warps * WARP, rows), 0, stream>>>(
        residual, out, mean, rstd, a, b, weight, bias, N, C, eps, kind);
    LAUNCH_CHECK();
}

// The norm of inp (N, C): as above.
static inline void norm_forward(floatX* out, float* mean, float* rstd, const floatX* inp,
                                const floatX* weight, const floatX* bias, int N, int C, float eps, int kind,
                                cudaStream_t stream) {
    residual_norm_forward(NULL, out, mean, rstd, inp, NULL, weight, bias, N, C, eps, kind, stream);
}

// ----------------------------------------------------------------------------
// backward
//   dinp += rstd * (g - E[g] - xhat * E[g * xhat])    g = dout * weight, xhat = (x - mean) * rstd;
//   RMSNorm has no E[g]
//   dweight += sum over rows of dout * xhat           dbias += sum over rows of dout
//
// A block walks down the rows, and a thread keeps to its columns, so that the column sums stay in registers
// from the first row to the last.

static inline int norm_backward_threads(int C) {
    size_t threads = ceil_div((size_t)(C / VEC), WARP) * WARP;
    return threads < NORM_MAX_THREADS ? (int)threads : NORM_MAX_THREADS;
}

// Blocks of the backward kernel, each with its part of the sums over rows: 128 times a power of two.
static inline int norm_parts(int C) {
    int parts = 128;
    while (2 * parts * norm_backward_threads(C) <= NORM_BACKWARD_THREADS) parts *= 2;
    return parts;
}

// Floats of scratch that norm_backward needs.
static inline size_t norm_backward_scratch(int C) { return 2 * (size_t)norm_parts(C) * (size_t)C; }

// The sums of a and of b over a block, in every thread. of_warp: not the one of the call before.
static __device__ inline float2 block_sum2(float a, float b, float2* of_warp) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, warps = (int)blockDim.x / WARP;
    a = warp_sum(a), b = warp_sum(b);
    if (lane == 0) of_warp[warp] = make_float2(a, b);
    __syncthreads();
    float2 mine = lane < warps ? of_warp[lane] : make_float2(0, 0);
    return make_float2(warp_sum(mine.x), warp_sum(mine.y));
}

// parts (blocks, 2, C): sums for dweight, then for dbias (not written unless wanted), of the rows that the
// block had. VECS: loads a thread needs for a row.
template <int VECS>
static __global__ void __launch_bounds__(NORM_MAX_THREADS, 1)
    norm_backward_kernel(floatX* dinp, float* parts, const floatX* dout, const floatX* inp,
                         const floatX* weight, const float* mean, const float* rstd, int N, int C, int kind,
                         bool want_dbias) {
    __shared__ float2 of_warp[2][WARP]; // two, so that one barrier a row is enough
    int first = (int)threadIdx.x * VEC, step = (int)blockDim.x * VEC, turn = 0;
    float dweight[VECS][VEC] = {}, dbias[VECS][VEC] = {};
    for (int n = (int)blockIdx.x; n < N; n += (int)gridDim.x, turn = 1 - turn) {
        size_t row = (size_t)n * (size_t)C;
        float center = kind == NORM_LAYERNORM ? mean[n] : 0, scale = rstd[n], sum = 0, dot = 0;
        float g[VECS][VEC] = {}, normal[VECS][VEC] = {};
        Vec<floatX> dx[VECS] = {};
#pragma unroll
        for (int v = 0, c = first; v < VECS && c < C; v++, c += step) {
            Vec<floatX> dy = load_vec(dout + row + c), x = load_vec(inp + row + c), w = load_vec(weight + c);
            dx[v] = load_vec(dinp + row + c); // long before it is needed
            for (int i = 0; i < VEC; i++) {
                float d = to_float(dy.at[i]);
                normal[v][i] = (to_float(x.at[i]) - center) * scale;
                g[v][i] = d * to_float(w.at[i]);
                sum += g[v][i];
                dot += g[v][i] * normal[v][i];
                dweight[v][i] += d * normal[v][i];
                dbias[v][i] += d;
            }
        }
        float2 total = block_sum2(sum, dot, of_warp[turn]);
        float g_mean = kind == NORM_LAYERNORM ? total.x / (float)C : 0, slope = total.y / (float)C;
#pragma unroll
        for (int v = 0, c = first; v < VECS && c < C; v++, c += step) {
            for (int i = 0; i < VEC; i++)
                dx[v].at[i] = from_float<floatX>(to_float(dx[v].at[i]) +
                                                 scale * (g[v][i] - g_mean - normal[v][i] * slope));
            store_vec(dinp + row + c, dx[v]);
        }
    }
    float* part = parts + 2 * (size_t)blockIdx.x * (size_t)C;
#pragma unroll
    for (int v = 0, c = first; v < VECS && c < C; v++, c += step) {
        store_floats(part + c, dweight[v]);
        if (want_dbias) store_floats(part + C + c, dbias[v]);
    }
}

// dinp (N, C) += (the gradient of the residual stream); dweight, dbias (C) += (dbias may be NULL); scratch:
// norm_backward_scratch(C) floats; dout (N, C); inp, weight, mean, rstd as in the forward.
template <typename Grad>
static inline void norm_backward(floatX* dinp, Grad* dweight, Grad* dbias, float* scratch, const floatX* dout,
                                 const floatX* inp, const floatX* weight, const float* mean,
                                 const float* rstd, int N, int C, int kind, cudaStream_t stream) {
    CHECK(C <= NORM_MAX_COLUMNS);
    int parts = N < norm_parts(C) ? N : norm_parts(C), threads = norm_backward_threads(C);
    auto kernel = C <= threads * VEC       ? norm_backward_kernel<1>
                  : C <= 2 * threads * VEC ? norm_backward_kernel<2>
                                           : norm_backward_kernel<NORM_VECS>;
    kernel<<<(unsigned)parts, (unsigned)threads, 0, stream>>>(dinp, scratch, dout, inp, weight, mean, rstd, N,
                                                              C, kind, dbias != NULL);
    LAUNCH_CHECK();
    add_parts(dweight, scratch, parts, 2 * C, C, stream);
    if (dbias != NULL) add_parts(dbias, scratch + C, parts, 2 * C, C, stream);
}
