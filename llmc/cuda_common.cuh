// What every kernel stands on: the element type, 16-byte accesses, reductions, errors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <type_traits>

#include "llmc/utils.h" // defines: Error, fail, CHECK, EXIT_OS

// ----------------------------------------------------------------------------
// errors: what goes wrong inside a step is the hardware's (or ours) and ends the program, not the run: started
// again, perhaps on other GPUs, it may go well

static inline void cuda_check(cudaError_t status, const char* call, const char* file, int line) {
    Error err = {0, {0}};
    if (status == cudaSuccess) return;
    fail(&err, EXIT_OS, "%s:%d: %s: %s", file, line, call, cudaGetErrorString(status));
    exit_with(&err);
}
#define CUDA_CHECK(call) cuda_check((call), #call, __FILE__, __LINE__)

// Behind every kernel launch: a launch that the device refuses says so here.
#define LAUNCH_CHECK() CUDA_CHECK(cudaGetLastError())

// ----------------------------------------------------------------------------
// the element type of activations and of the weights that the model computes with

#ifdef PRECISION_FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif

__host__ __device__ static inline float to_float(float x) { return x; }
__host__ __device__ static inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __host__ __device__ static inline T from_float(float x) {
    if constexpr (std::is_same_v<T, float>)
        return x;
    else
        return __float2bfloat16_rn(x);
}

// ----------------------------------------------------------------------------
// 16 bytes, the widest access a thread has

template <typename T> struct alignas(16) Vec {
    static constexpr int SIZE = 16 / sizeof(T);
    T at[SIZE];
};
enum { VEC = Vec<floatX>::SIZE }; // elements of floatX in one: 8, or 4 in fp32

template <typename T> __device__ static inline Vec<T> load_vec(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
template <typename T> __device__ static inline void store_vec(T* p, const Vec<T>& v) {
    *reinterpret_cast<Vec<T>*>(p) = v;
}

// ----------------------------------------------------------------------------
// reductions, in an order that depends on nothing but the number of threads

enum { WARP = 32 };

template <typename T> __device__ static inline T warp_sum(T x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, offset);
    return x;
}
__device__ static inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, offset));
    return x;
}

// The sum over a block of THREADS threads, in every thread. All of them must call it.
template <int THREADS, typename T> __device__ static inline T block_sum(T x) {
    __shared__ T of_warp[WARP];
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    x = warp_sum(x);
    __syncthreads(); // of_warp may still be read by the call before
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_sum(lane < THREADS / WARP ? of_warp[lane] : T(0));
}

__host__ __device__ static inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
