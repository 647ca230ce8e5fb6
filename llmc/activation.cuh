// The feed-forward layer's nonlinearity, where it is not part of the matmul (precision.fused_gelu).
//   GELU (tanh form)  out = x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
//   SwiGLU            out = gate * sigmoid(gate) * up
// Source: Hendrycks and Gimpel, 2016; Shazeer, 2020.
//     every element is read and written once: GELU 2 N FF and 3 N FF, SwiGLU 3 N FF and 5 N FF
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, store_vec
#include "llmc/model.h"         // defines: ActivationKind

enum { ACTIVATION_THREADS = 256 };

static __device__ inline float sigmoid_float(float x) { return 1 / (1 + expf(-x)); }

// sigmoid(2 u) and how fast x * sigmoid(2 u) grows
static __device__ inline float gelu_gate(float x) {
    return sigmoid_float(1.5957691216057308f * x * (1 + 0.044715f * x * x));
}
static __device__ inline float gelu_slope(float x) {
    float square = 0.044715f * x * x, s = sigmoid_float(1.5957691216057308f * x * (1 + square));
    return s + x * s * (1 - s) * 1.5957691216057308f * (1 + 3 * square);
}

static __global__ void gelu_forward_kernel(floatX* out, const floatX* inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Vec<floatX> v = load_vec(inp + i);
    for (int k = 0; k < VEC; k++) {
        float x = to_float(v.at[k]);
        v.at[k] = from_float<floatX>(x * gelu_gate(x));
    }
    store_vec(out + i, v);
}

static __global__ void gelu_backward_kernel(floatX* dinp, const floatX* dout, const floatX* inp, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Vec<floatX> dy = load_vec(dout + i), x = load_vec(inp + i);
    for (int k = 0; k < VEC; k++)
        dy.at[k] = from_float<floatX>(to_float(dy.at[k]) * gelu_slope(to_float(x.at[k])));
    store_vec(dinp + i, dy);
}

// Block (n, tile) has part of row n. A row of inp holds FF gates, then FF ups.
static __global__ void swiglu_forward_kernel(floatX* out, const floatX* inp, int FF) {
    size_t row = (size_t)blockIdx.x * (size_t)FF;
    int c = (int)(blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (c >= FF) return;
    const floatX* gates = inp + 2 * row + c;
    Vec<floatX> gate = load_vec(gates), up = load_vec(gates + FF);
    for (int k = 0; k < VEC; k++) {
        float x = to_float(gate.at[k]);
        up.at[k] = from_float<floatX>(x * sigmoid_float(x) * to_float(up.at[k]));
    }
    store_vec(out + row + c, up);
}

static __global__ void swiglu_backward_kernel(floatX* dinp, const floatX* dout, const floatX* inp, int FF) {
    size_t row = (size_t)blockIdx.x * (size_t)FF;
    int c = (int)(blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (c >= FF) return;
    const floatX* gates = inp + 2 * row + c;
    Vec<floatX> dy = load_vec(dout + row + c), gate = load_vec(gates), up = load_vec(gates + FF);
    for (int k = 0; k < VEC; k++) {
        float x = to_float(gate.at[k]), d = to_float(dy.at[k]), s = sigmoid_float(x), silu = x * s;
        gate.at[k] = from_float<floatX>(d * to_float(up.at[k]) * (s + silu * (1 - s)));
        up.at[k] = from_float<floatX>(d * silu);
    }
    store_vec(dinp + 2 * row + c, gate);
    store_vec(dinp + 2 * row + FF + c, up);
}

static inline dim3 swiglu_grid(int N, int FF) {
    return dim3((unsigned)N, (unsigned)ceil_div((size_t)FF, ACTIVATION_THREADS * VEC));
}

// out (N, FF) =; inp (N, FF) for GELU, (N, 2 FF) for SwiGLU
static inline void activation_forward(floatX* out, const floatX* inp, int N, int FF, int kind,
                                      cudaStream_t stream) {
    size_t n = (size_t)N * (size_t)FF;
    unsigned blocks = (unsigned)ceil_div(n, ACTIVATION_THREADS * VEC);
    if (kind == ACTIVATION_GELU_TANH)
        gelu_forward_kernel<<<blocks, ACTIVATION_THREADS, 0, stream>>>(out, inp, n);
    else
        swiglu_forward_kernel<<<swiglu_grid(N, FF), ACTIVATION_THREADS, 0, stream>>>(out, inp, FF);
    LAUNCH_CHECK();
}

// dinp (shape of inp) =; dout (N, FF). For GELU dinp may be dout.
static inline void activation_backward(floatX* dinp, const floatX* dout, const floatX* inp, int N, int FF,
                                       int kind, cudaStream_t stream) {
    size_t n = (size_t)N * (size_t)FF;
    unsigned blocks = (unsigned)ceil_div(n, ACTIVATION_THREADS * VEC);
    if (kind == ACTIVATION_GELU_TANH)
        gelu_backward_kernel<<<blocks, ACTIVATION_THREADS, 0, stream>>>(dinp, dout, inp, n);
    else
        swiglu_backward_kernel<<<swiglu_grid(N, FF), ACTIVATION_THREADS, 0, stream>>>(dinp, dout, inp, FF);
    LAUNCH_CHECK();
}
