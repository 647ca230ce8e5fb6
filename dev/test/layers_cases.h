// Every layer in every option, in the precision REAL this is compiled for:
//   forward   the error against long double is at most twice the naive formula's in REAL, plus one ulp of the
//             largest output;
//   backward  central differences of the naive formula in long double.
// Outputs that are set (=) start as NaN, those that are added to (+=) start as random numbers.
#include "llmc/layers_cpu.h"    // defines: every layer
#include "llmc/optimizer_cpu.h" // defines: adamw_update, global_norm_squared
#include "llmc/rand.h"          // defines: random_uniform, RANDOM_INIT
#include <float.h>
#include <setjmp.h>
#include <cmocka.h> // last: it makes `fail` a macro

typedef long double wide;
#define NUM real
#define NAIVE(f) plain_##f
#include "dev/test/layers_naive.h" // defines: plain_product, plain_norm, ...
#undef NUM
#undef NAIVE
#define NUM wide
#define NAIVE(f) true_##f
#include "dev/test/layers_naive.h" // defines: true_product, true_norm, ...
#undef NUM
#undef NAIVE

enum { INPUTS = 3 };
static const bool in_double = sizeof(real) == sizeof(double);

// ----------------------------------------------------------------------------
// arrays: exactly as long as the layer is told, so that AddressSanitizer sees every step beyond; freed
// together

static void* owned[4096];
static int owned_count;

static void* own(size_t bytes) {
    CHECK(owned_count < 4096);
    return owned[owned_count++] = malloc_check(bytes);
}
static int release_all(void** state) {
    (void)state;
    while (owned_count > 0) free(owned[--owned_count]);
    return 0;
}
static real* random_reals(size_t n, double scale) {
    static uint64_t arrays;
    real* x = (real*)own(n * sizeof(real));
    for (size_t i = 0; i < n; i++) x[i] = (real)(scale * (2 * random_uniform(1, RANDOM_INIT, arrays, i) - 1));
    arrays++;
    return x;
}
static real* poisoned(size_t n) {
    real* x = (real*)own(n * sizeof(real));
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}
static real* copy_of(const real* x, size_t n) {
    return (real*)memcpy(own(n * sizeof(real)), x, n * sizeof(real));
}
static wide* widen(const real* x, size_t n) {
    if (x == NULL) return NULL;
    wide* w = (wide*)own(n * sizeof(wide));
    for (size_t i = 0; i < n; i++) w[i] = x[i];
    return w;
}

// ----------------------------------------------------------------------------
// judgement

static wide largest(const wide* x, size_t n) {
    wide max = 0;
    for (size_t i = 0; i < n; i++) max = fabsl(x[i]) > max ? fabsl(x[i]) : max;
    return max;
}

// relative: each element by its own size instead of the largest's, down to 1e-30
static void assert_errors(const char* what, const real* ours, const real* plain, const wide* truth, size_t n,
                          bool relative) {
    wide plain_error = 0, all = largest(truth, n);
    for (size_t i = 0; i < n; i++) {
        wide scale = relative ? fmaxl(fabsl(truth[i]), 1e-30L) : all;
        if (scale > 0) plain_error = fmaxl(plain_error, fabsl(plain[i] - truth[i]) / scale);
    }
    wide allowed = 2 * plain_error + (in_double ? (wide)DBL_EPSILON : (wide)FLT_EPSILON);
    for (size_t i = 0; i < n; i++) {
        wide scale = relative ? fmaxl(fabsl(truth[i]), 1e-30L) : all;
        if (!(fabsl(ours[i] - truth[i]) <= allowed * scale))
            fail_msg("%s: element %zu of %zu is %.9g, not %.9Lg; an error of %.2Lg is allowed", what, i, n,
                     (double)ours[i], truth[i], allowed * scale);
    }
}
static void assert_accurate(const char* what, const real* ours, const real* plain, const wide* truth,
                            size_t n) {
    assert_errors(what, ours, plain, truth, n, false);
}

static void assert_close(const char* what, const real* ours, const wide* truth, size_t n, wide tolerance) {
    wide allowed = tolerance * largest(truth, n);
    for (size_t i = 0; i < n; i++)
        if (!(fabsl(ours[i] - truth[i]) <= allowed))
            fail_msg("%s: element %zu of %zu is %.9g, not %.9Lg", what, i, n, (double)ours[i], truth[i]);
}

