// A trainer whose computation goes wrong where it is told to, for e2e_guard.sh and e2e_replay.sh. The faults are data: in the product's
// code there is no place for them.
//
//     FAULT="BATCH WHAT VALUE;..." BATCH: hash of the rows of a process's step, as FAULT_TRACE says it; *: every step
//         loss VALUE               is added to the sum of losses       (nan, inf, 1e6 ...)
//         gradient VALUE           is added to one gradient
//         weight 0                 one bit of one weight flips, once, before the step is computed
//         forward CALL             one bit of what attention computes, once, behind its CALL-th call in the step, from 0 on
//         attention CALL           the same of its gradient
//         matrix CALL              the same of the gradient of a matrix
//         stream CALL              the same of a norm behind an addition to the residual stream, or of the stream without
//     FAULT_RANK=RANK              on that rank alone
//     FAULT_TRACE=FILE             FILE.RANK has one line for each step: the hash of its rows
//
// Rows differ from data-parallel rank to rank, so a fault is on those ranks alone that have them; and it comes again where
// the same rows are computed again.
#pragma once
#include "llmc/commands.h" // defines: program_main, and all of the run, which calls the faulty functions

static struct {
    uint64_t next, current; // hash of the rows that were loaded last; of those of the step
    bool flipped;
    int rank;
} faulty;

static inline void faulty_load(const int32_t* rows, size_t tokens) {
    faulty.next = XXH3_64bits(rows, tokens * sizeof *rows);
}

static inline void faulty_start(int rank) {
    const char* trace = getenv("FAULT_TRACE");
    char path[PATH_MAX];
    faulty.current = faulty.next, faulty.rank = rank;
    if (trace == NULL) return;
    snprintf(path, sizeof path, "%s.%d", trace, rank);
    FILE* file = fopen(path, "a");
    CHECK(file != NULL);
    fprintf(file, "%016llx\n", (unsigned long long)faulty.current);
    CHECK(fclose(file) == 0);
}

// Is this fault in this step? Then *value is its number.
static inline bool fault_in_step(const char* what, double* value) {
    char batch[32], kind[32], hash[32];
    const char* rank = getenv("FAULT_RANK");
    if (rank != NULL && atoi(rank) != faulty.rank) return false;
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)faulty.current);
    for (const char* fault = getenv("FAULT"); fault != NULL; fault = strchr(fault, ';')) {
        fault += *fault == ';';
        CHECK(sscanf(fault, "%31s %31s %lf", batch, kind, value) == 3);
        if (strcmp(kind, what) == 0 && (strcmp(batch, "*") == 0 || strcmp(batch, hash) == 0)) return true;
    }
    return false;
}
