// How fast are the layers of the CPU reference, and how far from what this machine can do? Each line: one
// layer at GPT-2 124M's shapes, its best time of several, its rate, and the ratio of that rate to a ceiling
// measured in the same run: fused multiply-adds in registers (GFLOP/s) or a stream that reads two arrays and
// writes one (GB/s). Then the sum over a training step.
//
//     build/bench/bench_layers [B T]        default 4 256; OMP_NUM_THREADS decides the threads
#include "llmc/layers_cpu.h"    // defines: every layer
#include "llmc/optimizer_cpu.h" // defines: adamw_update, global_norm_squared
#include "llmc/rand.h"          // defines: random_uniform, RANDOM_SAMPLE

enum {
    L = 12,
    C = 768,
    NH = 12,
    HS = 64,
    FF = 3072,
    V = 50257,
    Vp = 50304,
    PARAMETERS = 124475904,
    CHUNK = 256
};
enum { REPEATS = 5, ADAMW_PART = PARAMETERS / 4 };
static const double SECONDS = 0.2; // for each line, at least
enum Ceiling { COMPUTE, COMPUTE_BF16, MEMORY };

typedef struct {
    int B, T, N;
    real *inp, *out, *dinp, *dout, *weight, *dweight, *bias, *dbias; // inp .. dout: the widest activation
    real *mean, *rstd, *losses;
    real *params, *grads, *m, *v;
    float *cos_table, *sin_table;
    int *tokens, *targets;
    void *attention_scratch, *matmul_scratch;
    Matmul fp32, bf16, plain;
} Bench;

static real* random_reals(size_t n, double scale, uint64_t which) {
    real* x = (real*)malloc_check(n * sizeof(real));
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i++) x[i] = (real)(scale * (random_uniform(1, RANDOM_SAMPLE, which, i) - 0.5));
    return x;
}

static void bench_setup(Bench* s, int B, int T) {
    s->B = B, s->T = T, s->N = B * T;
    size_t wide = (size_t)s->N * FF > (size_t)CHUNK * Vp ? (size_t)s->N * FF : (size_t)CHUNK * Vp;
    s->inp = random_reals(wide, 2, 1), s->out = random_reals(wide, 2, 2);
    s->dinp = random_reals(wide, 2, 3), s->dout = random_reals(wide, 2, 4);
    s->weight = random_reals((size_t)Vp * C, 0.1, 5), s->dweight = random_reals((size_t)Vp * C, 0.1, 6);
    s->bias = random_reals(Vp, 1, 7), s->dbias = random_reals(Vp, 1, 8);
    s->mean = random_reals((size_t)s->N * NH, 1, 9), s->rstd = random_reals((size_t)s->N * NH, 1, 10);
    s->losses = random_reals((size_t)s->N, 1, 11);
    s->params = random_reals(ADAMW_PART, 1, 12), s->grads = random_reals(ADAMW_PART, 1, 13);
    s->m = random_reals(ADAMW_PART, 1, 14), s->v = random_reals(ADAMW_PART, 0, 15);
    s->cos_table = (float*)malloc_check((size_t)T * HS / 2 * sizeof(float));
    s->sin_table = (float*)malloc_check((size_t)T * HS / 2 * sizeof(float));
    RopeConfig rope = {10000, ROPE_SCALING_NONE, 1, 1, 1, 1};
    rope_table(s->cos_table, s->sin_table, &rope, T, HS);
    s->tokens = (int*)malloc_check((size_t)s->N * sizeof(int));
    s->targets = (int*)malloc_check((size_t)s->N * sizeof(int));
    for (int n = 0; n < s->N; n++) {
        s->tokens[n] = (int)(V * (random_uniform(1, RANDOM_SAMPLE, 16, (uint64_t)n) * 0.999));
        s->targets[n] = s->tokens[n];
    }
    s->attention_scratch = malloc_check(attention_scratch_bytes(T, HS));
    size_t bytes = matmul_scratch_bytes(MATMUL_BF16, s->N, FF, FF);
    size_t head = matmul_scratch_bytes(MATMUL_BF16, CHUNK, C, Vp);
    bytes = bytes > head ? bytes : head;
    s->matmul_scratch = aligned_zeros(bytes);
    matmul_init(&s->fp32, MATMUL_FP32, s->matmul_scratch, bytes);
    matmul_init(&s->bf16, MATMUL_BF16, s->matmul_scratch, bytes);
    matmul_init(&s->plain, MATMUL_FP32, s->matmul_scratch, bytes);
    s->plain.plain = true;
}

