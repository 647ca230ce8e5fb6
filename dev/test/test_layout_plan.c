// What a layout costs: traffic against numbers from a pencil, time against what must hold, the search, what
// is printed.
#include "dev/test/pipeline_time.h" // defines: pipeline_simulate
#include "llmc/layout_search.h"     // defines: layout_traffic, layout_cost, layout_search, layout_print ...
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

static RunConfig run; // too large for a stack

// A program whose ranks need 16 bytes for every parameter, fewer for those that data-parallel ranks share
// out.
struct GPT {
    int nothing;
};
int gpt_memory(const RunConfig* r, bool training, MemoryLine lines[MEMORY_LINES_MAX]) {
    ModelConfig part = model_part(&r->model, &r->layout);
    uint64_t elements = layout_parameters(&part, &r->layout).num_parameters;
    int shared = 4 * (r->parallel.zero_stage + 1), dp = r->layout.dp_size;
    lines[0].name = "all",
    lines[0].bytes = elements * (uint64_t)(16 - shared) + elements * (uint64_t)shared / (uint64_t)dp;
    return training ? 1 : 0;
}
bool gpt_resolve(RunConfig* r, bool training, Error* err) {
    (void)r, (void)training, (void)err;
    return true;
}
static double measured;
void gpt_measure(const RunConfig* r, double* matmul_rate, double* copy_rate) {
    (void)r;
    *matmul_rate = *copy_rate = measured;
}

// Into `run`, in a layout of `size` processes of which this is rank 0: a GPT-2 with V 512, C 64, L 2, NH 4,
// FF 256, T 64, tied, fp32 gradients; 8 sequences a micro-batch. Overrides end with NULL.
static const Layout* lay_out_run(int size, const char* first, ...) {
    char* overrides[24] = {(char*)"sample.every=0"};
    int count = 1;
    va_list more;
    va_start(more, first);
    for (const char* o = first; o != NULL; o = va_arg(more, const char*)) overrides[count++] = (char*)o;
    va_end(more);
    Error err = {0};
    if (!config_load(&run, "configs/tiny_gpt2.json", count, overrides, &err) ||
        !layout_resolve(&run, 0, size, &err))
        fail_msg("%s", err.text);
    return &run.layout;
}

static void expect_traffic(int rank, double tp, double dp, double pp, double tied, double world) {
    Layout l = layout_at(run.layout, rank);
    LayoutTraffic t = layout_traffic(&run, &l);
    assert_float_equal(t.tp, tp, 0.5);
    assert_float_equal(t.cp, 0, 0.5);
    assert_float_equal(t.dp, dp, 0.5);
    assert_float_equal(t.pp, pp, 0.5);
    assert_float_equal(t.tied, tied, 0.5);
    assert_float_equal(t.world, world, 0.5);
}

#define TP "parallel.tensor_parallel_size="
#define PP "parallel.pipeline_parallel_size="
#define CP "parallel.context_parallel_size="
#define ZERO "parallel.zero_stage="
#define GLOBAL "batch.global_batch_size="

// Two sums of 67 words and two more, of 8 bytes: 1088.
enum { SUMS = (2 * 67 + 2) * 8 };

static void one_rank_sends_nothing(void** state) {
    (void)state;
    lay_out_run(1, GLOBAL "16", NULL);
    expect_traffic(0, 0, 0, 0, 0, 0);
}

