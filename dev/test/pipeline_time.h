// How long a pipeline schedule takes where every virtual stage costs the same: what tests hold formulas and the layout
// planner against.
#pragma once
#include <math.h> // defines: INFINITY, fmax

#include "llmc/pipeline.h" // defines: PipelineList, PipelineOp, pipeline_list

typedef struct {
    double forward, backward_input, backward_weight; // seconds, for one operation of one virtual stage
    double send;                                     // seconds until the neighbour has a result
} PipelineCosts;

typedef struct {
    double seconds; // of the whole step; INFINITY when the stages wait for each other
    double busy;    // seconds that the busiest stage computes
    double bubble;  // share of the time in which the mean stage idles
    int peak_slots; // activation buffers of the stage that needs most
} PipelineTime;

// When the results that `op` needs are on its stage; INFINITY while one of them has not been computed. The
// ends are those of [virtual stage][micro-batch], backward_end without the weight gradients that are apart.
static inline double pipeline_ready(const PipelineOp* op, int stage, int num_stages, int num_chunks,
                                    int num_micro_batches, double send, const double* forward_end,
                                    const double* backward_end) {
    int here = (op->chunk * num_stages + stage) * num_micro_batches + op->micro_batch;
    int last = (num_stages * num_chunks - 1) * num_micro_batches; // where the last virtual stage begins
    if (num_stages == 1) send = 0;
    if (op->kind == PIPELINE_BACKWARD_WEIGHT) return backward_end[here];
    if (op->kind == PIPELINE_FORWARD)
        return here < num_micro_batches ? 0 : forward_end[here - num_micro_batches] + send;
    if (here >= last) return forward_end[here];
    return fmax(forward_end[here], backward_end[here + num_micro_batches] + send);
}

static inline double pipeline_cost(int kind, PipelineCosts costs) {
    if (kind == PIPELINE_FORWARD) return costs.forward;
    if (kind == PIPELINE_BACKWARD_INPUT) return costs.backward_input;
    if (kind == PIPELINE_BACKWARD_WEIGHT) return costs.backward_weight;
    return costs.backward_input + costs.backward_weight;
}

// Runs one list per stage against each other: each stage goes through its list in order, and an operation
// starts when its stage is free and its input has arrived. starts, unless NULL, gets the time at which each
// operation starts. For lists that wait for each other, seconds is INFINITY.
static inline PipelineTime pipeline_simulate_lists(const PipelineList* lists, int num_stages, int num_chunks,
                                                   int num_micro_batches, PipelineCosts costs,
                                                   double* const* starts) {
    size_t size = (size_t)num_stages * (size_t)num_chunks * (size_t)num_micro_batches;
    double* forward_end = (double*)malloc_check(size * sizeof(double));
    double* backward_end = (double*)malloc_check(size * sizeof(double));
    double* now = (double*)calloc_check((size_t)num_stages, sizeof(double)); // of [stage]
    int* done = (int*)calloc_check((size_t)num_stages, sizeof(int));         // operations, of [stage]
    for (size_t i = 0; i < size; i++) forward_end[i] = backward_end[i] = INFINITY;
    PipelineTime time = {0, 0, 0, 0};
    for (bool moved = true; moved;) {
        moved = false;
        for (int p = 0; p < num_stages; p++) {
            for (; done[p] < lists[p].count; done[p]++, moved = true) {
                const PipelineOp* op = &lists[p].ops[done[p]];
                double ready = pipeline_ready(op, p, num_stages, num_chunks, num_micro_batches, costs.send,
                                              forward_end, backward_end);
                if (ready == INFINITY) break;
                double start = fmax(now[p], ready);
                if (starts != NULL) starts[p][done[p]] = start;
                now[p] = start + pipeline_cost(op->kind, costs);
                int here = (op->chunk * num_stages + p) * num_micro_batches + op->micro_batch;
                if (op->kind == PIPELINE_FORWARD)
                    forward_end[here] = now[p];
                else if (op->kind != PIPELINE_BACKWARD_WEIGHT)
                    backward_end[here] = now[p];
            }
        }
    }
    double all_busy = 0;
    for (int p = 0; p < num_stages; p++) {
        double busy = 0;
        for (int i = 0; i < lists[p].count; i++) busy += pipeline_cost(lists[p].ops[i].kind, costs);
        all_busy += busy;
        time.busy = fmax(time.busy, busy);
        time.seconds = fmax(time.seconds, done[p] < lists[p].count ? INFINITY : now[p]);
        if (lists[p].num_slots > time.peak_slots) time.peak_slots = lists[p].num_slots;
    }
    if (time.seconds > 0) time.bubble = 1 - all_busy / num_stages / time.seconds;
    free(forward_end);
    free(backward_end);
    free(now);
    free(done);
    return time;
}

// How long a step of this schedule takes when every virtual stage costs the same. The numbers must have
// passed pipeline_check.
static inline PipelineTime pipeline_simulate(int schedule, int num_stages, int num_chunks,
                                             int num_micro_batches, PipelineCosts costs) {
    PipelineList* lists = (PipelineList*)malloc_check((size_t)num_stages * sizeof *lists);
    for (int p = 0; p < num_stages; p++)
        lists[p] = pipeline_list(schedule, num_stages, p, num_chunks, num_micro_batches);
    PipelineTime time =
        pipeline_simulate_lists(lists, num_stages, num_chunks, num_micro_batches, costs, NULL);
    for (int p = 0; p < num_stages; p++) free(lists[p].ops);
    free(lists);
    return time;
}
