// Before a long run: does every rank's GPU work, and is none much slower than the others? The node of one that fails
// is named, also in RUN_DIR/BAD_NODE, which scripts/train.sbatch reads to go on without it.
#pragma once
#include "llmc/launch.h"  // defines: node_name
#include "llmc/trainer.h" // defines: Trainer, gpt_self_test, gpt_measure, agree

#define SELF_TEST_SLOW 0.7 // of the median

typedef struct {
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

// All processes together, before the model is there: most memory is free.
static inline bool self_test_ranks(Trainer* t, Error* err) {
    RankSpeed mine = {0, 0, ""};
    RankSpeed* all = (RankSpeed*)calloc_check((size_t)t->control.size, sizeof *all);
    node_name(mine.node);
    bool bad = false, ok = gpt_self_test(&t->run, &bad, err);
    if (bad) name_bad_node(t, mine.node);
    if (ok) gpt_measure(&t->run, &mine.matmul, &mine.copy);
    ok = agree(t, err) && control_gather(&t->control, &mine, sizeof mine, all, err);
    if (ok && t->control.rank == 0)
        ok = compare_speeds(t, all, offsetof(RankSpeed, matmul), "a matmul", "FLOP/s", err) &&
             compare_speeds(t, all, offsetof(RankSpeed, copy), "a copy", "B/s", err);
    free(all);
    return agree(t, err) && ok;
}