// (N, C) in bf16 is 512 * 64 * 2 bytes, of which a rank of two sends half: G. A layer gathers or scatters it
// 4 times forward and 6 times backward, the embedding and the head twice each; of every row 12 bytes.
// Gradients that both have: wpe, 2 * (4 * 64 + 2 * 64), 2 * 64, in fp32, and their all-reduce sends them
// once.
static void tensor_parallel_traffic(void** state) {
    (void)state;
    double G = 512 * 64 * 2 / 2, pass = (2 * 10 + 4) * G + 12 * 512;
    double replicas = (64 * 64 + 2 * 384 + 128) * 4;
    lay_out_run(2, TP "2", NULL);
    expect_traffic(0, pass + replicas, 0, 0, 0, SUMS);
    expect_traffic(1, pass + replicas, 0, 0, 0, SUMS);
    lay_out_run(2, TP "2", GLOBAL "24", NULL); // gradients add up where they are
    expect_traffic(0, 3 * pass + replicas, 0, 0, 0, SUMS);
    lay_out_run(2, TP "2", GLOBAL "24", "parallel.deterministic=true", NULL); // and here they do not
    expect_traffic(0, 3 * (pass + replicas), 0, 0, 0, SUMS);
    lay_out_run(2, TP "2", "precision.gradients=bf16", "precision.compute=fp32", NULL);
    expect_traffic(0, 24 * 2 * G + 12 * 512 + replicas / 2, 0, 0, 0, SUMS);
    // of the two layers the last one still has everything: the other one gathers twice and scatters once more
    lay_out_run(2, TP "2", "batch.recompute=block", NULL);
    expect_traffic(0, pass + 3 * G + replicas, 0, 0, 0, SUMS);
}

// Four ranks and two key/value heads of 16: pairs have the same head, and sum its rows of qkvw. Two
// micro-batches.
static void replicated_heads_traffic(void** state) {
    (void)state;
    char* overrides[] = {(char*)TP "4", (char*)"sample.every=0", (char*)"model.intermediate_size=192"};
    Error err = {0};
    if (!config_load(&run, "configs/tiny_llama.json", 3, overrides, &err) ||
        !layout_resolve(&run, 0, 4, &err))
        fail_msg("%s", err.text);
    double N = run.batch.micro_batch_size * 64, G = N * 64 * 2 * 3 / 4;
    double norms = (2 * 2 * 64 + 64) * 4 * 2 * 3 / 4, heads = 2 * (2 * 16 * 64) * 4; // no biases
    expect_traffic(0, 2 * (24 * G + 3 * 12 * N) + norms + heads, 0, 0, 0, 2 * 3 * SUMS / 4);
}

// Buckets are multiples of 2 * 2048 elements: 36864 before the layers, 53248 a layer, 4096 behind them.
static void data_parallel_traffic(void** state) {
    (void)state;
    double all = 36864 + 2 * 53248 + 4096, sum = all * 4 / 2, gather = all * 2 / 2;
    lay_out_run(2, ZERO "0", GLOBAL "16", NULL);
    expect_traffic(0, 0, 2 * sum, 0, 0, SUMS);
    lay_out_run(2, ZERO "1", GLOBAL "48", NULL);
    expect_traffic(0, 0, sum + gather, 0, 0, SUMS);
    lay_out_run(2, ZERO "2", GLOBAL "48", NULL);
    expect_traffic(1, 0, 3 * sum + gather, 0, 0, SUMS);
    lay_out_run(2, ZERO "2", GLOBAL "48", "precision.gradients=bf16", NULL);
    expect_traffic(0, 0, 3 * sum / 2 + gather, 0, 0, SUMS);
    lay_out_run(2, ZERO "1", GLOBAL "48", "parallel.deterministic=true",
                NULL); // all slices, to itself as well
    expect_traffic(0, 0, 3 * 2 * sum + gather, 0, 0, SUMS);
    lay_out_run(2, ZERO "3", GLOBAL "16", NULL); // two layers have two windows: gathered once
    expect_traffic(0, 0, sum + gather, 0, 0, SUMS);
}

// Four layers take turns in two windows: forward gathers 4, backward finds the last two and gathers 2; the
// next micro-batch finds the first two, and gathers 2 and 2.
static void zero3_gathers_by_windows(void** state) {
    (void)state;
    double outside = 36864 + 4096, layer = 53248;
    lay_out_run(2, ZERO "3", GLOBAL "32", "model.n_layer=4", NULL);
    expect_traffic(0, 0, 2 * (outside + 4 * layer) * 4 / 2 + (outside + 10 * layer) * 2 / 2, 0, 0, SUMS);
}

