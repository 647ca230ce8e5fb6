// Matmuls through cuBLASLt: every shape of product, every epilogue, accumulation, the fallback for bias
// gradients, and autotuning. The yardstick is the plain product in fp32, from left to right, stored in floatX.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, judge, tap_check, random_values, to_device, to_host ...
#include "llmc/matmul.cuh"           // defines: Matmul, matmul_forward, matmul_backward ...

struct MatmulCase {
    int N, C, OC;
    bool bias;
};
static const MatmulCase matmul_cases[] = {
    {1, 8, 8, true},     {1, 64, 24, false},   {37, 64, 192, true}, {37, 128, 192, true},
    {40, 256, 64, true}, {130, 72, 96, false}, {9, 40, 1304, true}, {300, 128, 64, true},
};
enum { WIDEST_OC = 1304 };

static Matmul* matmul_context(const char* choices, int compute) {
    static Matmul mm;
    Error err = {0, {0}};
    if (!matmul_init(&mm, compute, own_device<char>(matmul_workspace_bytes()),
                     poisoned_device<float>(matmul_bias_scratch(WIDEST_OC)), choices, test_stream, &err))
        exit_with(&err);
    return &mm;
}
static const int matmul_compute = sizeof(floatX) == sizeof(float) ? COMPUTE_FP32 : COMPUTE_BF16;

// c (M, N) = a b + bias, += if accumulate, element (i, k) of a at a[i * ai + k * ak]; in NUM
template <typename NUM>
static void plain_product(double* c, const double* a, size_t ai, size_t ak, const double* b, size_t bk,
                          size_t bj, const double* bias, int M, int N, int K, bool accumulate) {
    for (size_t i = 0; i < (size_t)M; i++)
        for (size_t j = 0; j < (size_t)N; j++) {
            NUM sum = 0;
            for (size_t k = 0; k < (size_t)K; k++) sum += (NUM)a[i * ai + k * ak] * (NUM)b[k * bk + j * bj];
            if (bias != NULL) sum += (NUM)bias[j];
            if (accumulate) sum += (NUM)c[i * (size_t)N + j];
            c[i * (size_t)N + j] = (double)sum;
        }
}

template <typename X> static void round_to(double* x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (double)to_float(rounded_to<X>(x[i]));
}

// A copy as a later layer's parameters lie: on 16 bytes only. What it was copied from is not to be read again.
template <typename X> static X* on_16_bytes(X* device, size_t n) {
    X* copy = own_device<X>(n + Vec<X>::SIZE) + Vec<X>::SIZE;
    CUDA_CHECK(cudaMemcpy(copy, device, n * sizeof(X), cudaMemcpyDeviceToDevice));
    CUDA_CHECK(cudaMemset(device, 0xFF, n * sizeof(X)));
    return copy;
}

static void test_matmul_forward(const MatmulCase& c, Matmul* mm) {
    size_t N = (size_t)c.N, C = (size_t)c.C, OC = (size_t)c.OC, n = N * OC;
    double *inp = random_values(N * C, 1), *weight = random_values(OC * C, 1), *bias = random_values(OC, 1);
    double *truth = own_host<double>(n), *plain = own_host<double>(n), *gelu = own_host<double>(n),
           *plain_gelu = own_host<double>(n);
    const double* b = c.bias ? bias : NULL;
    plain_product<double>(truth, inp, C, 1, weight, 1, C, b, c.N, c.OC, c.C, false);
    plain_product<float>(plain, inp, C, 1, weight, 1, C, b, c.N, c.OC, c.C, false);
    cpu::activation_forward(gelu, truth, c.N, c.OC, ACTIVATION_GELU_TANH);
    round_to_floatX(plain, n);
    cpu::activation_forward(plain_gelu, plain, c.N, c.OC, ACTIVATION_GELU_TANH); // of what is stored
    for (size_t i = 0; i < n; i++) plain_gelu[i] = (double)(float)plain_gelu[i];
    round_to_floatX(plain_gelu, n);
    floatX *dev_inp = to_device<floatX>(inp, N * C), *dev_weight = to_device<floatX>(weight, OC * C),
           *dev_bias = c.bias ? to_device<floatX>(bias, OC) : NULL, *out = poisoned_device<floatX>(n),
           *pre = poisoned_device<floatX>(n), *act = poisoned_device<floatX>(n),
           *again = poisoned_device<floatX>(n);
    matmul_forward(out, dev_inp, dev_weight, dev_bias, c.N, c.C, c.OC, mm);
    dev_weight = on_16_bytes(dev_weight, OC * C);
    if (c.bias) dev_bias = on_16_bytes(dev_bias, OC);
    matmul_forward(again, dev_inp, dev_weight, dev_bias, c.N, c.C, c.OC, mm);
    matmul_gelu_forward(act, pre, dev_inp, dev_weight, dev_bias, c.N, c.C, c.OC, mm);
    char name[100];
    snprintf(name, sizeof name, "matmul N=%d C=%d OC=%d%s", c.N, c.C, c.OC, c.bias ? ", bias" : "");
    judge((std::string(name) + ": forward").c_str(), to_host(out, n), plain, truth, n);
    judge((std::string(name) + ": kept before the fused GELU").c_str(), to_host(pre, n), plain, truth, n);
    judge((std::string(name) + ": fused GELU").c_str(), to_host(act, n), plain_gelu, gelu, n);
    tap_check(same_bits(out, again, n), "%s: forward twice, the same bits", name);
}

