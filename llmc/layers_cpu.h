// The layers of the CPU reference, forward and backward. Every loop is vectorised by the compiler and
// threaded; every sum is taken in an order that does not depend on the number of threads. Shapes: N = B*T
// rows of C columns; each function names what it sets (=) and what it adds to (+=). Gradients of parameters
// are +=, so that micro-batches accumulate; a NULL bias or dbias is one that is absent.
#pragma once
#include "llmc/real.h"          // defines: real, exp_real, sigmoid_real, COLUMN_BLOCK
#include "llmc/matmul_cpu.h"    // defines: Matmul, matmul_forward, matmul_backward
#include "llmc/model.h"         // defines: NormKind, ActivationKind
#include "llmc/rope.h"          // defines: RopeConfig, rope_table
#include "llmc/attention_cpu.h" // defines: attention_forward, attention_backward, attention_decode

// ----------------------------------------------------------------------------
// embedding: out[n] = wte[token[n]] + wpe[t]

// out (B, T, C) =; wte (V, C), wpe (T or more, C) or NULL. To decode at position t, pass wpe + t * C and T =
// 1.
static inline void embedding_forward(real* out, const int* tokens, const real* wte, const real* wpe, int B,
                                     int T, int C) {
    size_t width = (size_t)C;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < B * T; n++) {
        const real* token = wte + (size_t)tokens[n] * width;
        real* row = out + (size_t)n * width;
        memcpy(row, token, width * sizeof(real));
        if (wpe == NULL) continue;
        const real* position = wpe + (size_t)(n % T) * width;
        for (int c = 0; c < C; c++) row[c] += position[c];
    }
}

// dwte (V, C) +=, dwpe (T, C) += or NULL, dout (B, T, C). A thread owns columns, not tokens: two rows of the
// same token meet in one thread, in order, without atomics.
static inline void embedding_backward(real* dwte, real* dwpe, const real* dout, const int* tokens, int B,
                                      int T, int C) {
    size_t width = (size_t)C;
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += COLUMN_BLOCK) {
        int columns = C - first < COLUMN_BLOCK ? C - first : COLUMN_BLOCK;
        for (int n = 0; n < B * T; n++) {
            const real* row = dout + (size_t)n * width + first;
            real* token = dwte + (size_t)tokens[n] * width + first;
            for (int c = 0; c < columns; c++) token[c] += row[c];
            if (dwpe == NULL) continue;
            real* position = dwpe + (size_t)(n % T) * width + first;
            for (int c = 0; c < columns; c++) position[c] += row[c];
        }
    }
}

// ----------------------------------------------------------------------------
// norm: out = xhat * weight + bias
//   LayerNorm  xhat = (x - mean) * rstd    mean = E[x]   rstd = 1 / sqrt(E[(x - mean)^2] + eps)
//   RMSNorm    xhat = x * rstd             rstd = 1 / sqrt(E[x^2] + eps)
// Source: Ba et al., 2016; Zhang and Sennrich, 2019.

static inline void norm_row(real* out, real* mean, real* rstd, const real* x, const real* weight,
                            const real* bias, int C, real eps, int kind) {
    double sum = 0, square = 0; // a mean far from zero would cost the small differences their last digits
    real center = 0;
    if (kind == NORM_LAYERNORM) {
#pragma omp simd reduction(+ : sum)
        for (int c = 0; c < C; c++) sum += (double)x[c];
        *mean = center = (real)(sum / C);
    }
#pragma omp simd reduction(+ : square)
    for (int c = 0; c < C; c++) square += (double)((x[c] - center) * (x[c] - center));
    real scale = *rstd = (real)(1 / sqrt(square / C + (double)eps));
    for (int c = 0; c < C; c++) out[c] = (x[c] - center) * scale * weight[c];
    if (bias != NULL)
        for (int c = 0; c < C; c++) out[c] += bias[c];
}

// out (N, C), mean (N; not touched and may be NULL for RMSNorm), rstd (N) =; inp (N, C), weight and bias (C)
static inline void norm_forward(real* out, real* mean, real* rstd, const real* inp, const real* weight,
                                const real* bias, int N, int C, real eps, int kind) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * (size_t)C;
        norm_row(out + row, mean != NULL ? mean + n : NULL, rstd + n, inp + row, weight, bias, C, eps, kind);
    }
}

// out = a + b, n elements; out may be a or b
static inline void residual_forward(real* out, const real* a, const real* b, size_t n) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
}

