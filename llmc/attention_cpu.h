// Causal attention with grouped queries, on the CPU: tiles and a running softmax, no T x T memory.
//
//     S = scale Q K^T   P = softmax(S)   O = P V        scale = 1 / sqrt(HS)
//     dV = P^T dO       dP = dO V^T      dS = P * (dP - rowsum(dO * O))
//     dQ = scale dS K   dK = scale dS^T Q
//
// qkv is (B, T, (NH + 2 NKV) * HS): the query heads of a token, then its key heads, then its value heads.
// Query head h reads key and value head h / (NH / NKV).
//
// A score tile is kept transposed, (KEY_TILE keys, QUERY_TILE queries): queries lie along the vector lanes,
// so that the softmax needs no sum across lanes, and only small tiles of Q and dO are ever transposed.
// One task is one key head of one sequence with all its query heads: it owns everything it writes, so that
// results do not depend on the thread count.
// Source: Dao, FlashAttention-2, 2023; Milakov and Gimelshein, Online normalizer calculation, 2018.
#pragma once
#include "llmc/real.h"     // defines: real, exp_real, LANES, round_up_to_lanes
#include "llmc/tile_cpu.h" // defines: tile_multiply

enum { QUERY_TILE = 32, KEY_TILE = 64 };          // tuned on Zen 5, 2026-11-21: HS 64, T 64 .. 1024
static const real ATTENTION_MASKED = (real)-1e30; // finite: MASKED - MASKED is 0, not NaN

// One task: its sizes, and its tiles in the scratch memory of its thread. Rows of a tile are HS elements,
// rounded up to whole vectors; the padding is zero.
typedef struct {
    int T, HS;
    size_t row;              // elements of a row of a tile
    size_t qkv_row, out_row; // elements from one token to the next in qkv and in out
    real scale;
    real *k, *v, *dk, *dv;  // (T, row) the key head
    real *q, *dout, *o;     // (QUERY_TILE, row) rows of q and dout; o accumulates the output, or dQ
    real *q_t, *dout_t;     // (HS, QUERY_TILE) the same, transposed
    real *scores, *dscores; // (KEY_TILE, QUERY_TILE)
} AttentionTask;

// Elements that the tiles of one thread take.
static inline size_t attention_tiles_size(int T, int HS) {
    return (size_t)round_up_to_lanes(HS) * (size_t)(4 * T + 5 * QUERY_TILE) + 2 * KEY_TILE * QUERY_TILE;
}

// Bytes of scratch that attention_forward and attention_backward need, for all threads of now together.
static inline size_t attention_scratch_bytes(int T, int HS) {
    return (size_t)omp_get_max_threads() * attention_tiles_size(T, HS) * sizeof(real);
}

static inline AttentionTask attention_task(void* scratch, int T, int NH, int NKV, int HS) {
    AttentionTask a;
    a.T = T, a.HS = HS;
    a.row = (size_t)round_up_to_lanes(HS);
    a.qkv_row = (size_t)(NH + 2 * NKV) * (size_t)HS, a.out_row = (size_t)NH * (size_t)HS;
    a.scale = (real)(1 / sqrt((double)HS));
    size_t keys = (size_t)T * a.row, queries = QUERY_TILE * a.row;
    a.k = (real*)scratch + (size_t)omp_get_thread_num() * attention_tiles_size(T, HS);
    a.v = a.k + keys;
    a.dk = a.v + keys;
    a.dv = a.dk + keys;
    a.q = a.dv + keys;
    a.dout = a.q + queries;
    a.o = a.dout + queries;
    a.q_t = a.o + queries;
    a.dout_t = a.q_t + queries;
    a.scores = a.dout_t + queries;
    a.dscores = a.scores + KEY_TILE * QUERY_TILE;
    return a;
}

// tile (padded_rows, row) = the first `rows` rows of in, which lie in_row elements apart; the rest zero
static inline void attention_load(real* tile, const AttentionTask* a, const real* in, size_t in_row, int rows,
                                  int padded_rows) {
    memset(tile, 0, (size_t)padded_rows * a->row * sizeof(real));
    for (size_t i = 0; i < (size_t)rows; i++)
        memcpy(tile + i * a->row, in + i * in_row, (size_t)a->HS * sizeof(real));
}

// Rows of a tile back to where they came from.
static inline void attention_store(real* out, size_t out_row, const AttentionTask* a, const real* tile,
                                   int rows) {
    for (size_t i = 0; i < (size_t)rows; i++)
        memcpy(out + i * out_row, tile + i * a->row, (size_t)a->HS * sizeof(real));
}

