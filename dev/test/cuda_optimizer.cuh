// The optimizer on the device: AdamW in every way of keeping weights, gradients and moments, the norm, the
// decision to skip, the two halves of a master weight, and stochastic rounding.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, judge, tap_check, random_values, to_device, to_host ...
#include "llmc/adamw.cuh"            // defines: adamw_update, update_control, StepControl
#include "llmc/replay.cuh"           // defines: Replay, replay_word, replay_point, replay_first ...
#include "llmc/weights_hash.cuh"     // defines: hash_add

// ----------------------------------------------------------------------------
// numbers in 16 bits

static void test_split_float(void) {
    bool exact = true, nearest = true;
    uint64_t tried = 0;
    for (uint32_t high = 0; high < 0x10000; high++) {
        if ((high & 0x7F80) == 0x7F80) continue; // infinities and NaNs are never weights
        const uint32_t lows[] = {0,      1,      0x7FFE, 0x7FFF,
                                 0x8000, 0x8001, 0xFFFF, random_bits(1, RANDOM_INIT, 3, high).x[0] & 0xFFFF};
        for (uint32_t low : lows) {
            float x = float_of_bits(high << 16 | low), back;
            uint16_t h;
            int16_t l;
            split_float(&h, &l, x);
            back = join_float(h, l);
            exact = exact && bits_of_float(back) == bits_of_float(x);
            double upper = (double)float_of_bits((uint32_t)h << 16);
            double other = (double)float_of_bits(((uint32_t)h + (l < 0 ? -1u : 1u)) << 16);
            if (isfinite(upper) && isfinite(other) && low != 0)
                nearest = nearest && fabs((double)x - upper) <= fabs((double)x - other);
            tried++;
        }
    }
    tap_check(exact, "%llu floats in two halves and back", (unsigned long long)tried);
    tap_check(nearest, "the upper half is the nearest bf16");
}

static void test_stochastic_rounding(void) {
    bool between = true, exact = true;
    for (uint32_t i = 0; i < 0x10000; i++) {
        float x = float_of_bits(i << 16), nan_or_inf = float_of_bits(i << 16);
        if ((i & 0x7F80) == 0x7F80) {
            uint16_t kept = bf16_stochastic(nan_or_inf, 0xFFFF);
            exact = exact && (isnan(x) ? isnan(float_of_bits((uint32_t)kept << 16)) : kept == i);
            continue;
        }
        exact = exact && bf16_stochastic(x, 0) == i && bf16_stochastic(x, 0xFFFF) == i;
        float y = float_of_bits(i << 16 | 0x4321); // up for 0x4321 of the 0x10000 random numbers
        between = between && bf16_stochastic(y, 0xFFFF - 0x4321) == i &&
                  bf16_stochastic(y, 0x10000 - 0x4321) == i + 1;
    }
    exact = exact && isnan(float_of_bits((uint32_t)bf16_stochastic(float_of_bits(0x7F800001), 0) << 16));
    tap_check(exact, "what bf16 holds is not rounded; infinities and NaNs stay");
    tap_check(between, "rounding up has the probability that makes the mean exact");
}

// ----------------------------------------------------------------------------
// AdamW

struct OptimizerModel {
    ModelConfig config;
    ParameterLayout layout;
    size_t n;
};

static OptimizerModel optimizer_model(const char* family, bool tied) {
    OptimizerModel m = {};
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(model_families[i].model_type, family) == 0) m.config.family = &model_families[i];
    ModelConfig& c = m.config;
    c.vocab_size = 131, c.hidden_size = 16, c.num_hidden_layers = 3, c.num_attention_heads = 2;
    c.num_key_value_heads = 1, c.head_dim = 8, c.intermediate_size = 24, c.max_position_embeddings = 9;
    c.tie_word_embeddings = tied;
    c.attention_bias = c.attention_output_bias = c.mlp_bias = c.norm_bias = c.family->conv1d;
    m.layout = parameter_layout(&c), m.n = m.layout.num_parameters;
    return m;
}

template <typename Grad, typename Moment> struct OptimizerState {
    floatX* weights;
    int16_t* remainder;
    Grad* grads;
    Moment *m, *v;
    StepControl* control;
};