// Two stages: one sends activations, the other gradients, (N, C) each; with two chunks a stage each sends
// both, but the last chunk has no activations and the first no gradients to send. Both sum wte and wpe, 36864
// elements.
static void pipeline_traffic(void** state) {
    (void)state;
    double message = 512 * 64 * 2;
    lay_out_run(2, PP "2", GLOBAL "32", NULL);
    expect_traffic(0, 0, 0, 4 * message, 36864 * 4, SUMS);
    expect_traffic(1, 0, 0, 4 * message, 36864 * 4, SUMS);
    lay_out_run(2, PP "2", GLOBAL "32", "parallel.virtual_pipeline_size=2", "model.n_layer=4",
                "parallel.pipeline_schedule=interleaved", NULL);
    expect_traffic(0, 0, 0, 4 * (2 + 1) * message, 36864 * 4, SUMS);
    expect_traffic(1, 0, 0, 4 * (1 + 2) * message, 36864 * 4, SUMS);
    lay_out_run(4, PP "4", GLOBAL "32", "model.n_layer=4", NULL);
    expect_traffic(1, 0, 0, 4 * 2 * message, 0, 2 * 3 * SUMS / 4);
}

// Two ranks have half of each sequence: of keys and values, (N / 2, 128) of 2 bytes, each layer gathers one part in the
// forward pass, again in the backward pass, apart from the last layer's, which are still there, and scatters gradients.
static void context_parallel_traffic(void** state) {
    (void)state;
    double part = 256 * 128 * 2, all = 36864 + 2 * 53248 + 4096;
    Layout l = *lay_out_run(2, CP "2", GLOBAL "16", NULL);
    LayoutTraffic t = layout_traffic(&run, &l);
    assert_float_equal(t.cp, 2 * (2 + 1 + 2) * part, 0.5); // of two micro-batches
    assert_float_equal(t.dp, all * (4 + 2) / 2, 0.5); // and weights are shared out as by data parallelism
    l = *lay_out_run(2, CP "2", GLOBAL "16", "batch.recompute=block", NULL);
    assert_float_equal(layout_traffic(&run, &l).cp, 2 * (2 + 1 + 2) * part, 0.5);
    l = *lay_out_run(4, CP "2", PP "2", GLOBAL "16", NULL);
    assert_float_equal(layout_traffic(&run, &l).cp, 2 * (1 + 1 + 1) * part,
                       0.5); // two micro-batches are under way
    l = layout_at(l, 2);     // the last stage's backward pass follows its forward pass
    assert_float_equal(layout_traffic(&run, &l).cp, 2 * (1 + 0 + 1) * part, 0.5);
}

// A rank's part of wte and wpe is 20480 elements, of a layer 25184, in whole slices 28672.
static void traffic_of_all_three(void** state) {
    (void)state;
    double G = 512 * 64 * 2 / 2, share = 20480 + 28672;
    lay_out_run(8, TP "2", PP "2", GLOBAL "32", NULL);
    expect_traffic(0, 2 * 12 * G + (64 * 64 + 384) * 4, share * (4 + 2) / 2, 2 * G, 20480 / 2 * 4,
                   2 * 7 * SUMS / 8);
    lay_out_run(8, TP "2", PP "2", GLOBAL "32", ZERO "2", "batch.recompute=block", NULL);
    expect_traffic(0, 2 * (15 * G + (64 * 64 + 384) * 4), share * (2 * 4 + 2) / 2, 2 * G, 20480 / 2 * 4,
                   2 * 7 * SUMS / 8);
    // the last stage has the head, the last norm and, as it is tied, the embedding's bucket; and, with one
    // micro-batch at a time, all of its last layer
    double last = share + 4096;
    lay_out_run(8, TP "2", PP "2", GLOBAL "32", "batch.recompute=block", NULL);
    expect_traffic(7, 2 * (12 * G + 12 * 512) + (64 * 64 + 384 + 128) * 4, last * (4 + 2) / 2, 2 * G,
                   20480 / 2 * 4, 2 * 7 * SUMS / 8);
}

