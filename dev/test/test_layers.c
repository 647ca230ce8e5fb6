// The layers as the program uses them, in fp32: every case of layers_cases.h, then what only fp32 has: the
// exponential, bf16, oneDNN, and the same bits from any number of threads.
#include "dev/test/layers_cases.h" // defines: LAYER_CASES

// ----------------------------------------------------------------------------
// arithmetic

static void test_exp(void** state) {
    (void)state;
    for (int i = -87330; i <= 88370; i++) {
        float x = (float)(i * 1e-3 + 1e-5 * (i % 7));
        if (x < -87.33f || x > 88.37f) continue;
        wide truth = expl((wide)x), ulp = ldexpl(1, ilogbl(truth) - 23);
        if (fabsl(exp_float(x) - truth) > ulp) fail_msg("exp(%.9g) is %.9g", (double)x, (double)exp_float(x));
    }
    assert_true(exp_float(0) == 1 && exp_float(-88) == 0 && exp_float(-1e30f) == 0 &&
                exp_float(-INFINITY) == 0);
    assert_true(isinf(exp_float(89)) && isinf(exp_float(1e30f)) && isinf(exp_float(INFINITY)));
    assert_true(isnan(exp_float(NAN)));
    assert_true(sigmoid_real(-200) == 0 && sigmoid_real(200) == 1 && sigmoid_real(0) == (real)0.5);
}

static void test_bf16(void** state) {
    (void)state;
    for (uint32_t i = 0; i < 0x10000; i++) { // every value is itself; NaNs stay NaNs
        float x = float_from_bf16((uint16_t)i);
        if (isnan(x))
            assert_true(isnan(float_from_bf16(bf16_from_float(x))));
        else
            assert_int_equal(bf16_from_float(x), i);
    }
    for (uint64_t i = 0; i < 100000; i++) { // the nearer of the two neighbours, the even one of a tie
        uint32_t bits = random_bits(1, RANDOM_INIT, 0, i).x[0];
        bits = i % 4 == 0 ? (bits & 0xFFFF0000u) | 0x8000u : bits;
        if ((bits & 0x7F800000u) == 0x7F800000u) continue;
        float x;
        memcpy(&x, &bits, sizeof x);
        uint16_t low = (uint16_t)(bits >> 16), high = (uint16_t)(low + 1);
        uint32_t rest = bits & 0xFFFF;
        uint16_t nearest = rest < 0x8000 || (rest == 0x8000 && low % 2 == 0) ? low : high;
        assert_int_equal(bf16_from_float(x), nearest);
    }
    float quiet;
    uint32_t nan_bits = 0x7F800001; // its upper half alone would be infinity
    memcpy(&quiet, &nan_bits, sizeof quiet);
    assert_true(isnan(float_from_bf16(bf16_from_float(quiet))));
    assert_true(isinf(float_from_bf16(bf16_from_float(FLT_MAX))));
}

// ----------------------------------------------------------------------------
// rope's table, against transformers 4.57's formulas (modeling_rope_utils) evaluated in fp32

static void test_rope_table(void** state) {
    (void)state;
    enum { HS = 64, HALF = HS / 2, T = 100 };
    static const struct {
        RopeConfig config;
        float frequency[4]; // pairs 0, 15, 17, 31
    } cases[] = {
        {{10000, ROPE_SCALING_NONE, 0, 0, 0, 0}, {1, 0.0133352149f, 0.00749894232f, 0.00013335215f}},
        {{10000, ROPE_SCALING_LINEAR, 4, 0, 0, 0}, {0.25f, 0.00333380373f, 0.00187473558f, 3.33380376e-05f}},
        {{500000, ROPE_SCALING_LLAMA3, 32, 1, 4, 8192},
         {1, 0.00129054801f, 9.70828623e-05f, 9.41830649e-08f}},
    };
    static const int pairs[4] = {0, 15, 17, 31};
    float cosines[T * HALF], sines[T * HALF];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        rope_table(cosines, sines, &cases[i].config, T, HS);
        for (int j = 0; j < 4; j++) {
            double frequency = (double)cases[i].frequency[j];
            if (fabs((double)rope_frequency(&cases[i].config, pairs[j], HS) / frequency - 1) > 3e-7)
                fail_msg("rope case %zu, pair %d: frequency %.9g, not %.9g", i, pairs[j],
                         (double)rope_frequency(&cases[i].config, pairs[j], HS), frequency);
            for (int t = 0; t < T; t++) {
                assert_true(fabs((double)cosines[t * HALF + pairs[j]] - cos(t * frequency)) < 1e-5);
                assert_true(fabs((double)sines[t * HALF + pairs[j]] - sin(t * frequency)) < 1e-5);
            }
        }
    }
}

// ----------------------------------------------------------------------------
// matmul

static void test_matmul_fp32(void** state) {
    (void)state;
    matmul_cases(MATMUL_FP32, false);
}
static void test_matmul_bf16(void** state) {
    (void)state;
    matmul_cases(MATMUL_BF16, false);
}
static void test_matmul_bf16_plain(void** state) {
    (void)state;
    matmul_cases(MATMUL_BF16, true);
}

