// The residual stream and its norms.
//   LayerNorm  out = (x - mean) * rstd * weight + bias    mean = E[x]   rstd = 1 / sqrt(E[(x - mean)^2] + eps)
//   RMSNorm    out = x * rstd * weight                    rstd = 1 / sqrt(E[x^2] + eps)
// Source: Ba et al., 2016; Zhang and Sennrich, 2019.
//
// Bytes that must move, in elements of floatX for N rows of C:  norm forward 2 N C;  residual and norm 4 N C
// (two terms in, their sum and the norm out);  norm backward 4 N C (dout and inp in, dinp in and out).
#pragma once
#include "llmc/column_sums.cuh" // defines: add_parts
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, store_vec, warp_sum
#include "llmc/model.h"         // defines: NormKind

// Chosen by counting, not yet measured: a warp has a row of 768 in three loads a lane; rows wait for one
// another nowhere, so many small blocks hide what memory takes.
enum { NORM_WARPS = 4, NORM_MAX_THREADS = 1024, NORM_MAX_VECS = 4 };
enum { NORM_MAX_COLUMNS = NORM_MAX_THREADS * NORM_MAX_VECS * VEC };

// ----------------------------------------------------------------------------
// forward: a warp has a row; it is read from memory once, and again from the cache

// Statistics and output of a row x of C.
static __device__ inline void norm_row(floatX* out, float* mean, float* rstd, const floatX* x,
                                       const floatX* weight, const floatX* bias, int C, float eps, int kind,
                                       float sum) {
    int lane = (int)threadIdx.x % WARP;
    float center = kind == NORM_LAYERNORM ? warp_sum(sum) / (float)C : 0, square = 0;
    for (int c = lane * VEC; c < C; c += WARP * VEC) {
        Vec<floatX> v = load_vec(x + c);
        for (int i = 0; i < VEC; i++) {
            float d = to_float(v.at[i]) - center;
            square += d * d;
        }
    }
    float scale = 1 / sqrtf(warp_sum(square) / (float)C + eps);
    for (int c = lane * VEC; c < C; c += WARP * VEC) {
        Vec<floatX> v = load_vec(x + c), w = load_vec(weight + c), b = {};
        if (bias != NULL) b = load_vec(bias + c);
        for (int i = 0; i < VEC; i++) {
            float normal = (to_float(v.at[i]) - center) * scale;
            v.at[i] = from_float<floatX>(normal * to_float(w.at[i]) + (bias != NULL ? to_float(b.at[i]) : 0));
        }
        store_vec(out + c, v);
    }
    if (lane != 0) return;
    if (kind == NORM_LAYERNORM) *mean = center;
    *rstd = scale;
}

static __global__ void __launch_bounds__(NORM_WARPS* WARP)
    norm_forward_kernel(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                        const floatX* bias, int N, int C, float eps, int kind) {
    int n = (int)blockIdx.x * NORM_WARPS + (int)threadIdx.x / WARP;
    if (n >= N) return;
    const floatX* x = inp + (size_t)n * (size_t)C;
    float sum = 0;
    for (int c = (int)threadIdx.x % WARP * VEC; c < C; c += WARP * VEC) {
        Vec<floatX> v = load_vec(x + c);
        for (int i = 0; i < VEC; i++) sum += to_float(v.at[i]);
    }
    norm_row(out + (size_t)n * (size_t)C, mean + n, rstd + n, x, weight, bias, C, eps, kind, sum);
}