// ----------------------------------------------------------------------------
// time

static LayoutRates rates_of(double link) {
    LayoutRates r = {1e12, INFINITY, link, link, 0, 8, false};
    return r;
}

// Gathers of the backward pass are hidden, those of the forward pass and sums of gradients are not: 4 of 5 parts.
static void context_parallel_is_partly_hidden(void** state) {
    (void)state;
    const Layout* l = lay_out_run(2, CP "2", NULL);
    double all = layout_traffic(&run, l).cp, link = 1e14;
    LayoutRates rates = rates_of(link);
    assert_float_equal(layout_cost(&run, l, rates).cp * link / all, 0.8, 1e-6);
    rates.no_overlap = true;
    assert_float_equal(layout_cost(&run, l, rates).cp * link / all, 1, 1e-3);
}

// One rank: every FLOP of flops.h, and 36 bytes a parameter. No bubble, nothing exposed.
static void one_rank_computes(void** state) {
    (void)state;
    LayoutRates rates = rates_of(1e9);
    rates.copy = 1e11;
    LayoutCost c = layout_cost(&run, lay_out_run(1, GLOBAL "16", NULL), rates);
    double elements = (double)parameter_layout(&run.model).num_parameters;
    assert_float_equal(
        c.seconds / (16 * 64 * flops_per_token(&run.model, 64, FLOPS_CAUSAL) / 1e12 + 36 * elements / 1e11),
        1, 1e-9);
    assert_float_equal(c.compute, c.seconds, 1e-12);
    assert_float_equal(c.bubble, 0, 1e-9);
    assert_float_equal(c.exposed, 0, 1e-9);
}

// From links that cost nothing to links that are all there is, for every ZeRO stage.
static void data_parallel_hides_behind_compute(void** state) {
    (void)state;
    static const char* const zero[] = {ZERO "0", ZERO "1", ZERO "2", ZERO "3"};
    for (int z = 0; z < 4; z++) {
        const Layout* l = lay_out_run(4, zero[z], GLOBAL "64", "model.n_layer=8", NULL);
        LayoutTraffic sent = layout_traffic(&run, l);
        double bytes = sent.dp + sent.world, before = 0;
        LayoutCost fast = layout_cost(&run, l, rates_of(1e18));
        assert_true(fast.exposed < 1e-6);
        for (double link = 1e18; link > 1e3; link /= 2) {
            LayoutRates rates = rates_of(link), blocking = rates;
            blocking.no_overlap = true;
            LayoutCost c = layout_cost(&run, l, rates), naive = layout_cost(&run, l, blocking);
            assert_true(c.dp >= before * (1 - 1e-9));
            assert_true(c.dp <= bytes / link * (1 + 1e-9) + 1e-15);
            assert_true(c.seconds <= naive.seconds * (1 + 1e-9));
            assert_float_equal(naive.dp * link / bytes, 1, 0.01 + 1e-6 * link);
            before = c.dp;
        }
        LayoutCost slow = layout_cost(&run, l, rates_of(1e2));
        assert_float_equal(slow.dp / (bytes / 1e2), 1, 1e-3);
        assert_true(slow.exposed > 0.999);
        // as long as compute alone: some is hidden, and the first layer's is not
        LayoutCost even = layout_cost(&run, l, rates_of(bytes / fast.seconds));
        assert_true(even.dp > 0 && even.dp < 0.9 * fast.seconds);
    }
}

// With few bytes a layer all but the sum of the bucket that is ready last is hidden: half of wte and wpe, in
// fp32; and the gather of what the first pass begins with.
static void the_last_bucket_is_exposed(void** state) {
    (void)state;
    const Layout* l = lay_out_run(2, GLOBAL "16", "model.n_layer=8", NULL);
    double link = 1e11;
    LayoutCost c = layout_cost(&run, l, rates_of(link));
    double first_gathers = (36864 + 53248) * 2 / 2 / link, last_sum = 36864 * 4 / 2 / link;
    assert_true(c.dp >= last_sum + first_gathers - 1e-12);
    assert_true(c.dp < layout_traffic(&run, l).dp / link / 3);
}

