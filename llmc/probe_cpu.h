// What this machine's processor and memory do right now: the two rates that `plan` predicts a step from, and
// that benchmarks are measured against.
#pragma once
#include "llmc/matmul_cpu.h" // defines: Matmul, matmul_forward, matmul_scratch_bytes
#include "llmc/utils.h"      // defines: aligned_zeros, seconds_now

// FLOP/s of out (rows, OC) = inp (rows, C) weight^T, the best of at least 3 and about 0.2 s of trials.
static inline double measure_matmul_rate(int rows, int C, int OC, int compute) {
    size_t inp_size = (size_t)rows * (size_t)C, weight_size = (size_t)OC * (size_t)C;
    size_t out_size = (size_t)rows * (size_t)OC, scratch_bytes = matmul_scratch_bytes(compute, rows, C, OC);
    real* inp = (real*)aligned_zeros((inp_size + weight_size + out_size) * sizeof(real));
    void* scratch = aligned_zeros(scratch_bytes);
    Matmul mm;
    matmul_init(&mm, compute, scratch, scratch_bytes);
    double best = 0, begin = seconds_now();
    for (int i = 0; i < 3 || seconds_now() - begin < 0.2; i++) {
        double start = seconds_now();
        matmul_forward(inp + inp_size + weight_size, inp, inp + inp_size, NULL, rows, C, OC, &mm);
        best = fmax(best, 2.0 * rows * C * OC / (seconds_now() - start));
    }
    matmul_free(&mm);
    free(scratch), free(inp);
    return best;
}

// Bytes read and written a second by all threads, on arrays far larger than the caches.
static inline double measure_copy_rate(void) {
    enum { SIZE = 1 << 27, PARTS = 128, PART = SIZE / PARTS };
    char* memory = (char*)aligned_zeros(2 * (size_t)SIZE);
    double best = 0;
    for (int i = 0; i < 3; i++) {
        double start = seconds_now();
#pragma omp parallel for schedule(static)
        for (int part = 0; part < PARTS; part++)
            memcpy(memory + SIZE + part * PART, memory + part * PART, PART);
        best = fmax(best, 2.0 * SIZE / (seconds_now() - start));
    }
    free(memory);
    return best;
}
