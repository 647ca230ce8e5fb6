// The whole model on the device: logits, loss, every gradient and ten steps of AdamW against the CPU
// reference in fp64, and what must be equal to the bit.
//
// The yardstick is the plain same-precision model: in bf16 the reference's own layers, each array rounded once
// it is computed; in fp32 the reference compiled in fp32. The trainer may be at most twice as far from the fp64
// result as that is.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, judge, tap_check, round_to_floatX
#include "dev/test/reference.h"      // defines: Reference, reference_gradients ...

static const bool FP32_BUILD = sizeof(floatX) == sizeof(float);

// ----------------------------------------------------------------------------
// models and data

struct ModelCase {
    const char *name, *family;
    int V, C, L, NH, NKV, HS, FF;
    bool bias, tied;
};

static const ModelCase model_cases[] = {
    {"GPT-2", "gpt2", 157, 128, 2, 2, 2, 64, 256, true, true},
    {"GPT-2 without biases, untied", "gpt2", 130, 64, 2, 1, 1, 64, 192, false, false},
    {"Llama with grouped queries", "llama", 200, 64, 2, 2, 1, 64, 176, false, false},
    {"Llama, heads of 16, tied", "llama", 97, 64, 1, 4, 2, 16, 88, false, true},
    {"Qwen2", "qwen2", 128, 64, 2, 2, 1, 64, 128, true, true},
};
enum { NUM_MODEL_CASES = sizeof model_cases / sizeof model_cases[0], MODEL_T = 33, MODEL_B = 2 };

static ModelConfig config_of(const ModelCase& m) {
    ModelConfig c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(model_families[i].model_type, m.family) == 0) c.family = &model_families[i];
    c.vocab_size = m.V, c.hidden_size = m.C, c.num_hidden_layers = m.L, c.num_attention_heads = m.NH;
    c.num_key_value_heads = m.NKV, c.head_dim = m.HS, c.intermediate_size = m.FF;
    c.max_position_embeddings = MODEL_T + 8, c.norm_eps = c.family->norm_eps, c.initializer_range = 0.1;
    bool all = c.family->conv1d && m.bias;
    c.attention_bias = m.bias, c.attention_output_bias = c.mlp_bias = c.norm_bias = all;
    c.tie_word_embeddings = m.tied, c.rope.theta = 10000, c.bos_token_id = c.eos_token_id = -1;
    return c;
}

static RunConfig run_of(const ModelConfig& model, int B, int T, int G) {
    static RunConfig run;
    memset(&run, 0, sizeof run);
    run.seed = 3, run.model = model;
    run.batch.micro_batch_size = B, run.batch.sequence_length = T, run.batch.global_batch_size = G;
    run.layout = layout_single(), run.parallel.pipeline_schedule = PIPELINE_1F1B;
    run.parallel.zero_stage = ZERO_OPTIMIZER;
    run.optimizer.beta1 = 0.9, run.optimizer.beta2 = 0.95;
    run.optimizer.eps =
        1e-4; // with 1e-8 the rounding noise of a gradient of zero becomes a whole step, of either sign
    run.optimizer.weight_decay = 0.1, run.optimizer.grad_clip = 1;
    run.precision.compute = sizeof(floatX) == sizeof(float) ? COMPUTE_FP32 : COMPUTE_BF16;
    return run;
}

// (rows, T + 1); token 0 begins a document now and then
static std::vector<int32_t> random_rows(int rows, int T, int V, uint64_t seed) {
    std::vector<int32_t> tokens((size_t)rows * (size_t)(T + 1));
    for (size_t i = 0; i < tokens.size(); i++) {
        uint32_t bits = random_bits(seed, RANDOM_DATA, 0, i).x[0];
        tokens[i] = bits % 13 == 0 ? 0 : (int32_t)(bits / 13 % (uint32_t)V);
    }
    return tokens;
}

// The initial weights with every bias and norm weight off its starting value, exact in floatX.
static Array random_weights(const ModelConfig& c, uint64_t seed) {
    ParameterLayout layout = parameter_layout(&c);
    std::vector<float> tensor(layout.num_parameters);
    Array weights(layout.num_parameters);
    for (int i = 0; i < NUM_TENSORS; i++)
        for (int l = 0; l < tensor_copies(&c, (enum TensorId)i); l++) {
            size_t at = tensor_offset(&layout, (enum TensorId)i, l), size = layout.size[i];
            init_tensor(tensor.data(), &c, (enum TensorId)i, l, seed);
            for (size_t k = 0; k < size; k++) {
                bool vector = tensor_table[i].cols == DIM_1;
                double noise = random_uniform(seed, RANDOM_INIT, (uint64_t)(100 + i), (uint64_t)l * size + k);
                weights[at + k] = tensor[k] + (vector ? 0.4 * (noise - 0.5) : 0);
            }
        }
    round_to_floatX(weights.data(), weights.size());
    return weights;
}

