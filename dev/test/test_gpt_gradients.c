// Whole models, compiled in fp64, against central finite differences: every tensor of every family and
// option. The loss is differentiated in up to PROBES elements of each tensor; the step of 1e-5 leaves an
// error of the order of 1e-10 in the difference quotient, far below the 1e-6 that is asked for.
#define TESTING
#define REAL double
#include "train_gpt.c"

#include <setjmp.h>
#include <cmocka.h>

enum { B = 2, T = 9, PROBES = 24 };

static ModelConfig tiny(const char* model_type) {
    ModelConfig c;
    memset(&c, 0, sizeof c);
    for (int i = 0; i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(model_families[i].model_type, model_type) == 0) c.family = &model_families[i];
    assert_non_null(c.family);
    c.vocab_size = 37, c.hidden_size = 20, c.num_hidden_layers = 2, c.num_attention_heads = 4;
    c.num_key_value_heads = 4, c.head_dim = 6, c.intermediate_size = 28, c.max_position_embeddings = 12;
    c.norm_eps = c.family->norm_eps, c.initializer_range = 0.3;
    c.attention_bias = c.family->qkv_bias;
    c.attention_output_bias = c.mlp_bias = c.norm_bias = c.family->bias;
    c.tie_word_embeddings = c.family->tie_word_embeddings;
    c.rope.theta = 100.0;
    return c;
}

static void create_model(GPT* g, const ModelConfig* c, RunConfig* run) {
    Error err = {0};
    memset(run, 0, sizeof *run);
    run->model = *c, run->precision.compute = COMPUTE_FP32;
    run->log.layers_every = 1; // there is room to measure layers
    run->optimizer.beta1 = 0.9, run->optimizer.beta2 = 0.95, run->optimizer.eps = 1e-6;
    run->optimizer.weight_decay = 0.1, run->optimizer.grad_clip = 0.01;
    assert_true(gpt_create(g, run, B, T, true, &err));
}

typedef struct {
    GPT gpt;
    RunConfig run;
    int tokens[B * T], targets[B * T], doc_start[B * T];
    bool documents;
} Fixture;

static double loss_of(Fixture* f, real grad_scale) {
    gpt_forward(&f->gpt, f->tokens, f->documents ? f->doc_start : NULL, B);
    return gpt_loss(&f->gpt, f->targets, B, grad_scale);
}

// Random weights (of norms and of biases too, so that a forgotten one shows), random tokens, two masked
// targets.
static void create(Fixture* f, const ModelConfig* c, bool documents) {
    memset(f, 0, sizeof *f);
    create_model(&f->gpt, c, &f->run);
    for (size_t i = 0; i < f->gpt.layout.num_parameters; i++) {
        float z[4];
        random_normal4(z, 2, 0, 0, i);
        f->gpt.params[i] = 0.3 * z[0];
    }
    for (int i = 0; i < B * T; i++) {
        f->tokens[i] = (int)(random_bits(3, 0, 0, (uint64_t)i).x[0] % 37u);
        f->targets[i] = (int)(random_bits(3, 0, 1, (uint64_t)i).x[0] % 37u);
        int t = i % T;
        f->doc_start[i] = t < 4 ? 0 : t < 5 ? 4 : 5;
    }
    f->targets[3] = f->targets[14] = -1;
    f->documents = documents;
}

static void check_gradients(const ModelConfig* c, bool documents) {
    Fixture f;
    create(&f, c, documents);
    const double scale = 1.0 / (B * T), h = 1e-5;
    loss_of(&f, scale);
    gpt_backward(&f.gpt, f.tokens, B);
    for (int id = 0; id < NUM_TENSORS; id++) {
        size_t size = f.gpt.layout.size[id];
        for (int probe = 0; probe < PROBES && size != 0; probe++) {
            int layer = probe % tensor_copies(c, id);
            size_t element = random_bits(4, 0, (uint64_t)id, (uint64_t)probe).x[0] % size;
            size_t at = tensor_offset(&f.gpt.layout, id, layer) + element;
            if (tensor_table[id].rows == DIM_VOCAB) // padding rows have no gradient: look where there is one
                at = tensor_offset(&f.gpt.layout, id, 0) + element % (size_t)(c->vocab_size * c->hidden_size);
            real was = f.gpt.params[at];
            f.gpt.params[at] = was + h;
            double up = loss_of(&f, 0);
            f.gpt.params[at] = was - h;
            double down = loss_of(&f, 0);
            f.gpt.params[at] = was;
            double numeric = scale * (up - down) / (2 * h), analytic = f.gpt.grads[at];
            if (fabs(numeric - analytic) > 1e-6 * fmax(fabs(numeric), 1e-3))
                fail_msg("%s layer %d of %s: gradient %.12g, finite difference %.12g", tensor_table[id].name,
                         layer, c->family->model_type, analytic, numeric);
        }
    }
    gpt_free(&f.gpt);
}

