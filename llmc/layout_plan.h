// What a layout costs before it runs: the bytes that a rank sends in a step, the time of a step and how much
// of it is communication that nothing hides. Which layout is the fastest: llmc/layout_search.h.
//
// There is one description of a step here, the walk: it does what train_gpt.cu does, pass by pass and layer
// by layer, in the same order, but where that starts a matmul or a collective this adds up seconds and bytes.
// A stage has, as there, a queue of compute and one of communication; stages wait for what others send them.
//
//     compute   | update 0 1 2 .. | f layer 0 | f layer 1 | ... | b layer 1 | b layer 0 | .. norm |
//     dp comm     | gather 0 | gather 1 | ...                               | sum 1     | sum 0 |
//
// Left out: kernels other than matmuls, attention and the update (they are small beside them), and that a
// collective takes some of the GPU from the matmuls beside it. Plain C.
#pragma once
#include "llmc/utils.h"          // defines: malloc_check; first, as it asks for all of the C library
#include "llmc/layout_resolve.h" // defines: layout_resolve
#include "llmc/exact_sum.h"      // defines: StepSums

// Bytes that a rank sends in one optimizer step; tp: with what ranks of one key/value head send each other.
typedef struct {
    double tp, cp, dp, pp, tied, world;
} LayoutTraffic;

typedef struct {
    double matmul, copy;              // FLOP/s; bytes/s read and written
    double link_inside, link_between; // bytes/s that a GPU sends: in its machine; to other machines
    double latency;                   // seconds that a message takes however short it is
    int gpus_per_machine;
    bool no_overlap; // as if a rank computed or communicated, never both: what overlap is measured against
} LayoutRates;

typedef struct {
    double seconds;         // of a step
    double compute;         // of them, in which the mean stage computes
    double tp, cp, dp, pp;  // that communication adds; dp: with the step's sums, pp: with the tied embedding
    double bubble, exposed; // shares of the step: compute, bubble and exposed add up to 1
} LayoutCost;

// An H100 in a DGX H100 (NVIDIA's data sheets): 60 % of 989 dense bf16 TFLOP/s, 80 % of 3.35 TB/s, NVLink
// with 450 GB/s and a 400 Gb/s InfiniBand port for each GPU, in each direction. 5 us a message is assumed.
static inline LayoutRates layout_rates_h100(void) {
    LayoutRates r = {0.6 * 989.4e12, 0.8 * 3.35e12, 450e9, 50e9, 5e-6, 8, false};
    return r;
}

// ----------------------------------------------------------------------------
// the walk of one stage

enum PlanAxis { PLAN_TP, PLAN_CP, PLAN_DP, PLAN_PP, PLAN_TIED, PLAN_WORLD, NUM_PLAN_AXES };
// train_gpt.cu: NUM_WINDOWS, LOGIT_BYTES; tensor_parallel.cuh: TP_PIECES; classifier.cuh: RowPart
enum { PLAN_WINDOWS = 4, PLAN_PIECES = 2, PLAN_ROW_PART_BYTES = 12 };
#define PLAN_LOGIT_BYTES ((double)((size_t)512 << 20))

typedef struct {
    const RunConfig* run;
    Layout l;          // a rank of the stage
    ModelConfig c;     // its share of the model
    ParameterLayout p; // and of the parameters
    PipelineList list;
    LayoutRates rates;
    int micro_batches, zero, pieces, done; // done: operations of the list
    bool windows;
    unsigned costs;                            // bit a: axis a takes time
    double rows, weight_bytes, gradient_bytes; // of a micro-batch; of an element
    double link[NUM_PLAN_AXES], sent[NUM_PLAN_AXES];
    double now, comm, out[2], busy; // when each queue is free: compute, dp, links; seconds of compute
    // of each window of ZeRO: the bucket whose weights are there, and when they are, were used, gradients
    // summed
    int holds[PLAN_WINDOWS];
    double gathered[PLAN_WINDOWS], used[PLAN_WINDOWS], summed[PLAN_WINDOWS];
    int keys_of_slot, keys_of_layer; // whose keys were gathered last over context-parallel ranks
    double* ready;                   // (num_buckets) when a bucket's weights have come, ZeRO 1 and 2
} StageWalk;

