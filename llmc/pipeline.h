// Pipeline schedules as lists of operations: what each stage does, in which order, with which buffer.
//
// The layers are cut into num_stages * num_chunks virtual stages; stage p holds chunks v = 0, 1, ..., which
// are the virtual stages v * num_stages + p. Activations go from virtual stage s to s + 1, that is to the
// next stage, or from the last one around to the first and its next chunk; gradients go the same way back.
//
// In every schedule a virtual stage takes forwards, backwards and weight gradients each in the order of the
// micro-batches, so that gradients are summed in one order and results are equal bit for bit. And in every
// schedule a link carries messages in the order in which the receiver's list uses them: a receiver can post
// its receives in list order, the one of an activation as soon as its input is free, and needs no tags.
//
// A stage with several chunks must not stand still while it sends: two stages could wait for slots that the
// other's next backward frees. Either sends are queued on a stream of their own (the activations wait in
// their slots; a gradient needs a buffer until it has left), or each stage has one buffer for an early
// activation. With one chunk a stage, sends may block.
//
// In the pictures a row is a stage and a column the time of one forward; f2 is the forward of micro-batch 2,
// b2 its backward, which takes two columns ("--" is the second) unless w2, the weight gradient, is apart.
#pragma once
#include "llmc/utils.h"

enum PipelineSchedule { PIPELINE_AFAB, PIPELINE_1F1B, PIPELINE_INTERLEAVED, PIPELINE_ZERO_BUBBLE };

enum PipelineOpKind {
    PIPELINE_FORWARD,
    PIPELINE_BACKWARD,        // whole: gradients of the input and of the weights
    PIPELINE_BACKWARD_INPUT,  // the gradient that the previous stage waits for
    PIPELINE_BACKWARD_WEIGHT, // what nobody waits for
};

typedef struct {
    int kind, micro_batch, chunk; // kind: a PipelineOpKind
    int slot;                     // the activation buffer that the micro-batch has in this chunk
    int input; // the buffer of what enters the chunk, from the forward to the input's gradient
} PipelineOp;

typedef struct {
    PipelineOp* ops; // free() releases them
    int count;
    int num_slots, num_inputs; // buffers that the stage needs
} PipelineList;

// ----------------------------------------------------------------------------
// the schedules

// PIPELINE_AFAB: all forwards, then all backwards (GPipe, arXiv 1811.06965). The simplest, but each stage
// keeps the activations of every micro-batch. Backwards are not reversed as GPipe's are, for the order of
// sums.
//
//     stage 0  f0 f1 f2 f3 .. .. .. .. .. .. b0 -- b1 -- b2 -- b3 --
//     stage 1  .. f0 f1 f2 f3 .. .. .. b0 -- b1 -- b2 -- b3 -- .. ..
//     stage 2  .. .. f0 f1 f2 f3 b0 -- b1 -- b2 -- b3 -- .. .. .. ..
//
// PIPELINE_1F1B (PipeDream-flush, arXiv 2006.09503): just the forwards that the last stage needs to begin,
// then one forward and one backward in turn. As fast, and stage p of P has at most P - p micro-batches.
//
//     stage 0  f0 f1 f2 .. .. .. .. b0 -- f3 b1 -- .. b2 -- .. b3 --
//     stage 1  .. f0 f1 .. .. b0 -- f2 b1 -- f3 b2 -- .. b3 -- .. ..
//     stage 2  .. .. f0 b0 -- f1 b1 -- f2 b2 -- f3 b3 -- .. .. .. ..
//
// PIPELINE_INTERLEAVED (Megatron, arXiv 2104.04473): 1F1B with several chunks of layers on each stage, here
// two; capitals are the second one. Filling and draining take a chunk's time each instead of a whole
// stage's.
//
//     stage 0  f0 f1 F0 F1 f2 .. B0 -- f3 B1 -- F2 b0 -- F3 b1 -- .. B2 -- .. B3 -- b2 -- b3 --
//     stage 1  .. f0 f1 F0 B0 -- F1 B1 -- f2 b0 -- f3 b1 -- F2 B2 -- F3 B3 -- b2 -- b3 -- .. ..
//
// PIPELINE_ZERO_BUBBLE (ZB-H1, arXiv 2401.10241): 1F1B, but only the gradient of the input is computed at
// once. Stage p puts weight gradients off by p micro-batches, to have work left while the earlier stages
// drain. Each stage then has up to P micro-batches, which is no more than 1F1B has on its first.
//
//     stage 0  f0 f1 f2 .. .. b0 w0 f3 b1 w1 b2 w2 b3 w3
//     stage 1  .. f0 f1 .. b0 f2 b1 w0 f3 b2 w1 b3 w2 w3
//     stage 2  .. .. f0 b0 f1 b1 f2 b2 w0 f3 b3 w1 w2 w3

