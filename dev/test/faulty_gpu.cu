// train_gpt with faults: see faulty.h.
#define VERSION "faulty"
#include "dev/test/faulty.h" // defines: faulty_load, faulty_start, fault_in_step

#include "llmc/attention.cuh"   // defines: attention_forward, attention_backward
#include "llmc/global_norm.cuh" // defines: add_sum
#include "llmc/matmul.cuh"      // defines: matmul_backward, matmul_weight_gradient
#include "llmc/norm.cuh"        // defines: residual_norm_forward, residual_forward

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

// One bit flips behind one call of a step, once: in bf16 it makes a number 2^16 times as large, or as small, so that it
// cannot get lost among others.
typedef struct {
    const char* what;
    int calls; // in this step
} FlipPlace;
static FlipPlace forward = {"forward", 0}, attention = {"attention", 0}, matrix = {"matrix", 0},
                 residual_stream = {"stream", 0};

static __global__ void flip_kernel(uint16_t* number) { *number ^= 0x800; }
static void flip_after_call(FlipPlace* place, void* number, cudaStream_t stream) {
    double call;
    if (faulty.flipped || !fault_in_step(place->what, &call) || place->calls++ != (int)call) return;
    flip_kernel<<<1, 1, 0, stream>>>((uint16_t*)number);
    LAUNCH_CHECK();
    faulty.flipped = true;
}

static void faulty_attention_forward(floatX* out, float* lse, const floatX* qkv, const floatX* kv,
                                     const int* doc_start, AttentionShape shape, cudaStream_t stream) {
    attention_forward(out, lse, qkv, kv, doc_start, shape, stream);
    flip_after_call(&forward, out, stream);
}

// The query's gradient in the last row.
static void faulty_attention_backward(floatX* dqkv, floatX* dkv, void* scratch, const floatX* dout,
                                      const floatX* qkv, const floatX* kv, const floatX* out,
                                      const float* lse, const int* doc_start, AttentionShape shape,
                                      cudaStream_t stream) {
    size_t row = (size_t)((shape.NH + 2 * shape.NKV) * shape.HS), rows = (size_t)(shape.B * shape.T);
    attention_backward(dqkv, dkv, scratch, dout, qkv, kv, out, lse, doc_start, shape, stream);
    flip_after_call(&attention, dqkv + (rows - 1) * row, stream);
}

template <typename Grad>
static void faulty_matmul_weight_gradient(Grad* dweight, Grad* dbias, const floatX* dout, const floatX* inp,
                                          int N, int C, int OC, Matmul* mm) {
    matmul_weight_gradient(dweight, dbias, dout, inp, N, C, OC, mm);
    flip_after_call(&matrix, dweight, mm->stream);
}

template <typename Grad>
static void faulty_matmul_backward(floatX* dinp, Grad* dweight, Grad* dbias, const floatX* dout,
                                   const floatX* inp, const floatX* weight, int N, int C, int OC,
                                   Matmul* mm) {
    matmul_backward(dinp, dweight, dbias, dout, inp, weight, N, C, OC, mm);
    if (dweight != NULL) flip_after_call(&matrix, dweight, mm->stream);
}

static void faulty_residual_norm_forward(floatX* residual, floatX* out, float* mean, float* rstd,
                                         const floatX* a, const floatX* b, const floatX* weight,
                                         const floatX* bias, int N, int C, float eps, int kind,
                                         cudaStream_t stream) {
    residual_norm_forward(residual, out, mean, rstd, a, b, weight, bias, N, C, eps, kind, stream);
    flip_after_call(&residual_stream, out, stream);
}

static void faulty_residual_forward(floatX* out, const floatX* a, const floatX* b, size_t n,
                                    cudaStream_t stream) {
    residual_forward(out, a, b, n, stream);
    flip_after_call(&residual_stream, out, stream);
}

#define gpt_start_step right_start_step
#define gpt_load_batch right_load_batch
#define add_sum faulty_add_sum
#define residual_norm_forward faulty_residual_norm_forward
#define residual_forward faulty_residual_forward
#define attention_forward faulty_attention_forward
#define attention_backward faulty_attention_backward
#define matmul_backward faulty_matmul_backward
#define matmul_weight_gradient faulty_matmul_weight_gradient
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
    forward.calls = attention.calls = matrix.calls = residual_stream.calls = 0;
    if (fault_in_step("gradient", &value))
        change((float*)g->grads, [=](float x) { return x + (float)value; });
    if (!faulty.flipped && fault_in_step("weight", &value)) {
        change((uint16_t*)(void*)g->params, [](uint16_t x) { return (uint16_t)(x ^ 1); });
        faulty.flipped = true;
    }
    right_start_step(g, run, lr, applied_steps, requests, guard);
}
