// AdamW with decoupled weight decay on a slice of a bucket of parameters, and what decides about it: norm,
// clipping and skipping, all on the device, so that the host need not wait in the middle of a step.
// Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019; formula and names as in
// optimizer_cpu.h.
//
// Bytes a parameter, read and written: weights 4, rest of the master 4, gradient 8, moments 16: 32; with
// everything in bf16 4 + 4 + 8: 16.
#pragma once
#include "llmc/config.h"        // defines: RunConfig
#include "llmc/cuda_common.cuh" // defines: floatX, Vec
#include "llmc/global_norm.cuh" // defines: StepSums, BucketTable, exact_value
#include "llmc/program.h"       // defines: StepGuard, guard_accepts
#include "llmc/rounding.h"      // defines: split_float, join_float, bf16_stochastic

enum { ADAMW_THREADS = 256, ADAMW_ELEMENTS = 8 };

// ----------------------------------------------------------------------------
// control: one step's numbers, on the device; the host reads them when the step is over

typedef struct {
    StepSums sums;                   // of this rank, then of all
    double loss, grad_norm;          // mean loss; norm before clipping
    uint64_t applied_steps;          // this one included, if it is applied
    float lr, grad_scale;            // what gradients are multiplied by: 1, or less to clip
    float rate, second_moment_scale; // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    int applied;                     // 0: the guard rejected it, or it deviated: nothing may change
} StepControl;

static __global__ void step_control_begin_kernel(StepControl* control, float lr, uint64_t applied_steps,
                                                 int requests) {
    memset(control, 0, sizeof *control);
    control->lr = lr, control->applied_steps = applied_steps,
    control->sums.requests = requests_to_sum(requests);
}

static inline void step_control_begin(StepControl* control, double lr, uint64_t applied_steps, int requests,
                                      cudaStream_t stream) {
    step_control_begin_kernel<<<1, 1, 0, stream>>>(control, (float)lr, applied_steps, requests);
    LAUNCH_CHECK();
}

static __global__ void update_control_kernel(StepControl* control, double num_targets, StepGuard guard,
                                             double grad_clip, double beta1, double beta2) {
    double norm = sqrt(exact_value(&control->sums.norm_squared));
    double loss = exact_value(&control->sums.loss) / num_targets;
    control->loss = loss, control->grad_norm = norm;
    control->applied = control->sums.deviating == 0 && guard_accepts(&guard, loss, norm);
    control->grad_scale = (float)(grad_clip > 0 && norm > grad_clip ? grad_clip / norm : 1);
    if (!control->applied) return;
    double t = (double)++control->applied_steps;
    control->rate = (float)((double)control->lr / (1 - pow(beta1, t)));
    control->second_moment_scale = (float)(1 / sqrt(1 - pow(beta2, t)));
}

// From the sums of losses and squares to what adamw_update does. num_targets: of all ranks.
static inline void update_control(StepControl* control, double num_targets, StepGuard guard, double grad_clip,
                                  double beta1, double beta2, cudaStream_t stream) {
    update_control_kernel<<<1, 1, 0, stream>>>(control, num_targets, guard, grad_clip, beta1, beta2);
    LAUNCH_CHECK();
}

// ----------------------------------------------------------------------------
// the update

template <typename X> static __device__ inline void load_floats(float out[ADAMW_ELEMENTS], const X* from) {
    for (int first = 0; first < ADAMW_ELEMENTS; first += Vec<X>::SIZE) {
        Vec<X> v = load_vec(from + first);
        for (int k = 0; k < Vec<X>::SIZE; k++) out[first + k] = to_float(v.at[k]);
    }
}

// Sixteen random bits for each of eight numbers.
typedef struct {
    Philox bits;
} RandomEight;
static __device__ inline uint32_t random16(const RandomEight* r, int k) {
    return r->bits.x[k / 2] >> k % 2 * 16;
}

static __device__ inline void round_store(float* to, const float x[ADAMW_ELEMENTS], const RandomEight*) {
    for (int first = 0; first < ADAMW_ELEMENTS; first += Vec<float>::SIZE) {
        Vec<float> v;
        for (int k = 0; k < Vec<float>::SIZE; k++) v.at[k] = x[first + k];
        store_vec(to + first, v);
    }
}
static __device__ inline void round_store(__nv_bfloat16* to, const float x[ADAMW_ELEMENTS],
                                          const RandomEight* random) {
    Vec<__nv_bfloat16> v;
    for (int k = 0; k < ADAMW_ELEMENTS; k++)
        v.at[k] = __ushort_as_bfloat16(bf16_stochastic(x[k], random16(random, k)));
    store_vec(to, v);
}

typedef struct {
    float keep_m, take_m, keep_v, take_v, eps, weight_decay; // beta1, 1 - beta1, beta2, 1 - beta2
    uint64_t seed;                                           // of the stochastic rounding
} AdamW;

// What the numbers of a thread are rounded by: a function of the seed, the step and the element.
enum RoundedArray { ROUNDED_WEIGHTS, ROUNDED_M, ROUNDED_V, NUM_ROUNDED };
static __device__ inline RandomEight random_for(const AdamW* h, uint64_t step, size_t i, int array) {
    RandomEight r = {
        random_bits(h->seed, RANDOM_ROUNDING, step, i / ADAMW_ELEMENTS * NUM_ROUNDED + (size_t)array)};
    return r;
}

