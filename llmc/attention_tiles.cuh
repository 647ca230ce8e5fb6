// What the tensor-core attention kernels have in common: their sizes, tiles in shared memory, products,
// masks.
//
// A warp keeps 16 rows and streams tiles of the other side past them. Two products do everything:
//
//     multiply_rows   S (16, N)  = rows (16, HS) tile^T     tile (N, HS) in shared memory
//     add_product     O (16, HS) += P (16, N) tile          P in registers, made of S
//
//     kernel     rows       tiles
//     forward    q          k, v        S = q k^T      O += P v
//     dQ         q, dout    k, v        S = q k^T      dP = dout v^T      dQ += dS k
//     dK, dV     k, v       q, dout     S^T = k q^T    dP^T = v dout^T    dV += P^T dout    dK += dS^T q
//
// A tile is (rows, HS) of bf16 in chunks of 16 bytes. Chunk c of row r lies at place c ^ (r % 8) of its row:
// the 8 rows that a phase of ldmatrix reads at one chunk, and the 8 rows of a store of fragments, then fall
// on 8 different groups of 4 banks, all 32 of them.
//
//     row 0:  0 1 2 3 4 5 6 7     row 1:  1 0 3 2 5 4 7 6     row 2:  2 3 0 1 6 7 4 5     ...     (HS 64)
//
// Source: Dao, FlashAttention-2, 2023.
#pragma once
#include "llmc/attention_shape.cuh" // defines: AttentionShape, KeyValues, head_rows
#include "llmc/cuda_common.cuh"     // defines: load_vec, store_vec, WARP
#include "llmc/ptx.cuh"             // defines: mma_bf16, ldmatrix_x4, cp_async_or_zero, pack_bf16 ...

typedef __nv_bfloat16 bf16;

// ----------------------------------------------------------------------------
// sizes
//
// Chosen by counting, not yet measured. Every m16n8k16 product of a warp reads 256 bytes of a tile, 2 cycles
// of shared memory; the tensor cores take 1 at their peak and, by mma.sync, about 1.6 on Hopper: the
// fragments of the rows must not be read again and again as well. (A warp of 32 rows would halve the reads,
// and double the registers.) Registers of a lane, of which 65536 / (32 warps blocks), at most 255, are there:
//
//     kernel    HS   output  S, dP  rows   sum   there   shared memory of a block
//     forward    64      32     32    16    80     128   16 KB q + 2 x 16 KB k, v            =  48 KB
//     forward   128      64     32    32   128     255   32 KB q + 2 x 32 KB                 =  96 KB
//     dQ         64      32     64    32   128     168   16 KB q, dout + 2 x 16 KB k, v      =  48 KB
//     dQ        128      64     32    64   160     255   32 KB + 2 x 16 KB                   =  64 KB
//     dK, dV     64      64     64    32   160     255   16 KB k, v + 2 x (16 + 0.75) KB     =  49.5 KB
//     dK, dV    128     128     32     -   160     255   32 KB + 2 x (16 + 0.375) KB         =  64.75 KB
//
// dK, dV at 128 would not fit with its rows (64): it reads their fragments again for every tile, a quarter
// more of shared memory. Addresses take the rest: nvcc 13.0 uses 128, 226, 168, 243, 237, 254 for sm_90a, and
// spills 24 bytes in the first and 12 in the third, of which its loops read 8 and 8 again.

typedef struct {
    int warps;       // of a block, 16 rows each
    int columns;     // rows of a streamed tile
    int stages;      // tiles in shared memory, one in use and the others on their way
    int blocks;      // on a multiprocessor at a time
    bool keeps_rows; // fragments of the 16 rows stay in registers
} KernelSizes;

enum AttentionKernel { ATTENTION_FORWARD, ATTENTION_DQ, ATTENTION_DKV };
static constexpr KernelSizes attention_sizes[3][2] = {
    //  HS 64                    HS 128
    {{8, 64, 2, 2, true}, {8, 64, 2, 1, true}},
    {{4, 64, 2, 3, true}, {4, 32, 2, 2, true}},
    {{4, 64, 2, 2, true}, {4, 32, 2, 2, false}},
};

__host__ __device__ static constexpr KernelSizes sizes_of(int kernel, int HS) {
    return attention_sizes[kernel][HS / 128];
}
__host__ __device__ static constexpr int rows_of(const KernelSizes& s) { return 16 * s.warps; }
__host__ __device__ static constexpr int threads_of(const KernelSizes& s) { return WARP * s.warps; }

// Bytes: `kept` tiles of the block's rows, then the stages. What the dK, dV kernel streams with a row of q is
// its lse, its delta and its document's start: 12 bytes.
__host__ __device__ static constexpr int stage_bytes(int kernel, int HS) {
    int columns = sizes_of(kernel, HS).columns;
    return 2 * columns * HS * (int)sizeof(bf16) + (kernel == ATTENTION_DKV ? 12 * columns : 0);
}
__host__ __device__ static constexpr int shared_bytes(int kernel, int HS) {
    int kept = kernel == ATTENTION_FORWARD ? 1 : 2;
    return kept * rows_of(sizes_of(kernel, HS)) * HS * (int)sizeof(bf16) +
           sizes_of(kernel, HS).stages * stage_bytes(kernel, HS);
}

