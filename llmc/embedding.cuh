// embedding: out[n] = wte[token[n]] + wpe[position of n]
//     forward reads and writes N C once, and reads the rows of the table; backward reads dout once for the
//     tokens and once for the positions
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, store_vec
#include "llmc/positions.h"     // defines: Positions, position_at

// Chosen by counting, not yet measured: a warp copies a row; all the rows of a frequent token are summed by
// the same threads, which therefore have EMBEDDING_BATCH of them on their way at a time.
enum { EMBEDDING_ROWS = 4, EMBEDDING_THREADS = 128, EMBEDDING_BATCH = 8 };

static __global__ void embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte,
                                                const floatX* wpe, Positions at, int N, int T, int C) {
    int n = (int)(blockIdx.x * EMBEDDING_ROWS + threadIdx.y);
    if (n >= N) return;
    bool here = tokens[n] >= 0;
    const floatX* token = wte + (here ? (size_t)tokens[n] * (size_t)C : 0);
    const floatX* position = wpe + (wpe != NULL ? (size_t)position_at(at, n % T) * (size_t)C : 0);
    floatX* row = out + (size_t)n * (size_t)C;
#pragma unroll 4
    for (int c = (int)threadIdx.x * VEC; c < C; c += WARP * VEC) {
        Vec<floatX> v = {};
        if (here) v = load_vec(token + c);
        if (wpe != NULL) {
            Vec<floatX> p = load_vec(position + c);
            for (int k = 0; k < VEC; k++) v.at[k] = from_float<floatX>(to_float(v.at[k]) + to_float(p.at[k]));
        }
        store_vec(row + c, v);
    }
}

// out (B, T, C) =; wte (V, C), wpe (positions, C) or NULL; row (b, t) has position_at(at, t). A negative token
// is one whose row another rank has: zero here.
static inline void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe,
                                     Positions at, int B, int T, int C, cudaStream_t stream) {
    unsigned blocks = (unsigned)ceil_div((size_t)B * (size_t)T, EMBEDDING_ROWS);
    embedding_forward_kernel<<<blocks, dim3(WARP, EMBEDDING_ROWS), 0, stream>>>(out, tokens, wte, wpe, at,
                                                                                B * T, T, C);
    LAUNCH_CHECK();
}

// VEC gradients: 16 bytes, or 32 or 8 where their type is not the activations'.
template <typename Grad> struct alignas(VEC * sizeof(Grad) < 16 ? VEC * sizeof(Grad) : 16) GradVec {
    Grad at[VEC];
};

// Adds sum to VEC elements of a gradient.
template <typename Grad> static __device__ inline void add_to_gradient(Grad* gradient, const float sum[VEC]) {
    GradVec<Grad>* place = reinterpret_cast<GradVec<Grad>*>(gradient);
    GradVec<Grad> v = *place;
    for (int k = 0; k < VEC; k++) v.at[k] = from_float<Grad>(to_float(v.at[k]) + sum[k]);
    *place = v;
}

// Block (i, tile) has position i of `order`: if that is the first of its token, it sums the rows of all the
// token's positions; otherwise there is nothing to do. The rows of a batch are all on their way before the
// first of them is added.
template <typename Grad>
static __global__ void __launch_bounds__(EMBEDDING_THREADS)
    token_gradient_kernel(Grad* dwte, const floatX* dout, const int* tokens, const int* order, int N, int C) {
    int i = (int)blockIdx.x, token = tokens[order[i]];
    int c = ((int)blockIdx.y * EMBEDDING_THREADS + (int)threadIdx.x) * VEC;
    if (c >= C || token < 0 || (i > 0 && tokens[order[i - 1]] == token)) return;
    float sum[VEC] = {0};
    bool more = true;
    for (; more; i += EMBEDDING_BATCH) {
        int row[EMBEDDING_BATCH];
        Vec<floatX> v[EMBEDDING_BATCH] = {};
        for (int k = 0; k < EMBEDDING_BATCH; k++) row[k] = i + k < N ? order[i + k] : -1;
        for (int k = 0; k < EMBEDDING_BATCH; k++) {
            more = row[k] >= 0 && tokens[row[k]] == token;
            if (more) v[k] = load_vec(dout + (size_t)row[k] * (size_t)C + (size_t)c);
        }
        for (int k = 0; k < EMBEDDING_BATCH; k++)
            for (int j = 0; j < VEC; j++) sum[j] += to_float(v[k].at[j]); // 0 beyond the token's last
    }
    add_to_gradient(dwte + (size_t)token * (size_t)C + (size_t)c, sum);
}

template <typename Grad>
static __global__ void position_gradient_kernel(Grad* dwpe, const floatX* dout, Positions at, int B, int T,
                                                int C) {
    int t = (int)blockIdx.x, c = ((int)blockIdx.y * EMBEDDING_THREADS + (int)threadIdx.x) * VEC;
    if (c >= C) return;
    float sum[VEC] = {0};
#pragma unroll 4
    for (int b = 0; b < B; b++) {
        Vec<floatX> v = load_vec(dout + ((size_t)b * (size_t)T + (size_t)t) * (size_t)C + (size_t)c);
        for (int k = 0; k < VEC; k++) sum[k] += to_float(v.at[k]);
    }
    add_to_gradient(dwpe + (size_t)position_at(at, t) * (size_t)C + (size_t)c, sum);
}

// dwte (V, C) +=, dwpe (positions, C) += or NULL; dout (B, T, C), tokens (B, T), order (B T) as token_order gives it
template <typename Grad>
static inline void embedding_backward(Grad* dwte, Grad* dwpe, const floatX* dout, const int* tokens,
                                      const int* order, Positions at, int B, int T, int C,
                                      cudaStream_t stream) {
    unsigned tiles = (unsigned)ceil_div((size_t)(C / VEC), EMBEDDING_THREADS);
    token_gradient_kernel<<<dim3((unsigned)(B * T), tiles), EMBEDDING_THREADS, 0, stream>>>(
        dwte, dout, tokens, order, B * T, C);
    LAUNCH_CHECK();
    if (dwpe == NULL) return;
    position_gradient_kernel<<<dim3((unsigned)T, tiles), EMBEDDING_THREADS, 0, stream>>>(dwpe, dout, at, B, T,
                                                                                         C);
    LAUNCH_CHECK();
}