static void gpt2(void** state) {
    (void)state;
    ModelConfig c = tiny("gpt2");
    check_gradients(&c, false);
    check_gradients(&c, true);
    c.tie_word_embeddings = false;
    c.attention_bias = c.attention_output_bias = c.mlp_bias = c.norm_bias = false;
    check_gradients(&c, false);
}

static void llama(void** state) {
    (void)state;
    ModelConfig c = tiny("llama");
    check_gradients(&c, false);
    c.num_key_value_heads = 2, c.tie_word_embeddings = true;
    check_gradients(&c, true);
    c.num_key_value_heads = 1, c.attention_bias = c.attention_output_bias = c.mlp_bias = true;
    c.rope.scaling = ROPE_SCALING_LLAMA3, c.rope.factor = 8, c.rope.low_freq_factor = 1;
    c.rope.high_freq_factor = 4, c.rope.original_max_position_embeddings = 10;
    check_gradients(&c, false);
}

static void qwen2_and_mistral(void** state) {
    (void)state;
    ModelConfig c = tiny("qwen2");
    c.num_key_value_heads = 2;
    check_gradients(&c, false);
    c = tiny("mistral");
    check_gradients(&c, false);
}

// Two micro-batches leave the sum of their gradients; padding of the vocabulary gets none.
static void gradients_accumulate(void** state) {
    (void)state;
    ModelConfig c = tiny("gpt2");
    Fixture f;
    create(&f, &c, false);
    size_t n = f.gpt.layout.num_parameters;
    loss_of(&f, 1.0);
    gpt_backward(&f.gpt, f.tokens, B);
    real* once = malloc_check(n * sizeof(real));
    memcpy(once, f.gpt.grads, n * sizeof(real));
    loss_of(&f, 1.0);
    gpt_backward(&f.gpt, f.tokens, B);
    for (size_t i = 0; i < n; i++)
        if (fabs(f.gpt.grads[i] - 2 * once[i]) > 1e-12 * fmax(1, fabs(once[i]))) fail_msg("element %zu", i);
    for (size_t i = (size_t)(c.vocab_size * c.hidden_size); i < f.gpt.layout.size[WTE]; i++)
        assert_true(once[i] == 0.0);
    free(once);
    gpt_free(&f.gpt);
}

// The cached, one-row path scores the next token as the full forward pass does.
static void decoder_equals_forward(void** state) {
    (void)state;
    const char* families[] = {"gpt2", "llama", "qwen2"};
    for (int i = 0; i < 3; i++) {
        ModelConfig c = tiny(families[i]);
        if (i > 0) c.num_key_value_heads = 2;
        Fixture f;
        create(&f, &c, false);
        loss_of(&f, 0);
        int V = c.vocab_size, Vp = padded_vocab_size(V);
        real* full = malloc_check((size_t)(T * Vp) * sizeof(real));
        memcpy(full, f.gpt.logits, (size_t)(T * Vp) * sizeof(real)); // rows of the first sequence
        Decoder d;
        decoder_create(&d, &f.gpt, T);
        for (int t = 0; t < T; t++) {
            decoder_step(&d, f.tokens[t]);
            for (int v = 0; v < V; v++)
                if (fabs(d.logits[v] - full[t * Vp + v]) > 1e-10) fail_msg("%s position %d", families[i], t);
        }
        free(full);
        decoder_free(&d);
        gpt_free(&f.gpt);
    }
}

// Of each entry, the sum of squares of what its tensors hold.
static void squares_by_layer(const GPT* g, const real* x, int which, LayerNorms* sums) {
    for (int id = 0; id < NUM_TENSORS; id++)
        for (int l = 0; l < tensor_copies(&g->config, id); l++) {
            int place = tensor_table[id].place, L = g->config.num_hidden_layers;
            int entry = place == BEFORE_LAYERS ? 0 : place == PER_LAYER ? 1 + l : 1 + L;
            const real* tensor = x + tensor_offset(&g->layout, id, l);
            for (size_t i = 0; i < g->layout.size[id]; i++) sums[entry].of[which] += tensor[i] * tensor[i];
        }
}

static real* copy_of(const real* x, size_t n) {
    return memcpy(malloc_check(n * sizeof *x), x, n * sizeof *x);
}