// The norm is taken of the sum as it is stored, so that norm_forward repeats it to the bit.
static __global__ void __launch_bounds__(NORM_WARPS* WARP)
    residual_norm_forward_kernel(floatX* residual, floatX* out, float* mean, float* rstd, const floatX* a,
                                 const floatX* b, const floatX* weight, const floatX* bias, int N, int C,
                                 float eps, int kind) {
    int n = (int)blockIdx.x * NORM_WARPS + (int)threadIdx.x / WARP;
    if (n >= N) return;
    size_t row = (size_t)n * (size_t)C;
    float sum = 0;
    for (int c = (int)threadIdx.x % WARP * VEC; c < C; c += WARP * VEC) {
        Vec<floatX> v = load_vec(a + row + c), w = load_vec(b + row + c);
        for (int i = 0; i < VEC; i++) {
            v.at[i] = from_float<floatX>(to_float(v.at[i]) + to_float(w.at[i]));
            sum += to_float(v.at[i]);
        }
        store_vec(residual + row + c, v);
    }
    norm_row(out + row, mean + n, rstd + n, residual + row, weight, bias, C, eps, kind, sum);
}

static __global__ void residual_forward_kernel(floatX* out, const floatX* a, const floatX* b, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Vec<floatX> v = load_vec(a + i), w = load_vec(b + i);
    for (int k = 0; k < VEC; k++) v.at[k] = from_float<floatX>(to_float(v.at[k]) + to_float(w.at[k]));
    store_vec(out + i, v);
}

// out (N, C), mean (N; not touched for RMSNorm), rstd (N) =; inp (N, C), weight and bias (C; bias may be NULL)
static inline void norm_forward(floatX* out, float* mean, float* rstd, const floatX* inp,
                                const floatX* weight, const floatX* bias, int N, int C, float eps, int kind,
                                cudaStream_t stream) {
    norm_forward_kernel<<<(unsigned)ceil_div((size_t)N, NORM_WARPS), NORM_WARPS * WARP, 0, stream>>>(
        out, mean, rstd, inp, weight, bias, N, C, eps, kind);
    LAUNCH_CHECK();
}

// out = a + b, n elements, a multiple of 8; out may be a or b
static inline void residual_forward(floatX* out, const floatX* a, const floatX* b, size_t n,
                                    cudaStream_t stream) {
    residual_forward_kernel<<<(unsigned)ceil_div(n, 256 * VEC), 256, 0, stream>>>(out, a, b, n);
    LAUNCH_CHECK();
}