// split: fp32 master weights in two halves
template <typename Grad, typename Moment>
static OptimizerState<Grad, Moment> optimizer_state(const double* weights, size_t n, bool split) {
    OptimizerState<Grad, Moment> s = {};
    Array zeros(n, 0);
    s.weights = to_device<floatX>(weights, n); // exact: random_values are
    if (split) {
        s.remainder = own_device<int16_t>(n);
        CUDA_CHECK(cudaMemset(s.remainder, 0, n * sizeof(int16_t)));
    }
    s.grads = to_device<Grad>(zeros.data(), n);
    s.m = to_device<Moment>(zeros.data(), n), s.v = to_device<Moment>(zeros.data(), n);
    s.control = own_device<StepControl>(1);
    return s;
}

template <typename Grad> static void set_gradients(Grad* grads, const double* values, size_t n) {
    Grad* fresh = to_device<Grad>(values, n);
    CUDA_CHECK(cudaMemcpy(grads, fresh, n * sizeof(Grad), cudaMemcpyDeviceToDevice));
}

template <typename F> static void for_buckets(const OptimizerModel& model, F f) {
    const Layout alone = layout_single();
    int L = model.config.num_hidden_layers;
    for (int b = 0; b < L + 2; b++) {
        BucketTable table = bucket_table(&model.config, &alone, b - 1);
        f(parameter_bucket(&model.layout, L, b), &table);
    }
}

// One update as the trainer makes it; returns what the step reports.
template <typename Grad, typename Moment>
static StepControl optimizer_step(const OptimizerModel& model, OptimizerState<Grad, Moment>& s,
                                  const RunConfig& run, double lr, uint64_t applied, float loss,
                                  StepGuard guard = no_guard, long long deviating = 0) {
    StepControl control;
    float* losses = own_device<float>(3);
    const float three[] = {loss, 2, 3};
    CUDA_CHECK(cudaMemcpy(losses, three, sizeof three, cudaMemcpyHostToDevice));
    step_control_begin(s.control, lr, applied, false, 0);
    CUDA_CHECK(cudaMemcpy(&s.control->sums.deviating, &deviating, sizeof deviating, cudaMemcpyHostToDevice));
    add_sum(&s.control->sums.loss, losses, 3, 0);
    add_sum(&s.control->sums.loss, losses, 3, 0); // two micro-batches
    for_buckets(model, [&](Bucket b, const BucketTable* table) {
        global_norm_squared(&s.control->sums.norm_squared, s.grads + b.begin, b.size, 0, table, 0);
    });
    update_control(s.control, 6, guard, run.optimizer.grad_clip, run.optimizer.beta1, run.optimizer.beta2, 0);
    for_buckets(model, [&](Bucket b, const BucketTable* table) { // in two slices, as two ranks would
        size_t half = b.size / 16 * 8, at = b.begin;
        for (size_t first = 0; first < b.size; first = first == 0 ? half : b.size) {
            size_t i = at + first, size = first == 0 && half > 0 ? half : b.size - first;
            adamw_update(s.weights + i, s.remainder != NULL ? s.remainder + i : NULL, s.grads + i, s.m + i,
                         s.v + i, size, first, table, &run, s.control, 0);
            if (half == 0) break;
        }
    });
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(&control, s.control, sizeof control, cudaMemcpyDeviceToHost));
    return control;
}

