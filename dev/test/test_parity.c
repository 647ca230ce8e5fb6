// The reference against an independent implementation: transformers' own models, run in float64 by
// dev/test/make_fixtures.py (dev/test/fixtures/README.md lists what each fixture pins down). fp32 results
// must lie within 1e-5 of the largest expected value of their tensor: logits, loss, every gradient, ten
// losses and gradient norms, and the weights after ten AdamW steps.
#define TESTING
#include "train_gpt.c"

#include "llmc/model_config.h" // defines: model_config_load
#include <setjmp.h>
#include <cmocka.h>

static const double LIMIT = 1e-5;

// expected.safetensors in memory
typedef struct {
    char* bytes;
    size_t size;
    char* header; // with a NUL behind it
    Safetensors parsed;
} Expected;

static void expected_open(Expected* e, const char* path) {
    Error err = {0, {0}};
    e->bytes = read_file(path, (size_t)1 << 26, &e->size, &err);
    if (e->bytes == NULL) fail_msg("%s", err.text);
    uint64_t n;
    memcpy(&n, e->bytes, sizeof n);
    assert_true(n < e->size - 8);
    e->header = malloc_check((size_t)n + 1);
    memcpy(e->header, e->bytes + 8, (size_t)n);
    e->header[n] = '\0';
    if (!safetensors_parse(&e->parsed, e->header, n, e->size - 8 - n, path, &err)) fail_msg("%s", err.text);
}

static void expected_close(Expected* e) {
    safetensors_free(&e->parsed);
    free(e->header), free(e->bytes);
}

static const SafetensorsTensor* find(const Expected* e, const char* name) {
    for (int i = 0; i < e->parsed.count; i++)
        if (strcmp(e->parsed.tensors[i].name, name) == 0) return &e->parsed.tensors[i];
    return NULL;
}

static const void* data_of(const Expected* e, const char* name, size_t count) {
    const SafetensorsTensor* t = find(e, name);
    if (t == NULL || t->count != count) fail_msg("%s: not there, or not of %zu elements", name, count);
    return e->bytes + e->parsed.data_begin + t->begin;
}

static double number(const Expected* e, const char* key) {
    const cJSON* metadata = cJSON_GetObjectItemCaseSensitive(e->parsed.json, "__metadata__");
    const char* text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(metadata, key));
    if (text == NULL) fail_msg("__metadata__ has no %s", key);
    return strtod(text, NULL);
}

// max |ours - expected| / max |expected| over a tensor; ours is strided by HfTensor's view when h is given
static void compare(const char* fixture, const char* name, const float* ours, const float* expected,
                    size_t count, const HfTensor* h) {
    double worst = 0, largest = 1e-30;
    for (size_t i = 0; i < count; i++) {
        size_t at = i;
        if (h != NULL && h->transposed) at = i % h->rows * h->cols + i / h->rows;
        double difference = fabs((double)ours[at] - (double)expected[i]);
        worst = isfinite(difference) ? fmax(worst, difference) : INFINITY;
        largest = fmax(largest, fabs((double)expected[i]));
    }
    if (worst > LIMIT * largest)
        fail_msg("%s: %s is off by %.3g of its largest value", fixture, name, worst / largest);
}

// Compares a memory of the shape of the parameters with the tensors PREFIX.NAME.
static void compare_parameters(const GPT* g, const Expected* e, const char* fixture, const char* prefix,
                               const float* memory) {
    int count = model_hf_tensors(&g->config, NULL);
    HfTensor* tensors = malloc_check((size_t)count * sizeof *tensors);
    model_hf_tensors(&g->config, tensors);
    for (int i = 0; i < count; i++) {
        const HfTensor* h = &tensors[i];
        char name[128];
        snprintf(name, sizeof name, "%s.%s", prefix, h->name);
        compare(fixture, name, memory + h->offset, data_of(e, name, h->rows * h->cols), h->rows * h->cols, h);
    }
    free(tensors);
}

