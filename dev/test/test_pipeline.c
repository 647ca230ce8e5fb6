// Pipeline schedules: every list of every small pipeline, run against the rules, and times against formulas.
#include "dev/test/pipeline_time.h" // defines: pipeline_simulate, pipeline_simulate_lists
#include "llmc/pipeline.h"          // defines: pipeline_list, pipeline_check, pipeline_layers
// cmocka's macro fail() would hide ours, so its header comes last
#include <setjmp.h>
#include <cmocka.h>

enum { MAX_STAGES = 8, MAX_CHUNKS = 4, MAX_MICRO_BATCHES = 24, MAX_OPS = 3 * MAX_CHUNKS * MAX_MICRO_BATCHES };
enum { MAX_KEYS = MAX_STAGES * MAX_CHUNKS * MAX_MICRO_BATCHES };

// One pipeline: the numbers, and the list of each stage.
typedef struct {
    int schedule, P, V, M;
    PipelineList lists[MAX_STAGES];
} Pipeline;

static void make_lists(Pipeline* pipeline) {
    for (int p = 0; p < pipeline->P; p++)
        pipeline->lists[p] = pipeline_list(pipeline->schedule, pipeline->P, p, pipeline->V, pipeline->M);
}

static void free_lists(Pipeline* pipeline) {
    for (int p = 0; p < pipeline->P; p++) free(pipeline->lists[p].ops);
}

// Calls test for each pipeline that can run, and says which one it was if the test fails.
static void for_each_pipeline(void (*test)(const Pipeline*)) {
    int tested = 0;
    for (int schedule = PIPELINE_AFAB; schedule <= PIPELINE_ZERO_BUBBLE; schedule++)
        for (int P = 1; P <= MAX_STAGES; P++)
            for (int V = 1; V <= MAX_CHUNKS; V++)
                for (int M = 1; M <= MAX_MICRO_BATCHES; M++) {
                    Error err = {0, {0}};
                    bool can_run = P == 1 || V == 1 || (schedule == PIPELINE_INTERLEAVED && M % P == 0);
                    assert_int_equal(pipeline_check(schedule, P, V, M, P * V, &err), can_run);
                    if (!can_run) continue;
                    Pipeline pipeline = {schedule, P, V, M, {{NULL, 0, 0, 0}}};
                    make_lists(&pipeline);
                    test(&pipeline);
                    free_lists(&pipeline);
                    tested++;
                }
    // each with one chunk or one stage, and interleaved with P = 2..8: 12 + 8 + 6 + 4 + 4 + 3 + 3 multiples
    assert_int_equal(tested, 4 * 24 * (MAX_STAGES + 3) + 40 * 3);
}

#define FAIL_AT(pipeline, ...)                                                                               \
    do {                                                                                                     \
        print_error("%s, P %d, V %d, M %d: ", pipeline_schedule_name((pipeline)->schedule), (pipeline)->P,   \
                    (pipeline)->V, (pipeline)->M);                                                           \
        fail_msg(__VA_ARGS__);                                                                               \
    } while (0)

static bool is_last_backward(int kind) {
    return kind == PIPELINE_BACKWARD || kind == PIPELINE_BACKWARD_WEIGHT;
}

// The gradient of the input is there after this operation.
static bool is_backward(int kind) { return kind == PIPELINE_BACKWARD || kind == PIPELINE_BACKWARD_INPUT; }

static int virtual_stage(const Pipeline* pipeline, int p, const PipelineOp* op) {
    return op->chunk * pipeline->P + p;
}

// ----------------------------------------------------------------------------
// the lists by themselves

// "f0 b0" as the pictures have it: capitals for chunk 1.
static void expect_list(int schedule, int P, int stage, int V, int M, const char* wanted) {
    PipelineList list = pipeline_list(schedule, P, stage, V, M);
    String text = {NULL, 0, 0};
    for (int i = 0; i < list.count; i++) {
        const PipelineOp* op = &list.ops[i];
        string_append(&text, "%s%c%d", i > 0 ? " " : "", (op->chunk > 0 ? "FBIW" : "fbiw")[op->kind],
                      op->micro_batch);
    }
    assert_string_equal(text.data, wanted);
    free(text.data);
    free(list.ops);
}