// What a rank of an axis sends at. A ring that leaves the machine leaves it once for each of its members
// there, which all have a port of their own: so many rings run at once.
static inline double axis_link(const LayoutRates* r, const Layout* l, int axis) {
    int stride = axis == PLAN_DP || axis == PLAN_CP     ? l->tp_size
                 : axis == PLAN_PP || axis == PLAN_TIED ? l->tp_size * l->dp_size
                                                        : 1;
    int size = axis == PLAN_TP   ? l->tp_size
               : axis == PLAN_CP ? l->cp_size
               : axis == PLAN_DP ? l->dp_size
                                 : l->size / stride;
    if (stride * size <= r->gpus_per_machine) return r->link_inside;
    bool ring = axis != PLAN_PP && axis != PLAN_TIED;
    int ports = ring && stride < r->gpus_per_machine ? r->gpus_per_machine / stride : 1;
    return fmin(r->link_inside, ports * r->link_between);
}

static inline int walk_buckets(const StageWalk* w) { return w->c.num_hidden_layers + 2; }
static inline double bucket_elements(const StageWalk* w, int b) {
    return (double)parameter_bucket(&w->p, w->c.num_hidden_layers, b).size;
}

// costs: bits of the axes whose communication takes time.
static inline void walk_open(StageWalk* w, const RunConfig* run, Layout l, const LayoutRates* rates,
                             unsigned costs) {
    memset(w, 0, sizeof *w);
    w->run = run, w->l = l, w->rates = *rates, w->costs = costs;
    w->c = model_part(&run->model, &l), w->p = layout_parameters(&w->c, &l);
    w->micro_batches = run->batch.global_batch_size / run->batch.micro_batch_size / num_replicas(&l);
    w->list = pipeline_list(run->parallel.pipeline_schedule, l.pp_size, l.pp, l.num_chunks, w->micro_batches);
    w->zero = l.dp_size == 1 ? (int)ZERO_OPTIMIZER : run->parallel.zero_stage;
    w->windows = w->zero >= ZERO_GRADIENTS || run->parallel.deterministic;
    int N = run->batch.micro_batch_size * (run->batch.sequence_length / l.cp_size);
    w->rows = N, w->pieces = N % (PLAN_PIECES * l.tp_size) == 0 ? PLAN_PIECES : 1;
    bool fp32 = run->precision.compute == COMPUTE_FP32 || run->precision.compute == COMPUTE_TF32;
    w->weight_bytes = fp32 ? 4 : 2;
    w->gradient_bytes = run->precision.gradients == STORE_BF16 ? 2 : 4;
    for (int a = 0; a < NUM_PLAN_AXES; a++) w->link[a] = axis_link(rates, &l, a);
    for (int i = 0; i < PLAN_WINDOWS; i++) w->holds[i] = -1;
    w->keys_of_slot = -1;
    w->ready = (double*)calloc_check((size_t)walk_buckets(w), sizeof *w->ready);
}
static inline void walk_close(StageWalk* w) { free(w->ready), free(w->list.ops); }

// This rank sends so many bytes in so many messages, one after the other: the seconds.
static inline double walk_send(StageWalk* w, int axis, double bytes, double messages) {
    w->sent[axis] += bytes;
    return (w->costs >> axis & 1) == 0 ? 0 : bytes / w->link[axis] + messages * w->rates.latency;
}

// A ring over n ranks takes n - 1 messages of an n-th of the bytes each to gather or to reduce-scatter them,
// and both to all-reduce (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009).
static inline double walk_ring(StageWalk* w, int axis, int n, double bytes) {
    return n == 1 ? 0 : walk_send(w, axis, (n - 1.0) / n * bytes, n - 1);
}

static inline void walk_compute(StageWalk* w, double seconds) { w->now += seconds, w->busy += seconds; }

