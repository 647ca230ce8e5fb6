// The optimizer on the device: AdamW in every way of keeping weights, gradients and moments, the norm, the
// decision to skip, the two halves of a master weight, and stochastic rounding.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, judge, tap_check, random_values, to_device, to_host ...
#include "llmc/adamw.cuh"            // defines: adamw_update, update_control, StepControl

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
    double* partials;
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
    s.partials = poisoned_device<double>(NORM_PARTIALS);
    return s;
}

template <typename Grad> static void set_gradients(Grad* grads, const double* values, size_t n) {
    Grad* fresh = to_device<Grad>(values, n);
    CUDA_CHECK(cudaMemcpy(grads, fresh, n * sizeof(Grad), cudaMemcpyDeviceToDevice));
}

// One update as the trainer makes it; returns what the step reports.
template <typename Grad, typename Moment>
static StepControl optimizer_step(const OptimizerModel& model, OptimizerState<Grad, Moment>& s,
                                  const RunConfig& run, double lr, uint64_t applied, float loss) {
    StepControl control;
    float* losses = own_device<float>(3);
    const float three[] = {loss, 2, 3};
    CUDA_CHECK(cudaMemcpy(losses, three, sizeof three, cudaMemcpyHostToDevice));
    step_control_begin(s.control, lr, applied, 0);
    add_sum(&s.control->loss_sum, losses, 3, 0);
    add_sum(&s.control->loss_sum, losses, 3, 0); // two micro-batches
    global_norm_squared(s.partials, s.grads, model.n, 0);
    update_control(s.control, s.partials, norm_parts<Grad>(model.n), 6, run.optimizer.grad_clip,
                   run.optimizer.beta1, run.optimizer.beta2, 0);
    adamw_update(s.weights, s.remainder, s.grads, s.m, s.v, &model.layout, &run, s.control, 0);
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

static RunConfig optimizer_run(const OptimizerModel& m, double clip) {
    RunConfig run = {};
    run.model = m.config, run.seed = 5;
    run.optimizer.beta1 = 0.9, run.optimizer.beta2 = 0.95, run.optimizer.eps = 1e-8;
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

// With NaN or infinity in the loss or in one gradient nothing changes, to the bit, and the gradients are gone.
template <typename Grad> static void test_skip(float loss, double gradient, bool skipped) {
    OptimizerModel model = optimizer_model("gpt2", true);
    RunConfig run = optimizer_run(model, 1);
    size_t n = model.n;
    double *start = random_values(n, 1), *grads = random_values(n, 1);
    OptimizerState<Grad, float> s = optimizer_state<Grad, float>(start, n, sizeof(floatX) == 2);
    set_gradients(s.grads, grads, n);
    optimizer_step(model, s, run, 1e-2, 0, 1); // so that nothing is zero
    Array before = master_of(s, n);
    double *m = to_host(s.m, n), *v = to_host(s.v, n);
    grads[n / 2] = gradient;
    set_gradients(s.grads, grads, n);
    StepControl control = optimizer_step(model, s, run, 1e-2, 1, loss);
    double *m2 = to_host(s.m, n), *v2 = to_host(s.v, n), *after = to_host(s.grads, n);
    bool same =
        master_of(s, n) == before && memcmp(m, m2, n * sizeof *m) == 0 && memcmp(v, v2, n * sizeof *v) == 0;
    bool zeroed = true;
    for (size_t i = 0; i < n; i++) zeroed = zeroed && after[i] == 0;
    tap_check(same == skipped && zeroed && control.applied == !skipped &&
                  control.applied_steps == (skipped ? 1u : 2u),
              "loss %g, a gradient of %g%s: %s", (double)loss, gradient, sizeof(Grad) == 2 ? " in bf16" : "",
              skipped ? "skipped" : "applied");
    release_all();
}

// Storage in bf16: on average the update is that of fp32, and a rerun rounds alike.
template <typename Grad, typename Moment> static void test_lean(bool split) {
    enum { STEPS = 40 };
    OptimizerModel model = optimizer_model("llama", false);
    RunConfig run = optimizer_run(model, 0);
    run.optimizer.weight_decay = 0;
    size_t n = model.n;
    Array start(n, 1.0), gradient(n, 0.01);
    OptimizerState<Grad, Moment> a = optimizer_state<Grad, Moment>(start.data(), n, split),
                                 b = optimizer_state<Grad, Moment>(start.data(), n, split);
    std::vector<double> p(n, 1.0), m(n), v(n);
    double* exact = to_host(to_device<Grad>(gradient.data(), n), n);
    for (int step = 1; step <= STEPS; step++) { // each step is 1/40 of the distance between two bf16 numbers
        set_gradients(a.grads, gradient.data(), n), set_gradients(b.grads, gradient.data(), n);
        optimizer_step(model, a, run, 0x1p-8 / STEPS, (uint64_t)step - 1, 1);
        optimizer_step(model, b, run, 0x1p-8 / STEPS, (uint64_t)step - 1, 1);
        plain_adamw(p, m, v, exact, model, run, 0x1p-8 / STEPS, 1, step);
    }
    double sum = 0, truth = 0;
    Array master = master_of(a, n);
    for (size_t i = 0; i < n; i++) sum += 1 - master[i], truth += 1 - p[i];
    double mean = sum / (double)n, expected = truth / (double)n;
    // with p = 1/40 at most, 40 roundings have a variance of at most one step squared: four sigma of the mean
    double tolerance = 4 * 0x1p-8 / sqrt((double)n) + (sizeof(Moment) == 2 ? 0.01 * expected : 0);
    char name[120];
    snprintf(name, sizeof name, "master weights in %s, gradients in %s, moments in %s",
             split ? "fp32" : "bf16", sizeof(Grad) == 2 ? "bf16" : "fp32",
             sizeof(Moment) == 2 ? "bf16" : "fp32");
    tap_check(fabs(mean - expected) < tolerance, "%s: mean update %.4e, exact %.4e, four sigma %.1e", name,
              mean, expected, tolerance);
    tap_check(same_bits(a.weights, b.weights, n) && same_bits(a.m, b.m, n) && same_bits(a.v, b.v, n),
              "%s: twice, the same bits", name);
    bool moved = false;
    for (size_t i = 0; i < n && !split; i++) moved = moved || master[i] != master[0];
    if (!split) tap_check(moved, "%s: elements are rounded independently", name);
    release_all();
}

static void test_norm_squared(void) {
    const size_t n = 8 * 4001;
    Array x(n, 0);
    double* partials = poisoned_device<double>(NORM_PARTIALS);
    auto norm = [&](float* grads) {
        global_norm_squared(partials, grads, n, 0);
        int parts = norm_parts<float>(n);
        double *host = to_host(partials, (size_t)parts), sum = 0;
        for (int i = 0; i < parts; i++) sum += host[i];
        return sqrt(sum);
    };
    tap_check(norm(to_device<float>(x.data(), n)) == 0, "the norm of zeros is zero");
    x[n - 1] = 3e38, x[0] = 3e38;
    double huge = norm(to_device<float>(x.data(), n)), expected = sqrt(2.0) * (double)3e38f;
    tap_check(fabs(huge / expected - 1) < 1e-12, "the norm of huge gradients does not overflow: %.6e", huge);
    x[n / 2] = NAN;
    tap_check(isnan(norm(to_device<float>(x.data(), n))), "a NaN is seen");
    release_all();
}

static void test_optimizer(void) {
    test_split_float();
    test_stochastic_rounding();
    test_norm_squared();
    test_adamw<float>("gpt2", true, 1);
    test_adamw<float>("llama", false, 0);
    test_adamw<float>("qwen2", true, 100);
    test_skip<float>(1, 1, false);
    test_skip<float>(NAN, 1, true);
    test_skip<float>(INFINITY, 1, true);
    test_skip<float>(1, NAN, true);
    test_skip<float>(1, -INFINITY, true);
    test_lean<float, __nv_bfloat16>(sizeof(floatX) == 2);
    if (sizeof(floatX) == sizeof(float)) return;
    test_adamw<__nv_bfloat16>("gpt2", false, 1);
    test_skip<__nv_bfloat16>(1, NAN, true);
    test_lean<float, float>(false);
    test_lean<__nv_bfloat16, __nv_bfloat16>(false);
}