// Half of a gather in two pieces is exposed at least, and all of it at most.
static void tensor_parallel_is_half_hidden(void** state) {
    (void)state;
    const Layout* l = lay_out_run(2, TP "2", "precision.fused_gelu=false", NULL);
    double all = layout_traffic(&run, l).tp, before = 0;
    for (double link = 1e15; link > 1e6; link /= 4) {
        LayoutRates rates = rates_of(link);
        LayoutCost c = layout_cost(&run, l, rates);
        assert_true(c.tp >= before && c.tp > 0.25 * all / link && c.tp <= all / link * (1 + 1e-9));
        before = c.tp;
        rates.no_overlap = true;
        assert_float_equal(layout_cost(&run, l, rates).tp * link / all, 1, 1e-3);
    }
    // layers: forward 4 halves, backward 2 halves and 4 hidden whole; embedding and head: 4 whole
    double G = 512 * 64 * 2 / 2, link = 1e14, replicas = (64 * 64 + 2 * 384 + 128) * 4;
    double exposed = (2 * (4 + 2) * 0.5 + 4) * G + 12 * 512 + replicas;
    assert_float_equal(layout_cost(&run, l, rates_of(link)).tp * link / exposed, 1, 1e-6);
}

// Where stages cost about the same, pipeline_simulate's bubble; the head, 128 rows here, is small beside the
// layers.
static void bubble_is_the_schedule_s(void** state) {
    (void)state;
    PipelineCosts costs = {1, 1, 1, 0};
    LayoutCost c = layout_cost(
        &run, lay_out_run(4, PP "4", GLOBAL "64", "model.n_layer=64", "model.vocab_size=100", NULL),
        rates_of(1e18));
    assert_float_equal(c.bubble, pipeline_simulate(PIPELINE_1F1B, 4, 1, 8, costs).bubble, 0.01);
    c = layout_cost(&run,
                    lay_out_run(4, PP "4", GLOBAL "64", "model.n_layer=64", "model.vocab_size=100",
                                "parallel.virtual_pipeline_size=2", "parallel.pipeline_schedule=interleaved",
                                NULL),
                    rates_of(1e18));
    assert_float_equal(c.bubble, pipeline_simulate(PIPELINE_INTERLEAVED, 4, 2, 8, costs).bubble, 0.01);
    c = layout_cost(&run,
                    lay_out_run(4, PP "4", GLOBAL "64", "model.n_layer=64", "model.vocab_size=100",
                                "parallel.pipeline_schedule=zero_bubble", NULL),
                    rates_of(1e18));
    assert_float_equal(c.bubble, pipeline_simulate(PIPELINE_ZERO_BUBBLE, 4, 1, 8, costs).bubble, 0.03);
    assert_float_equal(c.compute / c.seconds + c.bubble + c.exposed, 1, 1e-9);
    assert_true(c.pp < 1e-6);
}

static void links_follow_machines(void** state) {
    (void)state;
    LayoutRates r = layout_rates_h100();
    const Layout* l = lay_out_run(8, TP "2", PP "2", GLOBAL "32", NULL);
    for (int a = 0; a < NUM_PLAN_AXES; a++) assert_float_equal(axis_link(&r, l, a), 450e9, 1);
    r.gpus_per_machine = 4; // tp and dp inside, stages apart
    assert_float_equal(axis_link(&r, l, PLAN_TP), 450e9, 1);
    assert_float_equal(axis_link(&r, l, PLAN_DP), 450e9, 1);
    assert_float_equal(axis_link(&r, l, PLAN_PP), 50e9, 1);
    r.gpus_per_machine = 2; // each rank of dp has a machine of its own
    assert_float_equal(axis_link(&r, l, PLAN_DP), 50e9, 1);
    l = lay_out_run(8, GLOBAL "64", NULL); // two rings leave each machine, through a port each
    assert_float_equal(axis_link(&r, l, PLAN_DP), 100e9, 1);
}