// How a gather or scatter of (N, C) over tensor-parallel ranks goes with its matmul: there is none; in
// pieces, so that half of it runs beside half of the matmul; behind all of the matmul; alone.
enum TensorComm { TP_NONE, TP_IN_PIECES, TP_BEHIND, TP_ALONE };

static inline void walk_matmul(StageWalk* w, double flops, enum TensorComm how) {
    double matmul = flops / w->rates.matmul, bytes = w->rows * w->c.hidden_size * w->weight_bytes, t = 0;
    for (int k = 0; k < w->pieces && how != TP_NONE; k++)
        t += walk_ring(w, PLAN_TP, w->l.tp_size, bytes / w->pieces);
    walk_compute(w, matmul);
    if (how == TP_IN_PIECES && w->pieces > 1 && !w->rates.no_overlap) t = t / 2 + fmax(0, t / 2 - matmul / 2);
    if (how == TP_BEHIND && !w->rates.no_overlap) t = fmax(0, t - matmul);
    w->now += t;
}

// ----------------------------------------------------------------------------
// buckets, as in train_gpt.cu

static inline int walk_window(const StageWalk* w, int b) {
    return b == 0 ? 0 : b == walk_buckets(w) - 1 ? 1 : 2 + b % 2;
}

// A data-parallel collective behind what its queue has to do and not before `from`; returns when it is done.
static inline double walk_dp(StageWalk* w, double from, double seconds) {
    w->comm = fmax(w->comm, from) + seconds;
    if (w->rates.no_overlap && seconds > 0) w->now = w->comm = fmax(w->comm, w->now + seconds);
    return w->comm;
}

static inline void walk_fetch_weights(StageWalk* w, int b) {
    int i = walk_window(w, b);
    if (w->zero != ZERO_PARAMETERS || b < 0 || b >= walk_buckets(w) || w->holds[i] == b) return;
    double t = walk_ring(w, PLAN_DP, w->l.dp_size, bucket_elements(w, b) * w->weight_bytes);
    w->gathered[i] = walk_dp(w, w->used[i], t);
    w->holds[i] = b;
}

static inline void walk_use_weights(StageWalk* w, int b, int next) {
    if (w->l.dp_size == 1) return;
    walk_fetch_weights(w, b);
    w->now = fmax(w->now, w->zero == ZERO_PARAMETERS ? w->gathered[walk_window(w, b)] : w->ready[b]);
    if (next != b && next > 0 && next < walk_buckets(w) - 1) walk_fetch_weights(w, next);
}

static inline void walk_begin_gradients(StageWalk* w, int b) {
    if (w->windows) w->now = fmax(w->now, w->summed[walk_window(w, b)]);
}

// Gradients of what tensor-parallel ranks all have, and of key/value heads that several have: one group call.
static inline void walk_sum_replicas(StageWalk* w, int b) {
    int L = w->c.num_hidden_layers, layer = b > 0 && b <= L ? b - 1 : 0, n = w->l.tp_size;
    double replicas = kv_replicas(&w->run->model, &w->l), bytes = 0;
    if (n == 1) return;
    for (int i = 0; i < NUM_TENSORS; i++) {
        const TensorSpec* t = &tensor_table[i];
        if (w->p.size[i] == 0 || tensor_bucket((enum TensorId)i, layer, L) != b) continue;
        if (t->split == SPLIT_NONE || t->split == SPLIT_FIRST)
            bytes += 2 * (n - 1.0) / n * (double)w->p.size[i];
        if (t->rows == DIM_QKV)
            bytes += 2 * (replicas - 1) / replicas *
                     (double)(w->p.size[i] - model_dim(&w->c, DIM_HEADS) * w->p.cols[i]);
    }
    if (bytes > 0) w->now += walk_send(w, PLAN_TP, bytes * w->gradient_bytes, 2 * (n - 1));
}