static void lists_are_those_of_the_papers(void** state) {
    (void)state;
    expect_list(PIPELINE_AFAB, 3, 1, 1, 3, "f0 f1 f2 b0 b1 b2");
    expect_list(PIPELINE_1F1B, 3, 0, 1, 4, "f0 f1 f2 b0 f3 b1 b2 b3");
    expect_list(PIPELINE_1F1B, 3, 2, 1, 4, "f0 b0 f1 b1 f2 b2 f3 b3");
    expect_list(PIPELINE_INTERLEAVED, 3, 1, 1, 4, "f0 f1 b0 f2 b1 f3 b2 b3");
    expect_list(PIPELINE_INTERLEAVED, 2, 0, 2, 4, "f0 f1 F0 F1 f2 B0 f3 B1 F2 b0 F3 b1 B2 B3 b2 b3");
    expect_list(PIPELINE_INTERLEAVED, 2, 1, 2, 4, "f0 f1 F0 B0 F1 B1 f2 b0 f3 b1 F2 B2 F3 B3 b2 b3");
    expect_list(PIPELINE_ZERO_BUBBLE, 3, 0, 1, 4, "f0 f1 f2 i0 w0 f3 i1 w1 i2 w2 i3 w3");
    expect_list(PIPELINE_ZERO_BUBBLE, 3, 2, 1, 4, "f0 i0 f1 i1 f2 i2 w0 f3 i3 w1 w2 w3");
}

// Each operation is there once, those of one kind and chunk in the order of the micro-batches, and no
// backward is before its forward nor a weight gradient before the gradient of the input.
static void check_order(const Pipeline* pipeline) {
    bool split = pipeline->schedule == PIPELINE_ZERO_BUBBLE;
    for (int p = 0; p < pipeline->P; p++) {
        const PipelineList* list = &pipeline->lists[p];
        int next[4][MAX_CHUNKS] = {{0}};
        if (list->count != pipeline->V * pipeline->M * (split ? 3 : 2))
            FAIL_AT(pipeline, "stage %d has %d operations", p, list->count);
        for (int i = 0; i < list->count; i++) {
            const PipelineOp* op = &list->ops[i];
            assert_in_range(op->chunk, 0, pipeline->V - 1);
            assert_in_range(op->kind, 0, 3);
            if (op->micro_batch != next[op->kind][op->chunk]++)
                FAIL_AT(pipeline, "stage %d, operation %d: micro-batch %d", p, i, op->micro_batch);
            bool whole = op->kind == PIPELINE_BACKWARD, needed = true;
            if (op->kind != PIPELINE_FORWARD) needed = split != whole;
            if (is_backward(op->kind) && op->micro_batch >= next[PIPELINE_FORWARD][op->chunk]) needed = false;
            if (op->kind == PIPELINE_BACKWARD_WEIGHT &&
                op->micro_batch >= next[PIPELINE_BACKWARD_INPUT][op->chunk])
                needed = false;
            if (!needed) FAIL_AT(pipeline, "stage %d, operation %d: kind %d", p, i, op->kind);
        }
        for (int v = 0; v < pipeline->V; v++) {
            assert_int_equal(next[PIPELINE_FORWARD][v], pipeline->M);
            assert_int_equal(next[PIPELINE_BACKWARD][v], split ? 0 : pipeline->M);
            assert_int_equal(next[PIPELINE_BACKWARD_INPUT][v], split ? pipeline->M : 0);
            assert_int_equal(next[PIPELINE_BACKWARD_WEIGHT][v], split ? pipeline->M : 0);
        }
    }
}

static int least(int a, int b) { return a < b ? a : b; }

// The slots that stage p needs, by the papers' formulas.
static int slots_by_formula(const Pipeline* pipeline, int p) {
    int P = pipeline->P, V = pipeline->V, M = pipeline->M, n = P - p;
    if (pipeline->schedule == PIPELINE_AFAB) return V * M;
    if (pipeline->schedule == PIPELINE_ZERO_BUBBLE) n = P;
    if (V > 1) n = 2 * (P - p - 1) + (V - 1) * P + 1;
    return least(V * M, n);
}