static inline void attention_transpose(real* transposed, const AttentionTask* a, const real* tile) {
    for (size_t c = 0; c < (size_t)a->HS; c++)
        for (size_t i = 0; i < QUERY_TILE; i++) transposed[c * QUERY_TILE + i] = tile[i * a->row + c];
}

// What the queries first .. first + rows - 1 may see.
typedef struct {
    int first, rows; // rows: QUERY_TILE, or fewer at the end of the sequence
    int begin, end;  // keys: the first tile with a visible key starts at begin; none at end or beyond is seen
    int start[QUERY_TILE]; // first key of each query
    int max_start;
} AttentionSpan;

static inline AttentionSpan attention_span(const int* doc_start, int first, int T) {
    AttentionSpan span;
    span.first = first;
    span.rows = T - first < QUERY_TILE ? T - first : QUERY_TILE;
    span.end = first + span.rows;
    span.begin = first, span.max_start = 0;
    for (int i = 0; i < QUERY_TILE; i++) {
        span.start[i] = doc_start != NULL && i < span.rows ? doc_start[first + i] : 0;
        if (span.start[i] < span.begin) span.begin = span.start[i];
        if (span.start[i] > span.max_start) span.max_start = span.start[i];
    }
    span.begin = span.begin / KEY_TILE * KEY_TILE;
    return span;
}

static inline int attention_keys(const AttentionSpan* span, int key) {
    return span->end - key < KEY_TILE ? span->end - key : KEY_TILE;
}

// Overwrites the scores of pairs that may not see each other; most tiles have none.
static inline void attention_mask(real* scores, const AttentionSpan* span, int key, int keys) {
    if (key + keys - 1 <= span->first && key >= span->max_start) return;
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < QUERY_TILE; i++) {
            bool visible = key + j <= span->first + i && key + j >= span->start[i];
            scores[j * QUERY_TILE + i] = visible ? scores[j * QUERY_TILE + i] : ATTENTION_MASKED;
        }
}

// ----------------------------------------------------------------------------
// forward

// One tile of the running softmax: scores become exp(score - max); max, sum and the output so far follow. A
// query that has seen nothing yet has max MASKED and a meaningless sum; its first visible key multiplies both
// by exp(MASKED - score) = 0.
static inline void attention_softmax(AttentionTask* a, real* max, real* sum, int keys) {
    real new_max[QUERY_TILE], total[QUERY_TILE], shrink[QUERY_TILE];
    for (int i = 0; i < QUERY_TILE; i++) new_max[i] = max[i], total[i] = 0;
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < QUERY_TILE; i++) {
            real score = a->scores[j * QUERY_TILE + i];
            new_max[i] = score > new_max[i] ? score : new_max[i];
        }
    for (int j = 0; j < keys; j++) {
        real* scores = a->scores + j * QUERY_TILE;
#pragma omp simd
        for (int i = 0; i < QUERY_TILE; i++) {
            scores[i] = exp_real(scores[i] - new_max[i]);
            total[i] += scores[i];
        }
    }
#pragma omp simd
    for (int i = 0; i < QUERY_TILE; i++) {
        shrink[i] = exp_real(max[i] - new_max[i]);
        sum[i] = sum[i] * shrink[i] + total[i];
        max[i] = new_max[i];
    }
    for (size_t i = 0; i < QUERY_TILE; i++)
        for (size_t c = 0; c < a->row; c++) a->o[i * a->row + c] *= shrink[i];
}

// out, lse, q: of the first query of the tile and of one head
static inline void attention_forward_tile(real* out, real* lse, AttentionTask* a, const real* q,
                                          const int* doc_start, int first) {
    real max[QUERY_TILE], sum[QUERY_TILE];
    AttentionSpan span = attention_span(doc_start, first, a->T);
    attention_load(a->q, a, q, a->qkv_row, span.rows, QUERY_TILE);
    attention_transpose(a->q_t, a, a->q);
    for (int i = 0; i < a->HS * QUERY_TILE; i++) a->q_t[i] *= a->scale;
    for (int i = 0; i < QUERY_TILE; i++) max[i] = ATTENTION_MASKED, sum[i] = 0;
    memset(a->o, 0, QUERY_TILE * a->row * sizeof(real));
    for (int key = span.begin; key < span.end; key += KEY_TILE) {
        int keys = attention_keys(&span, key);
        const real *k = a->k + (size_t)key * a->row, *v = a->v + (size_t)key * a->row;
        memset(a->scores, 0, KEY_TILE * QUERY_TILE * sizeof(real));
        tile_multiply(a->scores, QUERY_TILE, k, a->row, 1, a->q_t, QUERY_TILE, keys, QUERY_TILE, a->HS);
        attention_mask(a->scores, &span, key, keys);
        attention_softmax(a, max, sum, keys);
        tile_multiply(a->o, a->row, a->scores, 1, QUERY_TILE, v, a->row, QUERY_TILE, (int)a->row, keys);
    }
    for (size_t i = 0; i < (size_t)span.rows; i++) {
        for (size_t c = 0; c < a->row; c++) a->o[i * a->row + c] /= sum[i];
        lse[i] = max[i] + (real)log((double)sum[i]);
    }
    attention_store(out, a->out_row, a, a->o, span.rows);
}