// The sizes and options of one case; what a naive formula needs beside its inputs.
typedef struct {
    int B, T, N, C, NH, NKV, HS, FF, V, Vp, kind;
    const int *tokens, *doc_start;
    const float *cosines, *sines;
} Shape;
typedef void (*Formula)(wide* out, wide* const* inputs, const Shape* s);

// gradient (n) of sum(dout * formula) by its input `which`, less what it started from, against central
// differences; of a large array 300 elements spread over it.
static void assert_gradient(const char* what, const real* gradient, const real* start, Formula formula,
                            wide* const* inputs, int which, size_t n, const real* dout, size_t out_n,
                            const Shape* s) {
    const wide step = 1e-5L;
    enum { SAMPLE = 300 };
    size_t stride = n > SAMPLE ? n / SAMPLE : 1, count = n > SAMPLE ? SAMPLE : n;
    wide* out = (wide*)own(out_n * sizeof(wide));
    wide* numeric = (wide*)own(count * sizeof(wide));
    real* ours = (real*)own(count * sizeof(real));
    for (size_t j = 0; j < count; j++) {
        size_t i = j * stride;
        wide* x = inputs[which] + i;
        wide was = *x, difference = 0;
        for (int sign = -1; sign <= 1; sign += 2) {
            *x = was + sign * step;
            formula(out, inputs, s);
            for (size_t o = 0; o < out_n; o++) difference += sign * out[o] * dout[o];
        }
        *x = was;
        numeric[j] = difference / (2 * step) + (start != NULL ? start[i] : 0);
        ours[j] = gradient[i];
    }
    assert_close(what, ours, numeric, count, in_double ? 1e-9L : 1e-5L);
}

// ----------------------------------------------------------------------------
// embedding

static void embedding_formula(wide* out, wide* const* x, const Shape* s) {
    true_embedding(out, x[0], x[1], s->tokens, s->B, s->T, s->C);
}

static void test_embedding(void** state) {
    (void)state;
    enum { V = 7 };
    for (int with_positions = 0; with_positions < 2; with_positions++) {
        Shape s = {.B = 3, .T = 5, .C = 200};
        int tokens[15];
        for (int n = 0; n < 15; n++) tokens[n] = n * n % V; // several of a kind
        s.tokens = tokens;
        size_t out_n = 15 * 200, wte_n = V * 200, wpe_n = 5 * 200;
        real *wte = random_reals(wte_n, 1), *wpe = with_positions ? random_reals(wpe_n, 1) : NULL;
        real *out = poisoned(out_n), *plain = poisoned(out_n);
        embedding_forward(out, tokens, wte, wpe, s.B, s.T, s.C);
        plain_embedding(plain, wte, wpe, tokens, s.B, s.T, s.C);
        assert_memory_equal(out, plain, out_n * sizeof(real));
        real *dout = random_reals(out_n, 1), *dwte = random_reals(wte_n, 1);
        real* dwpe = with_positions ? random_reals(wpe_n, 1) : NULL;
        real *dwte_start = copy_of(dwte, wte_n), *dwpe_start = with_positions ? copy_of(dwpe, wpe_n) : NULL;
        embedding_backward(dwte, dwpe, dout, tokens, s.B, s.T, s.C);
        wide* x[INPUTS] = {widen(wte, wte_n), widen(wpe, wpe_n)};
        assert_gradient("dwte", dwte, dwte_start, embedding_formula, x, 0, wte_n, dout, out_n, &s);
        if (with_positions)
            assert_gradient("dwpe", dwpe, dwpe_start, embedding_formula, x, 1, wpe_n, dout, out_n, &s);
        release_all(NULL);
    }
}

// ----------------------------------------------------------------------------
// norm

static const real NORM_EPS = (real)1e-5;

static void norm_formula(wide* out, wide* const* x, const Shape* s) {
    true_norm(out, x[0], x[1], x[2], s->N, s->C, NORM_EPS, s->kind);
}