// Two micro-batches: what accumulates must do so, what does not must not.
template <typename Grad> static void test_matmul_backward(const MatmulCase& c, bool fused_gelu, Matmul* mm) {
    size_t N = (size_t)c.N, C = (size_t)c.C, OC = (size_t)c.OC;
    double *inp = random_values(N * C, 1), *weight = random_values(OC * C, 1),
           *dout = random_values(N * OC, 1), *pre = random_values(N * C, 2), *dw = random_values(OC * C, 1),
           *db = random_values(OC, 1);
    double *truth = own_host<double>(N * C), *plain = own_host<double>(N * C), *true_dw = copy_of(dw, OC * C),
           *plain_dw = copy_of(dw, OC * C), *true_db = copy_of(db, OC), *plain_db = copy_of(db, OC),
           *one = own_host<double>(N);
    for (size_t i = 0; i < N; i++) one[i] = 1;
    plain_product<double>(truth, dout, OC, 1, weight, C, 1, NULL, c.N, c.C, c.OC, false);
    plain_product<float>(plain, dout, OC, 1, weight, C, 1, NULL, c.N, c.C, c.OC, false);
    round_to_floatX(plain, N * C);
    if (fused_gelu) {
        cpu::activation_backward(truth, truth, pre, c.N, c.C, ACTIVATION_GELU_TANH);
        cpu::activation_backward(plain, plain, pre, c.N, c.C, ACTIVATION_GELU_TANH);
        for (size_t i = 0; i < N * C; i++) plain[i] = (double)(float)plain[i];
        round_to_floatX(plain, N * C);
    }
    for (int time = 0; time < 2; time++) {
        plain_product<double>(true_dw, dout, 1, OC, inp, C, 1, NULL, c.OC, c.C, c.N, true);
        plain_product<float>(plain_dw, dout, 1, OC, inp, C, 1, NULL, c.OC, c.C, c.N, true);
        plain_product<double>(true_db, one, 0, 1, dout, OC, 1, NULL, 1, c.OC, c.N, true);
        plain_product<float>(plain_db, one, 0, 1, dout, OC, 1, NULL, 1, c.OC, c.N, true);
        round_to<Grad>(plain_dw, OC * C), round_to<Grad>(plain_db, OC);
    }
    floatX *dev_inp = to_device<floatX>(inp, N * C), *dev_weight = to_device<floatX>(weight, OC * C),
           *dev_dout = to_device<floatX>(dout, N * OC), *dev_pre = to_device<floatX>(pre, N * C),
           *dinp = poisoned_device<floatX>(N * C);
    Grad *dev_dw[2], *dev_db[2];
    for (int run = 0; run < 2; run++) { // the second for the same bits
        dev_dw[run] = to_device<Grad>(dw, OC * C), dev_db[run] = to_device<Grad>(db, OC);
        if (run == 1) dev_dw[1] = on_16_bytes(dev_dw[1], OC * C), dev_db[1] = on_16_bytes(dev_db[1], OC);
        Grad* bias = c.bias ? dev_db[run] : (Grad*)NULL;
        for (int time = 0; time < 2; time++) {
            if (fused_gelu)
                matmul_gelu_backward(dinp, dev_dw[run], bias, dev_dout, dev_inp, dev_weight, dev_pre, c.N,
                                     c.C, c.OC, mm);
            else
                matmul_backward(time == 0 ? dinp : (floatX*)NULL, dev_dw[run], bias, dev_dout, dev_inp,
                                dev_weight, c.N, c.C, c.OC, mm);
        }
    }
    char name[120];
    snprintf(name, sizeof name, "matmul N=%d C=%d OC=%d%s%s", c.N, c.C, c.OC, fused_gelu ? ", GELU" : "",
             sizeof(Grad) == 2 ? ", bf16 gradients" : "");
    judge((std::string(name) + ": dinp").c_str(), to_host(dinp, N * C), plain, truth, N * C);
    judge((std::string(name) + ": dweight, twice").c_str(), to_host(dev_dw[0], OC * C), plain_dw, true_dw,
          OC * C);
    if (c.bias)
        judge((std::string(name) + ": dbias, twice").c_str(), to_host(dev_db[0], OC), plain_db, true_db, OC);
    tap_check(same_bits(dev_dw[0], dev_dw[1], OC * C) && same_bits(dev_db[0], dev_db[1], OC),
              "%s: gradients again, the same bits", name);
}

