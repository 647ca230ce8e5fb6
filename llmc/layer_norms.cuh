// The sums behind llmc/layer_norms.h on the device. They are the exact sums of global_norm.cuh, over the same
// pieces of 2,048 numbers: those of gradients and weights have the same bits however these are shared out
// over data-parallel ranks and stages, those of activations however micro-batches are.
//
// Bytes read and written besides, in a step that is measured: 4 or 2 a gradient; 36 a parameter (with bf16
// masters 30), as much as the update itself, which is the price of leaving adamw_kernel as it is; what a layer
// hands on, once.
#pragma once
#include "llmc/adamw.cuh"       // defines: adamw_update, join_weights
#include "llmc/comm.cuh"        // defines: Comm, comm_all_reduce
#include "llmc/global_norm.cuh" // defines: ExactSum, BucketTable, global_norm_squared
#include "llmc/layer_norms.h"   // defines: LayerNorms

typedef struct {
    ExactSum of[NUM_LAYER_NORMS]; // of squares
} LayerSums;

typedef struct {
    LayerSums *sums,
        *host; // (entries) on the device: of this rank, then of all; pinned. sums NULL: never measured
    LayerNorms* norms; // (entries)
    size_t entries;
    double activations; // of a step that is measured: numbers in its residual stream; else 0
} LayerMeter;

// The sums that a bucket adds to; NULL: this step is not measured.
static inline LayerSums* metered(const LayerMeter* m, const BucketTable* bucket) {
    return m->activations != 0 ? &m->sums[bucket->number] : NULL;
}

static inline void meter_begin(LayerMeter* m, bool measure, double activations, cudaStream_t stream) {
    m->activations = measure && m->sums != NULL ? activations : 0;
    if (m->activations != 0) CUDA_CHECK(cudaMemsetAsync(m->sums, 0, m->entries * sizeof *m->sums, stream));
}

// += the squares of what a layer hands on (n, a multiple of 8)
static inline void meter_activations(LayerSums* sums, const floatX* x, size_t n, cudaStream_t stream) {
    const BucketTable all = {}; // of activations all count
    if (sums != NULL) global_norm_squared(&sums->of[LAYER_ACTIVATION_RMS], x, n, 0, &all, stream);
}

// A range of a slice of a bucket: what this rank counts of it.
typedef struct {
    size_t begin, end;
} Counted;

// adamw_update; measured, it goes by pieces, so that the old weights have room in staging (staging_elements,
// at least SLICE_ALIGN).
template <typename Grad, typename Moment>
static inline void meter_update(LayerSums* sums, Counted counted, float* staging, size_t staging_elements,
                                floatX* weights, int16_t* remainder, Grad* grads, Moment* m, Moment* v,
                                size_t size, size_t first, const BucketTable* table, const RunConfig* run,
                                const StepControl* control, cudaStream_t stream) {
    size_t piece = sums != NULL ? staging_elements / SLICE_ALIGN * SLICE_ALIGN : size;
    for (size_t at = 0, n; at < size; at += n) {
        n = size - at < piece ? size - at : piece;
        int16_t* low = remainder != NULL ? remainder + at : NULL;
        if (sums != NULL) join_weights(staging, weights + at, low, n, false, stream);
        adamw_update(weights + at, low, grads + at, m + at, v + at, n, first + at, table, run, control,
                     stream);
        size_t from = at > counted.begin ? at : counted.begin,
               end = at + n < counted.end ? at + n : counted.end;
        for (int k = LAYER_UPDATE_NORM; sums != NULL && from < end && k >= LAYER_WEIGHT_NORM; k--) {
            join_weights(staging, weights + at, low, n, k == LAYER_UPDATE_NORM, stream);
            global_norm_squared(&sums->of[k], staging + (from - at), end - from, first + from, table, stream);
        }
    }
}

// Behind the update: the sums of all ranks, on their way to the host.
static inline void meter_collect(const LayerMeter* m, Comm* comm, cudaStream_t stream) {
    size_t bytes = m->entries * sizeof *m->sums;
    if (m->activations == 0) return;
    comm_all_reduce(comm, AXIS_WORLD, (long long*)m->sums, bytes / sizeof(long long), stream);
    CUDA_CHECK(cudaMemcpyAsync(m->host, m->sums, bytes, cudaMemcpyDeviceToHost, stream));
}

// Of the step that is over; NULL: it was not measured. What is computed from here on, as evaluations, is not.
static inline const LayerNorms* meter_result(LayerMeter* m) {
    double activations = m->activations;
    m->activations = 0;
    for (size_t i = 0; activations != 0 && i < m->entries; i++)
        for (int k = 0; k < NUM_LAYER_NORMS; k++)
            m->norms[i].of[k] =
                sqrt(exact_value(&m->host[i].of[k]) / (k == LAYER_ACTIVATION_RMS ? activations : 1));
    return activations != 0 ? m->norms : NULL;
}
