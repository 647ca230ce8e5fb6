// How much of a step would be communication that nothing hides, on clusters that are not here?
// usage: bench_layouts
//
// A simulation (llmc/layout_plan.h), not a measurement: for Llama shapes of 1, 8 and 70 billion parameters on
// 8, 64 and 1,024 GPUs, the fastest layout that fits in 80 GB, with 1 or 2 sequences a micro-batch, with and
// without recomputing blocks. A step has 4 million tokens in sequences of 4,096 or 131,072. `naive` is the same
// layout as if a rank computed or communicated, never both. Published shares are 30-40 % naive, 18 % tuned.
#include "llmc/layout_search.h" // defines: layout_search, layout_cost, layout_rates_h100

enum { ROOM = 1024 };

static RunConfig run, best_run; // too large for a stack
static LayoutChoice choices[ROOM];

static const struct {
    const char* name;
    int C, L, NH, NKV, FF, T;
    bool tied;
} shapes[] = {
    {"1B", 2048, 16, 32, 8, 8192, 4096, true},
    {"8B", 4096, 32, 32, 8, 14336, 4096, false},
    {"70B", 8192, 80, 64, 8, 28672, 4096, false},
    {"8B", 4096, 32, 32, 8, 14336, 131072, false},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0], TOKENS = 1 << 22 }; // of a step

// Weights, gradients, moments, activations and logits, as train_gpt.cu lays them out in bf16, without its
// small arrays.
int gpt_memory(const RunConfig* r, bool training, MemoryLine lines[MEMORY_LINES_MAX]) {
    const Layout* l = &r->layout;
    ModelConfig c = model_part(&r->model, l);
    ParameterLayout p = layout_parameters(&c, l);
    int zero = r->parallel.zero_stage, dp = l->dp_size, windows = l->dp_size > 1;
    double all = (double)p.num_parameters, slice = all / dp, C = c.hidden_size;
    double window =
        (double)(p.num_parameters - p.layer_size * (size_t)c.num_hidden_layers + 2 * p.layer_size) * windows;
    double N = (double)r->batch.micro_batch_size * r->batch.sequence_length / l->cp_size, NS = N / l->tp_size;
    double keys = (double)(model_dim(&c, DIM_QKV) - model_dim(&c, DIM_HEADS)) * N * l->cp_size;
    double wide = (double)(model_dim(&c, DIM_QKV) + model_dim(&c, DIM_HEADS) + model_dim(&c, DIM_FC) +
                           model_dim(&c, DIM_FF));
    int M = r->batch.global_batch_size / r->batch.micro_batch_size / num_replicas(l);
    PipelineList list = pipeline_list(r->parallel.pipeline_schedule, l->pp_size, l->pp, l->num_chunks, M);
    double layers = (double)list.num_slots * c.num_hidden_layers / l->num_chunks,
           block = 3 * NS * C + N * wide;
    free(list.ops);
    double weights = zero == ZERO_PARAMETERS ? slice + window : all;
    double gradients = zero >= ZERO_GRADIENTS ? slice + window : all;
    double kept = r->batch.recompute == RECOMPUTE_BLOCK ? layers * NS * C + block : layers * (block + NS * C);
    double scratch =
        (N * wide + (l->tp_size > 1 ? 2 * N * C : 0) + 3 * NS * C + (l->cp_size > 1 ? 3 * keys : 0)) * 2 +
        PLAN_LOGIT_BYTES;
    lines[0].name = "weights",
    lines[0].bytes = (uint64_t)(2 * weights + 2 * slice); // and the master's low halves
    lines[1].name = "gradients", lines[1].bytes = (uint64_t)(4 * gradients);
    lines[2].name = "moments", lines[2].bytes = (uint64_t)(8 * slice);
    lines[3].name = "activations", lines[3].bytes = (uint64_t)(2 * kept + scratch);
    return training ? 4 : 1;
}
bool gpt_resolve(RunConfig* r, bool training, Error* err) {
    (void)r, (void)training, (void)err;
    return true;
}
void gpt_measure(const RunConfig* r, double* matmul_rate, double* copy_rate) {
    (void)r;
    *matmul_rate = *copy_rate = 0;
}

static void shape_run(int shape) {
    ModelConfig* c = &run.model;
    memset(&run, 0, sizeof run);
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(model_families[i].model_type, "llama") == 0) c->family = &model_families[i];
    c->vocab_size = 128256, c->hidden_size = shapes[shape].C, c->num_hidden_layers = shapes[shape].L;
    c->num_attention_heads = shapes[shape].NH, c->num_key_value_heads = shapes[shape].NKV;
    c->head_dim = c->hidden_size / c->num_attention_heads, c->intermediate_size = shapes[shape].FF;
    c->max_position_embeddings = run.batch.sequence_length = shapes[shape].T;
    c->tie_word_embeddings = shapes[shape].tied;
    run.batch.micro_batch_size = 1, run.batch.global_batch_size = TOKENS / shapes[shape].T;
    run.precision.compute = COMPUTE_BF16;
    run.layout = layout_single();
}

// The fastest over micro-batches and recomputing; false: nothing fits.
static bool best_choice(int size, LayoutRates rates, LayoutChoice* best) {
    bool found = false;
    for (int option = 0; option < 4; option++) {
        int count = ROOM;
        run.batch.micro_batch_size = option % 2 + 1;
        run.batch.recompute = option < 2 ? RECOMPUTE_NONE : RECOMPUTE_BLOCK;
        run.layout = layout_single();
        if (!layout_search(&run, size, 80000000000ull, rates, choices, &count)) continue;
        if (!found || choices[0].cost.seconds < best->cost.seconds) *best = choices[0], best_run = run;
        found = true;
    }
    return found;
}

int main(void) {
    static const int sizes[] = {8, 64, 1024};
    LayoutRates rates = layout_rates_h100();
    printf("a simulation: %.0f TFLOP/s of matmuls a GPU, %.0f GB/s NVLink, %.0f GB/s InfiniBand a GPU, "
           "%.0f us a message\n",
           rates.matmul / 1e12, rates.link_inside / 1e9, rates.link_between / 1e9, rates.latency * 1e6);
    printf(
        "model sequence  GPUs  tp cp pp   dp zero schedule     micro recompute  memory      step  bubble | exposed: "
        "naive  tuned\n");
    for (int s = 0; s < SHAPES; s++)
        for (int k = 0; k < 3; k++) {
            LayoutChoice best;
            LayoutRates naive = rates;
            naive.no_overlap = true;
            shape_run(s);
            if (!best_choice(sizes[k], rates, &best)) {
                printf("%5s %8d %5d  does not fit\n", shapes[s].name, shapes[s].T, sizes[k]);
                continue;
            }
            const Layout* l = &best.layout;
            LayoutCost without = layout_cost(&best_run, l, naive);
            printf(
                "%5s %8d %5d %3d %2d %2d %4d %4d %-11s %6d %-9s %5.0f GB %6.2f s %5.1f %% | %12.1f %% %4.1f %%\n",
                shapes[s].name, shapes[s].T, sizes[k], l->tp_size, l->cp_size, l->pp_size, num_replicas(l),
                best.zero, l->pp_size > 1 ? pipeline_schedule_name(best.schedule) : "",
                best_run.batch.micro_batch_size,
                best_run.batch.recompute == RECOMPUTE_BLOCK ? "block" : "none", (double)best.memory / 1e9,
                best.cost.seconds, 100 * best.cost.bubble, 100 * without.exposed, 100 * best.cost.exposed);
            fflush(stdout);
        }
    printf("published shares: naive 30-40 %%, tuned 18 %%\n");
    return 0;
}