// The fp32 master weights.
template <typename Grad, typename Moment>
static Array master_of(const OptimizerState<Grad, Moment>& s, size_t n) {
    double* weights = to_host(s.weights, n);
    Array out(weights, weights + n);
    if (s.remainder == NULL) return out;
    std::vector<int16_t> low(n);
    CUDA_CHECK(cudaMemcpy(low.data(), s.remainder, n * sizeof(int16_t), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++)
        out[i] = (double)join_float((uint16_t)(bits_of_float((float)out[i]) >> 16), low[i]);
    return out;
}

template <typename Grad, typename Moment> static std::string storage_name(bool split) {
    const char* master = sizeof(floatX) == 4 || split ? "fp32" : "bf16";
    return std::string("master weights in ") + master + ", gradients in " +
           (sizeof(Grad) == 2 ? "bf16" : "fp32") + ", moments in " + (sizeof(Moment) == 2 ? "bf16" : "fp32");
}

static RunConfig optimizer_run(const OptimizerModel& m, double clip) {
    RunConfig run = {};
    run.model = m.config, run.seed = 5;
    run.optimizer.beta1 = 0.9, run.optimizer.beta2 = 0.95, run.optimizer.eps = 1e-3; // large: it must count
    run.optimizer.weight_decay = 0.1, run.optimizer.grad_clip = clip;
    return run;
}

// AdamW in NUM on all tensors, as the formula reads.
template <typename NUM>
static void plain_adamw(std::vector<NUM>& p, std::vector<NUM>& m, std::vector<NUM>& v, const double* grads,
                        const OptimizerModel& model, const RunConfig& run, double lr, double scale,
                        int step) {
    NUM b1 = (NUM)run.optimizer.beta1, b2 = (NUM)run.optimizer.beta2;
    NUM c1 = (NUM)(1 - pow(run.optimizer.beta1, step)), c2 = (NUM)(1 - pow(run.optimizer.beta2, step));
    for (int i = 0; i < NUM_TENSORS; i++)
        for (int l = 0; l < tensor_copies(&model.config, (enum TensorId)i); l++) {
            size_t at = tensor_offset(&model.layout, (enum TensorId)i, l), end = at + model.layout.size[i];
            NUM decay = tensor_table[i].decay ? (NUM)(lr * run.optimizer.weight_decay) : 0;
            for (; at < end; at++) {
                NUM g = (NUM)scale * (NUM)grads[at];
                m[at] = b1 * m[at] + (1 - b1) * g;
                v[at] = b2 * v[at] + (1 - b2) * g * g;
                p[at] = p[at] - decay * p[at] -
                        (NUM)lr * (m[at] / c1) / (sqrt(v[at] / c2) + (NUM)run.optimizer.eps);
            }
        }
}

template <typename Grad> static void test_adamw(const char* family, bool tied, double clip) {
    OptimizerModel model = optimizer_model(family, tied);
    RunConfig run = optimizer_run(model, clip);
    size_t n = model.n;
    double* start = random_values(n, 1);
    OptimizerState<Grad, float> s = optimizer_state<Grad, float>(start, n, sizeof(floatX) == 2);
    std::vector<double> p(start, start + n), m(n), v(n);
    std::vector<float> p32(start, start + n), m32(n), v32(n);
    bool norms = true, zeroed = true, losses = true;
    for (int step = 1; step <= 10; step++) {
        double *grads = random_values(n, 0.1), norm = 0, lr = 1e-3 * step;
        for (size_t i = 0; i < n; i++) norm += grads[i] * grads[i];
        norm = sqrt(norm);
        double scale = clip > 0 && norm > clip ? clip / norm : 1;
        set_gradients(s.grads, grads, n);
        StepControl control = optimizer_step(model, s, run, lr, (uint64_t)step - 1, 1);
        norms =
            norms && fabs(control.grad_norm / norm - 1) < 1e-12 && control.applied_steps == (uint64_t)step;
        losses = losses && control.loss == 2 && control.applied;
        plain_adamw(p, m, v, grads, model, run, (double)(float)lr, scale, step);
        plain_adamw(p32, m32, v32, grads, model, run, lr, scale, step);
        double* after = to_host(s.grads, n);
        for (size_t i = 0; i < n; i++) zeroed = zeroed && after[i] == 0;
    }
    char name[120];
    snprintf(name, sizeof name, "AdamW, %s%s, clip %g%s", family, tied ? ", tied" : "", clip,
             sizeof(Grad) == 2 ? ", bf16 gradients" : "");
    judge((std::string(name) + ": weights").c_str(), master_of(s, n).data(),
          Array(p32.begin(), p32.end()).data(), p.data(), n);
    judge((std::string(name) + ": m").c_str(), to_host(s.m, n), Array(m32.begin(), m32.end()).data(),
          m.data(), n);
    judge((std::string(name) + ": v").c_str(), to_host(s.v, n), Array(v32.begin(), v32.end()).data(),
          v.data(), n);
    tap_check(norms && losses && zeroed, "%s: ten norms and losses, gradients zero afterwards", name);
    double* rounded_weights = to_host(s.weights, n);
    Array master = master_of(s, n);
    bool agree = true;
    for (size_t i = 0; i < n; i++)
        agree = agree && fabs(rounded_weights[i] - master[i]) <= fabs(master[i]) * 0x1p-8;
    tap_check(agree, "%s: the weights are the rounded master weights", name);
    release_all();
}

// With NaN or infinity in the loss or in one gradient, or one of them above its limit, or deviating ranks, nothing changes,
// to the bit, and gradients are zeroed.
template <typename Grad, typename Moment>
static void test_skip(bool split, float loss, double gradient, bool skipped, StepGuard guard = no_guard,
                      long long deviating = 0) {
    OptimizerModel model = optimizer_model("gpt2", true);
    RunConfig run = optimizer_run(model, 1);
    size_t n = model.n;
    double *start = random_values(n, 1), *grads = random_values(n, 1);
    OptimizerState<Grad, Moment> s = optimizer_state<Grad, Moment>(start, n, split);
    set_gradients(s.grads, grads, n);
    optimizer_step(model, s, run, 1e-2, 0, 1); // so that nothing is zero
    Array before = master_of(s, n);
    double *m = to_host(s.m, n), *v = to_host(s.v, n);
    grads[n / 2] = gradient;
    set_gradients(s.grads, grads, n);
    StepControl control = optimizer_step(model, s, run, 1e-2, 1, loss, guard, deviating);
    double *m2 = to_host(s.m, n), *v2 = to_host(s.v, n), *after = to_host(s.grads, n);
    bool same =
        master_of(s, n) == before && memcmp(m, m2, n * sizeof *m) == 0 && memcmp(v, v2, n * sizeof *v) == 0;
    bool zeroed = true;
    for (size_t i = 0; i < n; i++) zeroed = zeroed && after[i] == 0;
    tap_check(same == skipped && zeroed && control.applied == !skipped &&
                  control.applied_steps == (skipped ? 1u : 2u),
              "loss %g (at most %g), a gradient of %g (norm at most %g), %d deviate, %s: %s", (double)loss,
              guard.max_loss, gradient, guard.max_grad_norm, (int)deviating,
              storage_name<Grad, Moment>(split).c_str(), skipped ? "skipped" : "applied");
    release_all();
}

// Every number is the exact one but for fp32's rounding, or one of the two bf16 around it and on average it.
static void check_stored(const std::string& what, const double* x, const double* exact, size_t n, bool bf16) {
    double sum = 0;
    bool close = true;
    size_t counted = 0;
    for (size_t i = 0; i < n; i++) {
        int exponent;
        frexp(exact[i], &exponent);
        double spacing = bf16 ? ldexp(1, exponent - 8) : 0; // of the bf16 around it
        close = close && fabs(x[i] - exact[i]) <= spacing + 0x1p-21;
        if (!bf16 || fabs(exact[i]) < 0x1p-8) continue; // fp32's error is no longer small beside the spacing
        sum += (x[i] - exact[i]) / spacing, counted++;
    }
    // an error lies between -1 and 1 of the spacing, its variance is 1/4 at most
    double mean = bf16 ? sum / (double)counted : 0, four_sigma = bf16 ? 2 / sqrt((double)counted) : 0;
    tap_check(close && fabs(mean) <= four_sigma, "%s: %zu numbers as stored, off by %.1e steps on average",
              what.c_str(), n, mean);
}

// One step from the middle of a run: random weights, moments and gradients.
template <typename Grad, typename Moment> static void test_storage(bool split) {
    OptimizerModel model = optimizer_model("qwen2", false);
    RunConfig run = optimizer_run(model, 1);
    size_t n = model.n;
    OptimizerState<Grad, Moment> s = optimizer_state<Grad, Moment>(random_values(n, 1), n, split);
    double* second = random_values(n, 1);
    for (size_t i = 0; i < n; i++) second[i] = fabs(second[i]);
    s.m = to_device<Moment>(random_values(n, 1), n), s.v = to_device<Moment>(second, n);
    set_gradients(s.grads, random_values(n, 1), n);
    double *p = to_host(s.weights, n), *m = to_host(s.m, n), *v = to_host(s.v, n), *g = to_host(s.grads, n);
    std::vector<double> new_p(p, p + n), new_m(m, m + n), new_v(v, v + n);
    double scale = 1 / sqrt(cpu::global_norm_squared(g, n)), lr = 0x1p-6;
    optimizer_step(model, s, run, lr, 4, 1);
    plain_adamw(new_p, new_m, new_v, g, model, run, lr, scale, 5);
    std::string name = storage_name<Grad, Moment>(split);
    bool bf16_weights = sizeof(floatX) == 2 && !split, bf16_moments = sizeof(Moment) == 2;
    check_stored(name + ", weights", master_of(s, n).data(), new_p.data(), n, bf16_weights);
    check_stored(name + ", m", to_host(s.m, n), new_m.data(), n, bf16_moments);
    check_stored(name + ", v", to_host(s.v, n), new_v.data(), n, bf16_moments);
    release_all();
}

// Roundings are independent: sums of neighbours spread no more than single ones do. error: in steps of bf16,
// of 40 roundings, each of which goes the rarer way once in 40 times at most: a variance of 1 at most.
static void check_independent(const std::string& name, const Array& error) {
    const size_t groups[] = {1, 8, 64}; // an element over the steps, a thread's elements, two warps'
    for (size_t size : groups) {
        double square = 0;
        size_t count = error.size() / size;
        for (size_t g = 0; g < count; g++) {
            double sum = 0;
            for (size_t i = g * size; i < (g + 1) * size; i++) sum += error[i];
            square += sum * sum / (double)size;
        }
        tap_check(square / (double)count < 1.5, "%s: sums of %zu roundings have a variance of %.2f each",
                  name.c_str(), 40 * size, square / (double)count);
    }
}

// Storage in bf16: on average the update is that of fp32, and a rerun rounds alike.
template <typename Grad, typename Moment> static void test_drift(bool split) {
    enum { STEPS = 40 };
    const double SPACING =
        0x1p-8; // of bf16 below 1: a step is at most 1/40 of it, rounding to nearest stands still
    OptimizerModel model = optimizer_model("llama", false);
    RunConfig run = optimizer_run(model, 0);
    run.optimizer.weight_decay = 0;
    size_t n = model.n;
    Array start(n, 1.0), gradient(n, 0.01);
    OptimizerState<Grad, Moment> a = optimizer_state<Grad, Moment>(start.data(), n, split),
                                 b = optimizer_state<Grad, Moment>(start.data(), n, split);
    std::vector<double> p(n, 1.0), m(n), v(n);
    double* exact = to_host(to_device<Grad>(gradient.data(), n), n);
    for (int step = 1; step <= STEPS; step++) {
        set_gradients(a.grads, gradient.data(), n), set_gradients(b.grads, gradient.data(), n);
        optimizer_step(model, a, run, SPACING / STEPS, (uint64_t)step - 1, 1);
        optimizer_step(model, b, run, SPACING / STEPS, (uint64_t)step - 1, 1);
        plain_adamw(p, m, v, exact, model, run, SPACING / STEPS, 1, step);
    }
    Array error = master_of(a, n);
    double sum = 0, expected = 1 - p[0];
    for (size_t i = 0; i < n; i++) error[i] = (error[i] - p[i]) / SPACING, sum += error[i];
    double mean = sum / (double)n, tolerance = 4 / sqrt((double)n); // four sigma: the variance is 1 at most
    // the update is not linear in the second moment: what it is off by at random shifts the mean
    if (sizeof(Moment) == 2) tolerance += 0.01 * expected / SPACING;
    std::string name = "drift, " + storage_name<Grad, Moment>(split);
    tap_check(fabs(mean) < tolerance, "%s: moved by %.4f steps of bf16, %.4f too little, four sigma %.4f",
              name.c_str(), expected / SPACING, mean, tolerance);
    if (sizeof(floatX) == 2 && !split) check_independent(name, error);
    tap_check(same_bits(a.weights, b.weights, n) && same_bits(a.m, b.m, n) && same_bits(a.v, b.v, n),
              "%s: twice, the same bits", name.c_str());
    set_gradients(a.grads, gradient.data(), n), set_gradients(b.grads, gradient.data(), n);
    optimizer_step(model, a, run, SPACING / STEPS, STEPS, 1);
    run.seed++;
    optimizer_step(model, b, run, SPACING / STEPS, STEPS, 1);
    tap_check(!same_bits(a.weights, b.weights, n) || !same_bits(a.m, b.m, n), "%s: another seed, other bits",
              name.c_str());
    release_all();
}

// ----------------------------------------------------------------------------
// sums

// One bucket of one tensor, all of which counts.
static BucketTable plain_table(size_t n) {
    BucketTable table = {};
    table.end[0] = n;
    return table;
}

// More elements than the kernel has warps, and not a multiple of what one takes. However they are cut into slices,
// the same bits; and what another rank counts is left out.
template <typename Grad> static void test_norm_squared(void) {
    const size_t n = (size_t)NORM_BLOCKS * (NORM_THREADS / WARP) * SLICE_ALIGN + 8 * 37;
    double *x = random_values(n, 1), expected = sqrt(cpu::global_norm_squared(x, n));
    Grad* grads = to_device<Grad>(x, n);
    BucketTable table = plain_table(n);
    ExactSum sums[3];
    for (int run = 0; run < 3; run++) {
        ExactSum* sum = own_device<ExactSum>(1);
        CUDA_CHECK(cudaMemset(sum, 0, sizeof *sum));
        size_t slice = run == 0 ? n : run == 1 ? SLICE_ALIGN : 300 * SLICE_ALIGN;
        if (run == 1) slice *= 4096; // a few launches, each less than the card holds
        for (size_t at = 0; at < n; at += slice)
            global_norm_squared(sum, grads + at, n - at < slice ? n - at : slice, at, &table, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaMemcpy(&sums[run], sum, sizeof *sum, cudaMemcpyDeviceToHost));
    }
    tap_check(fabs(sqrt(exact_value(&sums[0])) / expected - 1) < 1e-12,
              "the norm of %zu numbers in %zu bytes each", n, sizeof(Grad));
    tap_check(memcmp(&sums[0], &sums[1], sizeof sums[0]) == 0 &&
                  memcmp(&sums[0], &sums[2], sizeof sums[0]) == 0,
              "in slices of any size the same bits");
    release_all();
}

static void test_norm_of_some(void) {
    const size_t n = 3 * SLICE_ALIGN;
    Array x(n, 1);
    BucketTable table = plain_table(n);
    ExactSum* sum = own_device<ExactSum>(1);
    CUDA_CHECK(cudaMemset(sum, 0, sizeof *sum));
    table.skip[3] = SLICE_ALIGN + 16, table.skip_end[3] = 2 * SLICE_ALIGN + 8;
    float* grads = to_device<float>(x.data(), n);
    for (size_t at = 0; at < n; at += SLICE_ALIGN)
        global_norm_squared(sum, grads + at, SLICE_ALIGN, at, &table, 0);
    ExactSum host;
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(&host, sum, sizeof host, cudaMemcpyDeviceToHost));
    tap_check(exact_value(&host) == (double)(n - SLICE_ALIGN + 8),
              "what another rank counts is not counted: %g", exact_value(&host));
    release_all();
}