static inline void walk_reduce_gradients(StageWalk* w, int b, bool last_micro_batch) {
    int n = w->l.dp_size;
    double bytes = bucket_elements(w, b) * w->gradient_bytes, t;
    if (!w->windows && !last_micro_batch) return;
    walk_sum_replicas(w, b);
    if (n == 1 || bytes <= 0) return;
    if (w->run->parallel.deterministic)
        t = walk_send(w, PLAN_DP, bytes, n); // a slice to each rank, itself included
    else
        t = walk_ring(w, PLAN_DP, n, bytes);
    if (w->zero == ZERO_NONE && !w->run->parallel.deterministic) t += walk_ring(w, PLAN_DP, n, bytes);
    t = walk_dp(w, w->now, t);
    if (w->windows) w->summed[walk_window(w, b)] = t;
}

// Weights from summed gradients, at the beginning of the step after; gathers run ahead of the passes that use
// them. 36 bytes a parameter: planner.h.
static inline void walk_update(StageWalk* w) {
    int n = w->l.dp_size;
    for (int b = 0; b < walk_buckets(w); b++) {
        double elements = bucket_elements(w, b);
        walk_compute(w, 36 * elements / (w->zero >= ZERO_OPTIMIZER ? n : 1) / w->rates.copy);
        w->used[walk_window(w, b)] = w->now;
        if (elements > 0 && (w->zero == ZERO_OPTIMIZER || w->zero == ZERO_GRADIENTS))
            w->ready[b] = walk_dp(w, w->now, walk_ring(w, PLAN_DP, n, elements * w->weight_bytes));
    }
}

// ----------------------------------------------------------------------------
// passes, as in train_gpt.cu

typedef struct {
    int slot, first, end;
    bool embedding, head, last_micro_batch, weights_later;
} WalkPass;

// Causal attention: each query meets T / 2 keys, 2 multiply-adds forward and 4 backward (flops.h).
static inline double attention_flops(const StageWalk* w) {
    return 2 * w->rows * w->run->batch.sequence_length * (double)model_dim(&w->c, DIM_HEADS);
}
// FLOPs of one product of N rows with a tensor.
static inline double product_flops(const StageWalk* w, enum Dim rows, enum Dim cols) {
    return 2 * w->rows * (double)model_dim(&w->c, rows) * (double)model_dim(&w->c, cols);
}

// Keys and values of all ranks that share a sequence: in the forward pass attention waits for them; in the backward
// pass they come beside `matmuls` seconds of products, unless they are still there, and their gradients go back.
static inline double walk_keys(StageWalk* w) {
    double columns = (double)(model_dim(&w->c, DIM_QKV) - model_dim(&w->c, DIM_HEADS));
    return walk_ring(w, PLAN_CP, w->l.cp_size, w->l.cp_size * w->rows * columns * w->weight_bytes);
}
static inline void walk_gather_keys(StageWalk* w, const WalkPass* pass, int l) {
    w->now += walk_keys(w);
    w->keys_of_slot = pass->slot, w->keys_of_layer = l;
}
static inline void walk_keys_backward(StageWalk* w, const WalkPass* pass, int l, double matmuls) {
    bool there = w->keys_of_slot == pass->slot && w->keys_of_layer == l;
    w->keys_of_slot = pass->slot, w->keys_of_layer = l;
    if (!there) w->now += fmax(0, walk_keys(w) - (w->rates.no_overlap ? 0 : matmuls));
    w->now += walk_keys(w);
}

static inline void walk_inside(StageWalk* w, const WalkPass* pass, int l) {
    walk_matmul(w, product_flops(w, DIM_QKV, DIM_HIDDEN), TP_IN_PIECES);
    walk_gather_keys(w, pass, l);
    walk_matmul(w, attention_flops(w), TP_NONE);
    walk_matmul(w, product_flops(w, DIM_HIDDEN, DIM_HEADS), TP_IN_PIECES);
    walk_matmul(w, product_flops(w, DIM_FC, DIM_HIDDEN), TP_IN_PIECES);
}

