// One whole training step of GPT-2 124M on random tokens: forward, backward, norm, AdamW.
// usage, from the root of the tree: bench_step [STEPS]      each row in a process of its own, so that peak
// memory is the row's
//
// The baseline of a row is the same machine's matmul alone, measured in the same process: the step's FLOPs at
// that rate. A ratio of 1 would mean that everything but the matmuls is free.
#define TESTING
#include "train_gpt.c" // first, as it asks for all of the C library

#include <sys/resource.h>
#include <sys/wait.h>

static void bench(int B, int T, int compute, int steps) {
    static RunConfig run;
    Error err = {0};
    if (!config_load(&run, "configs/gpt2_124M.json", 0, NULL, &err)) exit_with(&err);
    ModelConfig c = run.model;
    run.precision.compute = compute;
    double rate = measure_matmul_rate(B * T, c.hidden_size, c.intermediate_size,
                                      compute == COMPUTE_BF16 ? MATMUL_BF16 : MATMUL_FP32);
    GPT g;
    if (!gpt_create(&g, &run, B, T, true, &err)) exit_with(&err);
    init_weights(&g, &run.model, 1);
    int tokens[4 * 1024 + 1];
    for (int i = 0; i <= B * T; i++) tokens[i] = (int)(random_bits(1, 0, 0, (uint64_t)i).x[0] % 50257u);
    double times[64];
    for (int step = -1; step < steps; step++) { // the first compiles oneDNN's primitives and touches memory
        double start = seconds_now();
        gpt_forward(&g, tokens, NULL, B);
        gpt_loss(&g, tokens + 1, B, (real)(1.0 / (B * T)));
        gpt_backward(&g, tokens, B);
        double norm = sqrt(global_norm_squared(g.grads, g.layout.num_parameters));
        gpt_update(&g, &run, 1e-4, norm > 1 ? 1 / norm : 1, (uint64_t)(step + 2));
        if (step >= 0) times[step] = seconds_now() - start;
    }
    double median = sort_for_median(times, steps);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double flops = (double)(B * T) * flops_per_token(&c, T, FLOPS_CAUSAL);
    printf("%-5s B=%d T=%-4d  median %6.0f ms (best %6.0f)  %6.0f tok/s  %6.1f GFLOP/s  "
           "ratio to matmul alone %.2f"
           "  peak %.2f GB\n",
           compute == COMPUTE_BF16 ? "bf16" : "fp32", B, T, 1e3 * median, 1e3 * times[0], B * T / median,
           flops / median / 1e9, median / (flops / rate), (double)usage.ru_maxrss * 1024 / 1e9);
    fflush(stdout);
}

int main(int argc, char** argv) {
    const struct {
        int B, T, compute;
    } rows[] = {{4, 64, COMPUTE_FP32}, {4, 256, COMPUTE_FP32}, {4, 64, COMPUTE_BF16}, {4, 256, COMPUTE_BF16}};
    long steps = argc > 1 ? strtol(argv[1], NULL, 10) : 5;
    if (steps < 1 || steps > 64) return EXIT_USAGE;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        pid_t child = fork();
        if (child == 0) {
            bench(rows[i].B, rows[i].T, rows[i].compute, (int)steps);
            return EXIT_OK;
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) < 0 || status != 0) return EXIT_INTERNAL;
    }
    return EXIT_OK;
}