// No two live micro-batches share a slot, a forward gets the lowest one, and there are as many as expected.
static void check_slots(const Pipeline* pipeline) {
    for (int p = 0; p < pipeline->P; p++) {
        const PipelineList* list = &pipeline->lists[p];
        int owner[MAX_OPS], most = 0;
        for (int s = 0; s < MAX_OPS; s++) owner[s] = -1;
        for (int i = 0; i < list->count; i++) {
            const PipelineOp* op = &list->ops[i];
            int key = op->chunk * pipeline->M + op->micro_batch;
            if (op->slot < 0 || op->slot >= list->num_slots)
                FAIL_AT(pipeline, "stage %d has slot %d of %d", p, op->slot, list->num_slots);
            for (int s = 0; op->kind == PIPELINE_FORWARD && s < op->slot; s++)
                if (owner[s] < 0) FAIL_AT(pipeline, "stage %d takes slot %d, not %d", p, op->slot, s);
            if (owner[op->slot] != (op->kind == PIPELINE_FORWARD ? -1 : key))
                FAIL_AT(pipeline, "stage %d, operation %d: slot %d is another's", p, i, op->slot);
            owner[op->slot] = is_last_backward(op->kind) ? -1 : key;
            if (op->slot >= most) most = op->slot + 1;
        }
        assert_int_equal(list->num_slots, most);
        if (most != slots_by_formula(pipeline, p))
            FAIL_AT(pipeline, "stage %d has %d slots, not %d", p, most, slots_by_formula(pipeline, p));
    }
}

// Micro-batches have inputs of their own until the gradient is there, and the next one's is another than that which was
// in use last: it can come beside that work.
static void check_inputs(const Pipeline* pipeline) {
    for (int p = 0; p < pipeline->P; p++) {
        const PipelineList* list = &pipeline->lists[p];
        int owner[MAX_OPS], freed = -1;
        for (int k = 0; k < MAX_OPS; k++) owner[k] = -1;
        assert_int_equal(list->num_inputs, list->num_slots + (pipeline->P > 1));
        for (int i = 0; i < list->count; i++) {
            const PipelineOp* op = &list->ops[i];
            int key = op->chunk * pipeline->M + op->micro_batch;
            bool forward = op->kind == PIPELINE_FORWARD;
            assert_in_range(op->input, 0, list->num_inputs - 1);
            if (op->kind != PIPELINE_BACKWARD_WEIGHT && owner[op->input] != (forward ? -1 : key))
                FAIL_AT(pipeline, "stage %d, operation %d: input %d is another's", p, i, op->input);
            if (forward && pipeline->P > 1 && op->input == freed)
                FAIL_AT(pipeline, "stage %d, operation %d waits for input %d", p, i, op->input);
            if (forward) owner[op->input] = key;
            if (op->kind == PIPELINE_BACKWARD || op->kind == PIPELINE_BACKWARD_INPUT)
                owner[op->input] = -1, freed = op->input;
        }
    }
}

enum { ACTIVATIONS, GRADIENTS, BOTH };

// What stage p sends (or, with receives, receives) of activations, gradients or both, as virtual stage of the
// receiver * M + micro-batch, gradients negative if it is both; returns how many there are.
static int messages(const Pipeline* pipeline, int p, int what, bool receives, int* keys) {
    int n = 0, last = pipeline->P * pipeline->V - 1;
    for (int i = 0; i < pipeline->lists[p].count; i++) {
        const PipelineOp* op = &pipeline->lists[p].ops[i];
        int here = virtual_stage(pipeline, p, op), to = here;
        bool gradients = op->kind != PIPELINE_FORWARD;
        if (op->kind == PIPELINE_BACKWARD_WEIGHT || what == (gradients ? ACTIVATIONS : GRADIENTS)) continue;
        if (!receives) to += gradients ? -1 : 1;
        if (receives && here == (gradients ? last : 0)) continue; // has it from the data, or the loss
        if (to < 0 || to > last) continue;
        keys[n] = to * pipeline->M + op->micro_batch;
        if (what == BOTH && gradients) keys[n] = -1 - keys[n];
        n++;
    }
    return n;
}

static void check_link(const Pipeline* pipeline, int what, int p, int to) {
    int sent[MAX_OPS], received[MAX_OPS], n = messages(pipeline, p, what, false, sent);
    assert_int_equal(n, messages(pipeline, to, what, true, received));
    for (int i = 0; i < n; i++)
        if (sent[i] != received[i])
            FAIL_AT(pipeline, "link %d to %d, message %d: sent %d, expected %d", p, to, i, sent[i],
                    received[i]);
}