static void set_weights(GPT* g, const Array& weights) {
    std::vector<float> floats(weights.begin(), weights.end());
    HostState host = gpt_host_state(g);
    size_t bytes = floats.size() * sizeof(float);
    memcpy(host.params, floats.data(), bytes), memset(host.m, 0, bytes), memset(host.v, 0, bytes);
    gpt_from_host(g);
}

static Array gradients_of(const GPT* g) {
    size_t n = g->layout.num_parameters;
    double* host =
        g->gradients_bf16 ? to_host((const __nv_bfloat16*)g->grads, n) : to_host((const float*)g->grads, n);
    return Array(host, host + n);
}

// ----------------------------------------------------------------------------
// the plain model

struct PlainModel {
    ModelConfig c;
    ParameterLayout layout;
    int B, T;
    bool rounded; // to floatX, array by array; else the truth
    const int* doc_start;
    Array weights, grads, logits, losses;
    cpu::Matmul mm;
    void* scratch;
};

// Rounds an array that was just computed.
static double* kept(const PlainModel& m, Array& x) {
    if (m.rounded) round_to_floatX(x.data(), x.size());
    return x.data();
}

static double* plain_tensor(PlainModel& m, Array& memory, int id, int l) {
    return m.layout.size[id] != 0 ? &memory[tensor_offset(&m.layout, (enum TensorId)id, l)] : NULL;
}

struct PlainBlock {
    Array ln1, ln1_mean, ln1_rstd, qkv, att, lse, residual2, ln2, ln2_mean, ln2_rstd, fc, act, residual3;
};

static void plain_block_forward(PlainModel& m, PlainBlock& a, const Array& residual, int l,
                                const Array& cosines, const Array& sines) {
    const ModelConfig& c = m.c;
    int T = m.T, N = m.B * T, C = c.hidden_size, NH = c.num_attention_heads, NKV = c.num_key_value_heads;
    int HS = c.head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF = c.intermediate_size;
    int FC = (int)model_dim(&c, DIM_FC), norm = c.family->norm;
    size_t rows = (size_t)N;
    auto p = [&](int id) { return plain_tensor(m, m.weights, id, l); };
    Array hidden(rows * (size_t)C);
    a.ln1.resize(rows * (size_t)C), a.ln1_mean.resize(rows), a.ln1_rstd.resize(rows);
    a.qkv.resize(rows * (size_t)QKV), a.att.resize(rows * (size_t)Q), a.lse.resize(rows * (size_t)NH);
    a.residual2.resize(rows * (size_t)C), a.ln2.resize(rows * (size_t)C);
    a.ln2_mean.resize(rows), a.ln2_rstd.resize(rows);
    a.fc.resize(rows * (size_t)FC), a.act.resize(rows * (size_t)FF), a.residual3.resize(rows * (size_t)C);

    cpu::norm_forward(a.ln1.data(), a.ln1_mean.data(), a.ln1_rstd.data(), residual.data(), p(LN1W), p(LN1B),
                      N, C, c.norm_eps, norm);
    cpu::matmul_forward(a.qkv.data(), kept(m, a.ln1), p(QKVW), p(QKVB), N, C, QKV, &m.mm);
    kept(m, a.qkv);
    if (c.family->position == POSITION_ROPE) {
        std::vector<float> cos_table(cosines.begin(), cosines.end()), sin_table(sines.begin(), sines.end());
        cpu::rope_forward(a.qkv.data(), cos_table.data(), sin_table.data(), 0, m.B, T, NH, NKV, HS);
        kept(m, a.qkv);
    }
    std::vector<char> scratch(cpu::attention_scratch_bytes(T, HS) + 64);
    cpu::attention_forward(a.att.data(), a.lse.data(), align64(scratch), a.qkv.data(), m.doc_start, m.B, T,
                           NH, NKV, HS);
    cpu::matmul_forward(hidden.data(), kept(m, a.att), p(ATTPROJW), p(ATTPROJB), N, Q, C, &m.mm);
    cpu::residual_forward(a.residual2.data(), residual.data(), kept(m, hidden), hidden.size());
    cpu::norm_forward(a.ln2.data(), a.ln2_mean.data(), a.ln2_rstd.data(), kept(m, a.residual2), p(LN2W),
                      p(LN2B), N, C, c.norm_eps, norm);
    cpu::matmul_forward(a.fc.data(), kept(m, a.ln2), p(FCW), p(FCB), N, C, FC, &m.mm);
    cpu::activation_forward(a.act.data(), kept(m, a.fc), N, FF, c.family->activation);
    cpu::matmul_forward(hidden.data(), kept(m, a.act), p(FCPROJW), p(FCPROJB), N, FF, C, &m.mm);
    cpu::residual_forward(a.residual3.data(), a.residual2.data(), kept(m, hidden), hidden.size());
    kept(m, a.residual3);
}