// The forwards of a stage before its first pair of a forward and a backward.
static inline int pipeline_warm_up(int schedule, int num_stages, int stage, int num_chunks,
                                   int num_micro_batches) {
    int total = num_chunks * num_micro_batches, after = num_stages - stage - 1, n;
    if (schedule == PIPELINE_AFAB)
        n = total;
    else if (num_chunks > 1)
        n = after * 2 + (num_chunks - 1) * num_stages;
    else
        n = after;
    return n < total ? n : total;
}

// The k-th forward (or, with chunks counted from the last, backward) of every stage: as many micro-batches as
// there are stages go through chunk 0, then the same ones through chunk 1, and so on; then the next group.
static inline PipelineOp pipeline_nth(int kind, int k, int num_stages, int num_chunks) {
    PipelineOp op = {kind, k, 0, 0, 0};
    if (num_chunks > 1) {
        int group = k / (num_stages * num_chunks);
        op.micro_batch = group * num_stages + k % num_stages;
        op.chunk = k / num_stages % num_chunks;
        if (kind != PIPELINE_FORWARD) op.chunk = num_chunks - 1 - op.chunk;
    }
    return op;
}

// Gives each micro-batch of each chunk the lowest free slot from its forward to its last backward operation.
static inline void pipeline_allot_slots(PipelineList* list, int num_chunks, int num_micro_batches) {
    int total = num_chunks * num_micro_batches;
    int* slots = (int*)calloc_check((size_t)total, sizeof *slots);   // of [chunk][micro-batch]
    bool* taken = (bool*)calloc_check((size_t)total, sizeof *taken); // of [slot]
    list->num_slots = 0;
    for (int i = 0; i < list->count; i++) {
        PipelineOp* op = &list->ops[i];
        int* slot = &slots[op->chunk * num_micro_batches + op->micro_batch];
        if (op->kind == PIPELINE_FORWARD) {
            for (*slot = 0; taken[*slot];) ++*slot;
            taken[*slot] = true;
            if (*slot >= list->num_slots) list->num_slots = *slot + 1;
        }
        op->slot = *slot;
        if (op->kind == PIPELINE_BACKWARD || op->kind == PIPELINE_BACKWARD_WEIGHT) taken[*slot] = false;
    }
    free(slots);
    free(taken);
}

// Inputs are small beside activations: there is one buffer more than slots, and the one that has been free longest is
// taken, so that the next input arrives while the stage is still at work on this one.
static inline void pipeline_allot_inputs(PipelineList* list, int num_stages, int num_chunks,
                                         int num_micro_batches) {
    int n = list->num_inputs = list->num_slots + (num_stages > 1), taken = 0, returned = 0;
    int* queue = (int*)malloc_check((size_t)n * sizeof *queue); // of free ones, around
    int* inputs = (int*)calloc_check((size_t)(num_chunks * num_micro_batches), sizeof *inputs);
    for (int i = 0; i < n; i++) queue[i] = i;
    for (int i = 0; i < list->count; i++) {
        PipelineOp* op = &list->ops[i];
        int* input = &inputs[op->chunk * num_micro_batches + op->micro_batch];
        if (op->kind == PIPELINE_FORWARD) *input = queue[taken++ % n];
        op->input = *input;
        if (op->kind == PIPELINE_BACKWARD || op->kind == PIPELINE_BACKWARD_INPUT)
            queue[returned++ % n] = *input;
    }
    free(queue);
    free(inputs);
}