static void norm_case(int N, int C, int kind, bool with_bias) {
    Shape s = {.N = N, .C = C, .kind = kind};
    size_t n = (size_t)N * (size_t)C, width = (size_t)C;
    real *inp = random_reals(n, 2), *weight = random_reals(width, 1);
    real* bias = with_bias ? random_reals(width, 1) : NULL;
    real *out = poisoned(n), *plain = poisoned(n), *rstd = poisoned((size_t)N);
    real* mean = kind == NORM_LAYERNORM ? poisoned((size_t)N) : NULL;
    for (int c = 0; c < C; c++) inp[c] += 30; // a row far from zero
    wide* x[INPUTS] = {widen(inp, n), widen(weight, width), widen(bias, width)};
    wide* truth = (wide*)own(n * sizeof(wide));
    norm_forward(out, mean, rstd, inp, weight, bias, N, C, NORM_EPS, kind);
    plain_norm(plain, inp, weight, bias, N, C, NORM_EPS, kind);
    norm_formula(truth, x, &s);
    assert_accurate("norm", out, plain, truth, n);

    real *a = random_reals(n, 1), *b = poisoned(n), *residual = poisoned(n), *fused = poisoned(n);
    for (size_t i = 0; i < n; i++) b[i] = inp[i] - a[i], inp[i] = a[i] + b[i];
    norm_forward(out, mean, rstd, inp, weight, bias, N, C, NORM_EPS, kind);
    residual_norm_forward(residual, fused, mean, rstd, a, b, weight, bias, N, C, NORM_EPS, kind);
    assert_memory_equal(residual, inp, n * sizeof(real));
    assert_memory_equal(fused, out, n * sizeof(real));
    residual_norm_forward(a, fused, mean, rstd, a, b, weight, bias, N, C, NORM_EPS, kind); // in place
    assert_memory_equal(a, inp, n * sizeof(real));
    assert_memory_equal(fused, out, n * sizeof(real));

    x[0] = widen(inp, n);
    real *dout = random_reals(n, 1), *dinp = random_reals(n, 1), *dweight = random_reals(width, 1);
    real* dbias = with_bias ? random_reals(width, 1) : NULL;
    real *dinp_start = copy_of(dinp, n), *dweight_start = copy_of(dweight, width);
    real* dbias_start = with_bias ? copy_of(dbias, width) : NULL;
    norm_backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, N, C, kind);
    assert_gradient("dinp of norm", dinp, dinp_start, norm_formula, x, 0, n, dout, n, &s);
    assert_gradient("dweight of norm", dweight, dweight_start, norm_formula, x, 1, width, dout, n, &s);
    if (with_bias)
        assert_gradient("dbias of norm", dbias, dbias_start, norm_formula, x, 2, width, dout, n, &s);
    release_all(NULL);
}

static void test_norm(void** state) {
    (void)state;
    for (int kind = NORM_LAYERNORM; kind <= NORM_RMSNORM; kind++)
        for (int with_bias = 0; with_bias < 2; with_bias++) {
            norm_case(1, 2, kind, with_bias);
            norm_case(5, 33, kind, with_bias);
            norm_case(20, 300, kind, with_bias);
        }
}

// ----------------------------------------------------------------------------
// matmul

