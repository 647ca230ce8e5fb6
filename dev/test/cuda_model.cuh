// The whole model on the device: logits, loss, every gradient and ten steps of AdamW against the CPU
// reference in fp64, and what must be equal to the bit.
//
// The trainer may be at most twice as far from the fp64 result as the plain same-precision model is.
#pragma once
#include "dev/test/plain_model.cuh" // defines: ModelCase, model_cases, run_of, random_rows, PlainModel, plain_gradients ...

// ----------------------------------------------------------------------------
// logits, losses and gradients

// The gradients of rows (B, T + 1) on the device, which is left with zero gradients.
static Array device_gradients(GPT* g, const std::vector<int32_t>& rows, bool mask) {
    size_t gradients = g->layout.num_parameters * (g->gradients_bf16 ? 2 : 4);
    gpt_load_batch(g, rows.data(), g->B, mask, 0);
    upload_batch(g, &g->slots[0], g->step_batch[g->step_slot]);
    micro_step(g, true);
    CUDA_CHECK(cudaStreamSynchronize(g->stream));
    Array grads = gradients_of(g);
    CUDA_CHECK(cudaMemset(g->grads, 0, gradients));
    return grads;
}

static GPT* device_model(const RunConfig& run, const Array& weights) {
    Error err = {0, {0}};
    GPT* g = new GPT;
    if (!gpt_create(g, &run, run.batch.micro_batch_size, run.batch.sequence_length, true, &err))
        exit_with(&err);
    set_weights(g, weights);
    return g;
}

static void device_free(GPT* g) {
    gpt_free(g);
    delete g;
}

static void judge_gradients(const char* name, const ModelConfig& c, const Array& ours, const Array& plain,
                            const Array& truth) {
    ParameterLayout layout = parameter_layout(&c);
    for (int i = 0; i < NUM_TENSORS; i++) {
        for (int l = 0; l < tensor_copies(&c, (enum TensorId)i) && layout.size[i] != 0; l++) {
            char tensor[32], what[160];
            size_t at = tensor_offset(&layout, (enum TensorId)i, l);
            tensor_name(tensor, (enum TensorId)i, l);
            snprintf(what, sizeof what, "%s: d%s", name, tensor);
            judge(what, &ours[at], &plain[at], &truth[at], layout.size[i]);
        }
    }
}

struct Outputs {
    Array logits, losses, grads;
};

// What the CPU reference gives, in fp64 or in fp32.
#define REFERENCE_OUTPUTS(function, name)                                                                    \
    static Outputs function(const RunConfig& run, const Array& weights, const std::vector<int32_t>& rows,    \
                            bool mask) {                                                                     \
        size_t N = MODEL_B * MODEL_T, Vp = (size_t)padded_vocab_size(run.model.vocab_size);                  \
        Outputs o = {Array(N * Vp), Array(N), Array(weights.size())};                                        \
        Reference* r = name##_create(&run);                                                                  \
        name##_set_weights(r, weights.data());                                                               \
        name##_losses(r, rows.data(), mask);                                                                 \
        name##_get(r, REFERENCE_LOGITS, o.logits.data());                                                    \
        name##_get(r, REFERENCE_LOSSES, o.losses.data());                                                    \
        name##_gradients(r, rows.data(), mask);                                                              \
        name##_get(r, REFERENCE_GRADS, o.grads.data());                                                      \
        name##_free(r);                                                                                      \
        return o;                                                                                            \
    }
REFERENCE_OUTPUTS(truth_outputs, reference)
REFERENCE_OUTPUTS(fp32_outputs, reference32)

static Outputs plain_outputs(const RunConfig& run, const Array& weights, const std::vector<int32_t>& rows,
                             bool mask, bool rounded) {
    PlainModel m = plain_create(run.model, MODEL_B, MODEL_T, rounded, weights);
    plain_gradients(m, rows, mask);
    Outputs o = {m.logits, m.losses, m.grads};
    plain_free(m);
    return o;
}