static inline void walk_chunk_forward(StageWalk* w, const WalkPass* pass) {
    if (pass->embedding) {
        walk_use_weights(w, 0, 1 + pass->first);
        walk_matmul(w, 0, TP_ALONE);
    }
    walk_use_weights(w, 1 + pass->first, 2 + pass->first);
    for (int l = pass->first; l < pass->end; l++) {
        walk_use_weights(w, 1 + l, 2 + l);
        walk_inside(w, pass, l);
        walk_matmul(w, product_flops(w, DIM_HIDDEN, DIM_FF), TP_IN_PIECES);
        w->used[walk_window(w, 1 + l)] = w->now;
        if (l + 1 < pass->end || pass->head) walk_use_weights(w, 2 + l, 2 + l);
    }
}

// The head, forward and backward; logits exist for some rows at a time.
static inline void walk_loss(StageWalk* w) {
    double vocab = (double)model_dim(&w->c, DIM_VOCAB), product = product_flops(w, DIM_VOCAB, DIM_HIDDEN);
    double chunks = ceil(w->rows / floor(PLAN_LOGIT_BYTES / (vocab * w->weight_bytes))), n = w->l.tp_size;
    int head = w->c.tie_word_embeddings ? 0 : walk_buckets(w) - 1;
    walk_use_weights(w, head, head);
    walk_matmul(w, product, TP_ALONE);
    if (n > 1) w->now += walk_send(w, PLAN_TP, (n - 1) * PLAN_ROW_PART_BYTES * w->rows, chunks * (n - 1));
    walk_matmul(w, 2 * product, TP_ALONE);
}

static inline void walk_block_backward(StageWalk* w, const WalkPass* pass, int l) {
    const RunConfig* run = w->run;
    bool whole = !pass->weights_later;
    bool gelu = run->precision.fused_gelu && w->c.family->activation == ACTIVATION_GELU_TANH;
    bool kept = l == pass->end - 1 && w->list.num_slots == 1; // the last to write what all layers share
    double qkv = product_flops(w, DIM_QKV, DIM_HIDDEN), fc = product_flops(w, DIM_FC, DIM_HIDDEN);
    double attproj = product_flops(w, DIM_HIDDEN, DIM_HEADS), fcproj = product_flops(w, DIM_HIDDEN, DIM_FF);
    walk_use_weights(w, 1 + l, l);
    walk_begin_gradients(w, 1 + l);
    if (run->batch.recompute == RECOMPUTE_BLOCK && !kept) walk_inside(w, pass, l);
    walk_matmul(w, fcproj, gelu ? TP_ALONE : TP_IN_PIECES); // gradient of the input, then of the weight
    if (whole) walk_matmul(w, fcproj, TP_NONE);
    walk_matmul(w, fc, whole ? TP_BEHIND : TP_ALONE);
    if (whole) walk_matmul(w, fc, TP_BEHIND);
    walk_matmul(w, attproj, TP_IN_PIECES);
    if (whole) walk_matmul(w, attproj, TP_NONE);
    walk_keys_backward(w, pass, l, (fcproj + fc + attproj) * (whole ? 2 : 1) / w->rates.matmul);
    walk_matmul(w, 2 * attention_flops(w), TP_NONE);
    walk_matmul(w, qkv, whole ? TP_BEHIND : TP_ALONE);
    if (whole) walk_matmul(w, qkv, TP_BEHIND);
    w->used[walk_window(w, 1 + l)] = w->now;
    if (whole) walk_reduce_gradients(w, 1 + l, pass->last_micro_batch);
}

static inline void walk_block_weights(StageWalk* w, const WalkPass* pass, int l) {
    walk_matmul(w, product_flops(w, DIM_HIDDEN, DIM_FF), TP_ALONE);
    walk_matmul(w, product_flops(w, DIM_FC, DIM_HIDDEN), TP_ALONE);
    walk_matmul(w, product_flops(w, DIM_HIDDEN, DIM_HEADS), TP_ALONE);
    walk_matmul(w, product_flops(w, DIM_QKV, DIM_HIDDEN), TP_ALONE);
    walk_reduce_gradients(w, 1 + l, pass->last_micro_batch);
}