// out (B, T, NH*HS) =; lse (B, NH, T) = log of the softmax's denominator, for the backward pass.
// doc_start (B, T), or NULL: the first key that a row may see, at most its own index (packed documents).
static inline void attention_forward(real* out, real* lse, void* scratch, const real* qkv,
                                     const int* doc_start, int B, int T, int NH, int NKV, int HS) {
    int group = NH / NKV;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int kv = 0; kv < NKV; kv++) {
            AttentionTask a = attention_task(scratch, T, NH, NKV, HS);
            const real* sequence = qkv + (size_t)b * (size_t)T * a.qkv_row;
            const int* starts = doc_start != NULL ? doc_start + (size_t)b * (size_t)T : NULL;
            attention_load(a.k, &a, sequence + (NH + kv) * HS, a.qkv_row, T, T);
            attention_load(a.v, &a, sequence + (NH + NKV + kv) * HS, a.qkv_row, T, T);
            for (int h = kv * group; h < (kv + 1) * group; h++) {
                real* head_lse = lse + ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T;
                for (int t = 0; t < T; t += QUERY_TILE) {
                    size_t token = (size_t)b * (size_t)T + (size_t)t;
                    attention_forward_tile(out + token * a.out_row + h * HS, head_lse + t, &a,
                                           qkv + token * a.qkv_row + h * HS, starts, t);
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------
// backward

// One tile of keys against one of queries: the probabilities again, their gradient, then what they add to dV,
// dK and dQ.
static inline void attention_backward_pair(AttentionTask* a, const AttentionSpan* span, const real* lse,
                                           const real* delta, int key) {
    size_t row = a->row, at = (size_t)key * row;
    int keys = attention_keys(span, key), HS = a->HS;
    real *p = a->scores, *ds = a->dscores;
    memset(p, 0, KEY_TILE * QUERY_TILE * sizeof(real));
    memset(ds, 0, KEY_TILE * QUERY_TILE * sizeof(real));
    tile_multiply(p, QUERY_TILE, a->k + at, row, 1, a->q_t, QUERY_TILE, keys, QUERY_TILE, HS);
    tile_multiply(ds, QUERY_TILE, a->v + at, row, 1, a->dout_t, QUERY_TILE, keys, QUERY_TILE, HS);
    attention_mask(p, span, key, keys);
    for (int j = 0; j < keys * QUERY_TILE; j += QUERY_TILE) {
#pragma omp simd
        for (int i = 0; i < QUERY_TILE; i++) {
            p[j + i] = exp_real(a->scale * p[j + i] - lse[i]);
            ds[j + i] = a->scale * p[j + i] * (ds[j + i] - delta[i]);
        }
    }
    tile_multiply(a->dv + at, row, p, QUERY_TILE, 1, a->dout, row, keys, (int)row, QUERY_TILE);
    tile_multiply(a->dk + at, row, ds, QUERY_TILE, 1, a->q, row, keys, (int)row, QUERY_TILE);
    tile_multiply(a->o, row, ds, 1, QUERY_TILE, a->k + at, row, QUERY_TILE, (int)row, keys);
}

// dq =, the task's dk and dv +=; dq, dout, q, out, lse: of the first query of the tile and of one head
static inline void attention_backward_tile(real* dq, AttentionTask* a, const real* dout, const real* q,
                                           const real* out, const real* lse, const int* doc_start,
                                           int first) {
    real row_lse[QUERY_TILE] = {0}, delta[QUERY_TILE] = {0}; // 0 for rows beyond the sequence, as their dout
    AttentionSpan span = attention_span(doc_start, first, a->T);
    attention_load(a->q, a, q, a->qkv_row, span.rows, QUERY_TILE);
    attention_load(a->dout, a, dout, a->out_row, span.rows, QUERY_TILE);
    attention_transpose(a->q_t, a, a->q);
    attention_transpose(a->dout_t, a, a->dout);
    for (size_t i = 0; i < (size_t)span.rows; i++) {
        const real *dout_row = dout + i * a->out_row, *out_row = out + i * a->out_row;
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < a->HS; c++) dot += dout_row[c] * out_row[c];
        delta[i] = dot;
        row_lse[i] = lse[i];
    }
    memset(a->o, 0, QUERY_TILE * a->row * sizeof(real));
    for (int key = span.begin; key < span.end; key += KEY_TILE)
        attention_backward_pair(a, &span, row_lse, delta, key);
    attention_store(dq, a->qkv_row, a, a->o, span.rows);
}

// dqkv (B, T, (NH + 2 NKV) * HS) =, from dout and out (B, T, NH*HS), the forward pass's qkv and lse.
static inline void attention_backward(real* dqkv, void* scratch, const real* dout, const real* qkv,
                                      const real* out, const real* lse, const int* doc_start, int B, int T,
                                      int NH, int NKV, int HS) {
    int group = NH / NKV;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int kv = 0; kv < NKV; kv++) {
            AttentionTask a = attention_task(scratch, T, NH, NKV, HS);
            size_t sequence = (size_t)b * (size_t)T * a.qkv_row;
            size_t k_part = sequence + (size_t)((NH + kv) * HS), v_part = k_part + (size_t)(NKV * HS);
            const int* starts = doc_start != NULL ? doc_start + (size_t)b * (size_t)T : NULL;
            attention_load(a.k, &a, qkv + k_part, a.qkv_row, T, T);
            attention_load(a.v, &a, qkv + v_part, a.qkv_row, T, T);
            memset(a.dk, 0, (size_t)T * a.row * sizeof(real));
            memset(a.dv, 0, (size_t)T * a.row * sizeof(real));
            for (int h = kv * group; h < (kv + 1) * group; h++) {
                const real* head_lse = lse + ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T;
                for (int t = 0; t < T; t += QUERY_TILE) {
                    size_t token = (size_t)b * (size_t)T + (size_t)t;
                    size_t in_qkv = token * a.qkv_row + (size_t)(h * HS);
                    size_t in_out = token * a.out_row + (size_t)(h * HS);
                    attention_backward_tile(dqkv + in_qkv, &a, dout + in_out, qkv + in_qkv, out + in_out,
                                            head_lse + t, starts, t);
                }
            }
            attention_store(dqkv + k_part, a.qkv_row, &a, a.dk, T);
            attention_store(dqkv + v_part, a.qkv_row, &a, a.dv, T);
        }
    }
}

