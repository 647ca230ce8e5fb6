// train_gpt_cpu with faults: see faulty.h.
#define VERSION "faulty"
#include "dev/test/faulty.h" // defines: faulty_load, faulty_start, fault_in_step

#include "llmc/layers_cpu.h" // defines: classifier

static bool loss_done; // in this step
static inline void faulty_classifier(real* losses, real* logits, const int* targets, real scale, int N, int V,
                                     int Vp, bool backward) {
    double value;
    classifier(losses, logits, targets, scale, N, V, Vp, backward);
    if (!loss_done && scale != 0 && fault_in_step("loss", &value)) losses[0] += (real)value, loss_done = true;
}

#define gpt_start_step right_start_step
#define gpt_load_batch right_load_batch
#define classifier faulty_classifier
#include "train_gpt.c"
#undef gpt_start_step
#undef gpt_load_batch

void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    faulty_load(rows, (size_t)num_rows * (size_t)(g->T + 1));
    right_load_batch(g, rows, num_rows, document_mask, eot_id);
}

void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps, int requests,
                    StepGuard guard) {
    double value;
    faulty_start(0), loss_done = false;
    if (fault_in_step("gradient", &value)) g->grads[0] += (real)value;
    right_start_step(g, run, lr, applied_steps, requests, guard);
}
