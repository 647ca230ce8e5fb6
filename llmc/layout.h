// The layout of a run is a division of sizes: which part of the model, and of the batch, a process has.
//
//     rank = tp + tp_size * (dp + dp_size * pp)
//
//     pp 0 | dp 0: tp 0 1 | dp 1: tp 0 1 |      tp   ranks that share every matmul: neighbours, on one machine
//     pp 1 | dp 0: tp 0 1 | dp 1: tp 0 1 |      dp   ranks with the same weights and different tokens
//                                               pp   ranks with different layers
//
//     dp = cp + cp_size * replica               cp   ranks with different positions of the same rows of the batch
//
// Tensor parallelism divides heads, feed-forward rows and the vocabulary (Megatron-LM, arXiv 1909.08053; the
// sequence between them: arXiv 2205.05198). Pipeline parallelism divides layers, context parallelism sequences.
// ZeRO (arXiv 1910.02054) divides the state of what is left over data-parallel ranks. Plain C; nothing here
// communicates.
#pragma once
#include "llmc/model.h"    // defines: ModelConfig, ParameterLayout, tensor_table
#include "llmc/pipeline.h" // defines: pipeline_layers

typedef struct {
    int rank, size; // of processes
    int tp, tp_size, dp, dp_size, pp, pp_size;
    int cp, cp_size; // among the dp ranks; for weights, gradients and their state these are all the same
    int num_chunks;  // parts of the model that a pipeline stage has
} Layout;

static inline Layout layout_single(void) {
    Layout l = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1};
    return l;
}

static inline Layout layout_at(Layout l, int rank) {
    l.rank = rank;
    l.tp = rank % l.tp_size, l.dp = rank / l.tp_size % l.dp_size, l.pp = rank / l.tp_size / l.dp_size;
    l.cp = l.dp % l.cp_size;
    return l;
}
// Of the batch: how many ranks have different rows, and which of them this is.
static inline int num_replicas(const Layout* l) { return l->dp_size / l->cp_size; }
static inline int replica(const Layout* l) { return l->dp / l->cp_size; }
static inline int layout_rank(const Layout* l, int tp, int dp, int pp) {
    return tp + l->tp_size * (dp + l->dp_size * pp);
}

// ----------------------------------------------------------------------------
// pipeline: virtual stage (chunk, stage) has layers of its own; a stage's layers are those of its chunks

static inline int num_virtual_stages(const Layout* l) { return l->pp_size * l->num_chunks; }
static inline int virtual_stage(const Layout* l, int chunk) { return chunk * l->pp_size + l->pp; }
static inline bool has_embedding(const Layout* l) { return l->pp == 0; }
static inline bool has_head(const Layout* l) { return l->pp == l->pp_size - 1; }

// The stage that has a layer of the whole model, and its number among the layers there.
static inline void find_layer(const Layout* l, const ModelConfig* whole, int layer, int* stage, int* local) {
    int before[1024] = {0}, first, end;
    CHECK(l->pp_size <= 1024);
    for (int s = 0; s < num_virtual_stages(l); s++) {
        pipeline_layers(whole->num_hidden_layers, num_virtual_stages(l), s, &first, &end);
        *stage = s % l->pp_size;
        if (layer < end) {
            *local = before[*stage] + layer - first;
            return;
        }
        before[*stage] += end - first;
    }
    CHECK(!"a layer that the model does not have");
}

// Layers [*first, *end) of this stage are the chunk's; the first of them is *global in the whole model.
static inline void chunk_layers(const Layout* l, const ModelConfig* whole, int chunk, int* first, int* end,
                                int* global) {
    int from, to;
    *first = *end = *global = 0;
    for (int c = 0; c <= chunk; c++) {
        pipeline_layers(whole->num_hidden_layers, num_virtual_stages(l), virtual_stage(l, c), &from, &to);
        *first = *end, *end += to - from, *global = from;
    }
}

// ----------------------------------------------------------------------------
// tensor parallelism: the sizes that a rank has

// Rows of the vocabulary's tensors on each rank, padding included.
static inline int vocab_rows(const ModelConfig* whole, int tp_size) {
    int padded = padded_vocab_size(whole->vocab_size), step = 128 * tp_size;
    return (padded + step - 1) / step * 128;
}
// How many of them, from the first on, are tokens.
static inline int vocab_used(const ModelConfig* whole, const Layout* l) {
    int rows = vocab_rows(whole, l->tp_size), left = whole->vocab_size - l->tp * rows;
    return l->tp_size == 1 ? whole->vocab_size : left < 0 ? 0 : left < rows ? left : rows;
}

// Ranks that have the same key/value head, where there are more ranks than heads.
static inline int kv_replicas(const ModelConfig* whole, const Layout* l) {
    int heads = whole->num_key_value_heads;
    return heads >= l->tp_size ? 1 : l->tp_size / heads;
}

// The model as a rank sees it: its share of the heads, of the feed-forward rows, of the vocabulary, its layers.
static inline ModelConfig model_part(const ModelConfig* whole, const Layout* l) {
    ModelConfig c = *whole;
    int first, end, global;
    chunk_layers(l, whole, l->num_chunks - 1, &first, &end, &global);
    c.num_hidden_layers = end;
    if (l->tp_size == 1) return c;
    c.num_attention_heads /= l->tp_size;
    c.num_key_value_heads = c.num_key_value_heads * kv_replicas(whole, l) / l->tp_size;
    c.intermediate_size /= l->tp_size;
    c.vocab_size = vocab_rows(whole, l->tp_size);
    return c;
}