// ----------------------------------------------------------------------------
// search

enum { ROOM = 256 };
static LayoutChoice choices[ROOM], few[3];

static void search_sorts(void** state) {
    (void)state;
    int count = ROOM, room = 3, last_fit = -1;
    lay_out_run(8, GLOBAL "64", "model.n_layer=4", NULL);
    uint64_t limit = 16 * (uint64_t)parameter_layout(&run.model).num_parameters / 2;
    LayoutRates rates = rates_of(1e10);
    assert_true(layout_search(&run, 8, limit, rates, choices, &count));
    assert_true(count > 20 && count < ROOM);
    for (int i = 0; i < count; i++) {
        const Layout* l = &choices[i].layout;
        assert_int_equal(l->tp_size * l->dp_size * l->pp_size, 8);
        assert_int_equal(choices[i].fits, choices[i].memory <= limit);
        if (choices[i].fits) {
            assert_int_equal(last_fit, i - 1);
            last_fit = i;
            if (i > 0) assert_true(choices[i].cost.seconds >= choices[i - 1].cost.seconds);
        } else {
            assert_non_null(strstr(choices[i].reason, "does not fit: "));
        }
        for (int k = 0; k < i; k++)
            assert_true(choices[k].zero != choices[i].zero || choices[k].schedule != choices[i].schedule ||
                        memcmp(&choices[k].layout, l, sizeof *l) != 0);
    }
    assert_true(last_fit >= 2 && last_fit < count - 1);
    assert_string_equal(choices[0].reason, "the fastest");
    assert_memory_equal(&run.layout, &choices[0].layout, sizeof(Layout));
    assert_int_equal(run.parallel.zero_stage, choices[0].zero);
    assert_true(layout_search(&run, 8, limit, rates, few, &room));
    assert_int_equal(room, 3);
    for (int i = 0; i < 3; i++) assert_memory_equal(&few[i].layout, &choices[i].layout, sizeof(Layout));
}

// Nothing that costs nothing is avoided; what costs all is.
static void search_follows_the_rates(void** state) {
    (void)state;
    int count = ROOM;
    lay_out_run(8, GLOBAL "64", "model.n_layer=8", NULL);
    assert_true(layout_search(&run, 8, 0, rates_of(1e18), choices, &count));
    assert_int_equal(run.layout.pp_size, 1); // a bubble is all that can be lost
    count = ROOM;
    assert_true(layout_search(&run, 8, 0, rates_of(1e6), choices, &count));
    assert_true(run.layout.tp_size == 1); // activations of every layer are the most bytes
    // 4 heads allow tp 4 at most; keys and values of 8 ranks are the most bytes of all
    assert_int_equal(choices[count - 1].layout.cp_size, 8);
    assert_non_null(strstr(choices[count - 1].reason, "slower: context-parallel communication"));
}

static void search_that_finds_nothing(void** state) {
    (void)state;
    int count = ROOM;
    lay_out_run(8, GLOBAL "64", NULL);
    RunConfig before = run;
    assert_false(layout_search(&run, 8, 1000, rates_of(1e10), choices, &count));
    assert_true(count > 0);
    assert_memory_equal(&run.layout, &before.layout, sizeof before.layout);
    count = ROOM;
    assert_false(
        layout_search(&run, 7, 0, rates_of(1e10), choices, &count)); // 64 sequences, 4 heads, 2 layers
    assert_int_equal(count, 0);
}

// ----------------------------------------------------------------------------
// what is printed

static char text[16384];
static void read_back(FILE* out) {
    rewind(out);
    text[fread(text, 1, sizeof text - 1, out)] = '\0';
    fclose(out);
}
static void expect(const char* wanted) {
    if (strstr(text, wanted) == NULL) fail_msg("no \"%s\" in: %s", wanted, text);
}