static void check_links(const Pipeline* pipeline) {
    int P = pipeline->P;
    for (int p = 0; p < P && P > 1; p++) {
        check_link(pipeline, ACTIVATIONS, p, (p + 1) % P);
        check_link(pipeline, GRADIENTS, p, (p + P - 1) % P);
        if (P == 2) check_link(pipeline, BOTH, p, 1 - p);
    }
}

static void each_operation_is_there_once(void** state) {
    (void)state;
    for_each_pipeline(check_order);
}

static void slots_are_not_shared(void** state) {
    (void)state;
    for_each_pipeline(check_slots);
}

static void inputs_come_ahead(void** state) {
    (void)state;
    for_each_pipeline(check_inputs);
}

static void links_keep_the_order(void** state) {
    (void)state;
    for_each_pipeline(check_links);
}

// ----------------------------------------------------------------------------
// the lists against each other, when a message leaves only once its receive has been posted: a stage posts
// the receives of a link in list order, that of an activation when the slot is free (or a landing buffer is)

enum {
    BLOCKING,       // the stage computes nothing while it sends
    LANDING_BUFFER, // the same, but each stage can take in one activation ahead of its slot
    SEND_QUEUES,    // the stage goes on, each link has a queue of sends
    ONE_SEND_QUEUE, // the stage goes on, activations and gradients wait in one queue
    NUM_TRANSPORTS,
};

static int transport;

typedef struct {
    int sent, count, keys[MAX_OPS], gradients[MAX_OPS];
} SendQueue;

typedef struct {
    int done;                    // operations, with what the stage waits for
    bool computed;               // the operation at `done` has run, its message has not left
    int frees[MAX_OPS];          // of a forward: the operation that must be done before its slot is free
    int expected[2][MAX_OPS];    // keys of the receives: activations, gradients
    int forward_of[MAX_OPS];     // of an expected activation: the operation that takes it
    int received[2], to_come[2]; // of `expected`
    SendQueue sends[2];          // activations, gradients
} StageRun;

static StageRun runs[MAX_STAGES];
static bool arrived[2][MAX_KEYS]; // activations, gradients

static void prepare(const Pipeline* pipeline, int p) {
    StageRun* run = &runs[p];
    int freed_by[MAX_OPS], n = 0;
    memset(run, 0, sizeof *run);
    for (int s = 0; s < MAX_OPS; s++) freed_by[s] = -1;
    for (int i = 0; i < pipeline->lists[p].count; i++) {
        const PipelineOp* op = &pipeline->lists[p].ops[i];
        run->frees[i] = freed_by[op->slot];
        if (is_last_backward(op->kind)) freed_by[op->slot] = i;
        if (op->kind == PIPELINE_FORWARD && virtual_stage(pipeline, p, op) > 0) run->forward_of[n++] = i;
    }
    for (int gradients = 0; gradients < 2; gradients++)
        run->to_come[gradients] = messages(pipeline, p, gradients, true, run->expected[gradients]);
    assert_int_equal(run->to_come[0], n);
}

// The receiver takes the message if it is the next one of its queue and, for an activation, there is a place.
static bool deliver(const Pipeline* pipeline, int to, int gradients, int key) {
    StageRun* run = &runs[to];
    if (pipeline->P > 1) {
        int next = run->received[gradients], waiting = next - (transport == LANDING_BUFFER);
        if (next == run->to_come[gradients] || run->expected[gradients][next] != key) return false;
        if (!gradients && waiting >= 0 && run->frees[run->forward_of[waiting]] >= run->done) return false;
        run->received[gradients]++;
    }
    return arrived[gradients][key] = true;
}

// Sends what has been computed as far as receivers take it; true if something was sent.
static bool send_on(const Pipeline* pipeline, int p) {
    bool moved = false;
    for (int q = 0; q < 2; q++) {
        SendQueue* queue = &runs[p].sends[q];
        while (queue->sent < queue->count) {
            int gradients = queue->gradients[queue->sent], key = queue->keys[queue->sent];
            if (!deliver(pipeline, key / pipeline->M % pipeline->P, gradients, key)) break;
            queue->sent++;
            moved = true;
        }
    }
    return moved;
}