static void test_matmul_all(Matmul* mm) {
    for (const MatmulCase& c : matmul_cases) {
        test_matmul_forward(c, mm);
        test_matmul_backward<float>(c, false, mm);
        test_matmul_backward<float>(c, true, mm);
        if (sizeof(floatX) == 2) test_matmul_backward<floatX>(c, false, mm);
    }
}

// Bias gradients from the product itself, and from the kernel that replaces it where cuBLASLt cannot. A GPU's
// cuBLASLt is not told what to refuse and may have its own reasons.
static void test_bias_gradients(bool fused) {
    if (!fused) setenv("EMU_CUBLASLT_REFUSE", "BGRADB", 1);
    Matmul* mm = matmul_context(NULL, matmul_compute);
    cudaDeviceProp properties;
    int plans = 0, wrong = 0;
    test_matmul_all(mm);
    unsetenv("EMU_CUBLASLT_REFUSE");
    for (int i = 0; i < mm->num_plans; i++) {
        const MatmulPlan* p = &mm->plans[i];
        bool asked = p->shape.epilogue == CUBLASLT_EPILOGUE_BGRADB && p->shape.d_type == CUDA_R_32F;
        plans += asked, wrong += asked && p->possible != fused;
    }
    CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    bool emulated = strcmp(properties.name, "emulated GPU") == 0;
    tap_check(plans > 0 && (!emulated || wrong == 0), "bias gradients of %d products come from %s%s", plans,
              fused ? "the product" : "a kernel of their own", emulated ? "" : ", or not: a GPU decides");
    matmul_free(mm);
    release_all();
}

// TF32: both operands lose 13 bits of their mantissa, in the worst case by cutting them off.
static void test_tf32(void) {
    enum { N = 40, C = 256, OC = 64 };
    double *inp = random_values(N * C, 1), *weight = random_values(OC * C, 1);
    double *truth = own_host<double>(N * OC), *plain = own_host<double>(N * OC);
    plain_product<double>(truth, inp, C, 1, weight, 1, C, NULL, N, OC, C, false);
    Matmul* mm = matmul_context(NULL, COMPUTE_TF32);
    floatX* out = poisoned_device<floatX>(N * OC);
    matmul_forward(out, to_device<floatX>(inp, N * C), to_device<floatX>(weight, OC * C), NULL, N, C, OC, mm);
    for (double* x : {inp, weight})
        for (size_t i = 0; i < N * C && (x == inp || i < OC * C); i++) {
            double unit = ldexp(1, ilogb(x[i]) - 10);
            x[i] = trunc(x[i] / unit) * unit;
        }
    plain_product<double>(plain, inp, C, 1, weight, 1, C, NULL, N, OC, C, false);
    double* ours = to_host(out, N * OC);
    judge("matmul in TF32", ours, plain, truth, N * OC);
    double worst = 0;
    for (size_t i = 0; i < N * OC; i++) worst = fmax(worst, fabs(ours[i] - truth[i]));
    tap_check(worst > 1e-4, "and it is not fp32: error %.1e", worst);
    matmul_free(mm);
    release_all();
}

// ----------------------------------------------------------------------------
// autotuning

// The result of one product with whatever algorithm the file says. `last`: the least of cuBLASLt's candidates is
// written to the file as the choice of the runs to come.
static std::vector<floatX> tuned_product(const char* choices, const double* inp, const double* weight,
                                         bool last, cublasLtMatmulAlgo_t* algorithm) {
    enum { N = 64, C = 512, OC = 64 };
    Matmul* mm = matmul_context(choices, matmul_compute);
    floatX* out = poisoned_device<floatX>(N * OC);
    matmul_forward(out, to_device<floatX>(inp, N * C), to_device<floatX>(weight, OC * C), NULL, N, C, OC, mm);
    std::vector<floatX> host(N * OC);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(host.data(), out, host.size() * sizeof(floatX), cudaMemcpyDeviceToHost));
    MatmulPlan* plan = &mm->plans[0];
    if (last) {
        cublasLtMatmulHeuristicResult_t results[MATMUL_CANDIDATES];
        int found = plan_candidates(plan, mm, results, MATMUL_CANDIDATES);
        plan->algorithm = results[found - 1].algo;
        choices_append(mm, plan);
    }
    *algorithm = plan->algorithm;
    matmul_free(mm);
    return host;
}

