// Which layout of so many processes is the fastest that fits, why the others are not, and what is printed of it.
// Plain C.
#pragma once
#include "llmc/layout_plan.h" // defines: layout_cost, layout_traffic; first, as it asks for all of the C library
#include "llmc/fit.h"         // defines: memory_needed

// ----------------------------------------------------------------------------
// search

typedef struct {
    Layout layout; // of rank 0
    int zero, schedule;
    uint64_t memory; // of the fullest stage
    bool fits;
    LayoutCost cost;  // zeros where it does not fit
    char reason[112]; // why it is not the first
} LayoutChoice;

static inline uint64_t stage_memory(const RunConfig* run, int stage) {
    RunConfig there = *run;
    there.layout = layout_at(run->layout, layout_rank(&run->layout, 0, 0, stage));
    return memory_needed(&there, true);
}
static inline uint64_t fullest_stage(const RunConfig* run) {
    uint64_t most = 0;
    for (int p = 0; p < run->layout.pp_size; p++) {
        uint64_t bytes = stage_memory(run, p);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static inline bool better_choice(const LayoutChoice* a, const LayoutChoice* b) {
    if (a->fits != b->fits) return a->fits;
    return a->fits ? a->cost.seconds < b->cost.seconds : a->memory < b->memory;
}

// The layout that run's sizes give, with what it costs, to its place among the others.
static inline void add_choice(const RunConfig* run, uint64_t limit, const LayoutRates* rates,
                              LayoutChoice* out, int room, int* count) {
    LayoutChoice choice;
    memset(&choice, 0, sizeof choice);
    choice.layout = run->layout, choice.zero = run->parallel.zero_stage;
    choice.schedule = run->parallel.pipeline_schedule;
    choice.memory = fullest_stage(run), choice.fits = limit == 0 || choice.memory <= limit;
    if (choice.fits) choice.cost = layout_cost(run, &run->layout, *rates);
    if (*count == room && !better_choice(&choice, &out[room - 1])) return;
    int at = *count < room ? (*count)++ : room - 1;
    for (; at > 0 && better_choice(&choice, &out[at - 1]); at--) out[at] = out[at - 1];
    out[at] = choice;
}

static inline const char* gigabytes(char out[16], uint64_t bytes) {
    double gb = (double)bytes / 1e9;
    snprintf(out, 16, gb < 10 ? "%.2f" : "%.0f", gb);
    return out;
}

// What it loses more of than the best one does, by its share of its own step.
static inline void explain_choice(LayoutChoice* c, const LayoutChoice* best, uint64_t limit) {
    static const char* const names[] = {"compute",
                                        "bubble",
                                        "tensor-parallel communication",
                                        "context-parallel communication",
                                        "data-parallel communication",
                                        "pipeline communication"};
    char needed[16], there[16];
    if (!c->fits) {
        snprintf(c->reason, sizeof c->reason, "does not fit: %s GB of %s", gigabytes(needed, c->memory),
                 gigabytes(there, limit));
        return;
    }
    double slower = c->cost.seconds / best->cost.seconds - 1, most = -INFINITY, share = 0;
    double mine[] = {c->cost.compute, c->cost.bubble * c->cost.seconds, c->cost.tp, c->cost.cp, c->cost.dp,
                     c->cost.pp};
    double its[] = {best->cost.compute, best->cost.bubble * best->cost.seconds,
                    best->cost.tp,      best->cost.cp,
                    best->cost.dp,      best->cost.pp};
    int which = 0;
    for (int i = 0; i < 6; i++)
        if (mine[i] - its[i] > most) most = mine[i] - its[i], share = mine[i] / c->cost.seconds, which = i;
    if (slower < 0.0005)
        snprintf(c->reason, sizeof c->reason, c == best ? "the fastest" : "as fast");
    else
        snprintf(c->reason, sizeof c->reason,
                 slower < 0.0995 ? "%.1f %% slower: %s %.0f %%" : "%.0f %% slower: %s %.0f %%", 100 * slower,
                 names[which], 100 * share);
}

// Every schedule and ZeRO stage of tp x cp ranks with every pipeline.
static inline void try_layouts(RunConfig* trial, int size, int tp, int cp, uint64_t limit,
                               const LayoutRates* rates, LayoutChoice* out, int room, int* count) {
    static const int schedules[] = {PIPELINE_1F1B, PIPELINE_INTERLEAVED, PIPELINE_ZERO_BUBBLE};
    Error none = {0, {0}};
    for (int pp = 1; pp <= size / tp / cp; pp++)
        for (int option = 0; option < 9 && size / tp / cp % pp == 0; option++) {
            int zero = option % 3 + 1, schedule = schedules[option / 3];
            // one stage has no schedule; one data-parallel rank shares nothing out
            if ((pp == 1 && schedule != PIPELINE_1F1B) || (tp * pp == size && zero > 1)) continue;
            trial->parallel.tensor_parallel_size = tp, trial->parallel.context_parallel_size = cp;
            trial->parallel.pipeline_parallel_size = pp, trial->parallel.pipeline_schedule = schedule;
            trial->parallel.virtual_pipeline_size = schedule == PIPELINE_INTERLEAVED ? 2 : 1;
            trial->parallel.zero_stage = zero;
            if (layout_resolve(trial, 0, size, &none)) add_choice(trial, limit, rates, out, room, count);
        }
}

// Every layout of `size` processes that run's model and batch can have, the fastest first, then those that do
// not fit in memory_limit bytes (0: not known) a process. *count: room in out, then how many there are.
// False: none fits. run->parallel and run->layout are then as the first one needs them, or as they were.
static inline bool layout_search(RunConfig* run, int size, uint64_t memory_limit, LayoutRates rates,
                                 LayoutChoice out[], int* count) {
    RunConfig trial = *run;
    int room = *count;
    *count = 0;
    trial.parallel.data_parallel_size = 0;
    for (int tp = 1; tp <= size; tp++)
        for (int cp = 1; cp <= size / tp && size % tp == 0; cp++)
            if (size / tp % cp == 0)
                try_layouts(&trial, size, tp, cp, memory_limit, &rates, out, room, count);
    for (int i = 0; i < *count; i++) explain_choice(&out[i], &out[0], memory_limit);
    if (*count == 0 || !out[0].fits) return false;
    const Layout* l = &out[0].layout;
    run->parallel.tensor_parallel_size = l->tp_size, run->parallel.pipeline_parallel_size = l->pp_size;
    run->parallel.data_parallel_size = num_replicas(l), run->parallel.context_parallel_size = l->cp_size;
    run->parallel.virtual_pipeline_size = l->num_chunks;
    run->parallel.pipeline_schedule = out[0].schedule, run->parallel.zero_stage = out[0].zero,
    run->layout = *l;
    return true;
}

// ----------------------------------------------------------------------------
// what is printed

static inline void layout_print(const LayoutChoice* choices, int count, FILE* out) {
    fprintf(out, "%4s %4s %4s %5s %4s  %-11s %10s %10s %7s %8s\n", "tp", "cp", "pp", "dp", "zero", "schedule",
            "memory", "a step", "bubble", "exposed");
    for (int i = 0; i < count; i++) {
        const LayoutChoice* c = &choices[i];
        const Layout* l = &c->layout;
        char memory[16];
        fprintf(out, "%4d %4d %4d %5d %4d  %-11s %7s GB ", l->tp_size, l->cp_size, l->pp_size,
                num_replicas(l), c->zero, l->pp_size > 1 ? pipeline_schedule_name(c->schedule) : "",
                gigabytes(memory, c->memory));
        if (c->fits)
            fprintf(out, "%8.3f s %5.1f %% %6.1f %%  %s\n", c->cost.seconds, 100 * c->cost.bubble,
                    100 * c->cost.exposed, c->reason);
        else
            fprintf(out, "%10s %7s %8s  %s\n", "", "", "", c->reason);
    }
}

static inline void plan_print_traffic(const RunConfig* run, FILE* out) {
    static const char* const names[] = {"tensor parallel", "context parallel", "data parallel",
                                        "pipeline",        "tied embedding",   "sums of the step"};
    fprintf(out, "traffic      bytes that the busiest rank sends in a step\n");
    double most[NUM_PLAN_AXES] = {0};
    for (int p = 0; p < run->layout.pp_size; p++) {
        Layout l = layout_at(run->layout, layout_rank(&run->layout, 0, 0, p));
        LayoutTraffic t = layout_traffic(run, &l);
        double sent[] = {t.tp, t.cp, t.dp, t.pp, t.tied, t.world};
        for (int a = 0; a < NUM_PLAN_AXES; a++) most[a] = fmax(most[a], sent[a]);
    }
    char n[32];
    for (int a = 0; a < NUM_PLAN_AXES; a++)
        if (most[a] > 0) fprintf(out, "  %-18s %20s\n", names[a], with_commas(n, (uint64_t)llround(most[a])));
}

static inline void layout_plan_print_at(const RunConfig* run, LayoutRates rates, FILE* out) {
    const Layout* l = &run->layout;
    char n[32];
    if (l->size == 1) return;
    fprintf(
        out,
        "layout       %d processes: tensor parallel %d x context parallel %d x data parallel %d x pipeline %d",
        l->size, l->tp_size, l->cp_size, num_replicas(l), l->pp_size);
    if (l->num_chunks > 1) fprintf(out, " of %d chunks", l->num_chunks);
    fprintf(out, ", ZeRO %d, %s\n", run->parallel.zero_stage,
            pipeline_schedule_name(run->parallel.pipeline_schedule));
    for (int p = 0; p < l->pp_size; p++) {
        uint64_t bytes = stage_memory(run, p);
        fprintf(out, "  memory, stage %-4d %20s   %.2f GB\n", p, with_commas(n, bytes), (double)bytes / 1e9);
    }
    plan_print_traffic(run, out);
    LayoutCost cost = layout_cost(run, l, rates);
    if (run->parallel.deterministic) {
        RunConfig without = *run;
        without.parallel.deterministic = false;
        double seconds = layout_cost(&without, l, rates).seconds;
        fprintf(out, "deterministic  %.1f %% of the step below is what ordered sums cost\n",
                100 * (cost.seconds - seconds) / cost.seconds);
    }
    fprintf(
        out,
        "simulated    %.4g s a step: compute %.1f %%, bubble %.1f %%, exposed communication %.1f %%\n"
        "             (tensor %.1f, context %.1f, data %.1f, pipeline %.1f), with %.0f TFLOP/s, %.0f GB/s in a machine of "
        "%d,\n             %.0f GB/s a GPU between machines, %.0f us a message\n",
        cost.seconds, 100 * cost.compute / cost.seconds, 100 * cost.bubble, 100 * cost.exposed,
        100 * cost.tp / cost.seconds, 100 * cost.cp / cost.seconds, 100 * cost.dp / cost.seconds,
        100 * cost.pp / cost.seconds, rates.matmul / 1e12, rates.link_inside / 1e9, rates.gpus_per_machine,
        rates.link_between / 1e9, rates.latency * 1e6);
}

// What this device computes and copies, with the links of an H100; without a device, an H100's throughout.
static inline void layout_plan_print(const RunConfig* run, FILE* out) {
    LayoutRates rates = layout_rates_h100();
    double matmul = 0, copy = 0;
    if (run->layout.size == 1) return;
    gpt_measure(run, &matmul, &copy);
    if (matmul > 0 && copy > 0) rates.matmul = matmul, rates.copy = copy;
    layout_plan_print_at(run, rates, out);
}
