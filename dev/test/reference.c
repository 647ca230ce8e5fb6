// The CPU reference for test_gpt2: see reference.h. Compiled with -DREAL=double, and without.
#define TESTING
#include "train_gpt.c"

#include "dev/test/reference.h" // defines: the functions below

#ifndef REAL_IS_FLOAT
#define NAMED(function) reference_##function
#else
#define NAMED(function) reference32_##function
#endif

struct Reference {
    GPT gpt;
};

Reference* NAMED(create)(const RunConfig* run) {
    Error err = {0, {0}};
    Reference* r = calloc_check(1, sizeof *r);
    RunConfig full = *run; // full precision, which the config calls fp32
    full.precision.compute = COMPUTE_FP32;
    if (!gpt_create(&r->gpt, &full, run->batch.micro_batch_size, run->batch.sequence_length, true, &err))
        exit_with(&err);
    return r;
}

void NAMED(free)(Reference* r) {
    gpt_free(&r->gpt);
    free(r);
}

void NAMED(set_weights)(Reference* r, const double* weights) {
    for (size_t i = 0; i < r->gpt.layout.num_parameters; i++) r->gpt.params[i] = (real)weights[i];
}

void NAMED(get)(const Reference* r, int array, double* out) {
    const GPT* g = &r->gpt;
    size_t N = (size_t)g->B * (size_t)g->T, n = g->layout.num_parameters;
    const struct {
        const real* from;
        size_t count;
    } arrays[] = {
        {g->params, n}, {g->grads, n}, {g->logits, N * model_dim(&g->config, DIM_VOCAB)}, {g->losses, N}};
    CHECK(array != REFERENCE_LOGITS || (size_t)g->logit_rows == N); // else only the last chunk is there
    for (size_t i = 0; i < arrays[array].count; i++) out[i] = (double)arrays[array].from[i];
}

void NAMED(losses)(Reference* r, const int32_t* rows, bool mask) {
    GPT* g = &r->gpt;
    gpt_forward(g, g->inputs, split_rows(g, rows, g->B, mask, 0), g->B);
    gpt_loss(g, g->targets, g->B, 0);
}

void NAMED(gradients)(Reference* r, const int32_t* rows, bool mask) {
    GPT* g = &r->gpt;
    gpt_forward(g, g->inputs, split_rows(g, rows, g->B, mask, 0), g->B);
    gpt_loss(g, g->targets, g->B, (real)(1.0 / (g->B * g->T)));
    gpt_backward(g, g->inputs, g->B);
}

double NAMED(step)(Reference* r, const RunConfig* run, const int32_t* rows, double lr, uint64_t applied_steps,
                   double* grad_norm) {
    gpt_load_batch(&r->gpt, rows, run->batch.global_batch_size, false, -1);
    gpt_start_step(&r->gpt, run, lr, applied_steps, 0, no_guard);
    StepResult result = gpt_finish_step(&r->gpt);
    *grad_norm = result.grad_norm;
    return result.loss;
}

void NAMED(layer_norms)(Reference* r, const RunConfig* run, const int32_t* rows, double lr,
                        uint64_t applied_steps, double* norms) {
    StepGuard measuring = no_guard;
    measuring.measure_layers = true;
    gpt_load_batch(&r->gpt, rows, run->batch.global_batch_size, false, -1);
    gpt_start_step(&r->gpt, run, lr, applied_steps, 0, measuring);
    const LayerNorms* layers = gpt_finish_step(&r->gpt).layers;
    memcpy(norms, layers, (size_t)(run->model.num_hidden_layers + 2) * sizeof *layers);
}