// Computes a stage's next operation; false when it has to wait.
static bool compute(const Pipeline* pipeline, int p) {
    StageRun* run = &runs[p];
    bool blocking = transport == BLOCKING || transport == LANDING_BUFFER;
    if (run->computed &&
        (run->sends[0].sent < run->sends[0].count || run->sends[1].sent < run->sends[1].count))
        return false;
    run->done += run->computed;
    run->computed = false;
    if (run->done == pipeline->lists[p].count) return false;
    const PipelineOp* op = &pipeline->lists[p].ops[run->done];
    int here = virtual_stage(pipeline, p, op), last = pipeline->P * pipeline->V - 1, M = pipeline->M;
    int gradients = op->kind != PIPELINE_FORWARD, to = gradients ? here - 1 : here + 1;
    bool talks = op->kind != PIPELINE_BACKWARD_WEIGHT;
    if (talks && here != (gradients ? last : 0) && !arrived[gradients][here * M + op->micro_batch])
        return false;
    if (talks && to >= 0 && to <= last) {
        SendQueue* queue = &run->sends[transport == ONE_SEND_QUEUE ? 0 : gradients];
        queue->gradients[queue->count] = gradients;
        queue->keys[queue->count++] = to * M + op->micro_batch;
    }
    if (blocking)
        run->computed = true;
    else
        run->done++;
    return true;
}

static bool runs_to_the_end(const Pipeline* pipeline, int how) {
    transport = how;
    memset(arrived, 0, sizeof arrived);
    for (int p = 0; p < pipeline->P; p++) prepare(pipeline, p);
    for (bool moved = true; moved;) {
        moved = false;
        for (int p = 0; p < pipeline->P; p++)
            while (compute(pipeline, p) || send_on(pipeline, p)) moved = true;
    }
    for (int p = 0; p < pipeline->P; p++)
        if (runs[p].done < pipeline->lists[p].count) return false;
    return true;
}

// With chunks, two stages that send to each other can both wait for a slot that the other's next backward
// frees, so that Megatron's order needs a landing buffer or sends that do not hold up the stage.
static void check_blocking(const Pipeline* pipeline) {
    for (int how = 0; how < NUM_TRANSPORTS; how++)
        if (how != BLOCKING || pipeline->V == 1)
            if (!runs_to_the_end(pipeline, how)) FAIL_AT(pipeline, "stages wait for each other (%d)", how);
}

static void sends_may_block(void** state) {
    (void)state;
    for_each_pipeline(check_blocking);
    Pipeline chunks = {PIPELINE_INTERLEAVED, 2, 2, 4, {{NULL, 0, 0, 0}}};
    make_lists(&chunks);
    assert_false(runs_to_the_end(&chunks, BLOCKING)); // what pipeline.h warns of
    free_lists(&chunks);
}

// Both simulations notice lists that cannot run, or the tests above would say nothing.
static void deadlocks_are_found(void** state) {
    (void)state;
    PipelineCosts costs = {1, 1, 1, 0};
    Pipeline pipeline = {PIPELINE_1F1B, 2, 1, 2, {{NULL, 0, 0, 0}}};
    make_lists(&pipeline);
    PipelineTime time = pipeline_simulate_lists(pipeline.lists, 2, 1, 2, costs, NULL);
    assert_true(time.seconds == 9);
    assert_true(runs_to_the_end(&pipeline, BLOCKING));
    PipelineOp* ops = pipeline.lists[0].ops; // f0 f1 b0 b1
    PipelineOp f1 = ops[1];
    ops[1] = ops[2]; // f0 b0 f1 b1 is slower but runs
    ops[2] = f1;
    assert_true(pipeline_simulate_lists(pipeline.lists, 2, 1, 2, costs, NULL).seconds > time.seconds);
    ops[0] = f1; // f1 b0 f0 b1: stage 1 has to have f0 first
    ops[2].micro_batch = 0;
    PipelineTime stuck = pipeline_simulate_lists(pipeline.lists, 2, 1, 2, costs, NULL);
    assert_true(stuck.seconds == INFINITY && stuck.bubble == 1);
    assert_false(runs_to_the_end(&pipeline, BLOCKING));
    free_lists(&pipeline);
}