// Before a launch with more than the 48 KB that every kernel may have.
static inline void allow_shared(const void* kernel, int bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// ----------------------------------------------------------------------------
// where a block works

__host__ __device__ static inline int tiles_of(int n, int rows) { return (n + rows - 1) / rows; }

// Each of a rank's runs has tiles of its own, so that the queries of a tile are neighbours in the sequence.
__host__ __device__ static inline int query_tiles(const AttentionShape& shape, int rows) {
    return tiles_of(shape.at.half, rows) * (shape.T / shape.at.half);
}

static inline unsigned tile_blocks(int tiles, int heads, int B) {
    return (unsigned)((size_t)tiles * (size_t)heads * (size_t)B);
}

typedef struct {
    int tile, head, b;
} BlockPlace;

// Tiles of a head are neighbours, so that they find its keys in the second-level cache; blocks start in this
// order.
static __device__ inline BlockPlace block_place(int tiles, int heads) {
    int block = (int)blockIdx.x;
    BlockPlace place = {block % tiles, block / tiles % heads, block / tiles / heads};
    return place;
}

typedef struct {
    int first, end; // positions of its queries
    int ahead;      // a query's position less its row
} QueryTile;

// Tile i from the end: what sees the most keys starts first.
template <int ROWS> static __device__ inline QueryTile query_tile(const AttentionShape& shape, int i) {
    int half = shape.at.half, tiles = tiles_of(half, ROWS), t = query_tiles(shape, ROWS) - 1 - i;
    bool second = t >= tiles;
    int begin = second ? shape.at.first[1] : shape.at.first[0], end = begin + half;
    int first = begin + (second ? t - tiles : t) * ROWS;
    QueryTile tile = {first, first + ROWS < end ? first + ROWS : end, second ? begin - half : begin};
    return tile;
}

// A head of an array (B, NH, T).
template <typename X> static __device__ inline X* head_statistics(X* x, int b, int T, int NH, int head) {
    return x + ((size_t)b * (size_t)NH + (size_t)head) * (size_t)T;
}

static __device__ inline const int* sequence_starts(const int* doc_start, int b, int T) {
    return doc_start != NULL ? doc_start + (size_t)b * (size_t)T : NULL;
}

// A lane's place in a fragment of C (ptx.cuh): rows g and g + 8, columns 2t and 2t + 1.
static __device__ inline int lane_row(void) { return (int)threadIdx.x % WARP / 4; }
static __device__ inline int lane_column(void) { return (int)threadIdx.x % 4 * 2; }

// ----------------------------------------------------------------------------
// tiles

template <int HS> static __device__ inline int tile_at(int row, int chunk) {
    return row * HS + (chunk ^ (row & 7)) * 8;
}

// Starts the copy of rows first .. first + ROWS - 1 of a sequence into a tile; those from `end` on become
// zero.
template <int HS, int ROWS, int THREADS>
static __device__ inline void load_tile(bf16* tile, const bf16* rows, int stride, int first, int end) {
    constexpr int CHUNKS = HS / 8, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0,
                  "a thread's chunks, STEP rows apart, have one place in their rows");
    int row = (int)threadIdx.x / CHUNKS, chunk = (int)threadIdx.x % CHUNKS;
    const bf16* from = rows + (size_t)(first + row) * (size_t)stride + chunk * 8;
    bf16* to = tile + tile_at<HS>(row, chunk);
#pragma unroll
    for (int i = 0; i < ROWS; i += STEP, from += (size_t)STEP * (size_t)stride)
        cp_async_or_zero<16>(to + i * HS, from, first + row + i < end);
}

// A stage: ROWS rows of x, then the same rows of y.
template <int HS, int ROWS, int THREADS>
static __device__ inline void load_stage(bf16* stage, const bf16* x, int x_stride, const bf16* y,
                                         int y_stride, int first, int end) {
    load_tile<HS, ROWS, THREADS>(stage, x, x_stride, first, end);
    load_tile<HS, ROWS, THREADS>(stage + ROWS * HS, y, y_stride, first, end);
}

// Writes a warp's accumulators (16, HS), times a factor for each of a lane's two rows, to `rows` rows of out.
// They go through 16 rows of shared memory that no other warp reads, so that every store is 16 bytes.
template <int HS>
static __device__ inline void store_rows(bf16* out, int stride, int rows, bf16* tile,
                                         const float o[HS / 8][4], float factor0, float factor8) {
    int row = lane_row(), column = lane_column();
    __syncwarp(); // the warp is done with what was there
#pragma unroll
    for (int j = 0; j < HS / 8; j++) {
        uint32_t pair0 = pack_bf16(o[j][0] * factor0, o[j][1] * factor0);
        uint32_t pair8 = pack_bf16(o[j][2] * factor8, o[j][3] * factor8);
        memcpy(tile + tile_at<HS>(row, j) + column, &pair0, sizeof pair0);
        memcpy(tile + tile_at<HS>(row + 8, j) + column, &pair8, sizeof pair8);
    }
    __syncwarp();
    for (int i = (int)threadIdx.x % WARP; i < 16 * HS / 8; i += WARP) {
        int r = i / (HS / 8), chunk = i % (HS / 8);
        if (r < rows)
            store_vec(out + (size_t)r * (size_t)stride + chunk * 8, load_vec(tile + tile_at<HS>(r, chunk)));
    }
}