// What would overflow in fp32, or be lost in it.
static void test_sum_of_losses(void) {
    const size_t n = 2500;
    Array x(n);
    double begin = 0.5, expected = begin;
    ExactSum host = {};
    for (size_t i = 0; i < n; i++) x[i] = 1 + (double)i * 0x1p-20, expected += x[i];
    exact_add(&host, begin);
    ExactSum* sum = own_device<ExactSum>(1);
    CUDA_CHECK(cudaMemcpy(sum, &host, sizeof host, cudaMemcpyHostToDevice));
    add_sum(sum, to_device<float>(x.data(), n), (int)n, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(&host, sum, sizeof host, cudaMemcpyDeviceToHost));
    tap_check(exact_value(&host) == expected, "the sum of %zu losses is exact, and added", n);
    release_all();
}

static void test_norm_of_extremes(void) {
    const size_t n = 8 * 4001;
    Array x(n, 0);
    BucketTable table = plain_table(n);
    auto norm = [&](float* grads) {
        ExactSum host = {}, *sum = own_device<ExactSum>(1);
        CUDA_CHECK(cudaMemcpy(sum, &host, sizeof host, cudaMemcpyHostToDevice));
        global_norm_squared(sum, grads, n, 0, &table, 0);
        CUDA_CHECK(cudaDeviceSynchronize());
        CUDA_CHECK(cudaMemcpy(&host, sum, sizeof host, cudaMemcpyDeviceToHost));
        return sqrt(exact_value(&host));
    };
    tap_check(norm(to_device<float>(x.data(), n)) == 0, "the norm of zeros is zero");
    x[n - 1] = 3e38, x[0] = 3e38;
    double huge = norm(to_device<float>(x.data(), n)), expected = sqrt(2.0) * (double)3e38f;
    tap_check(fabs(huge / expected - 1) < 1e-12, "the norm of huge gradients does not overflow: %.6e", huge);
    x[n / 2] = NAN;
    tap_check(isnan(norm(to_device<float>(x.data(), n))), "a NaN is seen");
    release_all();
}