// Elements that every slice of a bucket is a multiple of, so that sums over them do not depend on the slices.
enum { SLICE_ALIGN = 2048 };

static inline ParameterLayout layout_parameters(const ModelConfig* part, const Layout* l) {
    size_t align = l->dp_size > 1 ? (size_t)l->dp_size * SLICE_ALIGN : 1;
    return parameter_layout_of(part, has_embedding(l), has_head(l), align);
}

// Rows [local_row, + rows) of a rank's tensor are rows [row, + rows), columns [col, + cols) of the whole one.
typedef struct {
    size_t local_row, rows, row, col, cols;
    bool counted; // false: another rank has the same, and that one counts and writes it
} TensorPart;

static inline void add_part(TensorPart* parts, int* count, size_t rows, size_t row, size_t col, size_t cols,
                            bool counted) {
    size_t local = *count > 0 ? parts[*count - 1].local_row + parts[*count - 1].rows : 0;
    TensorPart part = {local, rows, row, col, cols, counted};
    parts[(*count)++] = part;
}

// What of the whole model's tensor a rank has: one part, or one for each tensor that is fused in it. Returns how
// many there are.
static inline int tensor_parts(TensorPart parts[3], const ModelConfig* whole, const Layout* l,
                               enum TensorId id) {
    const TensorSpec* t = &tensor_table[id];
    size_t rows = model_dim(whole, t->rows), cols = model_dim(whole, t->cols);
    size_t tp = (size_t)l->tp, size = (size_t)l->tp_size;
    int count = 0;
    if (size == 1 || t->split == SPLIT_NONE || t->split == SPLIT_FIRST) {
        if (t->rows == DIM_VOCAB) rows = (size_t)whole->vocab_size;
        add_part(parts, &count, rows, 0, 0, cols, l->tp == 0);
    } else if (t->split == SPLIT_COLUMNS) {
        add_part(parts, &count, rows, 0, tp * (cols / size), cols / size, true);
    } else if (t->split == SPLIT_VOCAB) {
        size_t first = tp * (size_t)vocab_rows(whole, l->tp_size);
        add_part(parts, &count, (size_t)vocab_used(whole, l), first, 0, cols, true);
    } else if (t->rows == DIM_QKV) {
        size_t head = (size_t)whole->head_dim, q = model_dim(whole, DIM_HEADS), replicas;
        size_t kv = (size_t)whole->num_key_value_heads * head;
        replicas = (size_t)kv_replicas(whole, l);
        size_t mine = kv * replicas / size, first = tp / replicas * mine;
        add_part(parts, &count, q / size, tp * (q / size), 0, cols, true);
        for (int v = 0; v < 2; v++)
            add_part(parts, &count, mine, q + (size_t)v * kv + first, 0, cols, tp % replicas == 0);
    } else { // the feed-forward rows, and those of the gate before them
        size_t ff = model_dim(whole, DIM_FF);
        for (size_t first = 0; first < rows; first += ff)
            add_part(parts, &count, ff / size, first + tp * (ff / size), 0, cols, true);
    }
    return count;
}

// ----------------------------------------------------------------------------
// checkpoints: each process reads and writes whole tensors, so that what is in a checkpoint is the same in every
// layout. Process r has those that begin in the r-th part of the whole model's memory.

// Elements [*begin, *end) of parameter_layout(whole).
static inline void tensors_owned(const ModelConfig* whole, int rank, int size, size_t* begin, size_t* end) {
    ParameterLayout p = parameter_layout(whole);
    size_t total = p.num_parameters, from = total / (size_t)size * (size_t)rank;
    size_t to = rank == size - 1 ? total : total / (size_t)size * (size_t)(rank + 1);
    *begin = *end = total;
    for (int place = BEFORE_LAYERS; place <= AFTER_LAYERS; place++)
        for (int layer = 0; layer < (place == PER_LAYER ? whole->num_hidden_layers : 1); layer++)
            for (int i = 0; i < NUM_TENSORS; i++) {
                if ((int)tensor_table[i].place != place || p.size[i] == 0) continue;
                size_t at = tensor_offset(&p, (enum TensorId)i, layer);
                if (at < from || at >= to) continue;
                if (*begin == total) *begin = at;
                *end = at + p.size[i];
            }
    if (*begin == total) *end = total;
}

// Where the tensor that holds an element begins: what is fused in it lies behind it.
static inline size_t tensor_begin(const ParameterLayout* p, size_t element) {
    size_t at = 0;
    for (int i = 0; i < NUM_TENSORS; i++) {
        if (p->size[i] == 0) continue;
        bool layered =
            tensor_table[i].place == PER_LAYER && element >= p->layer_begin && element < p->layer_end;
        size_t layer = layered ? (element - p->layer_begin) / p->layer_size : 0;
        size_t begin = tensor_offset(p, (enum TensorId)i, (int)layer);
        if (begin <= element && begin > at) at = begin;
    }
    return at;
}

// The process that has the tensor which begins there.
static inline int tensor_owner(const ParameterLayout* whole, size_t offset, int size) {
    size_t share = whole->num_parameters / (size_t)size;
    size_t rank = share > 0 ? offset / share : (size_t)size - 1;
    return rank < (size_t)size ? (int)rank : size - 1;
}
