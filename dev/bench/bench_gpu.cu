// What the GPU program reaches on this card, each figure beside its own floor, measured in the same run.
//
//     bench_gpu ceilings             a large matmul on random data, and a copy
//     bench_gpu kernels              every memory-bound kernel: bytes it must move at the copy's rate
//     bench_gpu attention            TFLOP/s, causal; dev/bench/sdpa.py prints PyTorch's for the same shapes
//     bench_gpu step CONFIG [B [T]]  whole steps on random tokens: time, tokens/s, MFU, memory
//
// Run from the root of the tree on an otherwise idle GPU. Times are medians over REPEATS.
#define TESTING
#include <algorithm>
#include <vector>

#include "train_gpt.cu"

enum { REPEATS = 20 };

static cudaStream_t stream;

// Random numbers, since a matmul on zeros draws less power and runs faster than a real one.
static __global__ void random_kernel(floatX* x, size_t n, float scale, uint64_t which) {
    size_t i = 4 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    float normal[4];
    random_normal4(normal, 1, RANDOM_INIT, which, i / 4);
    for (size_t k = 0; k < 4 && i + k < n; k++) x[i + k] = from_float<floatX>(scale * normal[k]);
}

static void* device_bytes(size_t bytes) {
    void* p;
    CUDA_CHECK(cudaMalloc(&p, bytes));
    return p;
}

static floatX* random_device(size_t n, float scale) {
    static uint64_t which = 1000;
    floatX* x = (floatX*)device_bytes(n * sizeof *x);
    random_kernel<<<(unsigned)ceil_div(n, 4 * 256), 256, 0, stream>>>(x, n, scale, which++);
    LAUNCH_CHECK();
    return x;
}

template <typename X> static X* zeros(size_t n) {
    X* x = (X*)device_bytes(n * sizeof(X));
    CUDA_CHECK(cudaMemset(x, 0, n * sizeof(X)));
    return x;
}

static int compare_floats(const void* a, const void* b) {
    float x = *(const float*)a, y = *(const float*)b;
    return x < y ? -1 : x > y;
}

// Median seconds of what `launch` enqueues.
template <typename Launch> static double seconds_of(Launch launch) {
    cudaEvent_t begin, end;
    float times[REPEATS];
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    launch();
    for (int i = 0; i < REPEATS; i++) {
        CUDA_CHECK(cudaEventRecord(begin, stream));
        launch();
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&times[i], begin, end));
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    qsort(times, REPEATS, sizeof *times, compare_floats);
    return 1e-3 * times[REPEATS / 2];
}

static Matmul* matmul_context(size_t widest) {
    static Matmul mm;
    Error err = {0, {0}};
    int compute = sizeof(floatX) == sizeof(float) ? COMPUTE_FP32 : COMPUTE_BF16;
    if (!matmul_init(&mm, compute, device_bytes(matmul_workspace_bytes()),
                     zeros<float>(matmul_bias_scratch((int)widest)), NULL, stream, &err))
        exit_with(&err);
    return &mm;
}

// ----------------------------------------------------------------------------
// ceilings

static double copy_rate(void) { // bytes/s, read and written
    size_t bytes = (size_t)1 << 30;
    void *from = random_device(bytes / sizeof(floatX), 1), *to = device_bytes(bytes);
    double s = seconds_of([&] { cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream); });
    CUDA_CHECK(cudaFree(from));
    CUDA_CHECK(cudaFree(to));
    return 2.0 * (double)bytes / s;
}

static double matmul_rate(Matmul* mm) {
    enum { SIZE = 8192 };
    size_t n = (size_t)SIZE * SIZE;
    floatX *a = random_device(n, 1), *b = random_device(n, 0.02f), *c = random_device(n, 1);
    double s = seconds_of([&] { matmul_forward(c, a, b, (floatX*)NULL, SIZE, SIZE, SIZE, mm); });
    CUDA_CHECK(cudaFree(a));
    CUDA_CHECK(cudaFree(b));
    CUDA_CHECK(cudaFree(c));
    return 2.0 * SIZE * SIZE * SIZE / s;
}