static unsigned long long hash_of(const std::vector<unsigned long long>& words, unsigned long long salt) {
    unsigned long long host = 0, *hash = own_device<unsigned long long>(1),
                       *memory = own_device<unsigned long long>(words.size());
    CUDA_CHECK(cudaMemcpy(memory, words.data(), words.size() * sizeof host, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMemcpy(hash, &host, sizeof host, cudaMemcpyHostToDevice));
    hash_add(hash, memory, words.size() * sizeof host, salt, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(&host, hash, sizeof host, cudaMemcpyDeviceToHost));
    release_all();
    return host;
}

// Every pass has words of its own, causes before effects: forward from stage to stage, then backward, then what is left
// of the weights' gradients; a micro-batch behind the other.
static void test_replay_order(void) {
    const int MICRO_BATCHES = 3, STAGES = 2, CHUNKS = 2;
    const int kinds[] = {PIPELINE_FORWARD, PIPELINE_BACKWARD, PIPELINE_BACKWARD_WEIGHT};
    Layout l = layout_single();
    Replay r = {};
    size_t expected = 0;
    bool same = true;
    l.size = l.pp_size = STAGES, l.num_chunks = CHUNKS;
    replay_configure(&r, &l, MICRO_BATCHES, 7);
    for (int m = 0; m < MICRO_BATCHES; m++)
        for (int kind : kinds)
            for (int i = 0; i < STAGES * CHUNKS; i++) {
                int stage = kind == PIPELINE_FORWARD ? i : STAGES * CHUNKS - 1 - i;
                PipelineOp op = {kind, m, stage / STAGES, 0, 0};
                Layout here = layout_at(l, stage % STAGES);
                same = same && replay_word(&r, &here, &op) == expected;
                op.kind = kind == PIPELINE_BACKWARD ? (int)PIPELINE_BACKWARD_INPUT : kind;
                same = same && replay_word(&r, &here, &op) == expected;
                expected += (size_t)r.points;
            }
    tap_check(same && r.num_words == expected && r.points >= 2 * REPLAY_POINTS_LAYER,
              "words of a step that is computed twice: causes before effects");
}

// Two runs of a pass with these points, in the second of which one bit of the memory of point `flipped` is another one,
// and then of that before the last. Returns the word that is found, -1 for none; -2 where `deviating` is wrong.
static long long replay_runs(int points, int flipped) {
    const size_t N = 3 * 333; // not of 8 bytes
    const PipelineOp op = {PIPELINE_FORWARD, 0, 0, 0, 0};
    Layout l = layout_single();
    Replay r = {};
    replay_configure(&r, &l, 1, 1);
    r.words = own_device<unsigned long long>(r.num_words + 1);
    uint32_t* memory = own_device<uint32_t>(N);
    long long *deviating = own_device<long long>(1), any, found;
    CUDA_CHECK(cudaMemset(memory, 1, N * sizeof *memory));
    replay_begin(&r, 0);
    for (int run = 0; run < 2; run++) {
        r.again = run > 0;
        replay_pass(&r, &l, &op);
        for (int i = 0; i < points; i++) {
            bool other = run > 0 && flipped >= 0 && (i == flipped || i == points - 2);
            CUDA_CHECK(cudaMemset(memory + N / 2, other ? 3 : 1, 1));
            replay_point(&r, memory + 1, (N - 1 - (size_t)(i % 2)) * sizeof *memory, 0);
        }
    }
    unsigned long long* words = replay_first(&r, deviating, 0, 0);
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(&found, words, sizeof found, cudaMemcpyDeviceToHost));
    CUDA_CHECK(cudaMemcpy(&any, deviating, sizeof any, cudaMemcpyDeviceToHost));
    release_all();
    return any == (found != -1) ? found : -2;
}