// ----------------------------------------------------------------------------
// times

static void expect_near(const Pipeline* pipeline, const char* what, double got, double wanted) {
    if (!(fabs(got - wanted) < 1e-9)) FAIL_AT(pipeline, "%s is %.12g, not %.12g", what, got, wanted);
}

static void check_times(const Pipeline* pipeline) {
    int P = pipeline->P, V = pipeline->V, M = pipeline->M;
    PipelineCosts even = {1, 1, 1, 0}, slow = {1, 1, 1, 0.7};
    PipelineTime time = pipeline_simulate(pipeline->schedule, P, V, M, even);
    double work = 3.0 * V * M, most = 0;
    for (int p = 0; p < P; p++) most = fmax(most, slots_by_formula(pipeline, p));
    expect_near(pipeline, "busy", time.busy, work);
    expect_near(pipeline, "peak_slots", time.peak_slots, most);
    expect_near(pipeline, "bubble against seconds", time.bubble, 1 - work / time.seconds);
    if (pipeline->schedule != PIPELINE_ZERO_BUBBLE)
        expect_near(pipeline, "bubble", time.bubble, (P - 1.0) / (V * M + P - 1));
    else if (P == 1 || M >= P) // (P - 1)(F + B - W)
        expect_near(pipeline, "seconds", time.seconds, work + P - 1);
    else // too few micro-batches to fill the last stage
        expect_near(pipeline, "seconds", time.seconds, work + P - 1 + P - M);
    if (pipeline->schedule == PIPELINE_ZERO_BUBBLE && P > 1)
        assert_true(time.seconds < pipeline_simulate(PIPELINE_1F1B, P, V, M, even).seconds);
    // latency makes nothing faster, costs one way there and back at least, and nothing on one stage
    double later = pipeline_simulate(pipeline->schedule, P, V, M, slow).seconds - time.seconds;
    if (P == 1) expect_near(pipeline, "latency", later, 0);
    if (!(later < INFINITY && later > 2 * 0.7 * (P - 1) - 1e-9)) FAIL_AT(pipeline, "latency adds %g", later);
}

static void times_are_those_of_the_formulas(void** state) {
    (void)state;
    for_each_pipeline(check_times);
}

static void each_cost_counts(void** state) {
    (void)state;
    PipelineCosts costs = {1, 10, 100, 1000};
    // one micro-batch through two stages and back; in the last one w0 runs while the gradient travels
    assert_true(pipeline_simulate(PIPELINE_1F1B, 2, 1, 1, costs).seconds == 2 + 1000 + 220 + 1000);
    assert_true(pipeline_simulate(PIPELINE_ZERO_BUBBLE, 2, 1, 1, costs).seconds ==
                2 + 1000 + 20 + 1000 + 100);
    // and through both chunks: three links there, three back
    assert_true(pipeline_simulate(PIPELINE_INTERLEAVED, 2, 2, 2, costs).seconds >= 4 + 6000 + 440);
}

// ----------------------------------------------------------------------------
// layers and messages