static void test_model_gradients(const ModelCase& m, bool mask, int logit_rows) {
    ModelConfig c = config_of(m);
    RunConfig run = run_of(c, MODEL_B, MODEL_T, MODEL_B);
    Array weights = random_weights(c, 7);
    std::vector<int32_t> rows = random_rows(MODEL_B, MODEL_T, c.vocab_size, 11);
    size_t N = MODEL_B * MODEL_T, Vp = (size_t)padded_vocab_size(c.vocab_size);
    char name[120];
    snprintf(name, sizeof name, "%s%s, %d logit rows", m.name, mask ? ", documents" : "", logit_rows);
    Outputs truth = truth_outputs(run, weights, rows, mask);
    Outputs plain =
        FP32_BUILD ? fp32_outputs(run, weights, rows, mask) : plain_outputs(run, weights, rows, mask, true);
    Outputs unrounded = plain_outputs(run, weights, rows, mask, false);
    double worst = 0, largest = 0;
    for (size_t i = 0; i < truth.grads.size(); i++) {
        worst = fmax(worst, fabs(truth.grads[i] - unrounded.grads[i]));
        largest = fmax(largest, fabs(truth.grads[i]));
    }
    tap_check(worst <= 1e-12 * largest,
              "%s: the plain model without rounding is the CPU reference (%.1e of %.1e)", name, worst,
              largest);

    GPT* g = device_model(run, weights);
    const float* losses = gpt_losses(g, rows.data(), MODEL_B, mask, 0);
    judge((std::string(name) + ": losses").c_str(), Array(losses, losses + N).data(), plain.losses.data(),
          truth.losses.data(), N);
    judge((std::string(name) + ": logits").c_str(), to_host(g->logits, N * Vp), plain.logits.data(),
          truth.logits.data(), N * Vp);
    g->logit_rows = logit_rows;
    judge_gradients(name, c, device_gradients(g, rows, mask), plain.grads, truth.grads);
    device_free(g);
    release_all();
}

// ----------------------------------------------------------------------------
// ten steps of AdamW in two micro-batches each

// AdamW on fp32 master weights, with the gradients of the plain model on their rounded copy.
struct PlainTrainer {
    PlainModel model;
    Array master, m, v;
};

static double plain_step(PlainTrainer& t, const RunConfig& run, const std::vector<int32_t>& rows, double lr,
                         int step) {
    PlainModel& model = t.model;
    size_t n = t.master.size();
    model.weights = t.master;
    round_to_floatX(model.weights.data(), n);
    double loss = plain_gradients(model, rows, false) / (double)(rows.size() - rows.size() / (MODEL_T + 1));
    double norm = sqrt(cpu::global_norm_squared(model.grads.data(), n));
    double scale = norm > run.optimizer.grad_clip ? run.optimizer.grad_clip / norm : 1;
    for (int i = 0; i < NUM_TENSORS; i++)
        for (int l = 0; l < tensor_copies(&model.c, (enum TensorId)i); l++) {
            size_t at = tensor_offset(&model.layout, (enum TensorId)i, l);
            cpu::adamw_update(&t.master[at], &model.grads[at], &t.m[at], &t.v[at], model.layout.size[i], lr,
                              run.optimizer.beta1, run.optimizer.beta2, run.optimizer.eps,
                              tensor_table[i].decay ? run.optimizer.weight_decay : 0, scale, step + 1);
        }
    return loss;
}

