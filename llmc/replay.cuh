// A step that is computed twice (guard.replay_every): a GPU gives the same bits both times (dev/doc/numerics.md), so what
// differs is a fault of the hardware. The first run of all passes leaves nothing but hashes; the second is the one
// that counts, and is not applied on any rank where one rank's hashes differ.
//
// A fault spreads from rank to rank, and all ranks behind it deviate. So each one hashes what it is about to hand to
// others, and its gradients before they are summed: what it has computed itself from what it was given. Each of these
// points has a word: the first run adds the hash of the point to it, the second subtracts it, and what is left is 0.
// Words lie in an order in which causes come before their effects, whoever computes them:
//
//     micro-batch 0                                                          | micro-batch 1 ...
//     forward                     | backward                  | weights      |
//     stage 0 | stage 1 | ...     | last stage | ... | 0      | as backward  |      virtual stages
//     point 0 1 2 ...                                                               of a pass, in its own order
//
// In all of the layout, the smallest word that is not 0 is where the fault was: the rank that has it made it. (Several
// have it where the fault was between them, in a collective.) Micro-batches meet in gradients alone, which nothing
// follows.
//
// Cost: the forward and backward passes of one step more, and one read of what is hashed: gradients, and what tensor-
// and context-parallel ranks and pipeline stages send. Every 1,000 steps, that is 0.1 % of the time. A fault that comes
// both times, or in what both runs read (weights, moments, the batch), is not seen: guard.check_every is for weights.
#pragma once
#include "llmc/layout.h"         // defines: Layout, num_virtual_stages, virtual_stage
#include "llmc/program.h"        // defines: REPLAY_SAME
#include "llmc/weights_hash.cuh" // defines: hash_add

enum { REPLAY_KINDS = 3, REPLAY_THREADS = 1024 };
// Points of a pass, at most: of a layer (recomputed, in pieces and with its gradients, it has 22), and of what is before
// and behind the layers. The head has one for each chunk of logits: what is beyond the last word shares it, and is found
// all the same, though not in its order.
enum { REPLAY_POINTS_LAYER = 24, REPLAY_POINTS_REST = 64 };

typedef struct {
    unsigned long long*
        words; // (micro-batches, kinds, virtual stages, points), and behind them (ranks): what
               // each one found. NULL: no step is computed twice
    size_t num_words;
    int stages, points; // of the whole model; of a pass
    bool again;         // the second run
    size_t next, last;  // words: the next point's, and the last of this pass
} Replay;

// Sizes; the words are the caller's to place.
static inline void replay_configure(Replay* r, const Layout* l, int micro_batches, int num_layers) {
    r->stages = num_virtual_stages(l);
    r->points = REPLAY_POINTS_LAYER * ((num_layers + r->stages - 1) / r->stages) + REPLAY_POINTS_REST;
    r->num_words = (size_t)micro_batches * REPLAY_KINDS * (size_t)r->stages * (size_t)r->points;
}

// The first word of a pass.
static inline size_t replay_word(const Replay* r, const Layout* l, const PipelineOp* op) {
    int kind = op->kind == PIPELINE_FORWARD ? 0 : op->kind == PIPELINE_BACKWARD_WEIGHT ? 2 : 1;
    int stage = virtual_stage(l, op->chunk), turn = kind == 0 ? stage : r->stages - 1 - stage;
    return (size_t)((op->micro_batch * REPLAY_KINDS + kind) * r->stages + turn) * (size_t)r->points;
}

// Before the first run.
static inline void replay_begin(Replay* r, cudaStream_t stream) {
    CUDA_CHECK(cudaMemsetAsync(r->words, 0, r->num_words * sizeof *r->words, stream));
    r->again = false;
}

// Before a pass. r NULL, here and below: the step is computed once.
static inline void replay_pass(Replay* r, const Layout* l, const PipelineOp* op) {
    if (r == NULL) return;
    r->next = replay_word(r, l, op), r->last = r->next + (size_t)r->points - 1;
    CHECK(r->last < r->num_words);
}

// What this rank has computed, and is about to hand over in this stream.
static inline void replay_point(Replay* r, const void* memory, size_t bytes, cudaStream_t stream) {
    if (r == NULL) return;
    hash_add(&r->words[r->next], memory, bytes, 0, stream, r->again);
    r->next += r->next < r->last;
}

static __global__ void __launch_bounds__(REPLAY_THREADS)
    replay_first_kernel(unsigned long long* first, long long* deviating, const unsigned long long* words,
                        size_t n) {
    __shared__ unsigned long long least;
    if (threadIdx.x == 0) least = REPLAY_SAME;
    __syncthreads();
    size_t i = threadIdx.x;
    while (i < n && words[i] == 0) i += REPLAY_THREADS;
    if (i < n) atomicMin(&least, (unsigned long long)i);
    __syncthreads();
    if (threadIdx.x == 0) *first = least, *deviating = least != REPLAY_SAME;
}

// Behind the second run. Returns a word for each rank: this one's is the first that is not 0, or REPLAY_SAME.
// *deviating = 1 or, if all are 0, 0.
static inline unsigned long long* replay_first(Replay* r, long long* deviating, int rank,
                                               cudaStream_t stream) {
    unsigned long long* found = r->words + r->num_words;
    replay_first_kernel<<<1, REPLAY_THREADS, 0, stream>>>(found + rank, deviating, r->words, r->num_words);
    LAUNCH_CHECK();
    return found;
}
