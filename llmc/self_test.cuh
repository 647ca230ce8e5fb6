// Is this GPU whole? Memory holds what is written to it, and a matmul has the one right answer: before a run of weeks
// starts, and in a second. What a GPU gets wrong now and then only, the guard finds while training (guard.h).
#pragma once
#include "llmc/device.cuh" // defines: device_free_memory
#include "llmc/matmul.cuh" // defines: Matmul, matmul_init, matmul_forward

enum { SELF_TEST_ROWS = 512, SELF_TEST_COLUMNS = 512, SELF_TEST_INNER = 512 };

// Different in neighbouring words, and with either value of each bit (flip) in turn.
static __device__ inline uint32_t self_test_word(size_t i, bool flip) {
    uint32_t word = (uint32_t)i * 2654435761u ^ (uint32_t)(i >> 32);
    return flip ? ~word : word;
}
static __global__ void self_test_fill_kernel(uint32_t* words, size_t n, bool flip) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        words[i] = self_test_word(i, flip);
}
static __global__ void self_test_compare_kernel(unsigned long long* wrong, const uint32_t* words, size_t n,
                                                bool flip) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        if (words[i] != self_test_word(i, flip)) atomicAdd(wrong, 1ULL);
}

// Whole numbers that bf16 holds, and so does every sum of two of them.
static __device__ inline float self_test_input(int row, int k) {
    return (float)((row * 7 + k * 13) % 61 - 30);
}
static __device__ inline int self_test_first(int column) { return column * 5 % SELF_TEST_INNER; }
static __device__ inline int self_test_second(int column) { return (column * 5 + 3) % SELF_TEST_INNER; }

// inp (rows, inner); weight (columns, inner) has a 1 and a -1 in each row, so that out = a difference of two inputs.
static __global__ void self_test_matrices_kernel(floatX* inp, floatX* weight) {
    int k = (int)threadIdx.x, row = (int)blockIdx.x;
    inp[row * SELF_TEST_INNER + k] = from_float<floatX>(self_test_input(row, k));
    float w = (float)((k == self_test_first(row)) - (k == self_test_second(row)));
    weight[row * SELF_TEST_INNER + k] = from_float<floatX>(w);
}
static __global__ void self_test_product_kernel(unsigned long long* wrong, const floatX* out) {
    int column = (int)threadIdx.x, row = (int)blockIdx.x;
    float right =
        self_test_input(row, self_test_first(column)) - self_test_input(row, self_test_second(column));
    if (to_float(out[row * SELF_TEST_COLUMNS + column]) != right) atomicAdd(wrong, 1ULL);
}

// A sixteenth of the memory that is free, more than caches hold, twice; then the matmul. False: err says why; *bad: the
// GPU is wrong.
static inline bool self_test(int compute, bool* bad, Error* err) { // compute: a ComputePrecision
    size_t words = device_free_memory() / 16 / sizeof(uint32_t), workspace = matmul_workspace_bytes();
    const size_t matrix = (size_t)SELF_TEST_ROWS * SELF_TEST_INNER;
    unsigned long long wrong[2] = {0, 0}, *counts;
    cudaStream_t stream;
    char* memory;
    Matmul mm;
    size_t bytes = words * sizeof(uint32_t), matrices = workspace + 3 * matrix * sizeof(floatX);
    if (bytes < matrices) bytes = matrices;
    if (cudaMalloc((void**)&memory, bytes) != cudaSuccess ||
        cudaMalloc((void**)&counts, sizeof wrong) != cudaSuccess)
        return fail(err, EXIT_OS, "there are no %zu bytes for the self-test (parallel.self_test)", bytes);
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CUDA_CHECK(cudaMemsetAsync(counts, 0, sizeof wrong, stream));
    for (int flip = 0; flip < 2; flip++) {
        self_test_fill_kernel<<<1024, 256, 0, stream>>>((uint32_t*)(void*)memory, words, flip);
        self_test_compare_kernel<<<1024, 256, 0, stream>>>(&counts[0], (uint32_t*)(void*)memory, words, flip);
        LAUNCH_CHECK();
    }
    floatX *inp = (floatX*)(void*)(memory + workspace), *weight = inp + matrix, *out = weight + matrix;
    bool ok = matmul_init(&mm, compute, memory, NULL, NULL, stream, err);
    if (ok) {
        self_test_matrices_kernel<<<SELF_TEST_ROWS, SELF_TEST_INNER, 0, stream>>>(inp, weight);
        matmul_forward(out, inp, weight, (floatX*)NULL, SELF_TEST_ROWS, SELF_TEST_INNER, SELF_TEST_COLUMNS,
                       &mm);
        self_test_product_kernel<<<SELF_TEST_ROWS, SELF_TEST_COLUMNS, 0, stream>>>(&counts[1], out);
        LAUNCH_CHECK();
        matmul_free(&mm);
    }
    CUDA_CHECK(cudaMemcpyAsync(wrong, counts, sizeof wrong, cudaMemcpyDeviceToHost, stream));
    CUDA_CHECK(cudaStreamSynchronize(stream));
    CUDA_CHECK(cudaStreamDestroy(stream));
    CUDA_CHECK(cudaFree(counts));
    CUDA_CHECK(cudaFree(memory));
    *bad = wrong[0] + wrong[1] != 0;
    if (wrong[0] != 0)
        return fail(err, EXIT_NO_DEVICE,
                    "this GPU's memory is bad: %llu of %zu words were not what was written", wrong[0],
                    2 * words);
    if (wrong[1] != 0)
        return fail(err, EXIT_NO_DEVICE,
                    "this GPU computes wrong: %llu of %d elements of a matmul with a known answer", wrong[1],
                    SELF_TEST_ROWS * SELF_TEST_COLUMNS);
    return ok;
}