// ----------------------------------------------------------------------------
// ceilings

static double best_seconds(void (*run)(Bench*), Bench* s) {
    double best = 1e9, begin = seconds_now();
    for (int i = 0; i < REPEATS || seconds_now() - begin < SECONDS; i++) {
        double start = seconds_now();
        run(s);
        double seconds = seconds_now() - start;
        best = seconds < best ? seconds : best;
    }
    return best;
}

enum { FMA_STEPS = 2000000, FMA_CHAINS = 16 };
static volatile real fma_sink;
static void run_fma(Bench* s) {
    (void)s;
#pragma omp parallel
    {
        Vec sum[FMA_CHAINS], factor, step;
        for (int j = 0; j < LANES; j++) factor[j] = (real)0.999, step[j] = (real)0.001;
        for (int i = 0; i < FMA_CHAINS; i++) sum[i] = step * (real)i;
        for (int k = 0; k < FMA_STEPS; k++)
            for (int i = 0; i < FMA_CHAINS; i++) sum[i] = sum[i] * factor + step;
        for (int i = 1; i < FMA_CHAINS; i++) sum[0] += sum[i];
        fma_sink = sum[0][0];
    }
}
static double peak_gflops(Bench* s) {
    return 2.0 * FMA_STEPS * FMA_CHAINS * LANES * omp_get_max_threads() / best_seconds(run_fma, s) / 1e9;
}
static void run_stream(Bench* s) {
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < ADAMW_PART; i++) s->m[i] = s->params[i] * (real)0.5 + s->grads[i];
}

// ----------------------------------------------------------------------------
// the layers

static void run_embedding_forward(Bench* s) {
    embedding_forward(s->out, s->tokens, s->weight, s->params, s->B, s->T, C);
}
static void run_embedding_backward(Bench* s) {
    embedding_backward(s->dweight, s->grads, s->dout, s->tokens, s->B, s->T, C);
}
static void run_norm_forward(Bench* s) {
    residual_norm_forward(s->dinp, s->out, s->mean, s->rstd, s->inp, s->dout, s->bias, s->bias, s->N, C,
                          (real)1e-5, NORM_LAYERNORM);
}
static void run_norm_backward(Bench* s) {
    norm_backward(s->dinp, s->dweight, s->dbias, s->dout, s->inp, s->weight, s->mean, s->rstd, s->N, C,
                  NORM_LAYERNORM);
}
static void run_rope_forward(Bench* s) {
    rope_forward(s->inp, s->cos_table, s->sin_table, 0, s->B, s->T, NH, NH, HS);
}
static void run_attention_forward(Bench* s) {
    attention_forward(s->out, s->mean, s->attention_scratch, s->inp, NULL, s->B, s->T, NH, NH, HS);
}
static void run_attention_backward(Bench* s) {
    attention_backward(s->dinp, s->attention_scratch, s->dout, s->inp, s->out, s->mean, NULL, s->B, s->T, NH,
                       NH, HS);
}
static void run_gelu_forward(Bench* s) { activation_forward(s->out, s->inp, s->N, FF, ACTIVATION_GELU_TANH); }
static void run_gelu_backward(Bench* s) {
    activation_backward(s->dinp, s->dout, s->inp, s->N, FF, ACTIVATION_GELU_TANH);
}
static void run_classifier(Bench* s) {
    classifier(s->losses, s->out, s->targets, (real)0.1, CHUNK, V, Vp, true);
}
static void run_adamw(Bench* s) {
    adamw_update(s->params, s->grads, s->m, s->v, ADAMW_PART, 1e-4, 0.9, 0.95, 1e-8, 0.1, 1, 10);
}
static void run_norm_squared(Bench* s) { fma_sink = (real)global_norm_squared(s->grads, ADAMW_PART); }

