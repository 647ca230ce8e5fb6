// What a step adds up before the update: the sum of its losses, and the square of the norm of all gradients.
// Both are exact sums (exact_sum.h) of doubles that each come from a fixed piece of the data: of the losses of a
// micro-batch, of SLICE_ALIGN gradients. So they are the same however micro-batches, layers and slices are
// shared out over ranks.
#pragma once
#include "llmc/cuda_common.cuh" // defines: Vec, load_vec, block_sum
#include "llmc/exact_sum.h"     // defines: ExactSum, StepSums, exact_add
#include "llmc/layout.h"        // defines: SLICE_ALIGN, TensorPart
#include "llmc/program.h"       // defines: REQUEST_STOP, REQUEST_SAVE

enum { NORM_BLOCKS = 1024, NORM_THREADS = 256, LOSS_THREADS = 1024 };

enum { STEP_SUMS = sizeof(StepSums) / sizeof(long long) };

static __host__ __device__ inline long long requests_to_sum(int requests) {
    return ((requests & REQUEST_STOP) != 0) + ((long long)((requests & REQUEST_SAVE) != 0) << 32);
}
static inline int requests_of_sum(long long sum) {
    return ((sum & 0xFFFFFFFF) != 0 ? REQUEST_STOP : 0) | (sum >> 32 != 0 ? REQUEST_SAVE : 0);
}

// ----------------------------------------------------------------------------
// what is in a bucket: the tensor table in a form that a kernel takes by value

typedef struct {
    size_t begin[NUM_TENSORS], end[NUM_TENSORS];     // in elements from the bucket's begin; empty: not in it
    size_t skip[NUM_TENSORS], skip_end[NUM_TENSORS]; // what another rank counts in the norm
    bool decay[NUM_TENSORS];
    int number;     // of the bucket in the whole model
    uint64_t index; // of the bucket's first element in the whole model without padding: what it is rounded by
} BucketTable;

// The bucket of a layer (its number in the whole model), or those before (-1) and behind them (L).
static inline BucketTable bucket_table(const ModelConfig* whole, const Layout* l, int layer) {
    BucketTable table;
    ModelConfig all = model_part(whole, l);
    all.num_hidden_layers = whole->num_hidden_layers;
    int L = whole->num_hidden_layers, b = layer + 1,
        here = b == 0      ? BEFORE_LAYERS
               : layer < L ? PER_LAYER
                           : AFTER_LAYERS;
    ParameterLayout mine = parameter_layout_of(&all, has_embedding(l), has_head(l), 1);
    ParameterLayout p = parameter_layout_of(&all, true, true, 1);
    memset(&table, 0, sizeof table);
    table.number = b;
    table.index = parameter_bucket(&p, L, b).begin;
    for (int i = 0; i < NUM_TENSORS; i++) {
        TensorPart parts[3];
        if ((int)tensor_table[i].place != here || mine.size[i] == 0) continue;
        table.begin[i] = tensor_offset(&mine, (enum TensorId)i, layer) - parameter_bucket(&mine, L, b).begin;
        table.end[i] = table.begin[i] + mine.size[i];
        table.decay[i] = tensor_table[i].decay;
        table.skip[i] = table.skip_end[i] = table.end[i];
        int count = tensor_parts(parts, whole, l, (enum TensorId)i);
        for (int k = count - 1; k >= 0; k--)
            if (!parts[k].counted) table.skip[i] = table.begin[i] + parts[k].local_row * mine.cols[i];
        // what lies before the layers may be in the last stage, too, and counts in the first
        if (b == 0 && !has_embedding(l)) table.skip[i] = table.begin[i];
    }
    return table;
}

// ----------------------------------------------------------------------------
// kernels

// sum += x[0] + ... + x[n-1]
static __global__ void __launch_bounds__(LOSS_THREADS) sum_kernel(ExactSum* sum, const float* x, int n) {
    double mine = 0;
    for (int i = (int)threadIdx.x; i < n; i += LOSS_THREADS) mine += (double)x[i];
    mine = block_sum<LOSS_THREADS>(mine);
    if (threadIdx.x == 0) exact_add(sum, mine);
}

static __device__ inline bool counts(const BucketTable* table, size_t i) {
    for (int k = 0; k < NUM_TENSORS; k++)
        if (i >= table->skip[k] && i < table->skip_end[k]) return false;
    return true;
}

// A warp has a piece of SLICE_ALIGN gradients at a time; every warp has bins of its own.
template <typename Grad>
static __global__ void __launch_bounds__(NORM_THREADS)
    norm_squared_kernel(ExactSum* sum, const Grad* grads, size_t n, size_t first, BucketTable table) {
    const int SIZE = Vec<Grad>::SIZE, WARPS = NORM_THREADS / WARP;
    __shared__ ExactSum of_warp[WARPS];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    for (int i = (int)threadIdx.x; i < WARPS * EXACT_BINS; i += NORM_THREADS)
        of_warp[i / EXACT_BINS].bin[i % EXACT_BINS] = 0;
    __syncthreads();
    size_t step = (size_t)gridDim.x * WARPS * SLICE_ALIGN;
    for (size_t at = ((size_t)blockIdx.x * WARPS + (size_t)warp) * SLICE_ALIGN; at < n; at += step) {
        double mine = 0;
        for (int k = lane * SIZE; k < SLICE_ALIGN; k += WARP * SIZE) {
            size_t i = at + (size_t)k;
            if (i >= n || !counts(&table, first + i)) continue;
            Vec<Grad> g = load_vec(grads + i);
            for (int j = 0; j < SIZE; j++) mine += (double)to_float(g.at[j]) * (double)to_float(g.at[j]);
        }
        mine = warp_sum(mine);
        if (lane == 0) exact_add(&of_warp[warp], mine);
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < EXACT_BINS; i += NORM_THREADS) {
        long long total = 0;
        for (int w = 0; w < WARPS; w++) total += of_warp[w].bin[i];
        if (total != 0) atomicAdd((unsigned long long*)&sum->bin[i], (unsigned long long)total);
    }
}

// *sum += the sum of x (n)
static inline void add_sum(ExactSum* sum, const float* x, int n, cudaStream_t stream) {
    sum_kernel<<<1, LOSS_THREADS, 0, stream>>>(sum, x, n);
    LAUNCH_CHECK();
}

// *sum += the squares of a slice of a bucket's gradients (n, a multiple of 8), which begins at element `first` of
// the bucket, a multiple of SLICE_ALIGN
template <typename Grad>
static inline void global_norm_squared(ExactSum* sum, const Grad* grads, size_t n, size_t first,
                                       const BucketTable* table, cudaStream_t stream) {
    size_t blocks = ceil_div(n, (size_t)(NORM_THREADS / WARP) * SLICE_ALIGN);
    if (n == 0) return;
    norm_squared_kernel<<<(unsigned)(blocks < NORM_BLOCKS ? blocks : (size_t)NORM_BLOCKS), NORM_THREADS, 0,
                          stream>>>(sum, grads, n, first, *table);
    LAUNCH_CHECK();
}
