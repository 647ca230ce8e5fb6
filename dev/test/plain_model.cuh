// Models for tests, and the yardstick of them: the plain same-precision model. In bf16 it is the reference's own layers,
// each array rounded once it is computed; in fp32 the reference compiled in fp32.
#pragma once
#include "dev/test/cuda_harness.cuh" // defines: cpu, round_to_floatX, to_host
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
