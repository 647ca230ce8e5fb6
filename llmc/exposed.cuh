// How long computing stood still for other ranks: events in the stream that computes, before and behind each of its
// waits for what communicates, and around each operation that runs in this stream itself.
//
//     computing stream   | matmul | event, wait, event | matmul | event, all-reduce, event | ...
//
// A pair costs the host some microseconds and the device about two, and the waits are many: of 32 layers with 16
// micro-batches ZeRO has 1,600 in a step, tensor parallelism 8,200 more. So one step of EXPOSED_EVERY is measured,
// which hides the cost, and its share counts until the next one.
#pragma once
#include "llmc/cuda_common.cuh" // defines: CUDA_CHECK

enum { EXPOSED_EVERY = 16 };

typedef struct {
    cudaStream_t stream; // that computes; NULL: there is one rank, and nothing is measured
    cudaEvent_t* events; // (capacity) in turn before and behind
    int capacity, used;
    uint64_t steps; // that have begun
    bool on;        // this one is measured
    double share;   // of the last step that was: exposed of all its time on the device
} Exposed;

// The first step, which has much to set up, and the second stands for those that follow.
static inline void exposed_begin_step(Exposed* x) {
    x->on = x->stream != NULL && (x->steps == 0 || x->steps % EXPOSED_EVERY == 1);
    x->steps++, x->used = 0;
}

// What stands between exposed_begin and exposed_end is waited for. In a pair, another begin is nothing new.
static inline void exposed_mark(Exposed* x, cudaStream_t stream, int turn) {
    if (!x->on || stream != x->stream || x->used % 2 != turn) return;
    if (x->used == x->capacity) {
        x->capacity = 2 * x->capacity + 64;
        x->events = (cudaEvent_t*)realloc_check(x->events, (size_t)x->capacity * sizeof *x->events);
        for (int i = x->used; i < x->capacity; i++) CUDA_CHECK(cudaEventCreate(&x->events[i]));
    }
    CUDA_CHECK(cudaEventRecord(x->events[x->used++], stream));
}
static inline void exposed_begin(Exposed* x, cudaStream_t stream) { exposed_mark(x, stream, 0); }
static inline void exposed_end(Exposed* x, cudaStream_t stream) { exposed_mark(x, stream, 1); }

// The step is over on the device, after `seconds` there.
static inline double exposed_share(Exposed* x, double seconds) {
    double waited = 0;
    if (!x->on) return x->share;
    for (int i = 0; i < x->used; i += 2) {
        float milliseconds;
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, x->events[i], x->events[i + 1]));
        waited += 1e-3 * (double)milliseconds;
    }
    x->on = false;
    return x->share = seconds > 0 ? fmin(1, waited / seconds) : 0;
}

static inline void exposed_free(Exposed* x) {
    for (int i = 0; i < x->capacity; i++) CUDA_CHECK(cudaEventDestroy(x->events[i]));
    free(x->events);
}
