// Kernels without bugs that come near to having some, and what the runtime promises: nothing may be reported,
// every line must be "ok". Prints TAP.
#include <cuda_runtime.h>
#include <type_traits>

#include "dev/test/emu/clean.cuh" // defines: twice, half_of

static int count, failed;
static void check(bool ok, const char* what) {
    printf("%s %d - %s\n", ok ? "ok" : "not ok", ++count, what);
    failed += !ok;
}

// ----------------------------------------------------------------------------
// what threads do together

template <typename T, int N> struct Pair { T at[N]; };

// A block's sum by a tree, three kinds of __shared__ at once, and a comma in a type.
template <typename T, int THREADS>
__global__ void __launch_bounds__(THREADS) tree_sum(T* out, const T* inp, int n) {
    __shared__ alignas(16) T part[THREADS];
    __shared__ Pair<T, 2> pair[2], *unused;
    extern __shared__ T row[];
    (void)unused;
    T sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += THREADS) row[i] = inp[(size_t)blockIdx.x * n + i];
    for (int i = (int)threadIdx.x; i < n; i += THREADS) sum += row[i];
    part[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) pair[1].at[1] = part[0];
    __syncthreads();
    if (threadIdx.x == 33) out[blockIdx.x] = pair[1].at[1];
}

// Every warp operation, its result per thread.
enum { WARP_RESULTS = 14 };
__global__ void warp_operations(int* out) {
    int t = (int)threadIdx.x, lane = t % 32, *result = out + t * WARP_RESULTS;
    unsigned all = 0xFFFFFFFFu, half = lane < 16 ? 0xFFFFu : 0xFFFF0000u;
    result[0] = __shfl_sync(all, lane, 5);
    result[1] = __shfl_xor_sync(all, lane, 3);
    result[2] = __shfl_up_sync(all, lane, 4);
    result[3] = __shfl_down_sync(all, lane, 30);
    result[4] = __shfl_xor_sync(all, lane, 9, 8); // leaves its segment: the own value
    result[5] = (int)__ballot_sync(all, lane % 3 == 0);
    result[6] = __any_sync(all, lane == 31) + 2 * __all_sync(all, lane >= 0) + 4 * __all_sync(all, lane > 0);
    result[7] = (int)__match_any_sync(all, lane % 4);
    result[8] = __reduce_add_sync(all, lane);
    result[9] = __reduce_max_sync(half, lane);
    result[10] = lane < 16 ? __shfl_sync(0xFFFFu, lane, 7) : -1; // the others are elsewhere
    result[11] = __syncthreads_count(lane == 0);
    result[12] = __syncthreads_or(t == 40) + 2 * __syncthreads_and(t != 40) + 4 * __syncthreads_and(t >= 0);
    result[13] = emu_warp_all(lane * lane)[6];
}

static bool warp_operation_right(int t, int which, int got) {
    int lane = t % 32;
    int multiples = 0;
    for (int i = 0; i < 32; i += 3) multiples |= (int)(1u << i);
    const int expected[WARP_RESULTS] = {5,
                                        lane ^ 3,
                                        lane < 4 ? lane : lane - 4,
                                        lane < 2 ? lane + 30 : lane,
                                        (lane ^ 9) / 8 > lane / 8 ? lane : lane ^ 9,
                                        multiples,
                                        3,
                                        (int)(0x11111111u << lane % 4),
                                        496,
                                        lane < 16 ? 15 : 31,
                                        lane < 16 ? 7 : -1,
                                        2,
                                        5,
                                        36};
    return got == expected[which];
}

// Lanes that have left are not waited for.
__global__ void lanes_leave(float* out) {
    if (threadIdx.x % 32 >= 20) return;
    float sum = (float)(threadIdx.x % 32);
    for (int offset = 16; offset > 0; offset /= 2) {
        float other = __shfl_down_sync(0xFFFFFFFFu, sum, (unsigned)offset);
        if ((int)(threadIdx.x % 32) + offset < 20) sum += other;
    }
    if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = sum;
}

__global__ void histogram(unsigned* bins, const int* values, int n) {
    __shared__ unsigned of_block[8];
    if (threadIdx.x < 8) of_block[threadIdx.x] = 0;
    __syncthreads();
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += (int)(gridDim.x * blockDim.x))
        atomicAdd(&of_block[values[i]], 1u);
    __syncthreads();
    if (threadIdx.x < 8) atomicAdd(&bins[threadIdx.x], of_block[threadIdx.x]);
}