static void test_replay(void) {
    const int LAST = REPLAY_POINTS_LAYER + REPLAY_POINTS_REST - 1;
    tap_check(replay_runs(5, -1) == -1, "computed twice, the same: nothing is found");
    tap_check(replay_runs(5, 0) == 0 && replay_runs(9, 3) == 3 && replay_runs(5, 4) == 3,
              "computed twice, not the same: the first point is found");
    tap_check(replay_runs(LAST + 9, LAST + 3) == LAST, "points beyond the last word share it, and are found");
}

// Any bit of any word, its place and the array count; also in words that a thread has after its first.
static void test_hash(void) {
    for (size_t n : {(size_t)1, (size_t)1000, (size_t)HASH_BLOCKS * HASH_THREADS + 77}) {
        std::vector<unsigned long long> words(n, 0x3F803F80BF803F80ull); // weights that are alike
        unsigned long long hash = hash_of(words, 1);
        bool again = hash_of(words, 1) == hash, salted = hash_of(words, 2) != hash, bits = true;
        for (int bit = 0; bit < (n == 1000 ? 64 : 2); bit++)
            for (size_t at : {(size_t)0, n / 3, n - 1}) {
                words[at] ^= 1ull << bit;
                bits = bits && hash_of(words, 1) != hash;
                words[at] ^= 1ull << bit;
            }
        words[0] = 1;
        hash = hash_of(words, 1);
        std::swap(words[0], words[n / 2]);
        bool place = n == 1 || hash_of(words, 1) != hash;
        tap_check(again && salted && bits && place, "a hash of %zu words tells bits, places and arrays", n);
    }
}