#define MATMUL_CASES(SUFFIX)                                                                                 \
    static void run_mlp_up_##SUFFIX(Bench* s) {                                                              \
        matmul_forward(s->out, s->inp, s->weight, s->bias, s->N, C, FF, &s->SUFFIX);                         \
    }                                                                                                        \
    static void run_mlp_up_backward_##SUFFIX(Bench* s) {                                                     \
        matmul_backward(s->dinp, s->dweight, s->dbias, s->dout, s->inp, s->weight, s->N, C, FF, &s->SUFFIX); \
    }                                                                                                        \
    static void run_mlp_down_##SUFFIX(Bench* s) {                                                            \
        matmul_forward(s->out, s->inp, s->weight, s->bias, s->N, FF, C, &s->SUFFIX);                         \
    }                                                                                                        \
    static void run_mlp_down_backward_##SUFFIX(Bench* s) {                                                   \
        matmul_backward(s->dinp, s->dweight, s->dbias, s->dout, s->inp, s->weight, s->N, FF, C, &s->SUFFIX); \
    }                                                                                                        \
    static void run_head_##SUFFIX(Bench* s) {                                                                \
        matmul_forward(s->out, s->inp, s->weight, NULL, CHUNK, C, Vp, &s->SUFFIX);                           \
    }                                                                                                        \
    static void run_head_backward_##SUFFIX(Bench* s) {                                                       \
        matmul_backward(s->dinp, s->dweight, NULL, s->dout, s->inp, s->weight, CHUNK, C, Vp, &s->SUFFIX);    \
    }                                                                                                        \
    static void run_decode_##SUFFIX(Bench* s) {                                                              \
        matmul_forward(s->out, s->inp, s->weight, NULL, 1, C, FF, &s->SUFFIX);                               \
    }
MATMUL_CASES(fp32)
MATMUL_CASES(bf16)
MATMUL_CASES(plain)

typedef struct {
    const char* name;
    void (*run)(Bench*);
    int ceiling;     // a Ceiling
    double work;     // floating-point operations or bytes of one call
    double per_step; // calls in a training step
} Case;