static void test_model_steps(const ModelCase& m) {
    enum { STEPS = 10, G = 2 * MODEL_B };
    const double lr = 1e-3;
    ModelConfig c = config_of(m);
    RunConfig run = run_of(c, MODEL_B, MODEL_T, G);
    Array weights = random_weights(c, 8), ours(STEPS), yardstick(STEPS), truth(STEPS);
    size_t n = weights.size();
    PlainTrainer plain = {plain_create(c, MODEL_B, MODEL_T, true, weights), weights, Array(n), Array(n)};
    Reference *reference = reference_create(&run), *fp32 = reference32_create(&run);
    reference_set_weights(reference, weights.data()), reference32_set_weights(fp32, weights.data());
    GPT* g = device_model(run, weights);
    bool norms_agree = true;
    for (int step = 0; step < STEPS; step++) {
        std::vector<int32_t> rows = random_rows(G, MODEL_T, c.vocab_size, 100 + (uint64_t)step);
        double norm, fp32_norm;
        truth[step] = reference_step(reference, &run, rows.data(), lr, (uint64_t)step, &norm);
        yardstick[step] = FP32_BUILD
                              ? reference32_step(fp32, &run, rows.data(), lr, (uint64_t)step, &fp32_norm)
                              : plain_step(plain, run, rows, lr, step);
        gpt_load_batch(g, rows.data(), G, false, -1);
        gpt_start_step(g, &run, lr, (uint64_t)step, 0, no_guard);
        StepResult r = gpt_finish_step(g);
        ours[step] = r.loss;
        norms_agree = norms_agree && r.applied && fabs(r.grad_norm / norm - 1) < 0.02;
    }
    tap_check(norms_agree, "%s: ten gradient norms within 2 %% of the reference", m.name);
    judge((std::string(m.name) + ": ten losses").c_str(), ours.data(), yardstick.data(), truth.data(), STEPS);
    gpt_snapshot(g);
    gpt_snapshot_wait(g);
    Array after(g->host.params, g->host.params + n), final_truth(n), final_fp32(n);
    reference_get(reference, REFERENCE_WEIGHTS, final_truth.data());
    reference32_get(fp32, REFERENCE_WEIGHTS, final_fp32.data());
    judge((std::string(m.name) + ": weights after ten steps").c_str(), after.data(),
          FP32_BUILD ? final_fp32.data() : plain.master.data(), final_truth.data(), n);
    reference_free(reference), reference32_free(fp32);
    device_free(g);
    plain_free(plain.model);
    release_all();
}

// ----------------------------------------------------------------------------
// equal to the bit

struct Outcome {
    Array params, m, v;
    double loss;
};

// Two steps; what the host would write into a checkpoint.
static Outcome two_steps(const RunConfig& run, const Array& weights, int logit_rows) {
    GPT* g = device_model(run, weights);
    Outcome o;
    if (logit_rows > 0) g->logit_rows = logit_rows;
    for (int step = 0; step < 2; step++) {
        std::vector<int32_t> rows =
            random_rows(run.batch.global_batch_size, MODEL_T, run.model.vocab_size, 50 + (uint64_t)step);
        gpt_load_batch(g, rows.data(), run.batch.global_batch_size, true, 0);
        StepGuard guard = no_guard;
        guard.measure_layers = run.log.layers_every > 0;
        gpt_start_step(g, &run, 1e-3, (uint64_t)step, 0, guard);
        o.loss = gpt_finish_step(g).loss;
    }
    gpt_snapshot(g);
    gpt_snapshot_wait(g);
    size_t n = g->layout.num_parameters;
    o.params.assign(g->host.params, g->host.params + n);
    o.m.assign(g->host.m, g->host.m + n), o.v.assign(g->host.v, g->host.v + n);
    device_free(g);
    return o;
}

static bool same(const Outcome& a, const Outcome& b) {
    return a.loss == b.loss && a.params == b.params && a.m == b.m && a.v == b.v;
}

