// What this GPU reaches right now, for the estimates of `plan`: a matmul of the model's own shape, and a copy.
#pragma once
#include "llmc/config.h"        // defines: RunConfig
#include "llmc/cuda_common.cuh" // defines: floatX, CUDA_CHECK, ceil_div
#include "llmc/matmul.cuh"      // defines: Matmul, matmul_forward

// Numbers of both signs and many sizes: a matmul on zeros draws less power, and runs faster than a real one.
static __global__ void probe_fill_kernel(floatX* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] = from_float<floatX>((float)(int32_t)((uint32_t)i * 2654435761u) * 0x1p-31f);
}

// Seconds of the fastest of a few calls of run(context).
template <typename Run> static inline double probe_seconds(cudaStream_t stream, Run run) {
    cudaEvent_t begin, end;
    float best = INFINITY;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    for (int i = 0; i < 5; i++) {
        float milliseconds;
        CUDA_CHECK(cudaEventRecord(begin, stream));
        run();
        CUDA_CHECK(cudaEventRecord(end, stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        CUDA_CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
        best = i > 0 ? fminf(best, milliseconds) : best; // the first loads and plans
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    return 1e-3 * (double)best;
}

// FLOP/s and bytes/s (read and written); 0 where there is no memory for the attempt.
static inline void probe_rates(const RunConfig* run, double* matmul_rate, double* copy_rate) {
    int rows = run->batch.micro_batch_size * run->batch.sequence_length, C = run->model.hidden_size;
    int FC = (int)model_dim(&run->model, DIM_FC);
    rows = rows < 8192 ? rows : 8192;
    size_t inp = (size_t)rows * (size_t)C, weight = (size_t)C * (size_t)FC, out = (size_t)rows * (size_t)FC;
    size_t elements = inp + weight + out, workspace = matmul_workspace_bytes();
    char* memory = NULL;
    cudaStream_t stream;
    Matmul mm;
    Error err = {0, {0}};
    *matmul_rate = *copy_rate = 0;
    if (cudaMalloc((void**)&memory, workspace + elements * sizeof(floatX)) != cudaSuccess) {
        cudaGetLastError(); // said by the zeros
        return;
    }
    floatX* x = (floatX*)(void*)(memory + workspace);
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    probe_fill_kernel<<<(unsigned)ceil_div(elements, 256), 256, 0, stream>>>(x, elements);
    LAUNCH_CHECK();
    if (matmul_init(&mm, run->precision.compute, memory, NULL, NULL, stream, &err)) {
        double s = probe_seconds(
            stream, [&] { matmul_forward(x + inp + weight, x, x + inp, (floatX*)NULL, rows, C, FC, &mm); });
        *matmul_rate = 2.0 * (double)rows * C * FC / s;
        matmul_free(&mm);
    }
    size_t half = elements / 2 * sizeof(floatX);
    double s = probe_seconds(stream, [&] {
        CUDA_CHECK(cudaMemcpyAsync(memory + workspace + half, x, half, cudaMemcpyDeviceToDevice, stream));
    });
    *copy_rate = 2.0 * (double)half / s;
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaStreamDestroy(stream));
    CUDA_CHECK(cudaFree(memory));
}
