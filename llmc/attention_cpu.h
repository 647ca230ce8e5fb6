// Causal attention with grouped queries, on the CPU: tiles and a running softmax, no T x T memory.
//
//     S = scale Q K^T    P = softmax(S)    O = P V       scale = 1 / sqrt(HS); query head h reads kv head
//     dP = dO V^T        dS = P * (dP - rowsum(dO * O))                        h / (NH / NKV)
//     dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
//
// qkv is (B, T, (NH + 2 NKV) * HS): the query heads, then the key heads, then the value heads of a token. A
// score tile is kept transposed, (KEY_TILE keys, QUERY_TILE queries): queries lie along the vector lanes, so
// that the softmax needs no sum across lanes, and of the operands only one small Q tile is ever transposed.
// One task is one kv head of one sequence with all its query heads; it owns everything it writes, so that
// results do not depend on the thread count. Source: Dao, FlashAttention-2, 2023; Milakov and Gimelshein,
// Online normalizer calculation, 2018.
#pragma once
#include "llmc/real.h"     // defines: real, exp_real, LANES, round_up_to_lanes
#include "llmc/tile_cpu.h" // defines: tile_multiply

enum { QUERY_TILE = 32, KEY_TILE = 64 }; // a score tile is 8 KB; tuned on Zen 5, 2026-11: HS 64, T 64..1024
static const real ATTENTION_MASKED = (real)-1e30; // finite: MASKED - MASKED is 0, not NaN

// The tiles of one thread. HSp is HS rounded up to whole vectors; the padding is zero.
typedef struct {
    real *k, *v;            // (T, HSp) one kv head
    real *dk, *dv;          // (T, HSp)
    real *q, *dout, *o;     // (QUERY_TILE, HSp) rows of q and dout; o accumulates the output, or dQ
    real *q_t, *dout_t;     // (HS, QUERY_TILE) the same, transposed
    real *scores, *dscores; // (KEY_TILE, QUERY_TILE)
} AttentionTiles;

// Elements that the tiles of one thread take.
static inline size_t attention_tiles_size(int T, int HS) {
    return (size_t)round_up_to_lanes(HS) * (size_t)(4 * T + 5 * QUERY_TILE) + 2 * KEY_TILE * QUERY_TILE;
}

// Bytes of scratch that attention_forward and attention_backward need, for all threads of now together.
static inline size_t attention_scratch_bytes(int T, int HS) {
    return (size_t)omp_get_max_threads() * attention_tiles_size(T, HS) * sizeof(real);
}

// The tiles of the calling thread.
static inline AttentionTiles attention_tiles(void* scratch, int T, int HS) {
    size_t row = (size_t)round_up_to_lanes(HS), keys = (size_t)T * row, queries = QUERY_TILE * row;
    AttentionTiles tiles;
    tiles.k = (real*)scratch + (size_t)omp_get_thread_num() * attention_tiles_size(T, HS);
    tiles.v = tiles.k + keys;
    tiles.dk = tiles.v + keys;
    tiles.dv = tiles.dk + keys;
    tiles.q = tiles.dv + keys;
    tiles.dout = tiles.q + queries;
    tiles.o = tiles.dout + queries;
    tiles.q_t = tiles.o + queries;
    tiles.dout_t = tiles.q_t + queries;
    tiles.scores = tiles.dout_t + queries;
    tiles.dscores = tiles.scores + KEY_TILE * QUERY_TILE;
    return tiles;
}

// out (rows, HSp) = rows of a (.., stride), zero beyond HS and beyond the first `rows`, up to padded_rows
static inline void attention_load(real* out, const real* in, size_t stride, int rows, int padded_rows,
                                  int HS) {
    size_t row = (size_t)round_up_to_lanes(HS);
    memset(out, 0, (size_t)padded_rows * row * sizeof(real));
    for (int i = 0; i < rows; i++)
        memcpy(out + (size_t)i * row, in + (size_t)i * stride, (size_t)HS * sizeof(real));
}

static inline void attention_transpose(real* out, const real* in, int HS) {
    size_t row = (size_t)round_up_to_lanes(HS);
    for (int c = 0; c < HS; c++)
        for (int i = 0; i < QUERY_TILE; i++) out[c * QUERY_TILE + i] = in[(size_t)i * row + (size_t)c];
}

// What the queries first .. first + QUERY_TILE - 1 of a sequence may see.
typedef struct {
    int rows;              // queries that exist
    int end;               // keys below this one are seen by the last query
    int tile;              // first key of the first tile with a visible key
    int start[QUERY_TILE]; // first key of each query
    int max_start;
} AttentionSpan;