static void test_optimizer(void) {
    const bool bf16 = sizeof(floatX) == 2;
    typedef __nv_bfloat16 Half;
    test_split_float();
    test_stochastic_rounding();
    test_sum_of_losses();
    test_norm_of_some();
    test_norm_of_extremes();
    test_hash();
    test_replay_order();
    test_replay();
    test_norm_squared<float>();
    test_adamw<float>("gpt2", true, 1);
    test_adamw<float>("llama", false, 0);
    test_adamw<float>("qwen2", true, 100);
    test_skip<float, float>(bf16, 1, 1, false);
    test_skip<float, float>(bf16, NAN, 1, true);
    test_skip<float, float>(bf16, INFINITY, 1, true);
    test_skip<float, float>(bf16, 1, NAN, true);
    test_skip<float, float>(bf16, 1, -INFINITY, true);
    test_skip<float, Half>(bf16, NAN, 1, true);
    test_skip<float, float>(bf16, 1, 1, false,
                            {2, 1e6, false, false, false}); // a mean of 2: at its limit, not above
    test_skip<float, float>(bf16, 1, 1, true, {1.999, 1e6, false, false, false});
    test_skip<float, float>(bf16, 1, 1, true, {2, 1, false, false, false});
    for (long long ranks : {1, 2}) test_skip<float, float>(bf16, 1, 1, true, no_guard, ranks);
    test_storage<float, float>(bf16), test_storage<float, Half>(bf16);
    test_drift<float, Half>(bf16);
    if (!bf16) return;
    test_norm_squared<Half>();
    test_adamw<Half>("gpt2", false, 1);
    test_skip<Half, Half>(false, 1, NAN, true);
    test_storage<Half, float>(true), test_storage<Half, Half>(true);
    test_storage<float, float>(false), test_storage<float, Half>(false);
    test_storage<Half, float>(false), test_storage<Half, Half>(false);
    test_drift<float, float>(false);
    test_drift<Half, Half>(false);
}
