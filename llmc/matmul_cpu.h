// Matrix products of the CPU reference: oneDNN's matmul primitive (-DUSE_DNNL), or plain C of the same
// results within rounding; operands in fp32, or rounded to bf16 with the sum in fp32. A linear layer is
//     out = inp weight^T + bias      dinp = dout weight      dweight += dout^T inp      dbias += colsum(dout)
// with inp (N, C), weight (OC, C), out (N, OC), all row-major.
//
// A Matmul stands where a CUDA layer has its stream: precision, scratch memory, the primitives made so far.
// Under bf16 an operand is rounded into the scratch once per call, so that one copy of dout serves both
// products of the backward pass; matmul_keep does the same for a weight across calls (the head's, row chunk
// by row chunk).
#pragma once
#include "llmc/bf16.h"     // defines: bf16_from_float, float_from_bf16
#include "llmc/real.h"     // defines: real, LANES, add_column_sums
#include "llmc/tile_cpu.h" // defines: tile_multiply, TILE_ROWS, TILE_VECS
#if defined(USE_DNNL) && defined(REAL_IS_FLOAT)
#define MATMUL_DNNL 1
#include <dnnl.h>
#endif

enum MatmulCompute { MATMUL_FP32, MATMUL_BF16 };

#ifdef MATMUL_DNNL
// A product of one shape, compiled by oneDNN.
enum { MATMUL_PRIMITIVES = 64 };
typedef struct {
    int M, N, K, a_transposed, b_transposed, accumulate, has_bias;
    dnnl_primitive_t primitive; // NULL: oneDNN has none for this processor
    dnnl_memory_t a, b, bias, c;
} MatmulPrimitive;
#endif

typedef struct {
    int compute;    // a MatmulCompute
    bool plain;     // the C loops, even where oneDNN is there
    real* pack;     // scratch: PLAIN_PACK elements for each thread, then ...
    char* operands; // ... bf16 copies, operands_used of operands_bytes
    size_t operands_bytes, operands_used;
    const real* kept;    // matmul_keep: this weight ...
    uint16_t* kept_copy; // ... has its bf16 copy here
#ifdef MATMUL_DNNL
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    MatmulPrimitive primitives[MATMUL_PRIMITIVES]; // the oldest makes room
    int primitives_made;
#endif
} Matmul;

// A matrix as a product reads it: its elements, or their bf16 copy if there is one.
typedef struct {
    const real* exact;
    const uint16_t* rounded; // NULL in fp32
    int transposed;
} Operand;

// ----------------------------------------------------------------------------
// the plain product: blocks packed to be contiguous, then tile_multiply

enum { PLAIN_M = 128, PLAIN_N = 256, PLAIN_K = 256, PANEL_N = TILE_VECS * LANES };
enum { PLAIN_PACK = (PLAIN_M + PLAIN_N) * PLAIN_K };

static inline real operand_at(Operand x, size_t i) {
    return x.rounded != NULL ? (real)float_from_bf16(x.rounded[i]) : x.exact[i];
}

// Copies `count` lines of x (rows of A, columns of B) from `first` on, elements k_first .. k_first + K - 1 of
// each, into panels of `width` lines: out[panel][k][line in panel]. What the last panel has no line for stays
// as it is: nobody reads what becomes of it.
static inline void plain_pack(real* out, Operand x, size_t line_stride, size_t k_stride, int first, int count,
                              int k_first, int K, int width) {
    for (int panel = 0; panel < count; panel += width) {
        real* to = out + (size_t)panel * (size_t)K;
        size_t from = (size_t)(first + panel) * line_stride + (size_t)k_first * k_stride;
        int lines = count - panel < width ? count - panel : width;
        if (line_stride == 1) {
            for (int k = 0; k < K; k++)
                for (int w = 0; w < lines; w++)
                    to[k * width + w] = operand_at(x, from + (size_t)k * k_stride + (size_t)w);
        } else {
            for (int w = 0; w < lines; w++)
                for (int k = 0; k < K; k++)
                    to[k * width + w] = operand_at(x, from + (size_t)w * line_stride + (size_t)k);
        }
    }
}