static inline AttentionSpan attention_span(const int* doc_start, int first, int T) {
    AttentionSpan span;
    span.rows = T - first < QUERY_TILE ? T - first : QUERY_TILE;
    span.end = first + span.rows;
    int min_start = first;
    span.max_start = 0;
    for (int i = 0; i < QUERY_TILE; i++) {
        span.start[i] = doc_start != NULL && i < span.rows ? doc_start[first + i] : 0;
        if (span.start[i] < min_start) min_start = span.start[i];
        if (span.start[i] > span.max_start) span.max_start = span.start[i];
    }
    span.tile = min_start / KEY_TILE * KEY_TILE;
    return span;
}

// Overwrites the scores of pairs that may not see each other; most tiles have none.
static inline void attention_mask(real* scores, const AttentionSpan* span, int first, int key, int keys) {
    if (key + keys - 1 <= first && key >= span->max_start) return;
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < QUERY_TILE; i++) {
            bool visible = key + j <= first + i && key + j >= span->start[i];
            scores[j * QUERY_TILE + i] = visible ? scores[j * QUERY_TILE + i] : ATTENTION_MASKED;
        }
}

// One tile of the running softmax: scores become exp(score - max); max, sum and the output so far follow.
// A query that has seen nothing yet has max MASKED and a meaningless sum; its first visible key multiplies
// both by exp(MASKED - score) = 0.
static inline void attention_softmax_tile(real* scores, real* max, real* sum, real* o, int keys, size_t row) {
    real new_max[QUERY_TILE], total[QUERY_TILE], shrink[QUERY_TILE];
    for (int i = 0; i < QUERY_TILE; i++) new_max[i] = max[i], total[i] = 0;
    for (int j = 0; j < keys; j++)
        for (int i = 0; i < QUERY_TILE; i++) {
            real score = scores[j * QUERY_TILE + i];
            new_max[i] = score > new_max[i] ? score : new_max[i];
        }
    for (int j = 0; j < keys; j++) {
#pragma omp simd
        for (int i = 0; i < QUERY_TILE; i++) {
            real p = exp_real(scores[j * QUERY_TILE + i] - new_max[i]);
            scores[j * QUERY_TILE + i] = p;
            total[i] += p;
        }
    }
#pragma omp simd
    for (int i = 0; i < QUERY_TILE; i++) {
        shrink[i] = exp_real(max[i] - new_max[i]);
        sum[i] = sum[i] * shrink[i] + total[i];
        max[i] = new_max[i];
    }
    for (int i = 0; i < QUERY_TILE; i++)
        for (size_t c = 0; c < row; c++) o[(size_t)i * row + c] *= shrink[i];
}

// out (rows, NH*HS), lse (rows) of the queries first .. first + QUERY_TILE - 1 of one head
static inline void attention_forward_tile(real* out, real* lse, AttentionTiles* tiles, const real* q,
                                          const int* doc_start, int first, int T, size_t out_stride,
                                          size_t stride, int HS) {
    size_t row = (size_t)round_up_to_lanes(HS);
    real max[QUERY_TILE], sum[QUERY_TILE];
    AttentionSpan span = attention_span(doc_start, first, T);
    attention_load(tiles->q, q, stride, span.rows, QUERY_TILE, HS);
    attention_transpose(tiles->q_t, tiles->q, HS);
    real scale = (real)(1 / sqrt((double)HS));
    for (int i = 0; i < HS * QUERY_TILE; i++) tiles->q_t[i] *= scale;
    for (int i = 0; i < QUERY_TILE; i++) max[i] = ATTENTION_MASKED, sum[i] = 0;
    memset(tiles->o, 0, QUERY_TILE * row * sizeof(real));
    for (int key = span.tile; key < span.end; key += KEY_TILE) {
        int keys = span.end - key < KEY_TILE ? span.end - key : KEY_TILE;
        memset(tiles->scores, 0, KEY_TILE * QUERY_TILE * sizeof(real));
        tile_multiply(tiles->scores, QUERY_TILE, tiles->k + (size_t)key * row, row, 1, tiles->q_t, QUERY_TILE,
                      keys, QUERY_TILE, HS);
        attention_mask(tiles->scores, &span, first, key, keys);
        attention_softmax_tile(tiles->scores, max, sum, tiles->o, keys, row);
        tile_multiply(tiles->o, row, tiles->scores, 1, QUERY_TILE, tiles->v + (size_t)key * row, row,
                      QUERY_TILE, (int)row, keys);
    }
    for (int i = 0; i < span.rows; i++) {
        for (int c = 0; c < HS; c++)
            out[(size_t)i * out_stride + (size_t)c] = tiles->o[(size_t)i * row + (size_t)c] / sum[i];
        lse[i] = max[i] + (real)log((double)sum[i]);
    }
}