// The weights' fp32 values, and back: two halves, or the weights alone (remainder NULL).
static __device__ inline void load_master(float out[ADAMW_ELEMENTS], const floatX* weights,
                                          const int16_t* remainder) {
    load_floats(out, weights);
    if (remainder == NULL) return;
    Vec<int16_t> low = load_vec(remainder);
    for (int k = 0; k < ADAMW_ELEMENTS; k++)
        out[k] = join_float((uint16_t)(bits_of_float(out[k]) >> 16), low.at[k]);
}

// out = those of n weights; difference: what they are less what out was
static __global__ void join_kernel(float* out, const floatX* weights, const int16_t* remainder, size_t n,
                                   bool difference) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float x = to_float(weights[i]);
    if (remainder != NULL) x = join_float((uint16_t)(bits_of_float(x) >> 16), remainder[i]);
    out[i] = difference ? x - out[i] : x;
}
static inline void join_weights(float* out, const floatX* weights, const int16_t* remainder, size_t n,
                                bool difference, cudaStream_t stream) {
    join_kernel<<<(unsigned)ceil_div(n, ADAMW_THREADS), ADAMW_THREADS, 0, stream>>>(out, weights, remainder,
                                                                                    n, difference);
    LAUNCH_CHECK();
}

static __device__ inline void store_master(floatX* weights, int16_t* remainder, const float x[ADAMW_ELEMENTS],
                                           const RandomEight* random) {
    if (remainder == NULL) {
        round_store(weights, x, random);
        return;
    }
    Vec<uint16_t> high;
    Vec<int16_t> low;
    for (int k = 0; k < ADAMW_ELEMENTS; k++) split_float(&high.at[k], &low.at[k], x[k]);
    store_vec((uint16_t*)(void*)weights, high);
    store_vec(remainder, low);
}

// Sizes are multiples of ADAMW_ELEMENTS, so what a thread has lies in one tensor.
static __device__ inline bool decays(const BucketTable* table, size_t i) {
    for (int k = 0; k < NUM_TENSORS; k++)
        if (i >= table->begin[k] && i < table->end[k]) return table->decay[k];
    return false;
}

template <typename Grad, typename Moment>
static __global__ void __launch_bounds__(ADAMW_THREADS)
    adamw_kernel(floatX* weights, int16_t* remainder, Grad* grads, Moment* m, Moment* v, size_t n,
                 size_t first, BucketTable table, AdamW h, const StepControl* control) {
    size_t i = ((size_t)blockIdx.x * ADAMW_THREADS + threadIdx.x) * ADAMW_ELEMENTS;
    if (i >= n) return;
    float g[ADAMW_ELEMENTS], p[ADAMW_ELEMENTS], m1[ADAMW_ELEMENTS], m2[ADAMW_ELEMENTS];
    load_floats(g, grads + i);
    for (int first = 0; first < ADAMW_ELEMENTS; first += Vec<Grad>::SIZE)
        store_vec(grads + i + first, Vec<Grad>{});
    if (!control->applied) return;
    load_master(p, weights + i, remainder != NULL ? remainder + i : NULL);
    load_floats(m1, m + i), load_floats(m2, v + i);
    float keep = 1 - control->lr * (decays(&table, first + i) ? h.weight_decay : 0);
    for (int k = 0; k < ADAMW_ELEMENTS; k++) {
        float gradient = control->grad_scale * g[k];
        m1[k] = h.keep_m * m1[k] + h.take_m * gradient;
        m2[k] = h.keep_v * m2[k] + h.take_v * gradient * gradient;
        float root = sqrtf(m2[k]) * control->second_moment_scale + h.eps;
        p[k] = keep * p[k] - control->rate * m1[k] / root;
    }
    uint64_t step = control->applied_steps, index = table.index + first + i;
    RandomEight for_p = random_for(&h, step, index, ROUNDED_WEIGHTS),
                for_m = random_for(&h, step, index, ROUNDED_M),
                for_v = random_for(&h, step, index, ROUNDED_V);
    store_master(weights + i, remainder != NULL ? remainder + i : NULL, p, &for_p);
    round_store(m + i, m1, &for_m);
    round_store(v + i, m2, &for_v);
}

// A slice of a bucket (n, a multiple of 8), which begins at the bucket's element `first`: weights, remainder, m, v
// are updated if control says so; grads become zero in any case. remainder is NULL where the weights are the
// master.
template <typename Grad, typename Moment>
static inline void adamw_update(floatX* weights, int16_t* remainder, Grad* grads, Moment* m, Moment* v,
                                size_t n, size_t first, const BucketTable* table, const RunConfig* run,
                                const StepControl* control, cudaStream_t stream) {
    double beta1 = run->optimizer.beta1, beta2 = run->optimizer.beta2;
    AdamW h = {(float)beta1,       (float)(1 - beta1),        (float)beta2,
               (float)(1 - beta2), (float)run->optimizer.eps, (float)run->optimizer.weight_decay,
               run->seed};
    if (n == 0) return;
    adamw_kernel<<<(unsigned)ceil_div(n, ADAMW_THREADS * ADAMW_ELEMENTS), ADAMW_THREADS, 0, stream>>>(
        weights, remainder, grads, m, v, n, first, *table, h, control);
    LAUNCH_CHECK();
}