// residual (N, C) = a + b, then the norm of it, while it is in the cache. residual may be a or b.
static inline void residual_norm_forward(real* residual, real* out, real* mean, real* rstd, const real* a,
                                         const real* b, const real* weight, const real* bias, int N, int C,
                                         real eps, int kind) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * (size_t)C;
        for (size_t c = row; c < row + (size_t)C; c++) residual[c] = a[c] + b[c];
        norm_row(out + row, mean != NULL ? mean + n : NULL, rstd + n, residual + row, weight, bias, C, eps,
                 kind);
    }
}

// dinp (N, C) += (the gradient of the residual stream); dweight, dbias (C) +=; inp, mean, rstd as in the
// forward.
//   dinp = rstd * (g - E[g] - xhat * E[g * xhat]), g = dout * weight; RMSNorm has no E[g]
static inline void norm_backward(real* dinp, real* dweight, real* dbias, const real* dout, const real* inp,
                                 const real* weight, const real* mean, const real* rstd, int N, int C,
                                 int kind) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        size_t row = (size_t)n * (size_t)C;
        const real *x = inp + row, *dy = dout + row;
        real center = kind == NORM_LAYERNORM ? mean[n] : 0, scale = rstd[n], sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
        for (int c = 0; c < C; c++) {
            real g = dy[c] * weight[c];
            sum += g;
            dot += g * (x[c] - center);
        }
        real g_mean = kind == NORM_LAYERNORM ? sum / (real)C : 0, slope = dot * scale * scale / (real)C;
        for (int c = 0; c < C; c++)
            dinp[row + (size_t)c] += scale * (dy[c] * weight[c] - g_mean - (x[c] - center) * slope);
    }
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += COLUMN_BLOCK) {
        int columns = C - first < COLUMN_BLOCK ? C - first : COLUMN_BLOCK;
        real total[COLUMN_BLOCK] = {0};
        for (int n = 0; n < N; n++) {
            const real *x = inp + (size_t)n * (size_t)C + first, *dy = dout + (size_t)n * (size_t)C + first;
            real center = kind == NORM_LAYERNORM ? mean[n] : 0, scale = rstd[n];
            for (int c = 0; c < columns; c++) total[c] += dy[c] * ((x[c] - center) * scale);
        }
        for (int c = 0; c < columns; c++) dweight[first + c] += total[c];
    }
    if (dbias != NULL) add_column_sums(dbias, dout, N, C);
}

// ----------------------------------------------------------------------------
// rotary positions: (x, y) -> (x cos - y sin, y cos + x sin) for the pairs (i, i + HS/2) of every q and k
// head

// direction 1 turns forward, -1 back: the gradient of a rotation is the rotation back
static inline void rope_rotate(real* qkv, const float* cos_table, const float* sin_table, int offset, int B,
                               int T, int NH, int NKV, int HS, real direction) {
    int half = HS / 2;
    size_t stride = (size_t)(NH + 2 * NKV) * (size_t)HS;
#pragma omp parallel for schedule(static)
    for (int n = 0; n < B * T; n++) {
        size_t position = (size_t)(offset + n % T) * (size_t)half;
        const float *cosines = cos_table + position, *sines = sin_table + position;
        for (int h = 0; h < NH + NKV; h++) {
            real *x = qkv + (size_t)n * stride + (size_t)(h * HS), *y = x + half;
#pragma omp simd
            for (int i = 0; i < half; i++) {
                real a = x[i], b = y[i], cosine = (real)cosines[i], sine = direction * (real)sines[i];
                x[i] = a * cosine - b * sine;
                y[i] = b * cosine + a * sine;
            }
        }
    }
}

// In place on the q and k heads of qkv (B, T, (NH + 2 NKV) * HS); row (b, t) has position offset + t of the
// tables.
static inline void rope_forward(real* qkv, const float* cos_table, const float* sin_table, int offset, int B,
                                int T, int NH, int NKV, int HS) {
    rope_rotate(qkv, cos_table, sin_table, offset, B, T, NH, NKV, HS, 1);
}
static inline void rope_backward(real* dqkv, const float* cos_table, const float* sin_table, int offset,
                                 int B, int T, int NH, int NKV, int HS) {
    rope_rotate(dqkv, cos_table, sin_table, offset, B, T, NH, NKV, HS, -1);
}

// ----------------------------------------------------------------------------
// activation
//   GELU (tanh form)  out = x (1 + tanh u) / 2 = x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
//   SwiGLU            out = gate * sigmoid(gate) * up
// Source: Hendrycks and Gimpel, 2016; Shazeer, 2020.

