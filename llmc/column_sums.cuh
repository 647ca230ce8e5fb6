// Sums over the rows of a matrix: gradients of biases, and the second half of the norms' weight gradients.
//
// Two stages, because a sum over many thousand rows needs many blocks and must still come out the same to
// the bit: each part is a fixed share of the rows, then a block adds the parts in a fixed order. Nothing of
// this depends on the card.
//     reads x once: N C elements; the parts stay in the L2 cache
#pragma once
#include "llmc/cuda_common.cuh" // defines: floatX, Vec, load_vec

// Chosen by counting, not yet measured: 768 blocks of 8 warps are 6 on each of 132 multiprocessors.
enum { COLUMN_BLOCKS = 768, COLUMN_WARPS = 8, COLUMN_TILE = WARP * VEC, ADD_WARPS = 32 };

// *place = x; place is on 16 bytes.
static __device__ inline void store_floats(float* place, const float x[VEC]) {
    for (int first = 0; first < VEC; first += Vec<float>::SIZE) {
        Vec<float> v;
        for (int i = 0; i < Vec<float>::SIZE; i++) v.at[i] = x[first + i];
        store_vec(place + first, v);
    }
}

static inline size_t column_tiles(int C) { return ceil_div((size_t)C, COLUMN_TILE); }

// As many parts as give about COLUMN_BLOCKS blocks, a power of two.
static inline int column_parts(int C) {
    int parts = 1;
    while (2 * (size_t)parts * column_tiles(C) <= COLUMN_BLOCKS) parts *= 2;
    return parts;
}

// Floats of scratch that add_column_sums needs for C columns or fewer.
static inline size_t column_sums_scratch(int C) {
    size_t most = (size_t)COLUMN_BLOCKS * COLUMN_TILE;
    return most > (size_t)C ? most : (size_t)C;
}

// sums (C) += the column sums of parts (num_parts, stride): warp w of a block of 32 columns has rows w, w +
// ADD_WARPS ..., so that a column is not one long chain of loads.
template <typename Grad>
static __global__ void __launch_bounds__(ADD_WARPS* WARP)
    add_parts_kernel(Grad* sums, const float* parts, int num_parts, int stride, int C) {
    __shared__ float of_warp[ADD_WARPS][WARP];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, c = (int)blockIdx.x * WARP + lane;
    float total = 0;
    for (int part = warp; part < num_parts && c < C; part += ADD_WARPS)
        total += parts[(size_t)part * (size_t)stride + (size_t)c];
    of_warp[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || c >= C) return;
    for (int w = 1; w < ADD_WARPS; w++) total += of_warp[w][lane];
    sums[c] = from_float<Grad>(to_float(sums[c]) + total);
}

template <typename Grad>
static inline void add_parts(Grad* sums, const float* parts, int num_parts, int stride, int C,
                             cudaStream_t stream) {
    add_parts_kernel<Grad><<<(unsigned)ceil_div((size_t)C, WARP), ADD_WARPS * WARP, 0, stream>>>(
        sums, parts, num_parts, stride, C);
    LAUNCH_CHECK();
}

// parts (gridDim.y, C): a warp of block (tile, part) sums COLUMN_TILE columns of rows that lie as far apart
// as all parts together have warps.
static __global__ void __launch_bounds__(COLUMN_WARPS* WARP)
    column_parts_kernel(float* parts, const floatX* x, int N, int C) {
    __shared__ float of_warp[COLUMN_WARPS][COLUMN_TILE];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int first = (int)blockIdx.x * COLUMN_TILE, column = first + lane * VEC;
    float sum[VEC] = {0};
    if (column < C) {
#pragma unroll 4
        for (int n = (int)blockIdx.y * COLUMN_WARPS + warp; n < N; n += (int)gridDim.y * COLUMN_WARPS) {
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
    int parts = column_parts(C);
    dim3 grid((unsigned)column_tiles(C), (unsigned)parts);
    column_parts_kernel<<<grid, COLUMN_WARPS * WARP, 0, stream>>>(scratch, x, N, C);
    LAUNCH_CHECK();
    add_parts(sums, scratch, parts, C, C, stream);
}
