// Softmax, cross-entropy and its gradient in one kernel, in place on a chunk of logits: a block has a row,
// reads it once for its maximum and sum, and once more, now from the L2 cache, to write the gradient.
//     reads and writes N Vp once
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec, store_vec, warp_sum, warp_max

enum { CLASSIFIER_THREADS = 1024 };

// The running maximum of a row and the sum of exp(x - max).
typedef struct {
    float max, sum;
} Softmax;

static __device__ inline Softmax softmax_merge(Softmax a, Softmax b) {
    float max = fmaxf(a.max, b.max);
    if (max == -INFINITY) return a; // two empty shares: exp(-inf + inf) is no number
    Softmax both = {max, a.sum * expf(a.max - max) + b.sum * expf(b.max - max)};
    return both;
}

static __device__ inline Softmax softmax_warp(Softmax s) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        Softmax other = {__shfl_xor_sync(0xFFFFFFFFu, s.max, offset),
                         __shfl_xor_sync(0xFFFFFFFFu, s.sum, offset)};
        s = softmax_merge(s, other);
    }
    return s;
}

// Of the V logits of a row, in every thread of the block.
static __device__ inline Softmax softmax_row(const floatX* row, int V) {
    __shared__ Softmax of_warp[WARP];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    Softmax mine = {-INFINITY, 0};
    for (int v = (int)threadIdx.x * VEC; v < V; v += (int)blockDim.x * VEC) {
        Vec<floatX> x = load_vec(row + v);
        float max = -INFINITY, sum = 0;
        for (int k = 0; k < VEC; k++) max = v + k < V ? fmaxf(max, to_float(x.at[k])) : max;
        max = fmaxf(mine.max, max);
        for (int k = 0; k < VEC; k++) sum += v + k < V ? expf(to_float(x.at[k]) - max) : 0;
        mine.sum = mine.sum * expf(mine.max - max) + sum;
        mine.max = max;
    }
    mine = softmax_warp(mine);
    if (lane == 0) of_warp[warp] = mine;
    __syncthreads();
    Softmax none = {-INFINITY, 0};
    return softmax_warp(lane < (int)blockDim.x / WARP ? of_warp[lane] : none);
}

// What a rank knows of a row when it has a part of the vocabulary.
typedef struct {
    Softmax softmax;
    float target; // its logit, 0 where another rank has it
} RowPart;

static __global__ void __launch_bounds__(CLASSIFIER_THREADS)
    classifier_part_kernel(RowPart* parts, const floatX* logits, const int* targets, int first, int V,
                           int Vp) {
    size_t n = blockIdx.x;
    const floatX* row = logits + n * (size_t)Vp;
    int target = targets[n] - first;
    Softmax s = softmax_row(row, V);
    RowPart part = {s, target >= 0 && target < V ? to_float(row[target]) : 0};
    if (threadIdx.x == 0) parts[n] = part;
}

// All ranks' parts of row n of N, in the order of ranks, so that all come to the same.
static __device__ inline RowPart merge_parts(const RowPart* parts, int ranks, size_t n, size_t N) {
    RowPart all = parts[n];
    for (int r = 1; r < ranks; r++) {
        RowPart part = parts[(size_t)r * N + n];
        all.softmax = softmax_merge(all.softmax, part.softmax);
        all.target += part.target;
    }
    return all;
}

static __global__ void __launch_bounds__(CLASSIFIER_THREADS)
    classifier_kernel(float* losses, floatX* logits, const int* targets, const RowPart* parts, int ranks,
                      int first, float scale, int V, int Vp, bool want_grad) {
    size_t n = blockIdx.x;
    bool masked = targets[n] < 0;
    int target = targets[n] - first;
    floatX* row = logits + n * (size_t)Vp;
    if (masked) {
        if (threadIdx.x == 0) losses[n] = 0;
        Vec<floatX> zero = {};
        for (int v = (int)threadIdx.x * VEC; want_grad && v < Vp; v += (int)blockDim.x * VEC)
            store_vec(row + v, zero);
        return;
    }
    RowPart whole;
    if (parts != NULL) {
        whole = merge_parts(parts, ranks, n, gridDim.x);
    } else {
        whole.target = to_float(row[target]); // before the row is overwritten
        whole.softmax = softmax_row(row, V);  // ends behind a barrier
    }
    Softmax s = whole.softmax;
    if (threadIdx.x == 0) losses[n] = logf(s.sum) - (whole.target - s.max);
    if (!want_grad) return;
    float factor = scale / s.sum;
    for (int v = (int)threadIdx.x * VEC; v < Vp; v += (int)blockDim.x * VEC) {
        Vec<floatX> x = load_vec(row + v);
        for (int k = 0; k < VEC; k++) {
            float d = v + k < V ? expf(to_float(x.at[k]) - s.max) * factor : 0;
            x.at[k] = from_float<floatX>(v + k == target ? d - scale : d);
        }
        store_vec(row + v, x);
    }
}

// As many threads as have something to read.
static inline unsigned classifier_threads(int V) {
    size_t threads = ceil_div(V > 0 ? (size_t)V : 1, VEC * WARP) * WARP;
    return (unsigned)(threads < CLASSIFIER_THREADS ? threads : (size_t)CLASSIFIER_THREADS);
}

// losses (N) = -log softmax(logits)[target]; a row whose target is negative has loss 0 and gradient 0. logits
// (N, Vp), the first V of them real ones, become scale * dloss/dlogits (0 in the padding) if want_grad;
// otherwise they are not touched. Where ranks share the vocabulary, the logits are of tokens [first, first + V),
// and parts (ranks, N) is what classifier_parts found on all of them; otherwise parts is NULL and first 0.
static inline void classifier(float* losses, floatX* logits, const int* targets, const RowPart* parts,
                              int ranks, int first, float scale, int N, int V, int Vp, bool want_grad,
                              cudaStream_t stream) {
    classifier_kernel<<<(unsigned)N, classifier_threads(V), 0, stream>>>(
        losses, logits, targets, parts, ranks, first, scale, V, Vp, want_grad);
    LAUNCH_CHECK();
}

// parts (N) =
static inline void classifier_parts(RowPart* parts, const floatX* logits, const int* targets, int first,
                                    int N, int V, int Vp, cudaStream_t stream) {
    classifier_part_kernel<<<(unsigned)N, classifier_threads(V), 0, stream>>>(parts, logits, targets, first,
                                                                              V, Vp);
    LAUNCH_CHECK();
}