static void layers_are_split(void** state) {
    (void)state;
    static const struct {
        int layers, stages, sizes[6];
    } cases[] = {
        {12, 4, {3, 3, 3, 3}},       {13, 4, {3, 4, 3, 3}}, {14, 4, {3, 4, 4, 3}},
        {15, 4, {4, 4, 4, 3}},       {5, 2, {3, 2}},        {7, 3, {2, 3, 2}},
        {20, 6, {3, 3, 4, 4, 3, 3}}, {7, 1, {7}},           {3, 4, {1, 1, 1, 0}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        for (int s = 0, next = 0; s < cases[i].stages; s++) {
            int first, end;
            pipeline_layers(cases[i].layers, cases[i].stages, s, &first, &end);
            assert_int_equal(first, next);
            assert_int_equal(end - first, cases[i].sizes[s]);
            next = end;
        }
    for (int layers = 1; layers <= 40; layers++)
        for (int stages = 1; stages <= layers; stages++) {
            int next = 0, first, end, rest = layers % stages;
            for (int s = 0; s < stages; s++, next = end) {
                pipeline_layers(layers, stages, s, &first, &end);
                bool at_an_end = s == 0 || s == stages - 1;
                assert_int_equal(first, next);
                assert_in_range(end - first, layers / stages, layers / stages + (rest > 0));
                if (at_an_end && rest <= stages - 2) assert_int_equal(end - first, layers / stages);
                if (s == stages - 1) assert_int_equal(end - first, layers / stages); // the head
            }
            assert_int_equal(next, layers);
        }
}

static void expect_message(int schedule, int P, int V, int M, int layers, const char* wanted) {
    Error err = {0, {0}};
    assert_int_equal(pipeline_check(schedule, P, V, M, layers, &err), wanted == NULL);
    assert_int_equal(err.code, wanted == NULL ? EXIT_OK : EXIT_CONFIG);
    assert_string_equal(err.text, wanted == NULL ? "" : wanted);
}

static void what_cannot_run_is_explained(void** state) {
    (void)state;
    expect_message(PIPELINE_1F1B, 4, 1, 1, 4, NULL);
    expect_message(PIPELINE_INTERLEAVED, 4, 1, 3, 4, NULL); // which is 1F1B
    expect_message(PIPELINE_INTERLEAVED, 4, 2, 8, 8, NULL);
    for (int schedule = PIPELINE_AFAB; schedule <= PIPELINE_ZERO_BUBBLE; schedule++)
        expect_message(schedule, 1, 3, 5, 2, NULL);
    expect_message(PIPELINE_1F1B, 4, 2, 8, 8,
                   "the 1F1B pipeline schedule has one chunk of layers a stage, not 2: set "
                   "parallel.virtual_pipeline_size=1, or parallel.pipeline_schedule=interleaved");
    expect_message(PIPELINE_ZERO_BUBBLE, 2, 3, 8, 8,
                   "the zero-bubble pipeline schedule has one chunk of layers a stage, not 3: set "
                   "parallel.virtual_pipeline_size=1, or parallel.pipeline_schedule=interleaved");
#define MULTIPLES(stages, has, nearest)                                                                      \
    "the interleaved pipeline schedule needs micro-batches in multiples of its " stages                      \
    " stages, but a step has " has ": the nearest number that works is " nearest
    expect_message(PIPELINE_INTERLEAVED, 4, 2, 9, 8, MULTIPLES("4", "9", "8"));
    expect_message(PIPELINE_INTERLEAVED, 4, 2, 10, 8, MULTIPLES("4", "10", "12"));
    expect_message(PIPELINE_INTERLEAVED, 4, 2, 11, 8, MULTIPLES("4", "11", "12"));
    expect_message(PIPELINE_INTERLEAVED, 4, 2, 1, 8, MULTIPLES("4", "1", "4"));
    expect_message(
        PIPELINE_1F1B, 8, 1, 8, 6,
        "a pipeline of 8 stages needs a layer for each, but the model has 6: set 6 stages or fewer");
    expect_message(PIPELINE_INTERLEAVED, 4, 4, 8, 12,
                   "a pipeline of 4 stages with 4 chunks each needs 16 layers or more, but the model has 12: "
                   "with 4 stages, the most chunks that work are 3");
    expect_message(
        PIPELINE_INTERLEAVED, 65536, 65536, 65536, 65536,
        "a pipeline of 65536 stages with 65536 chunks each needs 4294967296 layers or more, but the "
        "model has 65536: with 65536 stages, the most chunks that work are 1");
    expect_message(
        PIPELINE_1F1B, 4, 1, 0, 8,
        "a pipeline of 4 stages with 1 chunks each and 0 micro-batches cannot run: each number must "
        "be 1 or more");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lists_are_those_of_the_papers),
        cmocka_unit_test(each_operation_is_there_once),
        cmocka_unit_test(slots_are_not_shared),
        cmocka_unit_test(inputs_come_ahead),
        cmocka_unit_test(links_keep_the_order),
        cmocka_unit_test(sends_may_block),
        cmocka_unit_test(deadlocks_are_found),
        cmocka_unit_test(times_are_those_of_the_formulas),
        cmocka_unit_test(each_cost_counts),
        cmocka_unit_test(layers_are_split),
        cmocka_unit_test(what_cannot_run_is_explained),
    };
    return cmocka_run_group_tests_name("pipeline", tests, NULL, NULL);
}