static void plain_block_backward(PlainModel& m, PlainBlock& a, const Array& residual, Array& dresidual, int l,
                                 const Array& cosines, const Array& sines) {
    const ModelConfig& c = m.c;
    int T = m.T, N = m.B * T, C = c.hidden_size, NH = c.num_attention_heads, NKV = c.num_key_value_heads;
    int HS = c.head_dim, Q = NH * HS, QKV = Q + 2 * NKV * HS, FF = c.intermediate_size;
    int FC = (int)model_dim(&c, DIM_FC), norm = c.family->norm;
    auto p = [&](int id) { return plain_tensor(m, m.weights, id, l); };
    auto d = [&](int id) { return plain_tensor(m, m.grads, id, l); };
    Array dact(a.act.size()), dfc(a.fc.size()), dnorm(a.ln1.size()), datt(a.att.size()), dqkv(a.qkv.size());

    cpu::matmul_backward(dact.data(), d(FCPROJW), d(FCPROJB), dresidual.data(), a.act.data(), p(FCPROJW), N,
                         FF, C, &m.mm);
    cpu::activation_backward(dfc.data(), kept(m, dact), a.fc.data(), N, FF, c.family->activation);
    cpu::matmul_backward(dnorm.data(), d(FCW), d(FCB), kept(m, dfc), a.ln2.data(), p(FCW), N, C, FC, &m.mm);
    cpu::norm_backward(dresidual.data(), d(LN2W), d(LN2B), kept(m, dnorm), a.residual2.data(), p(LN2W),
                       a.ln2_mean.data(), a.ln2_rstd.data(), N, C, norm);
    cpu::matmul_backward(datt.data(), d(ATTPROJW), d(ATTPROJB), kept(m, dresidual), a.att.data(), p(ATTPROJW),
                         N, Q, C, &m.mm);
    std::vector<char> scratch(cpu::attention_scratch_bytes(T, HS) + 64);
    cpu::attention_backward(dqkv.data(), align64(scratch), kept(m, datt), a.qkv.data(), a.att.data(),
                            a.lse.data(), m.doc_start, m.B, T, NH, NKV, HS);
    kept(m, dqkv);
    if (c.family->position == POSITION_ROPE) {
        std::vector<float> cos_table(cosines.begin(), cosines.end()), sin_table(sines.begin(), sines.end());
        cpu::rope_backward(dqkv.data(), cos_table.data(), sin_table.data(), 0, m.B, T, NH, NKV, HS);
        kept(m, dqkv);
    }
    cpu::matmul_backward(dnorm.data(), d(QKVW), d(QKVB), dqkv.data(), a.ln1.data(), p(QKVW), N, C, QKV,
                         &m.mm);
    cpu::norm_backward(dresidual.data(), d(LN1W), d(LN1B), kept(m, dnorm), residual.data(), p(LN1W),
                       a.ln1_mean.data(), a.ln1_rstd.data(), N, C, norm);
    kept(m, dresidual);
}