static void run_fixture(const char* fixture) {
    char path[PATH_MAX];
    Error err = {0, {0}};
    Expected e;
    ModelConfig c;
    snprintf(path, sizeof path, "dev/test/fixtures/%s/expected.safetensors", fixture);
    expected_open(&e, path);
    snprintf(path, sizeof path, "dev/test/fixtures/%s/config.json", fixture);
    if (!model_config_load(&c, path, &err)) fail_msg("%s", err.text);
    int B = (int)find(&e, "tokens")->dims[0], T = (int)find(&e, "tokens")->dims[1], N = B * T,
        V = c.vocab_size;
    const int *tokens = data_of(&e, "tokens", (size_t)N), *targets = data_of(&e, "targets", (size_t)N);
    int* doc_start = NULL;
    if (find(&e, "doc_start") != NULL) {
        doc_start = malloc_check((size_t)N * sizeof(int));
        memcpy(doc_start, data_of(&e, "doc_start", (size_t)N), (size_t)N * sizeof(int));
    }
    GPT g;
    RunConfig run;
    memset(&run, 0, sizeof run);
    run.model = c, run.precision.compute = COMPUTE_FP32;
    if (!gpt_create(&g, &run, B, T, true, &err)) fail_msg("%s", err.text);
    CheckpointData data = {.model = &g.config, .params = g.params};
    snprintf(path, sizeof path, "dev/test/fixtures/%s", fixture);
    if (!checkpoint_load(path, &data, &err)) fail_msg("%s", err.text);

    // logits: gpt_loss leaves those of its last chunk of rows, here all of them
    assert_true(N <= g.logit_rows);
    gpt_forward(&g, tokens, doc_start, B);
    double loss = gpt_loss(&g, targets, B, 0) / N;
    float* logits = malloc_check((size_t)N * (size_t)V * sizeof(float));
    for (int n = 0; n < N; n++)
        memcpy(logits + (size_t)n * (size_t)V, g.logits + (size_t)n * (size_t)padded_vocab_size(V),
               (size_t)V * sizeof(float));
    compare(fixture, "logits", logits, data_of(&e, "logits", (size_t)N * (size_t)V), (size_t)N * (size_t)V,
            NULL);
    float loss_float = (float)loss;
    compare(fixture, "loss", &loss_float, data_of(&e, "loss", 1), 1, NULL);

    run.optimizer.beta1 = number(&e, "beta1"), run.optimizer.beta2 = number(&e, "beta2");
    run.optimizer.eps = number(&e, "eps"), run.optimizer.weight_decay = number(&e, "weight_decay");
    double lr = number(&e, "learning_rate"), clip = number(&e, "grad_clip");
    float losses[10], norms[10];
    for (uint64_t step = 0; step < 10; step++) {
        gpt_forward(&g, tokens, doc_start, B);
        losses[step] = (float)(gpt_loss(&g, targets, B, (real)(1.0 / N)) / N);
        gpt_backward(&g, tokens, B);
        if (step == 0) compare_parameters(&g, &e, fixture, "grad", g.grads);
        double norm = sqrt(global_norm_squared(g.grads, g.layout.num_parameters));
        norms[step] = (float)norm;
        gpt_update(&g, &run, lr, norm > clip ? clip / norm : 1, step + 1);
    }
    compare(fixture, "losses", losses, data_of(&e, "losses", 10), 10, NULL);
    compare(fixture, "grad_norm", norms, data_of(&e, "grad_norm", 10), 10, NULL);
    compare_parameters(&g, &e, fixture, "after", g.params);
    free(logits), free(doc_start);
    gpt_free(&g);
    expected_close(&e);
}

static void parity(void** state) { run_fixture((const char*)*state); }

int main(void) {
    static char* const fixtures[] = {"gpt2",      "gpt2_untied", "gpt2_documents",  "llama_mha",
                                     "llama_gqa", "llama_bias",  "llama_documents", "mistral",
                                     "qwen2"};
    enum { COUNT = sizeof fixtures / sizeof fixtures[0] };
    struct CMUnitTest tests[COUNT];
    for (int i = 0; i < COUNT; i++)
        tests[i] = (struct CMUnitTest){fixtures[i], parity, NULL, NULL, fixtures[i]};
    return cmocka_run_group_tests_name("parity", tests, NULL, NULL);
}
