// Sums over the rows of a matrix: gradients of biases, and the second half of the norms' weight gradients.
//
// Two stages, because a sum over many thousand rows needs many blocks and must still come out the same to
// the bit: PARTS blocks each sum a fixed share of the rows, then one block adds the parts of 32 columns in order.
// Neither depends on the card.
//     reads x once: N C elements; the parts, PARTS C floats, stay in the L2 cache
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec

enum { COLUMN_PARTS = 64, COLUMN_WARPS = 8, COLUMN_TILE = WARP * VEC, PART_WARPS = 16 };

// Floats of scratch that add_column_sums needs.
static inline size_t column_sums_scratch(int C) { return (size_t)COLUMN_PARTS * (size_t)C; }

// sums (C) += the column sums of parts (num_parts, stride): a block has 32 columns, and its warps take turns
// with the rows, so that a column is not one long chain of loads.
template <typename Grad>
static __global__ void __launch_bounds__(PART_WARPS* WARP)
    add_parts_kernel(Grad* sums, const float* parts, int num_parts, int stride, int C) {
    __shared__ float of_warp[PART_WARPS][WARP];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, c = (int)blockIdx.x * WARP + lane;
    float total = 0;
    for (int part = warp; part < num_parts && c < C; part += PART_WARPS)
        total += parts[(size_t)part * (size_t)stride + (size_t)c];
    of_warp[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || c >= C) return;
    total = 0;
    for (int w = 0; w < PART_WARPS; w++) total += of_warp[w][lane];
    sums[c] = from_float<Grad>(to_float(sums[c]) + total);
}

template <typename Grad>
static inline void add_parts(Grad* sums, const float* parts, int num_parts, int stride, int C,
                             cudaStream_t stream) {
    add_parts_kernel<Grad><<<(unsigned)ceil_div((size_t)C, WARP), PART_WARPS * WARP, 0, stream>>>(
        sums, parts, num_parts, stride, C);
    LAUNCH_CHECK();
}

// parts (COLUMN_PARTS, C): block (tile, part) sums rows part, part + PARTS, ... of its COLUMN_TILE columns.
static __global__ void __launch_bounds__(COLUMN_WARPS* WARP)
    column_parts_kernel(float* parts, const floatX* x, int N, int C) {
    __shared__ float of_warp[COLUMN_WARPS][COLUMN_TILE];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int first = (int)blockIdx.x * COLUMN_TILE, column = first + lane * VEC;
    float sum[VEC] = {0};
    if (column < C) {
        for (int n = (int)blockIdx.y * COLUMN_WARPS + warp; n < N; n += COLUMN_PARTS * COLUMN_WARPS) {
            Vec<floatX> v = load_vec(x + (size_t)n * (size_t)C + column);
            for (int i = 0; i < VEC; i++) sum[i] += to_float(v.at[i]);
        }
    }
    for (int i = 0; i < VEC; i++) of_warp[warp][lane * VEC + i] = sum[i];
    __syncthreads();
    for (int c = (int)threadIdx.x; c < COLUMN_TILE && first + c < C; c += COLUMN_WARPS * WARP) {
        float total = 0;
        for (int w = 0; w < COLUMN_WARPS; w++) total += of_warp[w][c];
        parts[(size_t)blockIdx.y * (size_t)C + (size_t)(first + c)] = total;
    }
}

// sums (C) += the column sums of x (N, C); scratch: column_sums_scratch(C) floats
template <typename Grad>
static inline void add_column_sums(Grad* sums, float* scratch, const floatX* x, int N, int C,
                                   cudaStream_t stream) {
    dim3 grid((unsigned)ceil_div((size_t)C, COLUMN_TILE), COLUMN_PARTS);
    column_parts_kernel<<<grid, COLUMN_WARPS * WARP, 0, stream>>>(scratch, x, N, C);
    LAUNCH_CHECK();
    add_parts(sums, scratch, COLUMN_PARTS, C, C, stream);
}