// residual (N, C) = a + b, then its norm. residual may be a or b.
static inline void residual_norm_forward(floatX* residual, floatX* out, float* mean, float* rstd,
                                         const floatX* a, const floatX* b, const floatX* weight,
                                         const floatX* bias, int N, int C, float eps, int kind,
                                         cudaStream_t stream) {
    residual_norm_forward_kernel<<<(unsigned)ceil_div((size_t)N, NORM_WARPS), NORM_WARPS * WARP, 0, stream>>>(
        residual, out, mean, rstd, a, b, weight, bias, N, C, eps, kind);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------
// backward
//   dinp += rstd * (g - E[g] - xhat * E[g * xhat])    g = dout * weight, xhat = (x - mean) * rstd;
//   RMSNorm has no E[g]
//   dweight += sum over rows of dout * xhat           dbias += sum over rows of dout
//
// A block walks down the rows, and a thread keeps to its columns, so that the column sums stay in registers
// from the first row to the last.

// Blocks of the backward pass, enough to fill a large GPU with threads (1.5 M columns in all), but a function of
// C alone, so that every card adds the same parts.
static inline int norm_backward_parts(int C) {
    int parts = (3 << 19) / C;
    return parts < 256 ? 256 : parts > 2048 ? 2048 : parts;
}

// Floats of scratch that norm_backward needs.
static inline size_t norm_backward_scratch(int C) { return 2 * (size_t)norm_backward_parts(C) * (size_t)C; }

// The sums of a and of b over a block of any number of warps, in every thread.
static __device__ inline float2 block_sum2(float a, float b, float2* of_warp) {
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, warps = (int)blockDim.x / WARP;
    a = warp_sum(a), b = warp_sum(b);
    __syncthreads(); // of_warp may still be read for the row before
    if (lane == 0) of_warp[warp] = make_float2(a, b);
    __syncthreads();
    float2 mine = lane < warps ? of_warp[lane] : make_float2(0, 0);
    return make_float2(warp_sum(mine.x), warp_sum(mine.y));
}

// parts (blocks, 2, C): sums for dweight, then for dbias, of the rows that the block had. VECS: loads a
// thread needs for a row.
template <int VECS>
static __global__ void __launch_bounds__(NORM_MAX_THREADS)
    norm_backward_kernel(floatX* dinp, float* parts, const floatX* dout, const floatX* inp,
                         const floatX* weight, const float* mean, const float* rstd, int N, int C, int kind) {
    __shared__ float2 of_warp[WARP];
    float dweight[VECS][VEC] = {}, dbias[VECS][VEC] = {};
    for (int n = (int)blockIdx.x; n < N; n += (int)gridDim.x) {
        size_t row = (size_t)n * (size_t)C;
        float center = kind == NORM_LAYERNORM ? mean[n] : 0, scale = rstd[n], sum = 0, dot = 0;
        float g[VECS][VEC], normal[VECS][VEC];
        for (int v = 0; v < VECS; v++) {
            int c = (v * (int)blockDim.x + (int)threadIdx.x) * VEC;
            if (c >= C) continue;
            Vec<floatX> dy = load_vec(dout + row + c), x = load_vec(inp + row + c), w = load_vec(weight + c);
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
        float2 total = block_sum2(sum, dot, of_warp);
        float g_mean = kind == NORM_LAYERNORM ? total.x / (float)C : 0, slope = total.y / (float)C;
        for (int v = 0; v < VECS; v++) {
            int c = (v * (int)blockDim.x + (int)threadIdx.x) * VEC;
            if (c >= C) continue;
            Vec<floatX> dx = load_vec(dinp + row + c);
            for (int i = 0; i < VEC; i++)
                dx.at[i] = from_float<floatX>(to_float(dx.at[i]) +
                                              scale * (g[v][i] - g_mean - normal[v][i] * slope));
            store_vec(dinp + row + c, dx);
        }
    }
    for (int v = 0; v < VECS; v++) {
        int c = (v * (int)blockDim.x + (int)threadIdx.x) * VEC;
        if (c >= C) continue;
        float* part = parts + 2 * (size_t)blockIdx.x * (size_t)C + (size_t)c;
        for (int i = 0; i < VEC; i++) part[i] = dweight[v][i], part[C + i] = dbias[v][i];
    }
}

// dinp (N, C) += (the gradient of the residual stream); dweight, dbias (C) += (dbias may be NULL); scratch:
// norm_backward_scratch(C) floats; dout (N, C); inp, weight, mean, rstd as in the forward.
template <typename Grad>
static inline void norm_backward(floatX* dinp, Grad* dweight, Grad* dbias, float* scratch, const floatX* dout,
                                 const floatX* inp, const floatX* weight, const float* mean,
                                 const float* rstd, int N, int C, int kind, cudaStream_t stream) {
    int most = norm_backward_parts(C), parts = N < most ? N : most, vecs = C / VEC;
    int threads = (int)ceil_div((size_t)vecs, WARP) * WARP;
    threads = threads < NORM_MAX_THREADS ? threads : NORM_MAX_THREADS;
    CHECK(C <= NORM_MAX_COLUMNS);
    auto kernel = vecs <= threads       ? norm_backward_kernel<1>
                  : vecs <= 2 * threads ? norm_backward_kernel<2>
                                        : norm_backward_kernel<NORM_MAX_VECS>;
    kernel<<<(unsigned)parts, (unsigned)threads, 0, stream>>>(dinp, scratch, dout, inp, weight, mean, rstd, N,
                                                              C, kind);
    LAUNCH_CHECK();
    add_parts(dweight, scratch, parts, 2 * C, C, stream);
    if (dbias != NULL) add_parts(dbias, scratch + C, parts, 2 * C, C, stream);
}