// More shapes than primitives are kept, twice over.
static void test_matmul_many_shapes(void** state) {
    (void)state;
    size_t bytes = matmul_scratch_bytes(MATMUL_FP32, 80, 80, 80);
    Matmul mm;
    void* scratch = aligned_zeros(bytes);
    matmul_init(&mm, MATMUL_FP32, scratch, bytes);
    for (int round = 0; round < 2; round++)
        for (int N = 1; N <= 30; N++) matmul_case(N, 3, 4, true, &mm);
    matmul_free(&mm);
    free(scratch);
}

// One shape in every layout, so that nothing but the layout and the flags tells the primitives apart.
static void test_gemm(void** state) {
    (void)state;
    enum { SIZE = 20, COUNT = SIZE * SIZE };
    real *a = random_reals(COUNT, 1), *b = random_reals(COUNT, 1), *bias = random_reals(SIZE, 1);
    real *start = random_reals(COUNT, 1), *plain = poisoned(COUNT);
    wide *wide_a = widen(a, COUNT), *wide_b = widen(b, COUNT), *truth = (wide*)own(COUNT * sizeof(wide));
    size_t bytes = matmul_scratch_bytes(MATMUL_FP32, SIZE, SIZE, SIZE);
    void* scratch = aligned_zeros(bytes);
    Matmul mm;
    matmul_init(&mm, MATMUL_FP32, scratch, bytes);
    for (int which = 0; which < 12; which++) {
        int a_t = which % 2, b_t = which / 2 % 2, kind = which / 4; // kind: plain, with a bias, accumulating
        Operand x = {a, NULL, a_t}, y = {b, NULL, b_t};
        real* out = kind == 2 ? copy_of(start, COUNT) : poisoned(COUNT);
        gemm(out, x, y, kind == 1 ? bias : NULL, SIZE, SIZE, SIZE, kind == 2, &mm);
        plain_product(plain, a, b, SIZE, SIZE, SIZE, a_t, b_t);
        true_product(truth, wide_a, wide_b, SIZE, SIZE, SIZE, a_t, b_t);
        for (int i = 0; i < COUNT; i++) {
            real more = kind == 0 ? 0 : kind == 1 ? bias[i % SIZE] : start[i];
            plain[i] += more, truth[i] += more;
        }
        assert_accurate("gemm", out, plain, truth, COUNT);
    }
    matmul_free(&mm);
    free(scratch);
}

// matmul_keep: the products with a weight use the copy made then, until it is released; others do not.
static void test_matmul_keep(void** state) {
    (void)state;
    enum { N = 5, C = 33, OC = 50 };
    real *inp = random_reals(N * C, 1), *weight = random_reals(OC * C, 1), *other = random_reals(OC * C, 1);
    real *dout = random_reals(N * OC, 1), *dweight = random_reals(OC * C, 1);
    for (int compute = MATMUL_FP32; compute <= MATMUL_BF16; compute++) {
        size_t bytes = matmul_scratch_bytes(compute, N, C, OC);
        void* scratch = aligned_zeros(bytes);
        uint16_t* copy = compute == MATMUL_BF16 ? (uint16_t*)own(OC * C * sizeof(uint16_t)) : NULL;
        Matmul mm;
        matmul_init(&mm, compute, scratch, bytes);
        real *out = poisoned(N * OC), *dinp = poisoned(N * C), *expected = poisoned(N * OC),
             *dexpected = poisoned(N * C);
        matmul_forward(expected, inp, weight, NULL, N, C, OC, &mm);
        matmul_backward(dexpected, dweight, NULL, dout, inp, weight, N, C, OC, &mm);
        real* was = copy_of(weight, OC * C);
        matmul_keep(&mm, weight, OC * C, copy);
        if (compute == MATMUL_BF16) memset(weight, 0, OC * C * sizeof(real));
        matmul_forward(out, inp, weight, NULL, N, C, OC, &mm);
        matmul_backward(dinp, dweight, NULL, dout, inp, weight, N, C, OC, &mm);
        assert_memory_equal(out, expected, N * OC * sizeof(real));
        assert_memory_equal(dinp, dexpected, N * C * sizeof(real));
        matmul_forward(out, inp, other, NULL, N, C, OC, &mm);
        assert_memory_not_equal(out, expected, N * OC * sizeof(real));
        matmul_release(&mm);
        memcpy(weight, other, OC * C * sizeof(real));
        matmul_forward(expected, inp, weight, NULL, N, C, OC, &mm);
        assert_memory_equal(out, expected, N * OC * sizeof(real));
        memcpy(weight, was, OC * C * sizeof(real));
        matmul_free(&mm);
        free(scratch);
    }
}

// ----------------------------------------------------------------------------
// threads: every layer that is ours gives the same bits from one, two or three of them

