// What a step adds up before the update: the sum of its losses, and the square of the norm of all gradients.
// Sums over many blocks go through a fixed number of parts, each in double.
#pragma once
#include "llmc/cuda_common.cuh" // defines: Vec, load_vec, block_sum

enum { NORM_PARTIALS = 1024, NORM_THREADS = 256, LOSS_THREADS = 1024 };

// *sum += x[0] + ... + x[n-1]
static __global__ void __launch_bounds__(LOSS_THREADS) sum_kernel(double* sum, const float* x, int n) {
    double mine = 0;
    for (int i = (int)threadIdx.x; i < n; i += LOSS_THREADS) mine += (double)x[i];
    mine = block_sum<LOSS_THREADS>(mine);
    if (threadIdx.x == 0) *sum += mine;
}

template <typename Grad>
static __global__ void __launch_bounds__(NORM_THREADS)
    norm_squared_kernel(double* partials, const Grad* grads, size_t n) {
    const int SIZE = Vec<Grad>::SIZE;
    double mine = 0;
    size_t i = ((size_t)blockIdx.x * NORM_THREADS + threadIdx.x) * SIZE;
    for (; i < n; i += (size_t)gridDim.x * NORM_THREADS * SIZE) {
        Vec<Grad> g = load_vec(grads + i);
        for (int k = 0; k < SIZE; k++) mine += (double)to_float(g.at[k]) * (double)to_float(g.at[k]);
    }
    mine = block_sum<NORM_THREADS>(mine);
    if (threadIdx.x == 0) partials[blockIdx.x] = mine;
}

// *sum += the sum of x (n)
static inline void add_sum(double* sum, const float* x, int n, cudaStream_t stream) {
    sum_kernel<<<1, LOSS_THREADS, 0, stream>>>(sum, x, n);
    LAUNCH_CHECK();
}

// How many partial sums the norm of n gradients has: a function of n alone, so that the same sums come out of
// every card.
template <typename Grad> static inline int global_norm_parts(size_t n) {
    size_t blocks = ceil_div(n, (size_t)NORM_THREADS * Vec<Grad>::SIZE);
    return blocks < NORM_PARTIALS ? (int)blocks : NORM_PARTIALS;
}

// partials (global_norm_parts<Grad>(n)) =; their sum is the sum of the squares of grads (n, a multiple of 8)
template <typename Grad>
static inline void global_norm_squared(double* partials, const Grad* grads, size_t n, cudaStream_t stream) {
    norm_squared_kernel<<<(unsigned)global_norm_parts<Grad>(n), NORM_THREADS, 0, stream>>>(partials, grads,
                                                                                           n);
    LAUNCH_CHECK();
}