static void matmul_case(int N, int C, int OC, bool with_bias, Matmul* mm) {
    size_t inp_n = (size_t)(N * C), weight_n = (size_t)(OC * C), out_n = (size_t)(N * OC);
    real *inp = random_reals(inp_n, 1), *weight = random_reals(weight_n, 1), *out = poisoned(out_n);
    real* bias = with_bias ? random_reals((size_t)OC, 1) : NULL;
    real *dout = random_reals(out_n, 1), *dinp = poisoned(inp_n), *dweight = random_reals(weight_n, 1);
    real* dbias = with_bias ? random_reals((size_t)OC, 1) : NULL;
    real *dweight_start = copy_of(dweight, weight_n),
         *dbias_start = with_bias ? copy_of(dbias, (size_t)OC) : NULL;
    matmul_forward(out, inp, weight, bias, N, C, OC, mm);
    matmul_backward(dinp, dweight, dbias, dout, inp, weight, N, C, OC, mm);
    real* dweight_alone = copy_of(dweight_start, weight_n);
    matmul_backward(NULL, dweight_alone, NULL, dout, inp, weight, N, C, OC, mm);
    assert_memory_equal(dweight_alone, dweight, weight_n * sizeof(real));
    if (with_bias)
        for (int c = 0; c < OC; c++) {
            wide sum = dbias_start[c], size = fabsl(sum);
            for (int n = 0; n < N; n++) sum += dout[n * OC + c], size += fabsl((wide)dout[n * OC + c]);
            assert_true(fabsl(dbias[c] - sum) <= size * (in_double ? 1e-14L : 1e-6L));
        }
    if (mm->compute == MATMUL_BF16) { // the operands as the product must see them
        real* arrays[3] = {inp, weight, dout};
        size_t counts[3] = {inp_n, weight_n, out_n};
        for (int a = 0; a < 3; a++)
            for (size_t i = 0; i < counts[a]; i++)
                arrays[a][i] = (real)float_from_bf16(bf16_from_float((float)arrays[a][i]));
    }
    wide *x = widen(inp, inp_n), *w = widen(weight, weight_n), *dy = widen(dout, out_n);
    wide* truth = (wide*)own((inp_n + weight_n + out_n) * sizeof(wide));
    real* plain = poisoned(inp_n + weight_n + out_n);
    plain_product(plain, inp, weight, N, OC, C, false, true);
    true_product(truth, x, w, N, OC, C, false, true);
    for (size_t i = 0; i < out_n && with_bias; i++)
        plain[i] += bias[i % (size_t)OC], truth[i] += bias[i % (size_t)OC];
    assert_accurate("matmul", out, plain, truth, out_n);
    plain_product(plain, dout, weight, N, C, OC, false, false);
    true_product(truth, dy, w, N, C, OC, false, false);
    assert_accurate("dinp of matmul", dinp, plain, truth, inp_n);
    plain_product(plain, dout, inp, OC, C, N, true, false);
    true_product(truth, dy, x, OC, C, N, true, false);
    for (size_t i = 0; i < weight_n; i++) plain[i] += dweight_start[i], truth[i] += dweight_start[i];
    assert_accurate("dweight of matmul", dweight, plain, truth, weight_n);
    release_all(NULL);
}