// The norms of layers in a step of two micro-batches are what loops over tensors and activations give; also in one that
// is skipped.
static void layer_norms_are_those_of_the_arrays(void** state) {
    (void)state;
    const char* families[] = {"gpt2", "llama"};
    for (int i = 0; i < 4; i++) {
        ModelConfig c = tiny(families[i / 2]);
        Fixture f;
        create(&f, &c, false);
        GPT* g = &f.gpt;
        bool skipped = i % 2 == 1;
        int L = c.num_hidden_layers, values = B * T * c.hidden_size;
        LayerNorms sums[4] = {0};
        int32_t rows[2 * B * (T + 1)];
        for (int k = 0; k < 2 * B * (T + 1); k++)
            rows[k] = (int32_t)(random_bits(5, 0, 0, (uint64_t)k).x[0] % 37u);
        for (int m = 0; m < 2; m++) {
            split_rows(g, rows + m * B * (T + 1), B, false, 0);
            gpt_forward(g, g->inputs, NULL, B);
            const real* handed_on[] = {g->embedded, g->layers[0].residual3, g->layers[1].residual3, g->lnf};
            for (int e = 0; e < L + 2; e++)
                for (int k = 0; k < values; k++)
                    sums[e].of[LAYER_ACTIVATION_RMS] += handed_on[e][k] * handed_on[e][k] / (2 * values);
            gpt_loss(g, g->targets, B, 1.0 / (2 * B * T));
            gpt_backward(g, g->inputs, B);
        }
        size_t n = g->layout.num_parameters;
        squares_by_layer(g, g->grads, LAYER_GRAD_NORM, sums);
        real* difference = copy_of(g->params, n);
        memset(g->grads, 0, n * sizeof(real));
        StepGuard guard = {skipped ? 0 : INFINITY, INFINITY, false, false, true};
        gpt_load_batch(g, rows, 2 * B, false, 0);
        gpt_start_step(g, &f.run, 0.01, 0, 0, guard);
        StepResult r = gpt_finish_step(g);
        assert_true(r.applied == !skipped);
        for (size_t k = 0; k < n; k++) difference[k] = g->params[k] - difference[k];
        squares_by_layer(g, difference, LAYER_UPDATE_NORM, sums);
        squares_by_layer(g, g->params, LAYER_WEIGHT_NORM, sums);
        double total = 0;
        for (int e = 0; e < L + 2; e++) {
            for (int k = 0; k < NUM_LAYER_NORMS; k++) {
                double norm = r.layers[e].of[k], wanted = sqrt(sums[e].of[k]);
                if (fabs(norm - wanted) > 1e-12 * wanted)
                    fail_msg("%s, entry %d, %s: %.15g, not %.15g", families[i / 2], e, layer_norm_keys[k],
                             norm, wanted);
            }
            assert_true((r.layers[e].of[LAYER_UPDATE_NORM] == 0) == skipped);
            total += r.layers[e].of[LAYER_GRAD_NORM] * r.layers[e].of[LAYER_GRAD_NORM];
        }
        assert_true(fabs(total / (r.grad_norm * r.grad_norm) - 1) < 1e-12);
        gpt_start_step(g, &f.run, 0.01, 1, 0, no_guard);
        assert_null(gpt_finish_step(g).layers);
        free(difference);
        gpt_free(g);
    }
}

// What gpt_plan says is what gpt_create takes: the sums of the same layout, with memory and without.
static void plan_is_exact(void** state) {
    (void)state;
    ModelConfig c = tiny("llama");
    size_t bytes[NUM_MEMORY_CLASSES];
    GPT g;
    RunConfig run;
    create_model(&g, &c, &run);
    gpt_plan(&run, B, T, true, bytes);
    assert_int_equal(bytes[MEMORY_PARAMETERS],
                     (parameter_layout(&c).num_parameters + 15) / 16 * 16 * sizeof(real));
    assert_int_equal(bytes[MEMORY_MOMENTS], 2 * bytes[MEMORY_GRADIENTS]);
    size_t unmeasured[NUM_MEMORY_CLASSES]; // without room for the weights before an update
    run.log.layers_every = 0;
    gpt_plan(&run, B, T, true, unmeasured);
    assert_int_equal(bytes[MEMORY_SCRATCH] - unmeasured[MEMORY_SCRATCH], bytes[MEMORY_PARAMETERS]);
    real* last = g.losses + B * T; // the last array of its class ends within a cache line of the class's size
    size_t used = (size_t)((char*)last - (char*)g.memory[MEMORY_ACTIVATIONS]);
    assert_true(used <= bytes[MEMORY_ACTIVATIONS] && used + 16 * sizeof(real) > bytes[MEMORY_ACTIVATIONS]);
    gpt_free(&g);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gpt2),
        cmocka_unit_test(llama),
        cmocka_unit_test(qwen2_and_mistral),
        cmocka_unit_test(gradients_accumulate),
        cmocka_unit_test(decoder_equals_forward),
        cmocka_unit_test(layer_norms_are_those_of_the_arrays),
        cmocka_unit_test(plan_is_exact),
    };
    return cmocka_run_group_tests_name("gpt_gradients", tests, NULL, NULL);
}