static inline void walk_chunk_backward(StageWalk* w, const WalkPass* pass) {
    int behind = walk_buckets(w) - 1;
    bool first_bucket = pass->embedding || (pass->head && w->c.tie_word_embeddings);
    if (first_bucket) walk_begin_gradients(w, 0);
    if (pass->head) {
        walk_begin_gradients(w, behind);
        walk_loss(w);
        walk_reduce_gradients(w, behind, pass->last_micro_batch);
    }
    for (int l = pass->end - 1; l >= pass->first; l--) walk_block_backward(w, pass, l);
    if (pass->embedding) walk_matmul(w, 0, TP_ALONE);
    if (first_bucket) walk_reduce_gradients(w, 0, pass->last_micro_batch);
}

// One operation of the stage's list, whose input arrives at a time. Returns when its result, if it sends one, is
// at the neighbour.
static inline double walk_operation(StageWalk* w, const PipelineOp* op, double arrives) {
    WalkPass pass;
    int global, stage = virtual_stage(&w->l, op->chunk), forward = op->kind == PIPELINE_FORWARD;
    chunk_layers(&w->l, &w->run->model, op->chunk, &pass.first, &pass.end, &global);
    pass.embedding = stage == 0, pass.head = stage == num_virtual_stages(&w->l) - 1;
    pass.last_micro_batch = op->micro_batch == w->micro_batches - 1;
    pass.slot = op->slot, pass.weights_later = op->kind == PIPELINE_BACKWARD_INPUT;
    w->now = fmax(w->now, arrives);
    if (op->kind == PIPELINE_BACKWARD_WEIGHT) {
        for (int l = pass.end - 1; l >= pass.first; l--) walk_block_weights(w, &pass, l);
        return w->now;
    }
    if (forward)
        walk_chunk_forward(w, &pass);
    else
        walk_chunk_backward(w, &pass);
    if (forward ? pass.head : pass.embedding) return w->now;
    double* link = &w->out[forward]; // a stream of its own, in which sends follow each other
    double t = walk_send(w, PLAN_PP, w->rows / w->l.tp_size * w->c.hidden_size * w->weight_bytes, 1);
    *link = fmax(*link, w->now) + t;
    if (w->rates.no_overlap) w->now = *link;
    return *link;
}

// The tied embedding's gradient, between the first stage and the last.
static inline double walk_tied(StageWalk* w) {
    double elements = bucket_elements(w, 0) / (w->zero >= ZERO_OPTIMIZER ? w->l.dp_size : 1);
    bool tied = w->c.tie_word_embeddings && w->l.pp_size > 1 && (has_embedding(&w->l) || has_head(&w->l));
    return tied ? walk_send(w, PLAN_TIED, elements * w->gradient_bytes, 2) : 0;
}

// The step's sums: so short that it goes along a tree, up and down.
static inline double walk_world(StageWalk* w) {
    double n = w->l.size, bytes = sizeof(StepSums);
    return n == 1 ? 0 : walk_send(w, PLAN_WORLD, 2 * (n - 1) / n * bytes, 2 * ceil(log2(n)));
}

// ----------------------------------------------------------------------------
// traffic and time

// Bytes that rank l->rank sends in a step; bf16 activations and weights have 2 bytes, fp32 and tf32 ones 4.
static inline LayoutTraffic layout_traffic(const RunConfig* run, const Layout* l) {
    LayoutRates rates = layout_rates_h100();
    StageWalk w;
    walk_open(&w, run, *l, &rates, 0);
    walk_update(&w);
    for (int i = 0; i < w.list.count; i++) walk_operation(&w, &w.list.ops[i], 0);
    walk_tied(&w);
    walk_world(&w);
    LayoutTraffic traffic = {w.sent[PLAN_TP], w.sent[PLAN_CP],   w.sent[PLAN_DP],
                             w.sent[PLAN_PP], w.sent[PLAN_TIED], w.sent[PLAN_WORLD]};
    walk_close(&w);
    return traffic;
}