// Every product, with oneDNN where it is built in (plain false) or the C loops.
static void matmul_cases(int compute, bool plain) {
    static const int sizes[][3] = {{1, 1, 1},    {5, 33, 50},     {1, 7, 3},
                                   {37, 12, 36}, {130, 300, 261}, {1, 300, 70}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (int with_bias = 0; with_bias < 2; with_bias++) {
            int N = sizes[i][0], C = sizes[i][1], OC = sizes[i][2];
            size_t bytes = matmul_scratch_bytes(compute, N, C, OC);
            void* scratch = aligned_zeros(bytes);
            memset(scratch, 0xFF, bytes);
            Matmul mm;
            matmul_init(&mm, compute, scratch, bytes);
            mm.plain = plain;
            matmul_case(N, C, OC, with_bias, &mm);
            matmul_free(&mm);
            free(scratch);
        }
}

static void test_matmul_plain(void** state) {
    (void)state;
    matmul_cases(MATMUL_FP32, true);
}

// ----------------------------------------------------------------------------
// rope

enum { ROPE_OFFSET = 3 };

static void rope_formula(wide* out, wide* const* x, const Shape* s) {
    true_rope(out, x[0], s->cosines, s->sines, ROPE_OFFSET, s->B, s->T, s->NH, s->NKV, s->HS);
}

static void test_rope(void** state) {
    (void)state;
    Shape s = {.B = 2, .T = 9, .NH = 4, .NKV = 2, .HS = 12};
    size_t n = 2 * 9 * 8 * 12, angles = (9 + ROPE_OFFSET) * 6;
    float *cosines = (float*)own(angles * sizeof(float)), *sines = (float*)own(angles * sizeof(float));
    RopeConfig config = {10000, ROPE_SCALING_NONE, 0, 0, 0, 0};
    rope_table(cosines, sines, &config, 9 + ROPE_OFFSET, s.HS);
    s.cosines = cosines, s.sines = sines;
    real *qkv = random_reals(n, 1), *plain = poisoned(n), *dqkv = random_reals(n, 1),
         *dout = copy_of(dqkv, n);
    wide *x[INPUTS] = {widen(qkv, n)}, *truth = (wide*)own(n * sizeof(wide));
    plain_rope(plain, qkv, cosines, sines, ROPE_OFFSET, s.B, s.T, s.NH, s.NKV, s.HS);
    rope_formula(truth, x, &s);
    rope_forward(qkv, cosines, sines, ROPE_OFFSET, s.B, s.T, s.NH, s.NKV, s.HS);
    assert_accurate("rope", qkv, plain, truth, n);
    rope_backward(dqkv, cosines, sines, ROPE_OFFSET, s.B, s.T, s.NH, s.NKV, s.HS);
    assert_gradient("dqkv of rope", dqkv, NULL, rope_formula, x, 0, n, dout, n, &s);
}

// ----------------------------------------------------------------------------
// attention

static void attention_formula(wide* out, wide* const* x, const Shape* s) {
    size_t lse_n = (size_t)(s->B * s->NH * s->T);
    wide* lse = (wide*)malloc_check(lse_n * sizeof(wide));
    true_attention(out, lse, x[0], s->doc_start, s->B, s->T, s->NH, s->NKV, s->HS);
    free(lse);
}

static void attention_case(Shape s, bool with_documents) {
    size_t rows = (size_t)(s.B * s.T), qkv_n = rows * (size_t)((s.NH + 2 * s.NKV) * s.HS);
    size_t out_n = rows * (size_t)(s.NH * s.HS), lse_n = rows * (size_t)s.NH;
    int* starts = (int*)own(rows * sizeof(int));
    for (int n = 0; n < s.B * s.T; n++) { // documents of 50 tokens, one from the last key of a tile on
        int t = n % s.T, b = n / s.T;
        starts[n] = t == 0 ? 0 : (t + 17 * b) % 50 == 13 ? t : starts[n - 1];
    }
    s.doc_start = with_documents ? starts : NULL;
    real *qkv = random_reals(qkv_n, 1.5), *out = poisoned(out_n), *lse = poisoned(lse_n);
    real *plain = poisoned(out_n), *plain_lse = poisoned(lse_n), *dqkv = poisoned(qkv_n);
    real* dout = random_reals(out_n, 1);
    wide *truth = (wide*)own(out_n * sizeof(wide)), *true_lse = (wide*)own(lse_n * sizeof(wide));
    wide* x[INPUTS] = {widen(qkv, qkv_n)};
    size_t scratch_bytes = attention_scratch_bytes(s.T, s.HS);
    void* scratch = memset(own(scratch_bytes), 0xFF, scratch_bytes); // NaNs
    attention_forward(out, lse, scratch, qkv, s.doc_start, s.B, s.T, s.NH, s.NKV, s.HS);
    plain_attention(plain, plain_lse, qkv, s.doc_start, s.B, s.T, s.NH, s.NKV, s.HS);
    true_attention(truth, true_lse, x[0], s.doc_start, s.B, s.T, s.NH, s.NKV, s.HS);
    assert_accurate("attention", out, plain, truth, out_n);
    assert_accurate("log-sum-exp of attention", lse, plain_lse, true_lse, lse_n);
    memset(scratch, 0xFF, scratch_bytes);
    attention_backward(dqkv, scratch, dout, qkv, out, lse, s.doc_start, s.B, s.T, s.NH, s.NKV, s.HS);
    for (size_t i = 0; i < qkv_n; i++) assert_true(isfinite(dqkv[i]));
    assert_gradient("dqkv", dqkv, NULL, attention_formula, x, 0, qkv_n, dout, out_n, &s);
    release_all(NULL);
}

static void test_attention(void** state) {
    (void)state;
    static const Shape shapes[] = {
        {.B = 1, .T = 1, .NH = 1, .NKV = 1, .HS = 12},  {.B = 2, .T = 37, .NH = 4, .NKV = 2, .HS = 12},
        {.B = 1, .T = 64, .NH = 2, .NKV = 2, .HS = 16}, {.B = 1, .T = 66, .NH = 1, .NKV = 1, .HS = 40},
        {.B = 1, .T = 131, .NH = 2, .NKV = 1, .HS = 8},
    };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
        for (int with_documents = 0; with_documents < 2; with_documents++)
            attention_case(shapes[i], with_documents);
}

// What a decoding step sees is the last row of a sequence.
static void test_attention_decode(void** state) {
    (void)state;
    enum { T = 70, NH = 4, NKV = 2, HS = 12, STRIDE = (NH + 2 * NKV) * HS, KV = NKV * HS };
    real *qkv = random_reals(T * STRIDE, 1.5), *out = poisoned(T * NH * HS);
    real *k_cache = poisoned(T * KV), *v_cache = poisoned(T * KV), *plain = poisoned(T * NH * HS);
    wide* truth = (wide*)own(T * NH * HS * sizeof(wide));
    real* plain_lse = poisoned(T * NH);
    wide *true_lse = (wide*)own(T * NH * sizeof(wide)), *x = widen(qkv, T * STRIDE);
    plain_attention(plain, plain_lse, qkv, NULL, 1, T, NH, NKV, HS);
    true_attention(truth, true_lse, x, NULL, 1, T, NH, NKV, HS);
    for (int t = 0; t < T; t++) {
        const real* token = qkv + t * STRIDE;
        memcpy(k_cache + t * KV, token + NH * HS, KV * sizeof(real));
        memcpy(v_cache + t * KV, token + (NH + NKV) * HS, KV * sizeof(real));
        attention_decode(out + t * NH * HS, token, k_cache, v_cache, t + 1, NH, NKV, HS);
    }
    assert_accurate("decode", out, plain, truth, T * NH * HS);
}

// ----------------------------------------------------------------------------
// activation

static void activation_formula(wide* out, wide* const* x, const Shape* s) {
    true_activation(out, x[0], s->N, s->FF, s->kind);
}

static void test_activation(void** state) {
    (void)state;
    static const real extremes[] = {0, 1, -5, 9, -9, 12, -12, 30, -30, 88, -88, 100, -100};
    for (int kind = ACTIVATION_GELU_TANH; kind <= ACTIVATION_SWIGLU; kind++) {
        Shape s = {.N = 5, .FF = 33, .kind = kind};
        size_t out_n = 5 * 33, inp_n = kind == ACTIVATION_SWIGLU ? 2 * out_n : out_n;
        real *inp = random_reals(inp_n, 2), *out = poisoned(out_n), *plain = poisoned(out_n);
        real *dout = random_reals(out_n, 1), *dinp = poisoned(inp_n);
        for (int i = 0; i < 13; i++) inp[33 * 2 * (kind == ACTIVATION_SWIGLU) + 33 + i] = extremes[i];
        wide *x[INPUTS] = {widen(inp, inp_n)}, *truth = (wide*)own(out_n * sizeof(wide));
        activation_forward(out, inp, s.N, s.FF, kind);
        plain_activation(plain, inp, s.N, s.FF, kind);
        activation_formula(truth, x, &s);
        assert_errors("activation", out, plain, truth, out_n, true); // the tails too
        if (kind == ACTIVATION_GELU_TANH)                            // 0.5 (1 + tanh(sqrt(2 / pi) 1.044715))
            assert_true(fabsl(out[34] - 0.84119199060827676L) < (in_double ? 1e-15L : 1e-7L));
        activation_backward(dinp, dout, inp, s.N, s.FF, kind);
        assert_gradient("dinp of activation", dinp, NULL, activation_formula, x, 0, inp_n, dout, out_n, &s);
        if (kind == ACTIVATION_GELU_TANH) {
            activation_backward(dout, dout, inp, s.N, s.FF, kind); // in place
            assert_memory_equal(dout, dinp, out_n * sizeof(real));
        }
        release_all(NULL);
    }
}

// ----------------------------------------------------------------------------
// classifier

static void classifier_formula(wide* out, wide* const* x, const Shape* s) {
    true_classifier(out, x[0], s->tokens, s->N, s->V, s->Vp);
}

static void test_classifier(void** state) {
    (void)state;
    enum { N = 5, V = 150, Vp = 192 };
    Shape s = {.N = N, .V = V, .Vp = Vp};
    int targets[N] = {3, -1, 149, 0, 7};
    s.tokens = targets;
    real *logits = random_reals(N * Vp, 3), *losses = poisoned(N), *plain = poisoned(N),
         *dlosses = poisoned(N);
    const real scale = (real)0.37;
    for (int n = 0; n < N; n++) dlosses[n] = scale;
    for (int n = 0; n < N; n++) logits[n * Vp + 5] += 20; // one likely token, and 4 rows that miss it
    targets[4] = 5;
    wide *x[INPUTS] = {widen(logits, N * Vp)}, truth[N];
    for (int n = 0; n < N; n++)
        for (int v = V; v < Vp; v++) logits[n * Vp + v] = v % 2 == 0 ? NAN : (real)1e30;
    plain_classifier(plain, logits, targets, N, V, Vp);
    classifier_formula(truth, x, &s);
    real* untouched = copy_of(logits, N * Vp);
    classifier(losses, logits, targets, scale, N, V, Vp, false);
    assert_accurate("loss", losses, plain, truth, N);
    assert_memory_equal(logits, untouched, N * Vp * sizeof(real));
    real* again = poisoned(N);
    classifier(again, logits, targets, scale, N, V, Vp, true);
    assert_memory_equal(again, losses, N * sizeof(real));
    assert_true(losses[1] == 0);
    for (int v = 0; v < Vp; v++) assert_true(logits[Vp + v] == 0);
    for (int n = 0; n < N; n++)
        for (int v = V; v < Vp; v++) assert_true(logits[n * Vp + v] == 0);
    assert_gradient("dlogits", logits, NULL, classifier_formula, x, 0, N * Vp, dlosses, N, &s);
    real* far = poisoned(Vp); // logits whose exponentials overflow, the largest last
    for (int v = 0; v < V; v++) far[v] = (real)(10 * v);
    targets[0] = V - 4;
    classifier(losses, far, targets, scale, 1, V, Vp, true);
    assert_true(fabsl(losses[0] - (30 + logl((1 - expl(-10 * V)) / (1 - expl(-10))))) < 1e-5L);
}

// ----------------------------------------------------------------------------
// optimizer

static void test_adamw(void** state) {
    (void)state;
    enum { N = 37, STEPS = 3 };
    const double lr = 1e-2, beta1 = 0.9, beta2 = 0.95, eps = 1e-3, decay = 0.1, grad_scale = 0.5;
    real *params = random_reals(N, 1), *m = random_reals(N, 0), *v = random_reals(N, 0);
    wide *p = widen(params, N), *wide_m = widen(m, N), *wide_v = widen(v, N);
    for (int step = 1; step <= STEPS; step++) {
        real* grads = random_reals(N, 1);
        for (int i = 0; i < N; i++) {
            wide g = (wide)grads[i] * grad_scale;
            wide_m[i] = beta1 * wide_m[i] + (1 - beta1) * g;
            wide_v[i] = beta2 * wide_v[i] + (1 - beta2) * g * g;
            wide m_hat = wide_m[i] / (1 - powl(beta1, step)), v_hat = wide_v[i] / (1 - powl(beta2, step));
            p[i] -= lr * (m_hat / (sqrtl(v_hat) + eps) + decay * p[i]);
        }
        adamw_update(params, grads, m, v, N, lr, beta1, beta2, eps, decay, grad_scale, step);
        for (int i = 0; i < N; i++) assert_true(grads[i] == 0);
    }
    wide tolerance = in_double ? 1e-15L : 5e-7L;
    assert_close("parameters", params, p, N, tolerance);
    assert_close("first moment", m, wide_m, N, tolerance);
    assert_close("second moment", v, wide_v, N, tolerance);
}

static void test_global_norm(void** state) {
    (void)state;
    static const size_t counts[] = {0, 1, 255, 256, 257, 100003};
    for (size_t k = 0; k < sizeof counts / sizeof counts[0]; k++) {
        real* grads = random_reals(counts[k], 1);
        wide sum = 0;
        for (size_t i = 0; i < counts[k]; i++) sum += (wide)grads[i] * grads[i];
        assert_true(fabsl(global_norm_squared(grads, counts[k]) - sum) <= 1e-14L * sum);
        release_all(NULL);
    }
}

#define LAYER_CASES                                                                                          \
    cmocka_unit_test_teardown(test_embedding, release_all),                                                  \
        cmocka_unit_test_teardown(test_norm, release_all),                                                   \
        cmocka_unit_test_teardown(test_matmul_plain, release_all),                                           \
        cmocka_unit_test_teardown(test_rope, release_all),                                                   \
        cmocka_unit_test_teardown(test_attention, release_all),                                              \
        cmocka_unit_test_teardown(test_attention_decode, release_all),                                       \
        cmocka_unit_test_teardown(test_activation, release_all),                                             \
        cmocka_unit_test_teardown(test_classifier, release_all),                                             \
        cmocka_unit_test_teardown(test_adamw, release_all),                                                  \
        cmocka_unit_test_teardown(test_global_norm, release_all)