// ----------------------------------------------------------------------------
// products

// The fragment of rows (16) and columns 16 k .. 16 k + 15 of a tile: an A of ptx.cuh.
template <int HS> static __device__ inline void load_fragment(uint32_t a[4], const bf16* tile, int k) {
    int lane = (int)threadIdx.x % WARP;
    ldmatrix_x4(a, tile + tile_at<HS>(lane % 16, 2 * k + lane / 16));
}

// The 16 rows of a warp: in registers, or where they lie in shared memory.
template <int HS, bool KEEPS> struct WarpRows {
    const bf16* tile; // (16, HS)
    uint32_t a[KEEPS ? HS / 16 : 1][4];
};

template <int HS, bool KEEPS>
static __device__ inline void warp_rows_init(WarpRows<HS, KEEPS>* rows, const bf16* tile) {
    rows->tile = tile;
    if constexpr (KEEPS) {
#pragma unroll
        for (int k = 0; k < HS / 16; k++) load_fragment<HS>(rows->a[k], tile, k);
    }
}

// s (16, N) = rows (16, HS) tile (N, HS)^T
template <int HS, int N, bool KEEPS>
static __device__ inline void multiply_rows(float s[N / 8][4], WarpRows<HS, KEEPS>* rows, const bf16* tile) {
    int lane = (int)threadIdx.x % WARP, row = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < N / 8; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0;
#pragma unroll
    for (int k = 0; k < HS / 16; k++) {
        if constexpr (!KEEPS) load_fragment<HS>(rows->a[0], rows->tile, k);
        const uint32_t* a = rows->a[KEEPS ? k : 0];
#pragma unroll
        for (int j = 0; j < N / 8; j += 2) { // rows 8 j .. 8 j + 15 of the tile are columns of s
            uint32_t b[4];
            ldmatrix_x4(b, tile + tile_at<HS>(8 * j + row, 2 * k + chunk));
            mma_bf16(s[j], a, b[0], b[1]);
            mma_bf16(s[j + 1], a, b[2], b[3]);
        }
    }
}

// o (16, HS) += p (16, N), rounded to bf16, tile (N, HS)
template <int HS, int N>
static __device__ inline void add_product(float o[HS / 8][4], const float p[N / 8][4], const bf16* tile) {
    int lane = (int)threadIdx.x % WARP, row = lane % 16, chunk = lane / 16;
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        const float *left = p[2 * k], *right = p[2 * k + 1];
        uint32_t a[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                         pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
#pragma unroll
        for (int j = 0; j < HS / 8; j += 2) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile + tile_at<HS>(16 * k + row, j + chunk));
            mma_bf16(o[j], a, b[0], b[1]);
            mma_bf16(o[j + 1], a, b[2], b[3]);
        }
    }
}

// ----------------------------------------------------------------------------
// who sees whom: the query at position q sees keys start .. q, and start never decreases along a sequence

// A warp's 16 queries.
typedef struct {
    int first;    // position of the first
    int start[2]; // of the lane's two
} QueryRows;

// Those from position `first` on. Rows beyond the tile's are never written; they do as the last one does.
static __device__ inline QueryRows query_rows(const int* starts, const QueryTile* tile, int first) {
    QueryRows rows = {first, {0, 0}};
    for (int i = 0; i < 2 && starts != NULL; i++) {
        int q = first + lane_row() + 8 * i;
        rows.start[i] = starts[(q < tile->end ? q : tile->end - 1) - tile->ahead];
    }
    return rows;
}

// The least and the largest start of the 16: of row 0, in lane 0, and of row 15, in lane 28.
static __device__ inline int least_start(const QueryRows* rows) {
    return __shfl_sync(0xFFFFFFFFu, rows->start[0], 0);
}
static __device__ inline int largest_start(const QueryRows* rows) {
    return __shfl_sync(0xFFFFFFFFu, rows->start[1], 28);
}

// Whether anything is seen of N keys from `key` on.
template <int N> static __device__ inline bool any_seen(const QueryRows* rows, int key) {
    return key <= rows->first + 15 && key + N > least_start(rows);
}

// Hides of s (16 queries, N keys from `key` on) what is not seen.
template <int N> static __device__ inline void hide_keys(float s[N / 8][4], const QueryRows* rows, int key) {
    if (key + N - 1 <= rows->first && key >= largest_start(rows)) return; // most tiles
    int q = rows->first + lane_row(), column = key + lane_column();
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int k = column + 8 * j + i % 2;
            if (k > q + i / 2 * 8 || k < rows->start[i / 2]) s[j][i] = -INFINITY;
        }
}