static bool same_algorithm(const cublasLtMatmulAlgo_t* a, const cublasLtMatmulAlgo_t* b) {
    return memcmp(a, b, sizeof *a) == 0;
}

// What the file says is done, also where it is not what tuning would choose.
static void test_choices(const char* choices) {
    double *inp = random_values(64 * 512, 1), *weight = random_values(64 * 512, 1);
    cublasLtMatmulAlgo_t tuned, again, last;
    size_t size, again_size;
    Error err = {0, {0}};
    std::vector<floatX> first = tuned_product(choices, inp, weight, false, &tuned);
    char* text = read_file(choices, 1 << 20, &size, &err);
    tap_check(text != NULL && strstr(text, "\n64 64 512 1 0 0 ") != NULL, "autotuning writes its choice");
    std::vector<floatX> second = tuned_product(choices, inp, weight, false, &again);
    char* text_again = read_file(choices, 1 << 20, &again_size, &err);
    tap_check(text_again != NULL && size == again_size && memcmp(text, text_again, size) == 0,
              "a second run adds nothing");
    tap_check(same_algorithm(&tuned, &again) &&
                  memcmp(first.data(), second.data(), first.size() * sizeof(floatX)) == 0,
              "and has the same bits");
    tuned_product(choices, inp, weight, true, &last);
    tuned_product(choices, inp, weight, false, &again);
    tap_check(same_algorithm(&last, &again), "the later line of two is the one that counts");
    free(text), free(text_again);
}

static void refuse_choices(const char* choices, const char* text, const char* part) {
    Matmul mm = {};
    Error err = {0, {0}};
    snprintf(mm.choices, sizeof mm.choices, "%s", choices);
    bool written = replace_file(choices, text, strlen(text), &err), loaded = choices_load(&mm, &err);
    tap_check(written && !loaded && err.code == EXIT_BAD_DATA && strstr(err.text, part) != NULL, "%s",
              err.text);
    free(mm.stored);
}

// A file that is damaged is refused, a last line that was cut short dropped, one of another machine begun anew.
static void test_choices_file(const char* choices) {
    Error err = {0, {0}};
    size_t size;
    Matmul mm = {};
    char* text = read_file(choices, 1 << 20, &size, &err);
    text[size - 3] = 'x';
    char* lines = strchr(text, '\n') + 1;
    char number[30];
    int count = 0;
    for (const char* c = lines; *c != '\0'; c++) count += *c == '\n';
    snprintf(number, sizeof number, "line %d is damaged", count + 1);
    refuse_choices(choices, text, number);
    text[size - 3] = '\0'; // a machine that died while it wrote
    Matmul cut = {};
    snprintf(cut.choices, sizeof cut.choices, "%s", choices);
    tap_check(replace_file(choices, text, strlen(text), &err) && choices_load(&cut, &err) &&
                  cut.num_stored == count - 1,
              "the start of a line that was cut short is dropped");
    free(cut.stored);
    *lines = '\0', text[strlen("pretrain.c matmul algorithms | ")] ^= 1;
    snprintf(mm.choices, sizeof mm.choices, "%s", choices);
    bool loaded = replace_file(choices, text, strlen(text), &err) && choices_load(&mm, &err);
    char* begun = read_file(choices, 1 << 20, &size, &err);
    text[strlen("pretrain.c matmul algorithms | ")] ^= 1;
    tap_check(loaded && mm.num_stored == 0 && begun != NULL && strcmp(begun, text) == 0,
              "another GPU's file is begun anew");
    free(text), free(begun), free(mm.stored);
}

static void test_autotune(void) {
    char choices[] = "/tmp/matmul_algorithms.XXXXXX";
    close(mkstemp(choices));
    test_choices(choices);
    Matmul* mm = matmul_context(choices, matmul_compute);
    test_matmul_all(mm); // gradients too: a product that is tried several times is added once
    matmul_free(mm);
    test_choices_file(choices);
    unlink(choices);
    release_all();
}

static void test_matmul(void) {
    test_bias_gradients(true);
    test_bias_gradients(false);
    test_autotune();
    if (sizeof(floatX) == sizeof(float)) test_tf32();
}