// A value handed on within a warp, from lane to lane, with __syncwarp and reads by all.
__global__ void handed_on(float* out) {
    __shared__ float value[2];
    float* mine = &value[threadIdx.x / 32];
    if (threadIdx.x % 32 == 0) *mine = 0;
    for (unsigned turn = 0; turn < 32; turn++) {
        __syncwarp();
        float seen = *mine;
        __syncwarp();
        if (threadIdx.x % 32 == turn) *mine = seen + 1;
    }
    __syncwarp();
    out[threadIdx.x] = *mine;
}

__global__ void indices(dim3* out) {
    size_t block = blockIdx.x + gridDim.x * (blockIdx.y + (size_t)gridDim.y * blockIdx.z);
    size_t thread = threadIdx.x + blockDim.x * (threadIdx.y + (size_t)blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = dim3(blockIdx.x, threadIdx.y, threadIdx.z);
}

__global__ void set(float* x, float value) { x[threadIdx.x] = value; }
template <typename T> __global__ void add(T* x, T value) { x[threadIdx.x] += value; }

static void test_threads(void) {
    enum { BLOCKS = 5, N = 300 };
    double *inp, *out, host[BLOCKS * N], sums[BLOCKS];
    for (int i = 0; i < BLOCKS * N; i++) host[i] = i % 17;
    cudaMalloc(&inp, sizeof host);
    cudaMalloc(&out, sizeof sums);
    cudaMemcpy(inp, host, sizeof host, cudaMemcpyHostToDevice);
    tree_sum<double, 64><<<BLOCKS, 64, N * sizeof(double)>>>(out, // a launch over several lines
                                                             inp, N);
    cudaMemcpy(sums, out, sizeof sums, cudaMemcpyDeviceToHost);
    bool right = true;
    for (int b = 0; b < BLOCKS; b++) {
        double sum = 0;
        for (int i = 0; i < N; i++) sum += host[b * N + i];
        right = right && sum == sums[b];
    }
    check(right, "a block's sum by a tree in static and dynamic shared memory");
    cudaFree(inp), cudaFree(out);

    int *results, got[64 * WARP_RESULTS];
    cudaMalloc(&results, sizeof got);
    warp_operations<<<1, 64>>>(results);
    cudaMemcpy(got, results, sizeof got, cudaMemcpyDeviceToHost);
    for (int which = 0; which < WARP_RESULTS; which++) {
        char text[64];
        right = true;
        for (int t = 0; t < 64; t++)
            right = right && warp_operation_right(t, which, got[t * WARP_RESULTS + which]);
        snprintf(text, sizeof text, "warp operation %d", which);
        check(right, text);
    }
    cudaFree(results);

    float *x, values[64];
    cudaMalloc(&x, sizeof values);
    lanes_leave<<<1, 64>>>(x);
    cudaMemcpy(values, x, sizeof values, cudaMemcpyDeviceToHost);
    check(values[0] == 190 && values[1] == 190, "lanes that have left are not waited for");
    handed_on<<<1, 64>>>(x);
    cudaMemcpy(values, x, sizeof values, cudaMemcpyDeviceToHost);
    check(values[0] == 32 && values[63] == 32, "a value goes from lane to lane");
    cudaFree(x);

    unsigned *bins, counted[8];
    int *numbers, random[1000];
    for (int i = 0; i < 1000; i++) random[i] = i * i % 8;
    cudaMalloc(&bins, sizeof counted), cudaMalloc(&numbers, sizeof random);
    cudaMemset(bins, 0, sizeof counted);
    cudaMemcpy(numbers, random, sizeof random, cudaMemcpyHostToDevice);
    histogram<<<3, 96>>>(bins, numbers, 1000);
    cudaMemcpy(counted, bins, sizeof counted, cudaMemcpyDeviceToHost);
    check(counted[1] == 500 && counted[0] == 250 && counted[4] == 250,
          "atomics, within a block and between blocks");
    cudaFree(bins), cudaFree(numbers);

    dim3 *where, grid(2, 3, 2), block(4, 2, 3), seen[2 * 3 * 2 * 4 * 2 * 3];
    cudaMalloc(&where, sizeof seen);
    indices<<<grid, block>>>(where);
    cudaMemcpy(seen, where, sizeof seen, cudaMemcpyDeviceToHost);
    check(seen[24 + 4 * 2 + 5].x == 1 && seen[24 + 4 * 2 + 5].y == 1 && seen[24 + 4 * 2 + 5].z == 1,
          "three dimensions");
    cudaFree(where);
}

// ----------------------------------------------------------------------------
// the runtime

static cudaError_t launched(void) { return cudaGetLastError(); }

static void test_limits(void) {
    float* x;
    cudaMalloc(&x, 2048 * sizeof(float));
    set<<<0, 64>>>(x, 1);
    check(launched() == cudaErrorInvalidConfiguration, "an empty grid is refused");
    set<<<1, 1025>>>(x, 1);
    check(launched() == cudaErrorInvalidConfiguration, "1025 threads are refused");
    set<<<dim3(1, 65536), 1>>>(x, 1);
    check(launched() == cudaErrorInvalidConfiguration, "65536 blocks in y are refused");
    set<<<1, 64, 48 * 1024 + 1>>>(x, 1);
    check(launched() == cudaErrorInvalidValue, "more than 48 KiB of shared memory have to be asked for");
    check(cudaFuncSetAttribute(set, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024) == cudaSuccess,
          "asked");
    set<<<1, 64, 227 * 1024>>>(x, 1);
    check(launched() == cudaSuccess, "and are given");
    check(cudaFuncSetAttribute(set, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024 + 1) !=
              cudaSuccess,
          "more than 227 KiB there are not");
    check(cudaGetLastError() != cudaSuccess && cudaGetLastError() == cudaSuccess, "an error is told once");
    int blocks = 0;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, set, 256, 100 * 1024);
    check(blocks == 2, "occupancy by shared memory");
    void* p;
    check(cudaMalloc(&p, (size_t)1 << 50) == cudaErrorMemoryAllocation && p == NULL, "memory is finite");
    cudaGetLastError();
    check(cudaMemcpy(x + 2000, x, 64 * sizeof(float), cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue,
          "a copy across the end is refused");
    cudaGetLastError();
    size_t before, after, total;
    cudaMemGetInfo(&before, &total);
    cudaFree(x);
    cudaMemGetInfo(&after, &total);
    check(after - before == 2048 * sizeof(float) && after == total, "free memory");
}

static void test_streams(void) {
    float *x, *pinned, pageable[64];
    cudaStream_t a, b, blocking;
    cudaEvent_t first, second;
    cudaMalloc(&x, sizeof pageable);
    cudaMallocHost(&pinned, sizeof pageable);
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaStreamCreate(&blocking);
    cudaEventCreate(&first), cudaEventCreate(&second);

    for (int i = 0; i < 64; i++) pageable[i] = 5;
    cudaMemcpyAsync(x, pageable, sizeof pageable, cudaMemcpyHostToDevice, a);
    for (int i = 0; i < 64; i++) pageable[i] = 6;
    cudaMemcpyAsync(pageable, x, sizeof pageable, cudaMemcpyDeviceToHost, a);
    check(pageable[0] == 5,
          "a copy from pageable memory has read it when it returns, one to it has written it");

    set<<<1, 64, 0, a>>>(x, 1);
    cudaMemcpyAsync(pinned, x, sizeof pageable, cudaMemcpyDeviceToHost, a);
    pinned[0] = 9;
    check(cudaStreamQuery(a) == cudaErrorNotReady && pinned[0] == 9, "a copy to pinned memory is late");
    cudaStreamSynchronize(a);
    check(pinned[0] == 1 && cudaStreamQuery(a) == cudaSuccess, "and is there when somebody has waited");

    set<<<1, 64, 0, a>>>(x, 2);
    cudaEventRecord(first, a);
    cudaStreamWaitEvent(b, first);
    add<<<1, 64, 0, b>>>(x, 1.0f);
    cudaEventRecord(second, b);
    check(cudaEventQuery(second) == cudaErrorNotReady, "an event is not there before its stream is");
    cudaEventSynchronize(second);
    float ms = -1;
    check(cudaEventElapsedTime(&ms, first, second) == cudaSuccess && ms >= 0, "time between events");
    cudaMemcpy(pinned, x, sizeof pageable, cudaMemcpyDeviceToHost);
    check(pinned[7] == 3, "an event orders two streams");

    set<<<1, 64, 0, blocking>>>(x, 4);
    add<<<1, 64>>>(x, 1.0f); // the default stream waits for it, and it for the default stream
    add<<<1, 64, 0, blocking>>>(x, 10.0f);
    cudaMemcpyAsync(pinned, x, sizeof pageable, cudaMemcpyDeviceToHost, blocking);
    cudaStreamSynchronize(blocking);
    check(pinned[7] == 15, "the default stream and blocking streams wait for each other");

    pinned[0] = 0;
    cudaLaunchHostFunc(
        a, [](void* p) { *(float*)p = 77; }, pinned);
    check(pinned[0] == 0 && cudaStreamSynchronize(a) == cudaSuccess && pinned[0] == 77,
          "a function of the host");
    cudaEventDestroy(first), cudaEventDestroy(second);
    cudaStreamDestroy(a), cudaStreamDestroy(b), cudaStreamDestroy(blocking);
    cudaFree(x), cudaFreeHost(pinned);
}

static void test_graphs(void) {
    float *x, host[64];
    void* p;
    cudaStream_t a, b, other;
    cudaEvent_t fork, join;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    cudaMalloc(&x, 2 * sizeof host);
    cudaMemset(x, 0, 2 * sizeof host);
    cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking);
    cudaStreamCreate(&other);
    cudaEventCreate(&fork), cudaEventCreate(&join);

    cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal);
    add<<<1, 64, 0, a>>>(x, 1.0f);
    cudaEventRecord(fork, a);
    cudaStreamWaitEvent(b, fork);
    add<<<1, 64, 0, b>>>(x + 64, 2.0f);
    cudaEventRecord(join, b);
    cudaStreamWaitEvent(a, join);
    add<<<1, 64, 0, a>>>(x + 64, 3.0f);
    check(cudaStreamEndCapture(a, &graph) == cudaSuccess && graph != NULL, "two streams are captured");
    cudaMemcpy(host, x, sizeof host, cudaMemcpyDeviceToHost);
    check(host[0] == 0, "what is captured does not run");
    cudaGraphInstantiate(&exec, graph);
    for (int i = 0; i < 3; i++) cudaGraphLaunch(exec, a);
    cudaStreamSynchronize(a);
    cudaMemcpy(host, x + 64, sizeof host, cudaMemcpyDeviceToHost);
    check(host[0] == 15, "a graph runs as often as it is launched");
    cudaGraphDestroy(graph), cudaGraphExecDestroy(exec);

    cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal);
    check(cudaStreamSynchronize(a) == cudaErrorStreamCaptureUnsupported,
          "a capture forbids waiting for its stream");
    check(cudaStreamEndCapture(a, &graph) == cudaErrorStreamCaptureInvalidated && graph == NULL,
          "and is lost");
    cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal);
    check(cudaMalloc(&p, 16) == cudaErrorStreamCaptureUnsupported, "a capture forbids allocation");
    cudaStreamEndCapture(a, &graph);
    cudaStreamBeginCapture(other, cudaStreamCaptureModeThreadLocal);
    set<<<1, 64>>>(x, 1);
    check(launched() == cudaErrorStreamCaptureImplicit,
          "and the default stream, where it would be waited for");
    cudaStreamEndCapture(other, &graph);
    cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal);
    cudaEventRecord(fork, a);
    cudaStreamWaitEvent(b, fork);
    add<<<1, 64, 0, b>>>(x, 1.0f);
    check(cudaStreamEndCapture(a, &graph) == cudaErrorStreamCaptureUnjoined,
          "a stream that does not come back");
    cudaGetLastError();
    cudaEventDestroy(fork), cudaEventDestroy(join);
    cudaStreamDestroy(a), cudaStreamDestroy(b), cudaStreamDestroy(other);
    cudaFree(x);
}

int main() {
    test_threads();
    test_limits();
    test_streams();
    test_graphs();
    check(half_of(twice(21)) == 21, "an included file; // kernel<<<1, 1>>>(no launch, but text)");
    check(strcmp(__FILE__, "dev/test/emu/clean.cu") == 0 && __LINE__ > 300,
          "files and lines are the original's");
    printf("1..%d\n", count);
    return failed > 0;
}
