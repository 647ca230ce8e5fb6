// embedding: out[n] = wte[token[n]] + wpe[t]
//     forward reads and writes N C once, and reads the rows of the table; backward reads dout once for the
//     tokens and once for the positions
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, store_vec

enum { EMBEDDING_THREADS = 128 };

// out (B, T, C) =; wte (V, C), wpe (T or more, C) or NULL. To decode at position t, pass wpe + t * C and T = 1.
static __global__ void embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte,
                                                const floatX* wpe, size_t vecs, int T, int C) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, per_row = (size_t)(C / VEC);
    if (i >= vecs) return;
    size_t n = i / per_row, c = i % per_row * VEC;
    Vec<floatX> v = load_vec(wte + (size_t)tokens[n] * (size_t)C + c);
    if (wpe != NULL) {
        Vec<floatX> position = load_vec(wpe + n % (size_t)T * (size_t)C + c);
        for (int k = 0; k < VEC; k++)
            v.at[k] = from_float<floatX>(to_float(v.at[k]) + to_float(position.at[k]));
    }
    store_vec(out + n * (size_t)C + c, v);
}

static inline void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe,
                                     int B, int T, int C, cudaStream_t stream) {
    size_t vecs = (size_t)B * (size_t)T * (size_t)(C / VEC);
    embedding_forward_kernel<<<(unsigned)ceil_div(vecs, EMBEDDING_THREADS), EMBEDDING_THREADS, 0, stream>>>(
        out, tokens, wte, wpe, vecs, T, C);
    LAUNCH_CHECK();
}

// Adds sum (VEC elements) to a gradient.
template <typename Grad> static __device__ inline void add_to_gradient(Grad* gradient, const float sum[VEC]) {
    for (int k = 0; k < VEC; k++) gradient[k] = from_float<Grad>(to_float(gradient[k]) + sum[k]);
}

// Block (i, tile) has position i of `order`: if that is the first of its token, it sums the rows of all the
// token's positions; otherwise there is nothing to do.
template <typename Grad>
static __global__ void token_gradient_kernel(Grad* dwte, const floatX* dout, const int* tokens,
                                             const int* order, int N, int C) {
    int i = (int)blockIdx.x, token = tokens[order[i]];
    int c = ((int)blockIdx.y * EMBEDDING_THREADS + (int)threadIdx.x) * VEC;
    if (c >= C || (i > 0 && tokens[order[i - 1]] == token)) return;
    float sum[VEC] = {0};
    for (; i < N && tokens[order[i]] == token; i++) {
        Vec<floatX> v = load_vec(dout + (size_t)order[i] * (size_t)C + (size_t)c);
        for (int k = 0; k < VEC; k++) sum[k] += to_float(v.at[k]);
    }
    add_to_gradient(dwte + (size_t)token * (size_t)C + (size_t)c, sum);
}

template <typename Grad>
static __global__ void position_gradient_kernel(Grad* dwpe, const floatX* dout, int B, int T, int C) {
    int t = (int)blockIdx.x, c = ((int)blockIdx.y * EMBEDDING_THREADS + (int)threadIdx.x) * VEC;
    if (c >= C) return;
    float sum[VEC] = {0};
    for (int b = 0; b < B; b++) {
        Vec<floatX> v = load_vec(dout + ((size_t)b * (size_t)T + (size_t)t) * (size_t)C + (size_t)c);
        for (int k = 0; k < VEC; k++) sum[k] += to_float(v.at[k]);
    }
    add_to_gradient(dwpe + (size_t)t * (size_t)C + (size_t)c, sum);
}

// dwte (V, C) +=, dwpe (T, C) += or NULL; dout (B, T, C), tokens (B, T), order (B T) as token_order gives it
template <typename Grad>
static inline void embedding_backward(Grad* dwte, Grad* dwpe, const floatX* dout, const int* tokens,
                                      const int* order, int B, int T, int C, cudaStream_t stream) {
    unsigned tiles = (unsigned)ceil_div((size_t)(C / VEC), EMBEDDING_THREADS);
    token_gradient_kernel<<<dim3((unsigned)(B * T), tiles), EMBEDDING_THREADS, 0, stream>>>(
        dwte, dout, tokens, order, B * T, C);
    LAUNCH_CHECK();
    if (dwpe == NULL) return;
    position_gradient_kernel<<<dim3((unsigned)T, tiles), EMBEDDING_THREADS, 0, stream>>>(dwpe, dout, B, T, C);
    LAUNCH_CHECK();
}
