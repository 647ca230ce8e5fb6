// AdamW with decoupled weight decay, and the global gradient norm, on the CPU.
// Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
#pragma once
#include "llmc/real.h" // defines: real, sqrt_real

// One pass over n elements: params, m, v are updated, grads are set to zero for the next step.
// grad_scale multiplies the gradients first (clipping, 1 / micro-batches); step counts from 1.
//   m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr weight_decay) p - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
static inline void adamw_update(real* restrict params, real* restrict grads, real* restrict m,
                                real* restrict v, size_t n, double lr, double beta1, double beta2, double eps,
                                double weight_decay, double grad_scale, int64_t step) {
    const real scale = (real)grad_scale, keep_m = (real)beta1, take_m = (real)(1 - beta1),
               keep_v = (real)beta2, take_v = (real)(1 - beta2), decay = (real)(1 - lr * weight_decay),
               small = (real)eps, rate = (real)(lr / (1 - pow(beta1, (double)step))),
               v_factor = (real)(1 / sqrt(1 - pow(beta2, (double)step)));
#pragma omp parallel for simd schedule(static)
    for (size_t i = 0; i < n; i++) {
        real g = scale * grads[i];
        grads[i] = 0;
        m[i] = keep_m * m[i] + take_m * g;
        v[i] = keep_v * v[i] + take_v * g * g;
        params[i] = decay * params[i] - rate * m[i] / (sqrt_real(v[i]) * v_factor + small);
    }
}

// The sum of the squares of n elements, in double, in a fixed number of parts: the same for any thread count.
static inline double global_norm_squared(const real* grads, size_t n) {
    enum { PARTS = 256 };
    double sums[PARTS], total = 0;
    size_t share = n / PARTS + 1;
#pragma omp parallel for schedule(static)
    for (int part = 0; part < PARTS; part++) {
        size_t first = (size_t)part * share, end = first + share < n ? first + share : n;
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t i = first; i < end; i++) sum += (double)grads[i] * (double)grads[i];
        sums[part] = sum;
    }
    for (int part = 0; part < PARTS; part++) total += sums[part];
    return total;
}