// What one stage does in a step. The numbers must have passed pipeline_check; the caller frees .ops.
static inline PipelineList pipeline_list(int schedule, int num_stages, int stage, int num_chunks,
                                         int num_micro_batches) {
    CHECK(0 <= stage && stage < num_stages && num_chunks >= 1 && num_micro_batches >= 1);
    CHECK(num_chunks == 1 || num_stages == 1 || schedule == PIPELINE_INTERLEAVED);
    CHECK(num_chunks == 1 || num_micro_batches % num_stages == 0);
    bool split = schedule == PIPELINE_ZERO_BUBBLE;
    int total = num_chunks * num_micro_batches, forwards = 0, backwards = 0, weights = 0;
    int warm_up = pipeline_warm_up(schedule, num_stages, stage, num_chunks, num_micro_batches);
    PipelineList list = {NULL, 0, 0, 0};
    list.ops = (PipelineOp*)malloc_check((size_t)total * (split ? 3 : 2) * sizeof *list.ops);
    while (forwards < warm_up)
        list.ops[list.count++] = pipeline_nth(PIPELINE_FORWARD, forwards++, num_stages, num_chunks);
    while (backwards < total) {
        if (forwards < total)
            list.ops[list.count++] = pipeline_nth(PIPELINE_FORWARD, forwards++, num_stages, num_chunks);
        int kind = split ? PIPELINE_BACKWARD_INPUT : PIPELINE_BACKWARD;
        list.ops[list.count++] = pipeline_nth(kind, backwards++, num_stages, num_chunks);
        if (split && backwards > stage)
            list.ops[list.count++] =
                pipeline_nth(PIPELINE_BACKWARD_WEIGHT, weights++, num_stages, num_chunks);
    }
    while (split && weights < total)
        list.ops[list.count++] = pipeline_nth(PIPELINE_BACKWARD_WEIGHT, weights++, num_stages, num_chunks);
    pipeline_allot_slots(&list, num_chunks, num_micro_batches);
    pipeline_allot_inputs(&list, num_stages, num_chunks, num_micro_batches);
    return list;
}

// ----------------------------------------------------------------------------
// what can run, and which layers go where

static inline const char* pipeline_schedule_name(int schedule) {
    static const char* const names[] = {"all-forward-all-backward", "1F1B", "interleaved", "zero-bubble"};
    CHECK(0 <= schedule && schedule <= PIPELINE_ZERO_BUBBLE);
    return names[schedule];
}

// The multiple of `step` that is nearest to n, at least step; of two equally near ones the larger.
static inline int64_t pipeline_nearest_multiple(int64_t n, int64_t step) {
    int64_t nearest = (2 * n + step) / (2 * step) * step;
    return nearest > step ? nearest : step;
}

// Whether pipeline_list has a schedule for these numbers and each virtual stage gets a layer; if not, err
// says which numbers do not go together and what would. One stage is no pipeline and runs with anything.
static inline bool pipeline_check(int schedule, int num_stages, int num_chunks, int num_micro_batches,
                                  int num_layers, Error* err) {
    const char* name = pipeline_schedule_name(schedule);
    if (num_stages < 1 || num_chunks < 1 || num_micro_batches < 1)
        return fail(
            err, EXIT_CONFIG,
            "a pipeline of %d stages with %d chunks each and %d micro-batches cannot run: each number "
            "must be 1 or more",
            num_stages, num_chunks, num_micro_batches);
    if (num_stages == 1) return true;
    if (num_chunks > 1 && schedule != PIPELINE_INTERLEAVED)
        return fail(
            err, EXIT_CONFIG,
            "the %s pipeline schedule has one chunk of layers a stage, not %d: set parallel.virtual_pipeline_size=1, or "
            "parallel.pipeline_schedule=interleaved",
            name, num_chunks);
    if (num_chunks > 1 && num_micro_batches % num_stages != 0)
        return fail(
            err, EXIT_CONFIG,
            "the interleaved pipeline schedule needs micro-batches in multiples of its %d stages, but "
            "a step has %d: the nearest number that works is %lld",
            num_stages, num_micro_batches,
            (long long)pipeline_nearest_multiple(num_micro_batches, num_stages));
    if (num_layers < num_stages)
        return fail(err, EXIT_CONFIG,
                    "a pipeline of %d stages needs a layer for each, but the model has %d: set %d stages or "
                    "fewer",
                    num_stages, num_layers, num_layers > 1 ? num_layers : 1);
    if (num_layers < (int64_t)num_stages * num_chunks)
        return fail(
            err, EXIT_CONFIG,
            "a pipeline of %d stages with %d chunks each needs %lld layers or more, but the model has "
            "%d: with %d stages, the most chunks that work are %d",
            num_stages, num_chunks, (long long)num_stages * num_chunks, num_layers, num_stages,
            num_layers / num_stages);
    return true;
}

// The layers first <= i < end of a virtual stage. What does not divide evenly goes to the stages in the
// middle: the first one has the embedding besides its layers, and the last one the head, which costs more.
static inline void pipeline_layers(int num_layers, int num_virtual_stages, int virtual_stage, int* first,
                                   int* end) {
    int each = num_layers / num_virtual_stages, larger = num_layers % num_virtual_stages;
    int first_larger = (num_virtual_stages - larger) / 2, before = virtual_stage - first_larger;
    bool is_larger = 0 <= before && before < larger;
    if (before < 0) before = 0;
    if (before > larger) before = larger;
    *first = virtual_stage * each + before;
    *end = *first + each + (is_larger ? 1 : 0);
}