// All that the lists allow until nothing moves: an operation is walked once its input is under way. arrives:
// of [forward][virtual stage][micro-batch], INFINITY while it is not.
static inline void walk_together(StageWalk* stages, int num_stages, double* const arrives[2]) {
    int M = stages[0].micro_batches, last = num_virtual_stages(&stages[0].l) - 1;
    for (bool moved = true; moved;) {
        moved = false;
        for (int p = 0; p < num_stages; p++) {
            StageWalk* w = &stages[p];
            for (; w->done < w->list.count; w->done++, moved = true) {
                const PipelineOp* op = &w->list.ops[w->done];
                int stage = virtual_stage(&w->l, op->chunk), m = op->micro_batch;
                bool forward = op->kind == PIPELINE_FORWARD, weights = op->kind == PIPELINE_BACKWARD_WEIGHT;
                bool first = weights || stage == (forward ? 0 : last);
                double start = first ? 0 : arrives[forward][stage * M + m];
                if (start == INFINITY) break;
                double end = walk_operation(w, op, start);
                if (!weights && stage != (forward ? last : 0))
                    arrives[forward][(stage + (forward ? 1 : -1)) * M + m] = end;
            }
        }
    }
}

// Seconds from one step's sums to the next one's, at which all ranks wait for each other; *busy: those in
// which the mean stage computes. Ranks of one stage do the same, so one of each is walked.
static inline double layout_period(const RunConfig* run, const Layout* l, const LayoutRates* rates,
                                   unsigned costs, double* busy) {
    int P = l->pp_size;
    double* arrives[2];
    StageWalk* stages = (StageWalk*)malloc_check((size_t)P * sizeof *stages);
    for (int p = 0; p < P; p++) {
        walk_open(&stages[p], run, layout_at(*l, layout_rank(l, 0, 0, p)), rates, costs);
        walk_update(&stages[p]);
    }
    size_t messages = (size_t)num_virtual_stages(l) * (size_t)stages[0].micro_batches;
    for (int k = 0; k < 2; k++) {
        arrives[k] = (double*)malloc_check(messages * sizeof(double));
        for (size_t i = 0; i < messages; i++) arrives[k][i] = INFINITY;
    }
    walk_together(stages, P, arrives);
    double seconds = 0;
    *busy = 0;
    for (int p = 0; p < P; p++) {
        StageWalk* w = &stages[p];
        CHECK(w->done == w->list.count);
        seconds = fmax(seconds, fmax(w->now, w->comm) + walk_tied(w)), *busy += w->busy / P;
    }
    seconds += walk_world(&stages[0]);
    for (int p = 0; p < P; p++) walk_close(&stages[p]);
    free(arrives[0]), free(arrives[1]), free(stages);
    return seconds;
}

// The same step five times: without communication; then pipeline, tensor, context and data parallelism's as
// well, so that each has what it adds. run->parallel says the schedule, ZeRO and the rest.
static inline LayoutCost layout_cost(const RunConfig* run, const Layout* l, LayoutRates rates) {
    LayoutCost cost;
    double busy;
    unsigned pp = 1u << PLAN_PP | 1u << PLAN_TIED, tp = pp | 1u << PLAN_TP, cp = tp | 1u << PLAN_CP;
    double alone = layout_period(run, l, &rates, 0, &busy);
    double with_pp = layout_period(run, l, &rates, pp, &busy),
           with_tp = layout_period(run, l, &rates, tp, &busy),
           with_cp = layout_period(run, l, &rates, cp, &busy);
    cost.seconds = layout_period(run, l, &rates, (1u << NUM_PLAN_AXES) - 1, &busy);
    cost.compute = busy, cost.pp = with_pp - alone, cost.tp = with_tp - with_pp;
    cost.cp = with_cp - with_tp, cost.dp = cost.seconds - with_cp;
    cost.bubble = (alone - busy) / cost.seconds, cost.exposed = (cost.seconds - alone) / cost.seconds;
    return cost;
}