// out (B, T, NH*HS) =; lse (B, NH, T) = log of the softmax's denominator, for the backward pass.
// doc_start (B, T), or NULL: the first key that a row may see, at most its own index (packed documents).
static inline void attention_forward(real* out, real* lse, void* scratch, const real* qkv,
                                     const int* doc_start, int B, int T, int NH, int NKV, int HS) {
    size_t stride = (size_t)(NH + 2 * NKV) * (size_t)HS, out_stride = (size_t)NH * (size_t)HS;
    int group = NH / NKV;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int kv = 0; kv < NKV; kv++) {
            AttentionTiles tiles = attention_tiles(scratch, T, HS);
            const real* q = qkv + (size_t)b * (size_t)T * stride;
            attention_load(tiles.k, q + (size_t)(NH + kv) * (size_t)HS, stride, T, T, HS);
            attention_load(tiles.v, q + (size_t)(NH + NKV + kv) * (size_t)HS, stride, T, T, HS);
            for (int h = kv * group; h < (kv + 1) * group; h++)
                for (int t = 0; t < T; t += QUERY_TILE)
                    attention_forward_tile(out + ((size_t)b * (size_t)T + (size_t)t) * out_stride +
                                               (size_t)(h * HS),
                                           lse + ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T + t, &tiles,
                                           q + (size_t)t * stride + (size_t)(h * HS),
                                           doc_start != NULL ? doc_start + (size_t)b * (size_t)T : NULL, t, T,
                                           out_stride, stride, HS);
        }
    }
}

// One pair of tiles: the probabilities again, then their gradient, then their parts of dV, dK and dQ.
static inline void attention_backward_pair(AttentionTiles* tiles, const AttentionSpan* span, const real* lse,
                                           const real* delta, int first, int key, int HS) {
    size_t row = (size_t)round_up_to_lanes(HS), k0 = (size_t)key * row;
    int keys = span->end - key < KEY_TILE ? span->end - key : KEY_TILE;
    real scale = (real)(1 / sqrt((double)HS));
    real *p = tiles->scores, *ds = tiles->dscores;
    memset(p, 0, KEY_TILE * QUERY_TILE * sizeof(real));
    memset(ds, 0, KEY_TILE * QUERY_TILE * sizeof(real));
    tile_multiply(p, QUERY_TILE, tiles->k + k0, row, 1, tiles->q_t, QUERY_TILE, keys, QUERY_TILE, HS);
    tile_multiply(ds, QUERY_TILE, tiles->v + k0, row, 1, tiles->dout_t, QUERY_TILE, keys, QUERY_TILE, HS);
    attention_mask(p, span, first, key, keys);
    for (int j = 0; j < keys; j++) {
#pragma omp simd
        for (int i = 0; i < QUERY_TILE; i++) {
            real probability = exp_real(scale * p[j * QUERY_TILE + i] - lse[i]);
            p[j * QUERY_TILE + i] = probability;
            ds[j * QUERY_TILE + i] = scale * probability * (ds[j * QUERY_TILE + i] - delta[i]);
        }
    }
    tile_multiply(tiles->dv + k0, row, p, QUERY_TILE, 1, tiles->dout, row, keys, (int)row, QUERY_TILE);
    tile_multiply(tiles->dk + k0, row, ds, QUERY_TILE, 1, tiles->q, row, keys, (int)row, QUERY_TILE);
    tile_multiply(tiles->o, row, ds, 1, QUERY_TILE, tiles->k + k0, row, QUERY_TILE, (int)row, keys);
}

// dq (rows, stride) =, and the tiles' dk, dv +=, from the queries of one tile of one head.
// dout and out have rows of out_stride elements; q and dq of stride.
static inline void attention_backward_tile(real* dq, AttentionTiles* tiles, const real* dout, const real* q,
                                           const real* out, const real* lse, const int* doc_start, int first,
                                           int T, size_t out_stride, size_t stride, int HS) {
    size_t row = (size_t)round_up_to_lanes(HS);
    real row_lse[QUERY_TILE] = {0}, delta[QUERY_TILE] = {0}; // rows that do not exist: finite, with dout 0
    AttentionSpan span = attention_span(doc_start, first, T);
    attention_load(tiles->q, q, stride, span.rows, QUERY_TILE, HS);
    attention_load(tiles->dout, dout, out_stride, span.rows, QUERY_TILE, HS);
    attention_transpose(tiles->q_t, tiles->q, HS);
    attention_transpose(tiles->dout_t, tiles->dout, HS);
    for (int i = 0; i < span.rows; i++) {
        const real *dout_row = dout + (size_t)i * out_stride, *out_row = out + (size_t)i * out_stride;
        real dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int c = 0; c < HS; c++) dot += dout_row[c] * out_row[c];
        delta[i] = dot;
        row_lse[i] = lse[i];
    }
    memset(tiles->o, 0, QUERY_TILE * row * sizeof(real));
    for (int key = span.tile; key < span.end; key += KEY_TILE)
        attention_backward_pair(tiles, &span, row_lse, delta, first, key, HS);
    for (int i = 0; i < span.rows; i++)
        memcpy(dq + (size_t)i * stride, tiles->o + (size_t)i * row, (size_t)HS * sizeof(real));
}

