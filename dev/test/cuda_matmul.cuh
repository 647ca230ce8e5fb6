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
    {1, 8, 8, true},     {1, 64, 24, false},   {37, 64, 192, true},
    {40, 256, 64, true}, {130, 72, 96, false}, {9, 40, 1304, true},
};

static Matmul* matmul_context(const char* choices, int widest) {
    static Matmul mm;
    Error err = {0, {0}};
    int compute = sizeof(floatX) == sizeof(float) ? COMPUTE_FP32 : COMPUTE_BF16;
    if (!matmul_init(&mm, compute, own_device<char>(matmul_workspace_bytes()),
                     poisoned_device<float>(matmul_bias_scratch(widest)), choices, test_stream, &err))
        exit_with(&err);
    return &mm;
}

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
    Grad *dev_dw = to_device<Grad>(dw, OC * C), *dev_db = to_device<Grad>(db, OC),
         *bias = c.bias ? dev_db : (Grad*)NULL;
    for (int time = 0; time < 2; time++) {
        if (fused_gelu)
            matmul_gelu_backward(dinp, dev_dw, bias, dev_dout, dev_inp, dev_weight, dev_pre, c.N, c.C, c.OC,
                                 mm);
        else
            matmul_backward(time == 0 ? dinp : (floatX*)NULL, dev_dw, bias, dev_dout, dev_inp, dev_weight,
                            c.N, c.C, c.OC, mm);
    }
    char name[120];
    snprintf(name, sizeof name, "matmul N=%d C=%d OC=%d%s%s", c.N, c.C, c.OC, fused_gelu ? ", GELU" : "",
             sizeof(Grad) == 2 ? ", bf16 gradients" : "");
    judge((std::string(name) + ": dinp").c_str(), to_host(dinp, N * C), plain, truth, N * C);
    judge((std::string(name) + ": dweight, twice").c_str(), to_host(dev_dw, OC * C), plain_dw, true_dw,
          OC * C);
    if (c.bias)
        judge((std::string(name) + ": dbias, twice").c_str(), to_host(dev_db, OC), plain_db, true_db, OC);
}

static void test_matmul_all(Matmul* mm) {
    for (const MatmulCase& c : matmul_cases) {
        test_matmul_forward(c, mm);
        test_matmul_backward<float>(c, false, mm);
        test_matmul_backward<float>(c, true, mm);
        if (sizeof(floatX) == 2) test_matmul_backward<floatX>(c, false, mm);
    }
    matmul_free(mm);
    release_all();
}

// The result of one product with whatever algorithm the file says.
static std::vector<floatX> tuned_product(const char* choices, const double* inp, const double* weight) {
    enum { N = 64, C = 512, OC = 64 };
    Matmul* mm = matmul_context(choices, OC);
    floatX* out = poisoned_device<floatX>(N * OC);
    matmul_forward(out, to_device<floatX>(inp, N * C), to_device<floatX>(weight, OC * C), NULL, N, C, OC, mm);
    std::vector<floatX> host(N * OC);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(host.data(), out, host.size() * sizeof(floatX), cudaMemcpyDeviceToHost));
    matmul_free(mm);
    return host;
}

static void test_autotune(void) {
    char choices[] = "/tmp/matmul_algorithms.XXXXXX";
    double *inp = random_values(64 * 512, 1), *weight = random_values(64 * 512, 1);
    close(mkstemp(choices));
    std::vector<floatX> first = tuned_product(choices, inp, weight);
    size_t size, again_size;
    Error err = {0, {0}};
    char* text = read_file(choices, 1 << 20, &size, &err);
    tap_check(text != NULL && strstr(text, "\n64 64 512 1 0 0 ") != NULL, "autotuning writes its choice");
    std::vector<floatX> second = tuned_product(choices, inp, weight);
    char* again = read_file(choices, 1 << 20, &again_size, &err);
    tap_check(again != NULL && size == again_size && memcmp(text, again, size) == 0,
              "a second run adds nothing");
    tap_check(memcmp(first.data(), second.data(), first.size() * sizeof(floatX)) == 0,
              "and has the same bits");
    Matmul mm = {};
    snprintf(mm.choices, sizeof mm.choices, "%s", choices);
    text[size - 3] = 'x';
    bool written = replace_file(choices, text, size, &err), loaded = choices_load(&mm, &err);
    tap_check(written && !loaded && err.code == EXIT_BAD_DATA && strstr(err.text, "line 2") != NULL,
              "a damaged line is refused: %s", err.text);
    free(mm.stored), free(text), free(again);
    unlink(choices);
    release_all();
}

static void test_matmul(void) {
    int widest = 1304;
    test_matmul_all(matmul_context(NULL, widest));
    setenv("EMU_CUBLASLT_REFUSE", "BGRADB", 1); // on a GPU this changes nothing
    test_matmul_all(matmul_context(NULL, widest));
    unsetenv("EMU_CUBLASLT_REFUSE");
    test_autotune();
}
