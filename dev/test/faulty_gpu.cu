// train_gpt with faults: see faulty.h.
#define VERSION "faulty"
#include "dev/test/faulty.h" // defines: faulty_load, faulty_start, fault_in_step

#include "llmc/global_norm.cuh" // defines: add_sum

static bool loss_done; // in this step
static __global__ void add_fault_kernel(ExactSum* sum, double value) { exact_add(sum, value); }
static void faulty_add_sum(ExactSum* sum, const float* x, int n, cudaStream_t stream) {
    double value;
    add_sum(sum, x, n, stream);
    if (loss_done || !fault_in_step("loss", &value)) return;
    add_fault_kernel<<<1, 1, 0, stream>>>(sum, value);
    LAUNCH_CHECK();
    loss_done = true;
}

#define gpt_start_step right_start_step
#define gpt_load_batch right_load_batch
#define add_sum faulty_add_sum
#include "train_gpt.cu"
#undef gpt_start_step
#undef gpt_load_batch

// memory[0] = change(memory[0]) on the device
template <typename X, typename F> static void change(X* memory, F change_value) {
    X x;
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaMemcpy(&x, memory, sizeof x, cudaMemcpyDeviceToHost));
    x = change_value(x);
    CUDA_CHECK(cudaMemcpy(memory, &x, sizeof x, cudaMemcpyHostToDevice));
}

void gpt_load_batch(GPT* g, const int32_t* rows, int num_rows, bool document_mask, int eot_id) {
    faulty_load(rows, (size_t)num_rows * (size_t)(g->T * g->place.cp_size + 1));
    right_load_batch(g, rows, num_rows, document_mask, eot_id);
}

void gpt_start_step(GPT* g, const RunConfig* run, double lr, uint64_t applied_steps, int requests,
                    StepGuard guard) {
    double value;
    faulty_start(g->place.rank), loss_done = false;
    if (fault_in_step("gradient", &value))
        change((float*)g->grads, [=](float x) { return x + (float)value; });
    if (!faulty.flipped && fault_in_step("weight", &value)) {
        change((uint16_t*)(void*)g->params, [](uint16_t x) { return (uint16_t)(x ^ 1); });
        faulty.flipped = true;
    }
    right_start_step(g, run, lr, applied_steps, requests, guard);
}