enum {
    TB = 2,
    TT = 70,
    TN = TB * TT,
    TC = 300,
    TNH = 6,
    TNKV = 3,
    THS = 25,
    TQKV = (TNH + 2 * TNKV) * THS,
    TFF = 90
};
enum { TV = 500, TVp = 512, OUTPUTS = 24 };

typedef struct {
    real* data[OUTPUTS];
    size_t sizes[OUTPUTS];
    int count;
} Outputs;

static real* output(Outputs* o, size_t n) {
    CHECK(o->count < OUTPUTS);
    o->sizes[o->count] = n;
    real* x = (real*)own(n * sizeof(real));
    for (size_t i = 0; i < n; i++) x[i] = (real)(i % 17) / 7; // for those that are added to
    return o->data[o->count++] = x;
}

static Outputs run_every_layer(const real* x, const int* tokens, int threads) {
    omp_set_num_threads(threads);
    Outputs o = {.count = 0};
    void* attention_scratch = own(attention_scratch_bytes(TT, THS));
    Matmul mm;
    size_t bytes = matmul_scratch_bytes(MATMUL_BF16, TN, TC, TFF);
    void* scratch = aligned_zeros(bytes);
    matmul_init(&mm, MATMUL_BF16, scratch, bytes);
    mm.plain = true;
    float cosines[TT * (THS / 2)], sines[TT * (THS / 2)];
    RopeConfig rope = {10000, ROPE_SCALING_NONE, 0, 0, 0, 0};
    rope_table(cosines, sines, &rope, TT, THS);
    embedding_forward(output(&o, TN * TC), tokens, x, x + 7, TB, TT, TC);
    real* dwte = output(&o, TV * TC);
    embedding_backward(dwte, output(&o, TT * TC), x, tokens, TB, TT, TC);
    real *norm = output(&o, TN * TC), *mean = output(&o, TN), *rstd = output(&o, TN);
    norm_forward(norm, mean, rstd, x, x + 1, x + 2, TN, TC, NORM_EPS, NORM_LAYERNORM);
    real *dnorm = output(&o, TN * TC), *dweight = output(&o, TC);
    norm_backward(dnorm, dweight, output(&o, TC), x + 5, x, x + 1, mean, rstd, TN, TC, NORM_LAYERNORM);
    real *qkv = output(&o, TN * TQKV), *att = output(&o, TN * TNH * THS), *lse = output(&o, TN * TNH);
    memcpy(qkv, x, TN * TQKV * sizeof(real));
    rope_forward(qkv, cosines, sines, 0, TB, TT, TNH, TNKV, THS);
    attention_forward(att, lse, attention_scratch, qkv, NULL, TB, TT, TNH, TNKV, THS);
    attention_backward(output(&o, TN * TQKV), attention_scratch, x + 3, qkv, att, lse, NULL, TB, TT, TNH,
                       TNKV, THS);
    real *dinp = output(&o, TN * TC), *dw = output(&o, TFF * TC), *db = output(&o, TFF),
         *fc = output(&o, TN * TFF);
    matmul_forward(fc, x, x + 100, x + 9, TN, TC, TFF, &mm);
    matmul_backward(dinp, dw, db, x + 50, x, x + 100, TN, TC, TFF, &mm);
    activation_forward(output(&o, TN * TFF), x, TN, TFF, ACTIVATION_SWIGLU);
    real* logits = output(&o, TN * TVp);
    memcpy(logits, x, TN * TVp * sizeof(real));
    classifier(output(&o, TN), logits, tokens, (real)0.1, TN, TV, TVp, true);
    real* norm_squared = output(&o, 2);
    double sum = global_norm_squared(x, TN * TVp);
    memcpy(norm_squared, &sum, sizeof sum);
    matmul_free(&mm);
    free(scratch);
    return o;
}

static void test_threads(void** state) {
    (void)state;
    int threads_before = omp_get_max_threads();
    real* x = random_reals(TN * TVp + TV * TC, 1);
    int tokens[TN];
    for (int n = 0; n < TN; n++) tokens[n] = n * n % TV;
    Outputs one = run_every_layer(x, tokens, 1);
    for (int threads = 2; threads <= 3; threads++) {
        Outputs more = run_every_layer(x, tokens, threads);
        for (int i = 0; i < one.count; i++)
            if (memcmp(more.data[i], one.data[i], one.sizes[i] * sizeof(real)) != 0)
                fail_msg("output %d is another with %d threads", i, threads);
    }
    omp_set_num_threads(threads_before);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        LAYER_CASES,
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_bf16),
        cmocka_unit_test(test_rope_table),
        cmocka_unit_test_teardown(test_matmul_fp32, release_all),
        cmocka_unit_test_teardown(test_matmul_bf16, release_all),
        cmocka_unit_test_teardown(test_matmul_bf16_plain, release_all),
        cmocka_unit_test_teardown(test_matmul_many_shapes, release_all),
        cmocka_unit_test_teardown(test_gemm, release_all),
        cmocka_unit_test_teardown(test_matmul_keep, release_all),
        cmocka_unit_test_teardown(test_threads, release_all),
    };
    return cmocka_run_group_tests_name("layers", tests, NULL, NULL);
}
