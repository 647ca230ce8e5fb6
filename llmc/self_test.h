// Before a long run: does every rank's GPU work, and is none much slower than the others? The node of one that fails
// is named in RUN_DIR/BAD_NODE, which scripts/train.sbatch reads to go on without it.
#pragma once
#include "llmc/launch.h"  // defines: node_name
#include "llmc/trainer.h" // defines: Trainer, gpt_self_test, gpt_measure, agree

#define SELF_TEST_SLOW 0.7 // of the median

// What a rank's test came to. GPU_FAILS: there is none, or a call failed, which may have other causes than the node.
enum { GPU_WORKS, GPU_FAILS, GPU_WRONG };

typedef struct {
    int32_t gpu;
    double matmul, copy; // FLOP/s, bytes/s
    char node[64];
} RankSpeed;

static inline void name_bad_node(const Trainer* t, const char* node) {
    char path[PATH_MAX], line[80];
    Error ignored = {0, {0}};
    int size = snprintf(line, sizeof line, "%s\n", node);
    if (path_join(path, t->run.log.run_dir, "BAD_NODE", &ignored))
        replace_file(path, line, (size_t)size, &ignored);
}

// Rank 0: is somebody slow? offset: of the rate in RankSpeed, which messages say in 10^12 `unit`.
static inline bool compare_speeds(const Trainer* t, const RankSpeed* speeds, size_t offset, const char* what,
                                  const char* unit, Error* err) {
    int size = t->control.size, slowest = 0;
    double* rates = (double*)calloc_check((size_t)size, sizeof *rates);
    for (int r = 0; r < size; r++) {
        memcpy(&rates[r], (const char*)&speeds[r] + offset, sizeof *rates);
        if (rates[r] < rates[slowest]) slowest = r;
    }
    double least = rates[slowest];
    double median = sort_for_median(rates, size);
    free(rates);
    if (least >= SELF_TEST_SLOW * median) return true;
    name_bad_node(t, speeds[slowest].node);
    return fail(
        err, EXIT_NO_DEVICE,
        "rank %d: its GPU is slow: %s reaches %.3g T%s, the median of %d ranks is %.3g; leave node %s out "
        "(sbatch --exclude=%s), or set parallel.self_test=false",
        slowest, what, 1e-12 * least, unit, size, 1e-12 * median, speeds[slowest].node, speeds[slowest].node);
}

static int compare_nodes(const void* a, const void* b) {
    return strcmp(((const RankSpeed*)a)->node, ((const RankSpeed*)b)->node);
}

// Rank 0: which node is to be left out, if one is? That of a GPU that computes wrong; of those that fail the first one's,
// unless more than half of all nodes have such, as they do where a config asks for more GPUs than there are.
static inline void judge_nodes(const Trainer* t, const RankSpeed* speeds) {
    int size = t->control.size, nodes = 0, failing = 0;
    const RankSpeed* bad = NULL;
    for (int r = size - 1; r >= 0; r--)
        if (speeds[r].gpu != GPU_WORKS && (bad == NULL || speeds[r].gpu >= bad->gpu)) bad = &speeds[r];
    if (bad == NULL) return;
    RankSpeed* sorted = (RankSpeed*)calloc_check((size_t)size, sizeof *sorted);
    memcpy(sorted, speeds, (size_t)size * sizeof *sorted);
    qsort(sorted, (size_t)size, sizeof *sorted, compare_nodes);
    for (int r = 0, next; r < size; r = next, nodes++) {
        bool fails = false;
        for (next = r; next < size && compare_nodes(&sorted[r], &sorted[next]) == 0; next++)
            fails = fails || sorted[next].gpu != GPU_WORKS;
        failing += fails;
    }
    free(sorted);
    if (bad->gpu == GPU_WRONG || 2 * failing <= nodes) name_bad_node(t, bad->node);
}

static struct {
    Trainer* t;
    RankSpeed mine, *all;                          // all: of rank 0
    void (*give_up)(int code, const char* reason); // on_giving_up outside of the test
} self_tested;

// How this rank's test ended. All ranks say it, also one that ends, which the watchdog of the first must not see before
// that one has judged.
static inline bool report_gpu(int gpu, Error* err) {
    Trainer* t = self_tested.t;
    on_giving_up = self_tested.give_up;
    self_tested.mine.gpu = gpu;
    if (!control_gather(&t->control, &self_tested.mine, sizeof self_tested.mine, self_tested.all, err))
        return false;
    if (t->control.rank == 0) judge_nodes(t, self_tested.all);
    return control_broadcast(&t->control, &gpu, sizeof gpu, err);
}

// What CUDA_CHECK finds ends the process.
static inline void give_up_in_test(int code, const char* reason) {
    Error ignored = {0, {0}};
    report_gpu(GPU_FAILS, &ignored);
    if (on_giving_up != NULL) on_giving_up(code, reason);
}

// All processes together, before the model is there: most memory is free.
static inline bool self_test_ranks(Trainer* t, Error* err) {
    RankSpeed *mine = &self_tested.mine,
              *all = (RankSpeed*)calloc_check((size_t)t->control.size, sizeof *all);
    bool wrong = false;
    self_tested.t = t, self_tested.all = all, self_tested.give_up = on_giving_up;
    node_name(mine->node);
    on_giving_up = give_up_in_test;
    bool ok = gpt_self_test(&t->run, &wrong, err);
    if (ok) gpt_measure(&t->run, &mine->matmul, &mine->copy);
    ok = report_gpu(wrong ? GPU_WRONG : ok ? GPU_WORKS : GPU_FAILS, err) && ok;
    ok = agree(t, err) && ok;
    if (ok && t->control.rank == 0)
        ok = compare_speeds(t, all, offsetof(RankSpeed, matmul), "a matmul", "FLOP/s", err) &&
             compare_speeds(t, all, offsetof(RankSpeed, copy), "a copy", "B/s", err);
    free(all);
    return agree(t, err) && ok;
}