int main(int argc, char** argv) {
    static Bench s;
    bench_setup(&s, argc > 2 ? (int)strtol(argv[1], NULL, 10) : 4,
                argc > 2 ? (int)strtol(argv[2], NULL, 10) : 256);
    double N = s.N, T = s.T, chunks = N / CHUNK, mlp = 2.0 * N * C * FF, head = 2.0 * CHUNK * C * Vp;
    double scores = (double)s.B * NH * T * (T + 1) / 2 * HS * 2; // one of attention's products, causal
    double bytes = sizeof(real);
    double peak = peak_gflops(&s), stream = 3 * bytes * ADAMW_PART / best_seconds(run_stream, &s) / 1e9;
    printf("B %d, T %d, %d threads. Ceilings: %.0f GFLOP/s fp32 in registers, %.0f GB/s stream\n", s.B, s.T,
           omp_get_max_threads(), peak, stream);
    const Case cases[] = {
        {"embedding forward", run_embedding_forward, MEMORY, 3 * bytes * N * C, 1},
        {"embedding backward", run_embedding_backward, MEMORY, 5 * bytes * N * C, 1},
        {"residual + norm forward", run_norm_forward, MEMORY, 4 * bytes * N * C, 2 * L + 1},
        {"norm backward", run_norm_backward, MEMORY, 4 * bytes * N * C, 2 * L + 1},
        {"rope forward (not in GPT-2)", run_rope_forward, MEMORY, 4 * bytes * N * C, 0},
        {"attention forward", run_attention_forward, COMPUTE, 2 * scores, L},
        {"attention backward", run_attention_backward, COMPUTE, 5 * scores, L},
        {"gelu forward", run_gelu_forward, MEMORY, 2 * bytes * N * FF, L},
        {"gelu backward", run_gelu_backward, MEMORY, 3 * bytes * N * FF, L},
        {"classifier, 256 rows", run_classifier, MEMORY, 2 * bytes * CHUNK * Vp, chunks},
        {"adamw, 1/4 of the model", run_adamw, MEMORY, 8 * bytes * ADAMW_PART, 4},
        {"global norm, 1/4", run_norm_squared, MEMORY, bytes * ADAMW_PART, 4},
        {"mlp up", run_mlp_up_fp32, COMPUTE, mlp, 0},
        {"mlp up backward", run_mlp_up_backward_fp32, COMPUTE, 2 * mlp, 0},
        {"mlp down", run_mlp_down_fp32, COMPUTE, mlp, 0},
        {"mlp down backward", run_mlp_down_backward_fp32, COMPUTE, 2 * mlp, 0},
        {"head, 256 rows", run_head_fp32, COMPUTE, head, 0},
        {"head backward, 256 rows", run_head_backward_fp32, COMPUTE, 2 * head, 0},
        {"one row, 768 x 3072", run_decode_fp32, MEMORY, bytes * C * FF, 0},
        {"mlp up, bf16", run_mlp_up_bf16, COMPUTE_BF16, mlp, 0},
        {"mlp up backward, bf16", run_mlp_up_backward_bf16, COMPUTE_BF16, 2 * mlp, 0},
        {"mlp down, bf16", run_mlp_down_bf16, COMPUTE_BF16, mlp, 0},
        {"mlp down backward, bf16", run_mlp_down_backward_bf16, COMPUTE_BF16, 2 * mlp, 0},
        {"head, 256 rows, bf16", run_head_bf16, COMPUTE_BF16, head, 0},
        {"head backward, 256 rows, bf16", run_head_backward_bf16, COMPUTE_BF16, 2 * head, 0},
        {"one row, 768 x 3072, bf16", run_decode_bf16, MEMORY, bytes * C * FF, 0},
        {"mlp up, plain C", run_mlp_up_plain, COMPUTE, mlp, 0},
        {"mlp up backward, plain C", run_mlp_up_backward_plain, COMPUTE, 2 * mlp, 0},
        {"mlp down, plain C", run_mlp_down_plain, COMPUTE, mlp, 0},
        {"mlp down backward, plain C", run_mlp_down_backward_plain, COMPUTE, 2 * mlp, 0},
        {"head, 256 rows, plain C", run_head_plain, COMPUTE, head, 0},
        {"head backward, 256 rows, plain C", run_head_backward_plain, COMPUTE, 2 * head, 0},
        {"one row, 768 x 3072, plain C", run_decode_plain, MEMORY, bytes * C * FF, 0},
    };
    double step = 0;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const Case* c = &cases[i];
        double seconds = best_seconds(c->run, &s), rate = c->work / seconds / 1e9;
        double ceiling = c->ceiling == MEMORY ? stream : c->ceiling == COMPUTE ? peak : 2 * peak;
        printf("%-34s %9.3f ms %8.1f %-8s %4.0f %% of the ceiling, %7.2f ms a step\n", c->name, 1e3 * seconds,
               rate, c->ceiling == MEMORY ? "GB/s" : "GFLOP/s", 100 * rate / ceiling,
               1e3 * seconds * c->per_step);
        step += seconds * c->per_step;
    }
    printf("everything but matmul: %.1f ms a step of %d tokens\n", 1e3 * step, s.N);
    return 0;
}