static void test_model_bits(const ModelCase& m) {
    ModelConfig c = config_of(m);
    Array weights = random_weights(c, 9);
    RunConfig run = run_of(c, MODEL_B, MODEL_T, MODEL_B);
    static const char* const levels[] = {"none", "activation", "norm", "block"};
    Outcome plain = two_steps(run, weights, 0);
    tap_check(same(plain, two_steps(run, weights, 0)), "%s: two runs are equal to the bit", m.name);
    for (int level = RECOMPUTE_ACTIVATION; level <= RECOMPUTE_BLOCK; level++) {
        run.batch.recompute = level;
        tap_check(same(plain, two_steps(run, weights, 0)), "%s: recompute %s is equal to the bit to none",
                  m.name, levels[level]);
    }
    run.batch.recompute = RECOMPUTE_NONE;
    run.parallel.cuda_graph = true;
    tap_check(same(plain, two_steps(run, weights, 0)), "%s: a CUDA graph is equal to the bit", m.name);
    run.log.layers_every = 1;
    tap_check(same(plain, two_steps(run, weights, 0)), "%s: measured layers beside a graph change nothing",
              m.name);
    run.parallel.cuda_graph = false, run.log.layers_every = 0;
    if (c.family->activation != ACTIVATION_GELU_TANH) return;
    run.precision.fused_gelu = true;
    Outcome fused = two_steps(run, weights, 0);
    run.batch.recompute = RECOMPUTE_BLOCK;
    tap_check(same(fused, two_steps(run, weights, 0)),
              "%s: recompute block is equal to the bit to none with the fused GELU", m.name);
}

// ----------------------------------------------------------------------------
// the norms of layers

static double sum_of_squares(const double* x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return sum;
}

static Array host_weights(GPT* g) {
    gpt_snapshot(g);
    gpt_snapshot_wait(g);
    return Array(g->host.params, g->host.params + g->layout.num_parameters);
}

// What LayerNorms should be for a step, from the arrays that the model has.
struct DirectNorms {
    Array squares, before; // (L + 2, NUM_LAYER_NORMS); weights
};

// Before the step: gradients and activations of two micro-batches, the same as in the step to the bit.
static DirectNorms direct_norms(GPT* g, const std::vector<int32_t>& rows) {
    int L = g->config.num_hidden_layers, N = g->B * g->T;
    size_t n = (size_t)(N * g->config.hidden_size), entries = (size_t)L + 2;
    DirectNorms d = {Array(entries * NUM_LAYER_NORMS), host_weights(g)};
    gpt_load_batch(g, rows.data(), 2 * g->B, false, -1);
    for (int i = 0; i < 2; i++) {
        const Slot* slot = &g->slots[0];
        upload_batch(g, slot, g->step_batch[g->step_slot] + i * NUM_BATCH_ARRAYS * N);
        micro_step(g, i == 1);
        CUDA_CHECK(cudaStreamSynchronize(g->stream));
        for (size_t e = 0; e < entries; e++) {
            const floatX* x = e == 0             ? g->inputs[0].residual
                              : e == entries - 1 ? slot->lnf
                                                 : slot->layers[e - 1].residual3;
            d.squares[e * NUM_LAYER_NORMS + LAYER_ACTIVATION_RMS] +=
                sum_of_squares(to_host(x, n), n) / (2 * (double)n);
        }
    }
    Array grads = gradients_of(g);
    CUDA_CHECK(cudaMemsetAsync(g->grads, 0, grads.size() * gradient_bytes(g), g->stream));
    for (size_t e = 0; e < entries; e++) {
        Bucket b = parameter_bucket(&g->layout, L, (int)e);
        d.squares[e * NUM_LAYER_NORMS + LAYER_GRAD_NORM] = sum_of_squares(&grads[b.begin], b.size);
    }
    return d;
}

// Behind it.
static void add_weights(DirectNorms& d, GPT* g) {
    Array after = host_weights(g), difference(after.size());
    for (size_t i = 0; i < after.size(); i++) difference[i] = (float)after[i] - (float)d.before[i];
    for (int e = 0; e < g->config.num_hidden_layers + 2; e++) {
        Bucket b = parameter_bucket(&g->layout, g->config.num_hidden_layers, e);
        d.squares[(size_t)(e * NUM_LAYER_NORMS + LAYER_WEIGHT_NORM)] =
            sum_of_squares(&after[b.begin], b.size);
        d.squares[(size_t)(e * NUM_LAYER_NORMS + LAYER_UPDATE_NORM)] =
            sum_of_squares(&difference[b.begin], b.size);
    }
}

// The larger of two deviations; of one that is no number there is none larger.
static double worse(double a, double b) { return a > b || isnan(a) ? a : b; }

