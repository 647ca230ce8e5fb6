// The CPU reference in fp64 for test_gpt2: see reference.h. It is compiled with -DREAL=double.
#define TESTING
#include "train_gpt.c"

#include "dev/test/reference.h" // defines: the functions below

struct Reference {
    GPT gpt;
};

Reference* reference_create(const RunConfig* run) {
    Error err = {0, {0}};
    Reference* r = (Reference*)calloc_check(1, sizeof *r);
    RunConfig fp32 = *run; // which is what the program calls its own type
    fp32.precision.compute = COMPUTE_FP32;
    if (!gpt_create(&r->gpt, &fp32, run->batch.micro_batch_size, run->batch.sequence_length, true, &err))
        exit_with(&err);
    return r;
}

void reference_free(Reference* r) {
    gpt_free(&r->gpt);
    free(r);
}

double* reference_weights(Reference* r) { return r->gpt.params; }
double* reference_grads(Reference* r) { return r->gpt.grads; }

double reference_gradients(Reference* r, const int32_t* rows, bool mask) {
    GPT* g = &r->gpt;
    int N = g->B * g->T;
    const int* doc_start = split_rows(g, rows, g->B, mask, 0);
    gpt_forward(g, g->inputs, doc_start, g->B);
    double sum = gpt_loss(g, g->targets, g->B, 1.0 / N);
    gpt_backward(g, g->inputs, g->B);
    return sum;
}

double reference_step(Reference* r, const RunConfig* run, const int32_t* rows, double lr,
                      uint64_t applied_steps, double* grad_norm) {
    gpt_load_batch(&r->gpt, rows, run->batch.global_batch_size, false, -1);
    gpt_start_step(&r->gpt, run, lr, applied_steps);
    StepResult result = gpt_finish_step(&r->gpt);
    *grad_norm = result.grad_norm;
    return result.loss;
}