// dqkv (B, T, (NH + 2 NKV) * HS) =, from dout and out (B, T, NH*HS), the forward pass's qkv and lse.
static inline void attention_backward(real* dqkv, void* scratch, const real* dout, const real* qkv,
                                      const real* out, const real* lse, const int* doc_start, int B, int T,
                                      int NH, int NKV, int HS) {
    size_t stride = (size_t)(NH + 2 * NKV) * (size_t)HS, out_stride = (size_t)NH * (size_t)HS;
    size_t row = (size_t)round_up_to_lanes(HS);
    int group = NH / NKV;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int b = 0; b < B; b++) {
        for (int kv = 0; kv < NKV; kv++) {
            AttentionTiles tiles = attention_tiles(scratch, T, HS);
            size_t sequence = (size_t)b * (size_t)T;
            size_t k_part = (size_t)(NH + kv) * (size_t)HS, v_part = (size_t)(NH + NKV + kv) * (size_t)HS;
            attention_load(tiles.k, qkv + sequence * stride + k_part, stride, T, T, HS);
            attention_load(tiles.v, qkv + sequence * stride + v_part, stride, T, T, HS);
            memset(tiles.dk, 0, (size_t)T * row * sizeof(real));
            memset(tiles.dv, 0, (size_t)T * row * sizeof(real));
            for (int h = kv * group; h < (kv + 1) * group; h++)
                for (int t = 0; t < T; t += QUERY_TILE) {
                    size_t token = sequence + (size_t)t, head = (size_t)(h * HS);
                    attention_backward_tile(
                        dqkv + token * stride + head, &tiles, dout + token * out_stride + head,
                        qkv + token * stride + head, out + token * out_stride + head,
                        lse + ((size_t)b * (size_t)NH + (size_t)h) * (size_t)T + t,
                        doc_start != NULL ? doc_start + sequence : NULL, t, T, out_stride, stride, HS);
                }
            for (size_t t = 0; t < (size_t)T; t++) {
                real* dtoken = dqkv + (sequence + t) * stride;
                memcpy(dtoken + k_part, tiles.dk + t * row, (size_t)HS * sizeof(real));
                memcpy(dtoken + v_part, tiles.dv + t * row, (size_t)HS * sizeof(real));
            }
        }
    }
}

// One new token against the keys and values so far. out, q (NH*HS); k_cache, v_cache (length or more,
// NKV*HS): a row of each per position, the new token's own among them.
static inline void attention_decode(real* out, const real* q, const real* k_cache, const real* v_cache,
                                    int length, int NH, int NKV, int HS) {
    size_t stride = (size_t)NKV * (size_t)HS;
    real scale = (real)(1 / sqrt((double)HS));
#pragma omp parallel for schedule(static)
    for (int h = 0; h < NH; h++) {
        size_t kv = (size_t)(h / (NH / NKV)) * (size_t)HS;
        const real* query = q + (size_t)h * (size_t)HS;
        real *o = out + (size_t)h * (size_t)HS, max = ATTENTION_MASKED, sum = 0, p[KEY_TILE];
        memset(o, 0, (size_t)HS * sizeof(real));
        for (int first = 0; first < length; first += KEY_TILE) {
            int keys = length - first < KEY_TILE ? length - first : KEY_TILE;
            real new_max = max;
            for (int j = 0; j < keys; j++) {
                const real* k = k_cache + (size_t)(first + j) * stride + kv;
                real score = 0;
#pragma omp simd reduction(+ : score)
                for (int c = 0; c < HS; c++) score += query[c] * k[c];
                p[j] = score * scale;
                new_max = p[j] > new_max ? p[j] : new_max;
            }
            real shrink = exp_real(max - new_max), total = 0;
#pragma omp simd reduction(+ : total)
            for (int j = 0; j < keys; j++) {
                p[j] = exp_real(p[j] - new_max);
                total += p[j];
            }
            for (int c = 0; c < HS; c++) o[c] *= shrink;
            for (int j = 0; j < keys; j++) {
                const real* v = v_cache + (size_t)(first + j) * stride + kv;
                for (int c = 0; c < HS; c++) o[c] += p[j] * v[c];
            }
            sum = sum * shrink + total;
            max = new_max;
        }
        for (int c = 0; c < HS; c++) o[c] /= sum;
    }
}