// One tile of C from two packed panels; the first slice of k starts from C, from the bias, or from nothing.
static inline void plain_tile(real* c, size_t c_row, const real* a, const real* b, const real* bias, int rows,
                              int columns, int K, bool add_to_c) {
    real tile[TILE_ROWS * PANEL_N];
    for (int i = 0; i < TILE_ROWS * PANEL_N; i++) tile[i] = 0;
    tile_multiply(tile, PANEL_N, a, 1, TILE_ROWS, b, PANEL_N, TILE_ROWS, PANEL_N, K);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            real start = add_to_c ? c[(size_t)i * c_row + (size_t)j] : bias != NULL ? bias[j] : 0;
            c[(size_t)i * c_row + (size_t)j] = start + tile[i * PANEL_N + j];
        }
}

// c (M, N) = a (M, K) b (K, N) + bias (N), or += without a bias; pack: PLAIN_PACK elements for each thread
static inline void gemm_plain(real* c, Operand a, Operand b, const real* bias, int M, int N, int K,
                              bool accumulate, real* pack) {
    size_t a_line = a.transposed ? 1 : (size_t)K, a_k = a.transposed ? (size_t)M : 1;
    size_t b_line = b.transposed ? (size_t)K : 1, b_k = b.transposed ? 1 : (size_t)N;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int m = 0; m < M; m += PLAIN_M) {
        for (int n = 0; n < N; n += PLAIN_N) {
            real* a_pack = pack + (size_t)omp_get_thread_num() * PLAIN_PACK;
            real* b_pack = a_pack + PLAIN_M * PLAIN_K;
            int rows = M - m < PLAIN_M ? M - m : PLAIN_M, columns = N - n < PLAIN_N ? N - n : PLAIN_N;
            for (int k = 0; k < K; k += PLAIN_K) {
                int depth = K - k < PLAIN_K ? K - k : PLAIN_K;
                plain_pack(a_pack, a, a_line, a_k, m, rows, k, depth, TILE_ROWS);
                plain_pack(b_pack, b, b_line, b_k, n, columns, k, depth, PANEL_N);
                for (int j = 0; j < columns; j += PANEL_N)
                    for (int i = 0; i < rows; i += TILE_ROWS)
                        plain_tile(c + (size_t)(m + i) * (size_t)N + (size_t)(n + j), (size_t)N,
                                   a_pack + i * depth, b_pack + j * depth, bias != NULL ? bias + n + j : NULL,
                                   rows - i < TILE_ROWS ? rows - i : TILE_ROWS,
                                   columns - j < PANEL_N ? columns - j : PANEL_N, depth, accumulate || k > 0);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// oneDNN's product
#ifdef MATMUL_DNNL

static inline dnnl_memory_desc_t dnnl_matrix(int rows, int columns, int is_transposed,
                                             dnnl_data_type_t type) {
    dnnl_dims_t dims = {rows, columns}, strides = {is_transposed ? 1 : columns, is_transposed ? rows : 1};
    dnnl_memory_desc_t desc;
    CHECK(dnnl_memory_desc_init_by_strides(&desc, 2, dims, type, strides) == dnnl_success);
    return desc;
}

static inline dnnl_memory_t dnnl_memory_of(const dnnl_memory_desc_t* desc, dnnl_engine_t engine) {
    dnnl_memory_t memory;
    CHECK(dnnl_memory_create(&memory, desc, engine, DNNL_MEMORY_NONE) == dnnl_success);
    return memory;
}

// The implementation to use, of those oneDNN has: its classic gemm where there is one. At GPT-2's shapes it
// beats the `brg` that oneDNN itself would choose: 209-234 against 133-179 GFLOP/s a core for dinp, 208-220
// against 178-213 for dweight (bf16: 385-433 against 258-378), and is as fast forward (oneDNN 2.6.3, Zen 5,
// 2026-11-21). NULL if it has only its slow reference for this processor (bf16 before AVX-512).
static inline dnnl_primitive_desc_t matmul_implementation(const dnnl_matmul_desc_t* product,
                                                          const_dnnl_primitive_attr_t attr,
                                                          dnnl_engine_t engine) {
    dnnl_primitive_desc_t best = NULL;
    dnnl_primitive_desc_iterator_t each;
    if (dnnl_primitive_desc_iterator_create(&each, product, attr, engine, NULL) != dnnl_success) return NULL;
    do {
        dnnl_primitive_desc_t candidate = dnnl_primitive_desc_iterator_fetch(each);
        const char* name = "";
        CHECK(dnnl_primitive_desc_query(candidate, dnnl_query_impl_info_str, 0, &name) == dnnl_success);
        if (strncmp(name, "gemm", 4) == 0 || (best == NULL && strncmp(name, "ref", 3) != 0)) {
            if (best != NULL) dnnl_primitive_desc_destroy(best);
            best = candidate;
        } else {
            dnnl_primitive_desc_destroy(candidate);
        }
    } while (dnnl_primitive_desc_iterator_next(each) == dnnl_success);
    dnnl_primitive_desc_iterator_destroy(each);
    return best;
}

// Fills in the primitive and the memories of the shape that p holds.
static inline void matmul_primitive_create(MatmulPrimitive* p, dnnl_data_type_t type, dnnl_engine_t engine) {
    dnnl_memory_desc_t a = dnnl_matrix(p->M, p->K, p->a_transposed, type);
    dnnl_memory_desc_t b = dnnl_matrix(p->K, p->N, p->b_transposed, type);
    dnnl_memory_desc_t c = dnnl_matrix(p->M, p->N, 0, dnnl_f32), bias = dnnl_matrix(1, p->N, 0, dnnl_f32);
    dnnl_matmul_desc_t product;
    CHECK(dnnl_matmul_desc_init(&product, &a, &b, p->has_bias ? &bias : NULL, &c) == dnnl_success);
    dnnl_primitive_attr_t attr;
    CHECK(dnnl_primitive_attr_create(&attr) == dnnl_success);
    if (p->accumulate) {
        dnnl_post_ops_t sum;
        CHECK(dnnl_post_ops_create(&sum) == dnnl_success &&
              dnnl_post_ops_append_sum(sum, 1) == dnnl_success &&
              dnnl_primitive_attr_set_post_ops(attr, sum) == dnnl_success);
        dnnl_post_ops_destroy(sum);
    }
    dnnl_primitive_desc_t choice = matmul_implementation(&product, attr, engine);
    dnnl_primitive_attr_destroy(attr);
    if (choice == NULL) return;
    CHECK(dnnl_primitive_create(&p->primitive, choice) == dnnl_success);
    dnnl_primitive_desc_destroy(choice);
    p->a = dnnl_memory_of(&a, engine), p->b = dnnl_memory_of(&b, engine), p->c = dnnl_memory_of(&c, engine);
    if (p->has_bias) p->bias = dnnl_memory_of(&bias, engine);
}

static inline void matmul_primitive_destroy(MatmulPrimitive* p) {
    if (p->primitive != NULL) {
        dnnl_primitive_destroy(p->primitive);
        dnnl_memory_destroy(p->a);
        dnnl_memory_destroy(p->b);
        dnnl_memory_destroy(p->c);
        if (p->has_bias) dnnl_memory_destroy(p->bias);
    }
    memset(p, 0, sizeof *p);
}

// The primitive of a shape, made at its first use.
static inline MatmulPrimitive* matmul_primitive(Matmul* mm, const MatmulPrimitive* shape) {
    for (int i = 0; i < MATMUL_PRIMITIVES; i++) {
        MatmulPrimitive* p = &mm->primitives[i];
        if (p->M == shape->M && p->N == shape->N && p->K == shape->K &&
            p->a_transposed == shape->a_transposed && p->b_transposed == shape->b_transposed &&
            p->accumulate == shape->accumulate && p->has_bias == shape->has_bias)
            return p;
    }
    MatmulPrimitive* p = &mm->primitives[mm->primitives_made++ % MATMUL_PRIMITIVES];
    matmul_primitive_destroy(p);
    *p = *shape;
    matmul_primitive_create(p, mm->compute == MATMUL_BF16 ? dnnl_bf16 : dnnl_f32, mm->engine);
    return p;
}

static inline void* operand_data(Operand x) {
    return x.rounded != NULL ? (void*)(uintptr_t)x.rounded : (void*)(uintptr_t)x.exact;
}

// As gemm_plain; false if oneDNN has no such product for this processor (bf16 before AVX-512).
static inline bool gemm_dnnl(real* c, Operand a, Operand b, const real* bias, int M, int N, int K,
                             bool accumulate, Matmul* mm) {
    MatmulPrimitive shape;
    memset(&shape, 0, sizeof shape);
    shape.M = M, shape.N = N, shape.K = K;
    shape.a_transposed = a.transposed, shape.b_transposed = b.transposed;
    shape.accumulate = accumulate, shape.has_bias = bias != NULL;
    MatmulPrimitive* p = matmul_primitive(mm, &shape);
    if (p->primitive == NULL) return false;
    dnnl_exec_arg_t args[4] = {
        {DNNL_ARG_SRC, p->a}, {DNNL_ARG_WEIGHTS, p->b}, {DNNL_ARG_DST, p->c}, {DNNL_ARG_BIAS, p->bias}};
    void* data[4] = {operand_data(a), operand_data(b), c, (void*)(uintptr_t)bias};
    int count = bias != NULL ? 4 : 3;
    for (int i = 0; i < count; i++)
        CHECK(dnnl_memory_set_data_handle(args[i].memory, data[i]) == dnnl_success);
    CHECK(dnnl_primitive_execute(p->primitive, mm->stream, count, args) == dnnl_success);
    CHECK(dnnl_stream_wait(mm->stream) == dnnl_success);
    return true;
}
#endif

// ----------------------------------------------------------------------------
// what the model calls

static inline size_t matmul_pack_bytes(void) {
    return (size_t)omp_get_max_threads() * PLAIN_PACK * sizeof(real);
}
static inline size_t bf16_copy_bytes(size_t count) { return (count * sizeof(uint16_t) + 63) / 64 * 64; }

// Bytes of scratch that matmul_forward and matmul_backward of this shape need with the threads of now.
static inline size_t matmul_scratch_bytes(int compute, int N, int C, int OC) {
    if (compute != MATMUL_BF16) return matmul_pack_bytes();
    size_t inp = bf16_copy_bytes((size_t)N * (size_t)C), weight = bf16_copy_bytes((size_t)OC * (size_t)C);
    size_t dout = bf16_copy_bytes((size_t)N * (size_t)OC), forward = inp + weight;
    size_t backward = dout + (weight > inp ? weight : inp);
    return matmul_pack_bytes() + (forward > backward ? forward : backward);
}

// scratch (64-byte aligned): the largest matmul_scratch_bytes of all shapes to come
static inline void matmul_init(Matmul* mm, int compute, void* scratch, size_t scratch_bytes) {
    memset(mm, 0, sizeof *mm);
    mm->compute = compute;
    mm->pack = (real*)scratch;
    mm->operands = (char*)scratch + matmul_pack_bytes();
    mm->operands_bytes = scratch_bytes - matmul_pack_bytes();
    CHECK(scratch_bytes >= matmul_pack_bytes());
#ifdef MATMUL_DNNL
    CHECK(dnnl_engine_create(&mm->engine, dnnl_cpu, 0) == dnnl_success);
    CHECK(dnnl_stream_create(&mm->stream, mm->engine, dnnl_stream_default_flags) == dnnl_success);
#endif
}

static inline void matmul_free(Matmul* mm) {
#ifdef MATMUL_DNNL
    for (int i = 0; i < MATMUL_PRIMITIVES; i++) matmul_primitive_destroy(&mm->primitives[i]);
    dnnl_stream_destroy(mm->stream);
    dnnl_engine_destroy(mm->engine);
#endif
    memset(mm, 0, sizeof *mm);
}

static inline void bf16_from_reals(uint16_t* out, const real* in, size_t count) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < count; i++) out[i] = bf16_from_float((float)in[i]);
}

// Under bf16, rounds a weight into copy (count entries) now, for all products with it until matmul_release:
// for a weight that several calls in a row read and none changes. In fp32 copy may be NULL.
static inline void matmul_keep(Matmul* mm, const real* weight, size_t count, uint16_t* copy) {
    if (mm->compute != MATMUL_BF16) return;
    mm->kept = weight, mm->kept_copy = copy;
    bf16_from_reals(copy, weight, count);
}
static inline void matmul_release(Matmul* mm) { mm->kept = NULL; }

static inline Operand matmul_operand(Matmul* mm, const real* x, size_t rows, size_t columns) {
    Operand operand = {x, NULL, 0};
    if (mm->compute != MATMUL_BF16) return operand;
    if (x == mm->kept) {
        operand.rounded = mm->kept_copy;
        return operand;
    }
    uint16_t* copy = (uint16_t*)(void*)(mm->operands + mm->operands_used);
    mm->operands_used += bf16_copy_bytes(rows * columns);
    CHECK(mm->operands_used <= mm->operands_bytes);
    bf16_from_reals(copy, x, rows * columns);
    operand.rounded = copy;
    return operand;
}

static inline Operand transposed(Operand x) {
    x.transposed = !x.transposed;
    return x;
}

// c (M, N) = a (M, K) b (K, N) + bias (N; NULL: none), or += if accumulate (then without a bias)
static inline void gemm(real* c, Operand a, Operand b, const real* bias, int M, int N, int K, bool accumulate,
                        Matmul* mm) {
    CHECK(!accumulate || bias == NULL);
#ifdef MATMUL_DNNL
    if (!mm->plain && gemm_dnnl(c, a, b, bias, M, N, K, accumulate, mm)) return;
#endif
    gemm_plain(c, a, b, bias, M, N, K, accumulate, mm->pack);
}

// out (N, OC) = inp (N, C) weight^T (C, OC) + bias (OC) or NULL
static inline void matmul_forward(real* out, const real* inp, const real* weight, const real* bias, int N,
                                  int C, int OC, Matmul* mm) {
    mm->operands_used = 0;
    Operand x = matmul_operand(mm, inp, (size_t)N, (size_t)C);
    Operand w = matmul_operand(mm, weight, (size_t)OC, (size_t)C);
    gemm(out, x, transposed(w), bias, N, OC, C, false, mm);
}

// dinp (N, C) = or NULL; dweight (OC, C) +=; dbias (OC) += or NULL; dout (N, OC), inp (N, C), weight (OC, C)
static inline void matmul_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                                   const real* weight, int N, int C, int OC, Matmul* mm) {
    mm->operands_used = 0;
    Operand dy = matmul_operand(mm, dout, (size_t)N, (size_t)OC);
    size_t after_dy = mm->operands_used;
    if (dinp != NULL)
        gemm(dinp, dy, matmul_operand(mm, weight, (size_t)OC, (size_t)C), NULL, N, C, OC, false, mm);
    mm->operands_used = after_dy; // the copy of inp takes the place of the weight's
    gemm(dweight, transposed(dy), matmul_operand(mm, inp, (size_t)N, (size_t)C), NULL, OC, C, N, true, mm);
    if (dbias != NULL) add_column_sums(dbias, dout, N, OC);
}