// ----------------------------------------------------------------------------
// decoding

// One head of attention_decode: the running softmax over blocks of keys, which lie kv_row elements apart.
static inline void attention_decode_head(real* out, const real* q, const real* k, const real* v,
                                         size_t kv_row, int length, int HS) {
    real max = ATTENTION_MASKED, sum = 0, p[KEY_TILE], scale = (real)(1 / sqrt((double)HS));
    memset(out, 0, (size_t)HS * sizeof(real));
    for (int first = 0; first < length; first += KEY_TILE) {
        int keys = length - first < KEY_TILE ? length - first : KEY_TILE;
        real new_max = max, total = 0;
        for (int j = 0; j < keys; j++) {
            const real* key = k + (size_t)(first + j) * kv_row;
            real score = 0;
#pragma omp simd reduction(+ : score)
            for (int c = 0; c < HS; c++) score += q[c] * key[c];
            p[j] = score * scale;
            new_max = p[j] > new_max ? p[j] : new_max;
        }
#pragma omp simd reduction(+ : total)
        for (int j = 0; j < keys; j++) {
            p[j] = exp_real(p[j] - new_max);
            total += p[j];
        }
        real shrink = exp_real(max - new_max);
        for (int c = 0; c < HS; c++) out[c] *= shrink;
        for (int j = 0; j < keys; j++) {
            const real* value = v + (size_t)(first + j) * kv_row;
            for (int c = 0; c < HS; c++) out[c] += p[j] * value[c];
        }
        sum = sum * shrink + total;
        max = new_max;
    }
    for (int c = 0; c < HS; c++) out[c] /= sum;
}

// One new token against the keys and values so far. out, q (NH*HS); k_cache, v_cache (length or more,
// NKV*HS): a row of each per position, the new token's own among them.
static inline void attention_decode(real* out, const real* q, const real* k_cache, const real* v_cache,
                                    int length, int NH, int NKV, int HS) {
    int group = NH / NKV;
#pragma omp parallel for schedule(static)
    for (int h = 0; h < NH; h++) {
        int head = h * HS, kv = h / group * HS;
        attention_decode_head(out + head, q + head, k_cache + kv, v_cache + kv, (size_t)(NKV * HS), length,
                              HS);
    }
}
