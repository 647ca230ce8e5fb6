// What we compute with a model directory, for check_hf.py to compare with transformers:
//
//     write_logits DIR OUT.safetensors      tokens (2, T) drawn at random, logits (2, T, V)
#pragma GCC diagnostic ignored "-Wunused-function" // only the forward pass is needed here
#define TESTING
#include "train_gpt.c" // defines: GPT, gpt_create, gpt_forward

#include "llmc/model_config.h" // defines: model_config_load

enum { B = 2, MAX_T = 64 };

// The head on all rows at once, without the padding of the vocabulary; gpt_loss never keeps logits.
static void compute_logits(GPT* g, const int* tokens, float* logits) {
    int N = B * g->T, C = g->config.hidden_size, V = g->config.vocab_size, Vp = padded_vocab_size(V);
    real* padded = (real*)malloc_check((size_t)N * (size_t)Vp * sizeof(real));
    CHECK(g->logit_rows >= N);
    gpt_forward(g, tokens, NULL, B);
    matmul_forward(padded, g->lnf, head_of(parameters_of(g, g->params, 0)), NULL, N, C, Vp, &g->matmul);
    for (int n = 0; n < N; n++)
        memcpy(logits + (size_t)n * (size_t)V, padded + (size_t)n * (size_t)Vp, (size_t)V * sizeof(float));
    free(padded);
}

int main(int argc, char** argv) {
    static RunConfig run;
    ModelConfig* config = &run.model;
    GPT gpt;
    Error err = {0};
    char path[PATH_MAX];
    if (argc != 3)
        fail(&err, EXIT_USAGE, "usage: write_logits DIR OUT.safetensors");
    else if (path_join(path, argv[1], "config.json", &err))
        model_config_load(config, path, &err);
    if (err.code != 0) exit_with(&err);

    int T = config->max_position_embeddings < MAX_T ? config->max_position_embeddings : MAX_T;
    size_t N = (size_t)B * (size_t)T, V = (size_t)config->vocab_size;
    if (!gpt_create(&gpt, &run, B, T, false, &err)) exit_with(&err);
    CheckpointData data = {.model = &gpt.config, .params = gpt.params};
    if (!checkpoint_load(argv[1], &data, &err)) exit_with(&err);

    int tokens[B * MAX_T];
    String file = {NULL, 0, 0};
    uint64_t end = 0, tokens_shape[] = {B, (uint64_t)T}, logits_shape[] = {B, (uint64_t)T, V};
    safetensors_header_begin(&file);
    safetensors_header_add(&file, &end, "tokens", 2, tokens_shape);
    safetensors_header_add(&file, &end, "logits", 3, logits_shape);
    safetensors_header_finish(&file);
    for (size_t i = 0; i < N; i++) {
        tokens[i] = (int)(random_bits(1, RANDOM_SAMPLE, 0, i).x[0] % V);
        float exact = (float)tokens[i];
        string_append_bytes(&file, &exact, sizeof exact);
    }
    float* logits = (float*)malloc_check(N * V * sizeof(float));
    compute_logits(&gpt, tokens, logits);
    string_append_bytes(&file, logits, N * V * sizeof(float));
    if (!replace_file(argv[2], file.data, file.size, &err)) exit_with(&err);
    free(logits), free(file.data), gpt_free(&gpt);
    return EXIT_OK;
}