// The largest relative deviation of a step's numbers from those that are wanted, or their squares.
static double deviation(const StepResult& r, const Array& wanted, bool squares) {
    double worst = 0;
    for (size_t i = 0; i < wanted.size(); i++) {
        double x = r.layers[i / NUM_LAYER_NORMS].of[i % NUM_LAYER_NORMS], y = wanted[i];
        worst = worse(worst, fabs((squares ? x * x : x) - y) / fmax(y, 1e-300));
    }
    return worst;
}

// Four steps of two micro-batches, of which the first is not measured (and makes the graph) and the last is skipped, with
// evaluations between them. reference: also against the CPU program's numbers.
static void test_layer_norms(const ModelCase& m, RunConfig run, const char* variant, bool reference) {
    enum { G = 2 * MODEL_B };
    const double lr = 1e-3;
    Array weights = random_weights(run.model, 12), truth((size_t)(run.model.num_hidden_layers + 2) * 4);
    run.log.layers_every = 1;
    Reference* cpu_model = reference_create(&run);
    reference_set_weights(cpu_model, weights.data());
    GPT* g = device_model(run, weights);
    double direct = 0, total = 0, from_reference = 0, norm;
    StepGuard guard = no_guard;
    StepResult r;
    for (int step = 0; step < 4; step++) {
        std::vector<int32_t> rows = random_rows(G, MODEL_T, run.model.vocab_size, 80 + (uint64_t)step);
        DirectNorms d = direct_norms(g, rows);
        guard.measure_layers = step > 0;
        if (step == 3) guard.max_loss = 0;
        gpt_load_batch(g, rows.data(), G, false, -1);
        gpt_start_step(g, &run, lr, (uint64_t)step, 0, guard);
        r = gpt_finish_step(g);
        if (step == 0) {
            tap_check(r.layers == NULL, "%s, %s: a step that is not measured", m.name, variant);
            reference_step(cpu_model, &run, rows.data(), lr, 0, &norm);
            continue;
        }
        add_weights(d, g);
        direct = worse(direct, deviation(r, d.squares, true));
        double sum = 0;
        for (int e = 0; e < run.model.num_hidden_layers + 2; e++)
            sum += r.layers[e].of[LAYER_GRAD_NORM] * r.layers[e].of[LAYER_GRAD_NORM];
        total = worse(total, fabs(sum / (r.grad_norm * r.grad_norm) - 1));
        if (step == 3) break;
        reference_layer_norms(cpu_model, &run, rows.data(), lr, (uint64_t)step, truth.data());
        from_reference = worse(from_reference, deviation(r, truth, false));
        gpt_losses(g, rows.data(), MODEL_B, false, -1);
    }
    tap_check(direct < 1e-11, "%s, %s: norms of layers are those of the arrays (%.1e)", m.name, variant,
              direct);
    tap_check(total < 1e-13, "%s, %s: gradients' add up to the norm of all (%.1e)", m.name, variant, total);
    if (reference)
        tap_check(from_reference < (FP32_BUILD ? 2e-5 : 0.005),
                  "%s, %s: norms of layers are the CPU's (%.1e)", m.name, variant, from_reference);
    tap_check(!r.applied && r.layers[1].of[LAYER_UPDATE_NORM] == 0, "%s, %s: a step that is skipped", m.name,
              variant);
    reference_free(cpu_model);
    device_free(g);
    release_all();
}

static void test_model_layer_norms(const ModelCase& m) {
    RunConfig run = run_of(config_of(m), MODEL_B, MODEL_T, 2 * MODEL_B);
    test_layer_norms(m, run, "as it is", true);
    run.parallel.cuda_graph = true;
    run.batch.recompute = RECOMPUTE_BLOCK;
    run.precision.moments = STORE_BF16;
    if (!FP32_BUILD) run.precision.master_weights = run.precision.gradients = STORE_BF16;
    test_layer_norms(m, run, "all in bf16, recomputed, through a graph", false);
}