static void bench_ceilings(const Device* device) {
    Matmul* mm = matmul_context(8192);
    double peak = gpu_peak_flops(device->name, COMPUTE_BF16), rate = matmul_rate(mm);
    printf("matmul 8192 x 8192 x 8192, random data   %7.1f TFLOP/s", rate / 1e12);
    if (peak > 0) printf("   %.1f %% of %.1f", 100 * rate / peak, peak / 1e12);
    printf("\ncopy of 1 GiB, read and written          %7.1f GB/s\n", copy_rate() / 1e9);
}

// ----------------------------------------------------------------------------
// memory-bound kernels

static double ceiling; // bytes/s of the copy

static void report_kernel(const char* name, double bytes, double seconds) {
    printf("%-34s %8.1f us  %7.1f GB/s   %5.1f %% of the copy\n", name, 1e6 * seconds, bytes / seconds / 1e9,
           100 * bytes / seconds / ceiling);
}

static void bench_kernels(int C, int norm, int activation) {
    const int T = 1024, B = 32, N = B * T, FF = 4 * C, V = 50257, Vp = padded_vocab_size(V), ROWS = 8192;
    const size_t NC = (size_t)N * (size_t)C, NF = (size_t)N * (size_t)FF, E = sizeof(floatX);
    floatX *x = random_device(NC, 1), *y = random_device(NC, 1), *z = random_device(NC, 1),
           *out = random_device(NC, 1), *weight = random_device((size_t)C, 1), *fc = random_device(2 * NF, 1),
           *act = random_device(NF, 1), *dfc = random_device(2 * NF, 1);
    float *mean = zeros<float>((size_t)N), *rstd = zeros<float>((size_t)N),
          *dweight = zeros<float>((size_t)C), *dbias = zeros<float>((size_t)FF),
          *scratch = zeros<float>(larger(norm_backward_scratch(C), column_sums_scratch(FF)));
    double nc = (double)NC * E, nf = (double)NF * E;
    int gate = activation == ACTIVATION_SWIGLU ? 2 : 1;
    printf("C = %d, %s, %s, %d rows\n", C, norm == NORM_RMSNORM ? "RMSNorm" : "LayerNorm",
           gate == 2 ? "SwiGLU" : "GELU", N);
    report_kernel("residual + norm forward", 4 * nc, seconds_of([&] {
                      residual_norm_forward(out, z, mean, rstd, x, y, weight, weight, N, C, 1e-5f, norm,
                                            stream);
                  }));
    report_kernel("norm forward", 2 * nc, seconds_of([&] {
                      norm_forward(z, mean, rstd, x, weight, weight, N, C, 1e-5f, norm, stream);
                  }));
    report_kernel("norm backward", 4 * nc, seconds_of([&] {
                      norm_backward(out, dweight, dbias, scratch, y, x, weight, mean, rstd, N, C, norm,
                                    stream);
                  }));
    report_kernel("activation forward", (gate + 1) * nf,
                  seconds_of([&] { activation_forward(act, fc, N, FF, activation, stream); }));
    report_kernel("activation backward", (2 * gate + 1) * nf,
                  seconds_of([&] { activation_backward(dfc, act, fc, N, FF, activation, stream); }));
    report_kernel("bias gradient (FF columns)", nf,
                  seconds_of([&] { add_column_sums(dbias, scratch, act, N, FF, stream); }));
    floatX* logits = random_device((size_t)ROWS * (size_t)Vp, 1);
    int* targets = zeros<int>((size_t)N);
    float* losses = zeros<float>((size_t)N);
    report_kernel("classifier, with gradient", 2.0 * ROWS * Vp * E, seconds_of([&] {
                      classifier(losses, logits, targets, NULL, 1, 0, 1e-9f, ROWS, V, Vp, true, stream);
                  }));
    CUDA_CHECK(cudaDeviceSynchronize());
    void* all[] = {x,    y,    z,       out,   weight,  fc,     act,     dfc,
                   mean, rstd, dweight, dbias, scratch, logits, targets, losses};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

static void bench_embedding_and_rope(int C) {
    const int T = 1024, B = 32, N = B * T, V = 50257, NH = C / 64;
    size_t NC = (size_t)N * (size_t)C;
    std::vector<int> tokens((size_t)N), order((size_t)N), counts((size_t)V + 2);
    for (size_t i = 0; i < tokens.size(); i++) // Zipf-like, as text is
        tokens[i] = (int)(pow(V, random_uniform(1, RANDOM_DATA, 0, i)) - 1);
    token_order(order.data(), tokens.data(), N, V, counts.data());
    int *device_tokens = zeros<int>((size_t)N), *device_order = zeros<int>((size_t)N);
    CUDA_CHECK(cudaMemcpy(device_tokens, tokens.data(), (size_t)N * sizeof(int), cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(device_order, order.data(), (size_t)N * sizeof(int), cudaMemcpyHostToDevice));
    floatX *x = random_device(NC, 1), *wte = random_device((size_t)V * (size_t)C, 1),
           *wpe = random_device((size_t)T * (size_t)C, 1), *qkv = random_device(3 * NC, 1);
    float *dwte = zeros<float>((size_t)V * (size_t)C), *dwpe = zeros<float>((size_t)T * (size_t)C);
    float *cosines = zeros<float>((size_t)T * 32), *sines = zeros<float>((size_t)T * 32);
    Positions all_rows = positions_of(T, 0, 1);
    double nc = (double)NC * sizeof(floatX);
    report_kernel("embedding forward", 2 * nc, seconds_of([&] {
                      embedding_forward(x, device_tokens, wte, wpe, all_rows, B, T, C, stream);
                  }));
    report_kernel("embedding backward", 2 * nc, seconds_of([&] {
                      embedding_backward(dwte, dwpe, x, device_tokens, device_order, all_rows, B, T, C,
                                         stream);
                  }));
    report_kernel("rope (q and k, in place)", 4 * nc,
                  seconds_of([&] { rope_forward(qkv, cosines, sines, all_rows, B, T, NH, NH, 64, stream); }));
    void* all[] = {device_tokens, device_order, x, wte, wpe, qkv, dwte, dwpe, cosines, sines};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

// ----------------------------------------------------------------------------
// attention

static void bench_attention(int HS, int T, int B, int NH) {
    size_t N = (size_t)B * (size_t)T, Q = (size_t)(NH * HS);
    floatX *qkv = random_device(3 * N * Q, 1), *out = random_device(N * Q, 1),
           *dout = random_device(N * Q, 1), *dqkv = random_device(3 * N * Q, 1);
    float* lse = zeros<float>(N * (size_t)NH);
    AttentionShape shape = {B, T, T, NH, NH, HS, positions_of(T, 0, 1)};
    void* scratch = device_bytes(attention_scratch_bytes(shape));
    double flops = 2.0 * (double)N * T * (double)Q; // 4 T^2 HS a head, half of it behind the causal mask
    double forward = seconds_of([&] { attention_forward(out, lse, qkv, NULL, NULL, shape, stream); });
    double backward = seconds_of(
        [&] { attention_backward(dqkv, NULL, scratch, dout, qkv, NULL, out, lse, NULL, shape, stream); });
    printf("head %3d  T %5d  B %2d  heads %2d   forward %6.1f   backward %6.1f   both %6.1f TFLOP/s\n", HS, T,
           B, NH, flops / forward / 1e12, 2.5 * flops / backward / 1e12,
           3.5 * flops / (forward + backward) / 1e12);
    void* all[] = {qkv, out, dout, dqkv, lse, scratch};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) CUDA_CHECK(cudaFree(all[i]));
}

// ----------------------------------------------------------------------------
// whole steps

static void bench_step(const Device* device, int argc, char** argv) {
    static RunConfig run;
    static GPT g;
    Error err = {0, {0}};
    char* overrides[] = {(char*)"data.train=none"};
    if (!config_load(&run, argv[0], 1, overrides, &err)) exit_with(&err);
    if (argc > 1) run.batch.micro_batch_size = run.batch.global_batch_size = atoi(argv[1]);
    if (argc > 2) run.batch.sequence_length = atoi(argv[2]);
    run.checkpoint.every = 0; // none here, so no memory for them
    int B = run.batch.micro_batch_size, T = run.batch.sequence_length, rows = run.batch.global_batch_size;
    if (!gpt_resolve(&run, true, &err)) exit_with(&err);
    size_t before = device_free_memory();
    if (!gpt_create(&g, &run, B, T, true, &err)) exit_with(&err);
    init_weights(&g, &run.model, 1);
    double times[REPEATS], tokens = (double)rows * T;
    std::vector<int32_t> data((size_t)rows * (size_t)(T + 1));
    for (size_t i = 0; i < data.size(); i++)
        data[i] = (int32_t)(random_bits(2, RANDOM_DATA, 0, i).x[0] % (uint32_t)run.model.vocab_size);
    for (int step = -3; step < REPEATS; step++) {
        double start = seconds_now();
        gpt_load_batch(&g, data.data(), rows, false, -1);
        gpt_start_step(&g, &run, 1e-4, (uint64_t)(step + 3), 0, no_guard);
        gpt_finish_step(&g);
        if (step >= 0) times[step] = seconds_now() - start;
    }
    std::sort(times, times + REPEATS);
    double s = times[REPEATS / 2], peak = gpu_peak_flops(device->name, run.precision.compute);
    double causal = tokens * flops_per_token(&run.model, T, FLOPS_CAUSAL) / s;
    double palm = tokens * flops_per_token(&run.model, T, FLOPS_PALM) / s;
    printf("%s B %d T %d x %d: %.1f ms, %.0f tokens/s, %.1f TFLOP/s (PaLM's count %.1f)", argv[0], B, T,
           rows / B, 1e3 * s, tokens / s, causal / 1e12, palm / 1e12);
    if (peak > 0)
        printf(", MFU %.1f %% (%.1f %%) of %.1f TFLOP/s", 100 * causal / peak, 100 * palm / peak,
               peak / 1e12);
    printf(", %.2f GB\n", (double)(before - device_free_memory()) / 1e9);
    gpt_free(&g);
}

int main(int argc, char** argv) {
    Device device;
    Error err = {0, {0}};
    const char* what = argc > 1 ? argv[1] : "";
    if (!device_open(&device, &err)) exit_with(&err);
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    printf("%s, driver %d, runtime %d\n", device.name, device.driver, device.runtime);
    if (strcmp(what, "ceilings") == 0) {
        bench_ceilings(&device);
    } else if (strcmp(what, "kernels") == 0) {
        ceiling = copy_rate();
        bench_kernels(768, NORM_LAYERNORM, ACTIVATION_GELU_TANH);
        bench_kernels(4096, NORM_RMSNORM, ACTIVATION_SWIGLU);
        bench_embedding_and_rope(768);
    } else if (strcmp(what, "attention") == 0) {
        for (int HS = 64; HS <= 128; HS *= 2)
            for (int T = 1024; T <= 8192; T *= 2) bench_attention(HS, T, 16384 / T, 2048 / HS);
    } else if (strcmp(what, "step") == 0 && argc > 2) {
        bench_step(&device, argc - 2, argv + 2);
    } else {
        fprintf(stderr, "usage: bench_gpu ceilings|kernels|attention|step CONFIG [B [T]]\n");
        return EXIT_USAGE;
    }
    return 0;
}