static void reasons_are_short(void** state) {
    (void)state;
    LayoutChoice c[4];
    memset(c, 0, sizeof c);
    for (int i = 0; i < 4; i++) c[i].layout = layout_single(), c[i].fits = i < 3, c[i].memory = 5250000000;
    LayoutCost best = {1.0, 0.9, 0.1, 0, 0, 0, 0, 0.1}, bubble = {1.12, 0.846, 0.05, 0, 0, 0, 0.2, 0.05};
    LayoutCost slow = {1.05, 0.9, 0.1, 0, 0.05, 0, 0, 0.15};
    c[0].cost = best, c[1].cost = bubble, c[2].cost = slow;
    c[3].memory = 91000000000;
    for (int i = 0; i < 4; i++) explain_choice(&c[i], &c[0], 80000000000);
    assert_string_equal(c[0].reason, "the fastest");
    assert_string_equal(c[1].reason, "12 % slower: bubble 20 %");
    assert_string_equal(c[2].reason, "5.0 % slower: data-parallel communication 5 %");
    assert_string_equal(c[3].reason, "does not fit: 91 GB of 80");
    FILE* out = tmpfile();
    assert_non_null(out);
    layout_print(c, 4, out);
    read_back(out);
    expect("  tp   cp   pp    dp zero  schedule        memory     a step  bubble  exposed\n");
    expect(
        "   1    1    1     1    0                 5.25 GB    1.120 s  20.0 %    5.0 %  12 % slower: bubble 20 %\n");
    expect("91 GB ");
    expect("  does not fit: 91 GB of 80\n");
}

static void plan_of_a_layout(void** state) {
    (void)state;
    FILE* out = tmpfile();
    assert_non_null(out);
    lay_out_run(8, TP "2", PP "2", GLOBAL "32", NULL);
    layout_plan_print(&run, out);
    read_back(out);
    expect(
        "8 processes: tensor parallel 2 x context parallel 1 x data parallel 2 x pipeline 2, ZeRO 1, 1F1B\n");
    expect("memory, stage 0 "), expect("589,824   0.00 GB\n"); // 49152 * (16 - 8) + 49152 * 8 / 2
    expect("memory, stage 1 "), expect("638,976   0.00 GB\n"); // 4096 more
    expect("data parallel                   159,744\n");       // 53248 * 6 / 2
    expect("pipeline                         65,536\n");
    expect("sums of the step                  1,904\n");
    expect("with 594 TFLOP/s, 450 GB/s in a machine of 8");
    out = tmpfile();
    measured = 1e12;
    layout_plan_print(&run, out);
    measured = 0;
    read_back(out);
    expect("with 1 TFLOP/s");
    out = tmpfile();
    lay_out_run(1, GLOBAL "32", NULL);
    layout_plan_print(&run, out);
    read_back(out);
    assert_string_equal(text, "");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_sends_nothing),     cmocka_unit_test(tensor_parallel_traffic),
        cmocka_unit_test(replicated_heads_traffic),   cmocka_unit_test(data_parallel_traffic),
        cmocka_unit_test(zero3_gathers_by_windows),   cmocka_unit_test(pipeline_traffic),
        cmocka_unit_test(traffic_of_all_three),       cmocka_unit_test(context_parallel_traffic),
        cmocka_unit_test(one_rank_computes),          cmocka_unit_test(data_parallel_hides_behind_compute),
        cmocka_unit_test(the_last_bucket_is_exposed), cmocka_unit_test(tensor_parallel_is_half_hidden),
        cmocka_unit_test(bubble_is_the_schedule_s),   cmocka_unit_test(context_parallel_is_partly_hidden),
        cmocka_unit_test(links_follow_machines),      cmocka_unit_test(search_sorts),
        cmocka_unit_test(search_follows_the_rates),   cmocka_unit_test(search_that_finds_nothing),
        cmocka_unit_test(reasons_are_short),          cmocka_unit_test(plan_of_a_layout),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