// The rows of the next step may come while a step runs.
static void test_model_next_rows(const ModelCase& m) {
    ModelConfig c = config_of(m);
    Array weights = random_weights(c, 11);
    RunConfig run = run_of(c, MODEL_B, MODEL_T, MODEL_B);
    std::vector<int32_t> first = random_rows(MODEL_B, MODEL_T, c.vocab_size, 70),
                         next = random_rows(MODEL_B, MODEL_T, c.vocab_size, 71);
    double losses[2];
    for (int early = 0; early < 2; early++) {
        GPT* g = device_model(run, weights);
        gpt_load_batch(g, first.data(), MODEL_B, false, -1);
        gpt_start_step(g, &run, 1e-3, 0, 0, no_guard);
        if (early) gpt_load_batch(g, next.data(), MODEL_B, false, -1);
        losses[early] = gpt_finish_step(g).loss;
        device_free(g);
    }
    tap_check(losses[0] == losses[1], "%s: a step computes on its own rows", m.name);
    release_all();
}

// Weights and moments to the host's copy and back, in every way of storing them.
static void test_model_host_copy(const ModelCase& m) {
    ModelConfig c = config_of(m);
    Array weights = random_weights(c, 10);
    for (int storage = 0; storage < 4; storage++) {
        RunConfig run = run_of(c, MODEL_B, MODEL_T, MODEL_B);
        run.precision.master_weights = storage & 1 ? STORE_BF16 : STORE_FP32;
        run.precision.moments = storage & 2 ? STORE_BF16 : STORE_FP32;
        GPT* g = device_model(run, weights);
        size_t n = g->layout.num_parameters, moment = g->moments_bf16 ? 2 : 4;
        std::vector<int32_t> rows = random_rows(MODEL_B, MODEL_T, c.vocab_size, 60);
        gpt_load_batch(g, rows.data(), MODEL_B, false, -1);
        gpt_start_step(g, &run, 1e-3, 0, 0, no_guard);
        gpt_finish_step(g);
        std::vector<char> before(n * (sizeof(floatX) + 2 + 2 * moment), 0), after(before);
        auto raw = [&](std::vector<char>& to) {
            char* at = to.data();
            CUDA_CHECK(cudaMemcpy(at, g->params, n * sizeof(floatX), cudaMemcpyDeviceToHost));
            CUDA_CHECK(cudaMemcpy(at += n * sizeof(floatX), g->m, n * moment, cudaMemcpyDeviceToHost));
            CUDA_CHECK(cudaMemcpy(at += n * moment, g->v, n * moment, cudaMemcpyDeviceToHost));
            if (g->remainder != NULL)
                CUDA_CHECK(cudaMemcpy(at + n * moment, g->remainder, 2 * n, cudaMemcpyDeviceToHost));
        };
        raw(before);
        gpt_snapshot(g);
        gpt_snapshot_wait(g);
        for (int i = 0; i < MEMORY_ACTIVATIONS; i++)
            if (i != MEMORY_GRADIENTS && g->memory[i] != NULL)
                CUDA_CHECK(cudaMemset(g->memory[i], 0, 2 * n)); // what the padding stays
        gpt_from_host(g);
        raw(after);
        tap_check(before == after, "%s: to the host and back, %s master weights, %s moments", m.name,
                  storage & 1 ? "bf16" : "fp32", storage & 2 ? "bf16" : "fp32");
        device_free(g);
    }
}

static void test_model(void) {
    for (int i = 0; i < NUM_MODEL_CASES; i++) {
        test_model_gradients(model_cases[i], i % 2 == 1, MODEL_B * MODEL_T);
        if (i == 0 || i == 2) {
            test_model_gradients(model_cases[i], i == 0, 24);
            test_model_steps(model_cases[i]);
            test_model_bits(model_cases[i]);
            test_model_layer_norms(model_cases[i]);
        }
        if (i == 0) test_model_next_rows(model_cases[i]), test_model_host_copy(model_cases[i]);
    }
}