static const real GELU_SCALE = (real)1.5957691216057308; // 2 sqrt(2 / pi)
static const real GELU_CUBIC = (real)0.044715;

// out (N, FF) =; inp (N, FF) for GELU, (N, 2 FF) for SwiGLU: a row holds the gates, then the ups.
static inline void activation_forward(real* out, const real* inp, int N, int FF, int kind) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        real* row = out + (size_t)n * (size_t)FF;
        if (kind == ACTIVATION_GELU_TANH) {
            const real* in = inp + (size_t)n * (size_t)FF;
#pragma omp simd
            for (int c = 0; c < FF; c++) {
                real x = in[c];
                row[c] = x * sigmoid_real(GELU_SCALE * x * (1 + GELU_CUBIC * x * x));
            }
        } else {
            const real *gate = inp + (size_t)n * 2 * (size_t)FF, *up = gate + FF;
#pragma omp simd
            for (int c = 0; c < FF; c++) row[c] = gate[c] * sigmoid_real(gate[c]) * up[c];
        }
    }
}

// dinp (shape of inp) =; dout (N, FF). For GELU dinp may be dout.
static inline void activation_backward(real* dinp, const real* dout, const real* inp, int N, int FF,
                                       int kind) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        const real* dy = dout + (size_t)n * (size_t)FF;
        if (kind == ACTIVATION_GELU_TANH) {
            const real* in = inp + (size_t)n * (size_t)FF;
            real* dx = dinp + (size_t)n * (size_t)FF;
#pragma omp simd
            for (int c = 0; c < FF; c++) {
                real x = in[c], square = GELU_CUBIC * x * x, s = sigmoid_real(GELU_SCALE * x * (1 + square));
                dx[c] = dy[c] * (s + x * s * (1 - s) * GELU_SCALE * (1 + 3 * square));
            }
        } else {
            const real *gate = inp + (size_t)n * 2 * (size_t)FF, *up = gate + FF;
            real *dgate = dinp + (size_t)n * 2 * (size_t)FF, *dup = dgate + FF;
#pragma omp simd
            for (int c = 0; c < FF; c++) {
                real s = sigmoid_real(gate[c]), silu = gate[c] * s;
                dgate[c] = dy[c] * up[c] * (s + silu * (1 - s));
                dup[c] = dy[c] * silu;
            }
        }
    }
}

// ----------------------------------------------------------------------------
// classifier: softmax, cross-entropy and its gradient, one row at a time so that a row stays in the cache

// A row of maxima, element by element, because clang does not vectorise a maximum that is one number.
static inline real largest_of(const real* x, int n) {
    enum { WIDTH = 64 };
    real largest[WIDTH];
    for (int j = 0; j < WIDTH; j++) largest[j] = x[0];
    int i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        for (int j = 0; j < WIDTH; j++) largest[j] = x[i + j] > largest[j] ? x[i + j] : largest[j];
    for (; i < n; i++) largest[0] = x[i] > largest[0] ? x[i] : largest[0];
    for (int j = 1; j < WIDTH; j++) largest[0] = largest[j] > largest[0] ? largest[j] : largest[0];
    return largest[0];
}

// losses (N) = -log softmax(logits)[target]; a row whose target is negative has loss 0 and gradient 0. logits
// (N, Vp), the first V of them real ones, become scale * dloss/dlogits (0 in the padding) if want_grad;
// otherwise they are not touched.
static inline void classifier(real* losses, real* logits, const int* targets, real scale, int N, int V,
                              int Vp, bool want_grad) {
#pragma omp parallel for schedule(static)
    for (int n = 0; n < N; n++) {
        real* row = logits + (size_t)n * (size_t)Vp;
        losses[n] = 0;
        if (targets[n] < 0) {
            if (want_grad) memset(row, 0, (size_t)Vp * sizeof(real));
            continue;
        }
        real max = largest_of(row, V), sum = 0, target_logit = row[targets[n]];
        if (want_grad) {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) {
                row[v] = exp_real(row[v] - max);
                sum += row[v];
            }
            real factor = scale / sum;
            for (int v = 0; v < V; v++) row[v] *= factor;
            row[targets[n]] -= scale;
            for (int v = V; v < Vp; v++) row[v] = 0;
        } else {
#pragma omp simd reduction(+ : sum)
            for (int v = 0; v < V; v++) sum += exp_real(row[v] - max);
        }
        losses[n] = (real)(log((double)sum) - (double)(target_logit - max));
    }
}