// Fills m.logits (N, Vp), m.losses (N), and adds to m.grads; grad_scale as in gpt_loss.
static void plain_model(PlainModel& m, const int* inputs, const int* targets, double grad_scale) {
    const ModelConfig& c = m.c;
    int N = m.B * m.T, C = c.hidden_size, V = c.vocab_size, Vp = padded_vocab_size(V),
        L = c.num_hidden_layers;
    int head = c.tie_word_embeddings ? WTE : LMHEAD, half = c.head_dim / 2;
    size_t size = (size_t)N * (size_t)C;
    Array embedded(size), lnf(size), mean((size_t)N), rstd((size_t)N), dlnf(size), dresidual(size), cosines,
        sines;
    if (c.family->position == POSITION_ROPE) {
        std::vector<float> table(2 * (size_t)(m.T * half));
        rope_table(table.data(), table.data() + m.T * half, &c.rope, m.T, c.head_dim);
        cosines.assign(table.begin(), table.begin() + m.T * half);
        sines.assign(table.begin() + m.T * half, table.end());
    }
    std::vector<PlainBlock> blocks((size_t)L);
    auto residual = [&](int l) -> Array& { return l == 0 ? embedded : blocks[(size_t)l - 1].residual3; };

    cpu::embedding_forward(embedded.data(), inputs, plain_tensor(m, m.weights, WTE, 0),
                           plain_tensor(m, m.weights, WPE, 0), m.B, m.T, C);
    kept(m, embedded);
    for (int l = 0; l < L; l++) plain_block_forward(m, blocks[(size_t)l], residual(l), l, cosines, sines);
    cpu::norm_forward(lnf.data(), mean.data(), rstd.data(), residual(L).data(),
                      plain_tensor(m, m.weights, LNFW, 0), plain_tensor(m, m.weights, LNFB, 0), N, C,
                      c.norm_eps, c.family->norm);
    m.logits.assign((size_t)N * (size_t)Vp, 0), m.losses.assign((size_t)N, 0);
    double* weight = plain_tensor(m, m.weights, head, 0);
    cpu::matmul_forward(m.logits.data(), kept(m, lnf), weight, NULL, N, C, Vp, &m.mm);
    kept(m, m.logits);
    Array dlogits = m.logits;
    cpu::classifier(m.losses.data(), dlogits.data(), targets, grad_scale, N, V, Vp, true);
    cpu::matmul_backward(dlnf.data(), plain_tensor(m, m.grads, head, 0), NULL, kept(m, dlogits), lnf.data(),
                         weight, N, C, Vp, &m.mm);
    cpu::norm_backward(dresidual.data(), plain_tensor(m, m.grads, LNFW, 0), plain_tensor(m, m.grads, LNFB, 0),
                       kept(m, dlnf), residual(L).data(), plain_tensor(m, m.weights, LNFW, 0), mean.data(),
                       rstd.data(), N, C, c.family->norm);
    kept(m, dresidual);
    for (int l = L - 1; l >= 0; l--)
        plain_block_backward(m, blocks[(size_t)l], residual(l), dresidual, l, cosines, sines);
    cpu::embedding_backward(plain_tensor(m, m.grads, WTE, 0), plain_tensor(m, m.grads, WPE, 0),
                            dresidual.data(), inputs, m.B, m.T, C);
}

static PlainModel plain_create(const ModelConfig& c, int B, int T, bool rounded, const Array& weights) {
    PlainModel m = {};
    m.c = c, m.layout = parameter_layout(&c), m.B = B, m.T = T, m.rounded = rounded, m.weights = weights;
    m.grads.assign(weights.size(), 0);
    size_t bytes = 0;
    int widths[] = {c.hidden_size, (int)model_dim(&c, DIM_QKV), (int)model_dim(&c, DIM_FC),
                    (int)model_dim(&c, DIM_HEADS), padded_vocab_size(c.vocab_size)};
    for (int in : widths)
        for (int out : widths)
            bytes = larger(bytes, cpu::matmul_scratch_bytes(cpu::MATMUL_FP32, B * T, in, out));
    m.scratch = aligned_zeros(bytes);
    cpu::matmul_init(&m.mm, cpu::MATMUL_FP32, m.scratch, bytes);
    return m;
}

static void plain_free(PlainModel& m) {
    cpu::matmul_free(&m.mm);
    free(m.scratch);
}

// rows (num_rows, T + 1) in micro-batches of m.B: adds to m.grads, returns the sum of the losses.
static double plain_gradients(PlainModel& m, const std::vector<int32_t>& rows, bool mask) {
    size_t T = (size_t)m.T, num_rows = rows.size() / (T + 1), N = (size_t)m.B * T;
    std::vector<int> inputs(N), targets(N), starts(N);
    double sum = 0;
    for (size_t first = 0; first < num_rows; first += (size_t)m.B) {
        for (size_t b = 0; b < (size_t)m.B; b++) {
            const int32_t* row = &rows[(first + b) * (T + 1)];
            std::copy(row, row + T, &inputs[b * T]);
            std::copy(row + 1, row + 1 + T, &targets[b * T]);
            document_starts(&starts[b * T], row, m.T, 0);
        }
        m.doc_start = mask ? starts.data() : NULL;
        plain_model(m, inputs.data(), targets.data(), 1.0 / (double)(num_rows * T));
        for (double loss : m.losses) sum += loss;
    }
    return sum;
}

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
