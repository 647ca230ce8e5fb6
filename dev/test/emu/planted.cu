// One bug of every kind that the emulator is there to find, each under a name: `planted NAME` must be
// stopped. Of most there is a repaired twin, `planted NAME fixed`, that must run through.
#include <cuda_runtime.h>

#define OR_FIXED(bug, repair)                                                                                \
    if (fixed)                                                                                               \
        repair;                                                                                              \
    else                                                                                                     \
        bug

// ----------------------------------------------------------------------------
// barriers and warp operations

__global__ void barrier_exit(float* x, bool fixed) {
    if (!fixed && threadIdx.x >= 40) return;
    __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void barrier_branch(float* x, bool fixed) {
    if (fixed || threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void barrier_count(float* x, bool fixed) {
    for (unsigned i = 0; i < (fixed ? 2 : 2 + threadIdx.x / 32); i++) __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void barrier_and_warp(float* x, bool fixed) { // the first warp's lanes split up
    if (!fixed && threadIdx.x == 3)
        __syncwarp();
    else
        __syncthreads();
    x[threadIdx.x] = 1;
}

__global__ void shuffle_mask(float* x, bool fixed) {
    unsigned mask = fixed || threadIdx.x % 2 ? 0xFFFFFFFFu : 0x55555555u | 1u << threadIdx.x % 32 | 2u;
    x[threadIdx.x] = __shfl_xor_sync(mask, (float)threadIdx.x, 1);
}

__global__ void shuffle_outside(float* x, bool fixed) {
    x[threadIdx.x] = __shfl_sync(fixed ? 0xFFFFFFFFu : 0xFFFFu, (float)threadIdx.x, 0);
}

__global__ void shuffle_branch(float* x, bool fixed) { // a shuffle in a branch that half of the lanes take
    float value = (float)threadIdx.x;
    if (fixed || threadIdx.x % 32 < 16) value = __shfl_down_sync(0xFFFFFFFFu, value, 16);
    x[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, value, 0);
}

// ----------------------------------------------------------------------------
// memory: AddressSanitizer's, and the check build's

__global__ void global_beyond(float* x, bool fixed) { x[threadIdx.x + (fixed ? 0 : 1)] = 1; }

__global__ void shared_beyond(float* x, bool fixed) {
    __shared__ float a[64], b[64];
    a[threadIdx.x + (fixed ? 0 : 1)] = 1, b[threadIdx.x] = 2;
    __syncthreads();
    x[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x];
}

__global__ void dynamic_beyond(float* x, bool fixed) {
    extern __shared__ float a[];
    a[threadIdx.x + (fixed ? 0 : 1)] = 1;
    __syncthreads();
    x[threadIdx.x] = a[threadIdx.x];
}

// ----------------------------------------------------------------------------
// the check build's: shared memory nobody wrote, races

__global__ void unwritten(float* x, bool fixed) {
    __shared__ float a[64];
    if (fixed || threadIdx.x < 63) a[threadIdx.x] = 1;
    __syncthreads();
    x[threadIdx.x] = a[63 - threadIdx.x];
}

__global__ void unwritten_by_block(float* x, bool fixed) { // another block's values are none
    __shared__ float a;
    if (threadIdx.x == 0 && (fixed || blockIdx.x == 0)) a = 1;
    __syncthreads();
    x[blockIdx.x * blockDim.x + threadIdx.x] = a;
}

__global__ void no_barrier(float* x, bool fixed) {
    __shared__ float a[64];
    a[threadIdx.x] = 1;
    OR_FIXED(__syncwarp(), __syncthreads());
    x[threadIdx.x] = a[63 - threadIdx.x];
}

__global__ void no_second_barrier(float* x, bool fixed) { // the array is used again while others still read
    __shared__ float a[64];
    float sum = 0;
    for (int i = 0; i < 2; i++) {
        a[threadIdx.x] = (float)i;
        __syncthreads();
        sum += a[63 - threadIdx.x];
        OR_FIXED(__syncwarp(), __syncthreads());
    }
    x[threadIdx.x] = sum;
}

__global__ void no_syncwarp(float* x, bool fixed) {
    __shared__ float a[64];
    a[threadIdx.x] = 1;
    if (fixed) __syncwarp();
    x[threadIdx.x] = a[threadIdx.x ^ 1];
}

__global__ void half_syncwarp(float* x, bool fixed) { // the halves of the warp do not hear of each other
    __shared__ float a[64];
    a[threadIdx.x] = 1;
    __syncwarp(fixed ? 0xFFFFFFFFu : threadIdx.x % 32 < 16 ? 0xFFFFu : 0xFFFF0000u);
    x[threadIdx.x] = a[threadIdx.x ^ 16];
}

__global__ void shuffle_no_fence(float* x, bool fixed) { // a shuffle brings lanes together, not their writes
    __shared__ float a[64];
    a[threadIdx.x] = 1;
    if (fixed) __syncwarp();
    float sum = __shfl_xor_sync(0xFFFFFFFFu, a[threadIdx.x], 1);
    x[threadIdx.x] = sum + a[threadIdx.x ^ 1];
}

__global__ void two_writers(float* x, bool fixed) {
    __shared__ float a;
    if (fixed ? threadIdx.x == 0 : threadIdx.x % 32 == 0) a = (float)threadIdx.x;
    __syncthreads();
    x[threadIdx.x] = a;
}

__global__ void write_after_reads(float* x, bool fixed) { // three warps read, one of the readers writes
    __shared__ float a;
    if (threadIdx.x == 0) a = 1;
    __syncthreads();
    float value = a;
    if (fixed) __syncthreads();
    if (threadIdx.x == 0) a = value + 1;
    x[threadIdx.x] = value;
}

__global__ void last_reader_writes(float* x,
                                   bool fixed) { // all lanes of a warp read; the last to do so writes
    __shared__ float a[2];
    float* mine = &a[threadIdx.x / 32];
    if (threadIdx.x % 32 == 0) *mine = 1;
    __syncwarp();
    float value = *mine;
    if (fixed) __syncwarp();
    if (threadIdx.x % 32 == 30) *mine = value + 1; // 31 came last to the barrier and went on first
    x[threadIdx.x] = value;
}

__global__ void two_blocks(float* x, bool fixed) {
    x[(fixed ? blockIdx.x * blockDim.x : 0) + threadIdx.x] = 1;
}

__global__ void block_reads_block(float* x, bool fixed) {
    size_t i = blockIdx.x * blockDim.x + threadIdx.x;
    float before = fixed || blockIdx.x == 0 ? 0 : x[i - blockDim.x];
    x[i] = before + 1;
}

__global__ void threads_in_global(float* x, bool fixed) { // global memory needs barriers as well
    x[threadIdx.x] = 1;
    if (fixed) __syncthreads();
    float other = x[63 - threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = other;
}

__global__ void unatomic(float* x, bool fixed) {
    int* counter = (int*)(void*)x;
    if (fixed)
        atomicAdd(counter, 1);
    else
        *counter += 1;
}

// ----------------------------------------------------------------------------
// what the host does wrong

__global__ void set(float* x, float value) { x[threadIdx.x] = value; }
__global__ void copy(float* out, const float* inp) { out[threadIdx.x] = inp[threadIdx.x]; }
template <int BYTES> __global__ void large(float* x) {
    __shared__ char a[BYTES];
    a[threadIdx.x] = (char)threadIdx.x;
    x[threadIdx.x] = a[threadIdx.x];
}

static bool all_equal(const float* host, float value) {
    bool equal = true;
    for (int i = 0; i < 64; i++) equal = equal && host[i] == value;
    return equal;
}

static bool use_after_free(float* x, bool fixed) {
    float* y;
    cudaMalloc(&y, 64 * sizeof(float));
    set<<<1, 64>>>(y, 1);
    if (!fixed) cudaFree(y);
    copy<<<1, 64>>>(x, y);
    cudaDeviceSynchronize();
    if (fixed) cudaFree(y);
    return true;
}

static bool host_reads_device(float* x, bool fixed) {
    float value = 1;
    set<<<1, 64>>>(x, 1);
    cudaDeviceSynchronize();
    if (fixed)
        cudaMemcpy(&value, x, sizeof value, cudaMemcpyDeviceToHost);
    else
        value = *(volatile float*)x;
    return value == 1;
}

static bool kernel_reads_host(float* x, bool fixed) {
    float *pageable = (float*)calloc(64, sizeof(float)), *pinned;
    cudaMallocHost(&pinned, 64 * sizeof(float));
    copy<<<1, 64>>>(x, fixed ? pinned : pageable);
    cudaDeviceSynchronize();
    free(pageable);
    cudaFreeHost(pinned);
    return true;
}

static bool no_event_wait(float* x, bool fixed) { // one stream's copy overtakes the other's kernel
    cudaStream_t compute, copies;
    cudaEvent_t done;
    float* host;
    cudaMallocHost(&host, 64 * sizeof(float));
    cudaStreamCreateWithFlags(&compute, cudaStreamNonBlocking);
    cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking);
    cudaEventCreateWithFlags(&done, cudaEventDisableTiming);
    set<<<1, 64, 0, compute>>>(x, 7);
    cudaEventRecord(done, compute);
    if (fixed) cudaStreamWaitEvent(copies, done);
    cudaMemcpyAsync(host, x, 64 * sizeof(float), cudaMemcpyDeviceToHost, copies);
    cudaStreamSynchronize(copies);
    bool right = all_equal(host, 7);
    cudaDeviceSynchronize();
    cudaEventDestroy(done);
    cudaStreamDestroy(compute);
    cudaStreamDestroy(copies);
    cudaFreeHost(host);
    return right;
}

static bool pinned_too_early(float* x, bool fixed) { // the source is overwritten before the copy has read it
    float* host;
    cudaMallocHost(&host, 64 * sizeof(float));
    for (int i = 0; i < 64; i++) host[i] = 3;
    cudaMemcpyAsync(x, host, 64 * sizeof(float), cudaMemcpyHostToDevice);
    if (fixed) cudaStreamSynchronize(0);
    for (int i = 0; i < 64; i++) host[i] = 4;
    cudaMemcpy(host, x, 64 * sizeof(float), cudaMemcpyDeviceToHost);
    bool right = all_equal(host, 3);
    cudaFreeHost(host);
    return right;
}

static bool stale_shared(float* x, bool fixed) { // what the block before left there must not help
    float host[128], sum = 0;
    float* y;
    cudaMalloc(&y, sizeof host);
    unwritten_by_block<<<2, 64>>>(y, fixed);
    cudaMemcpy(host, y, sizeof host, cudaMemcpyDeviceToHost);
    cudaFree(y);
    for (float value : host) sum += value;
    (void)x;
    return sum == 128;
}

static bool shared_too_large(float* x, bool fixed) {
    if (fixed)
        large<48 * 1024><<<1, 64>>>(x);
    else
        large<48 * 1024 + 4><<<1, 64>>>(x);
    return cudaDeviceSynchronize() == cudaSuccess;
}

// ----------------------------------------------------------------------------

typedef void (*Kernel)(float*, bool);
static const struct {
    const char* name;
    Kernel kernel;                    // with 64 threads each, or
    bool (*host)(float*, bool fixed); // a part of a program; false: it saw a wrong result
    unsigned blocks;
} bugs[] = {{"barrier_exit", barrier_exit, NULL, 1},
            {"barrier_branch", barrier_branch, NULL, 1},
            {"barrier_count", barrier_count, NULL, 1},
            {"barrier_and_warp", barrier_and_warp, NULL, 1},
            {"shuffle_mask", shuffle_mask, NULL, 1},
            {"shuffle_outside", shuffle_outside, NULL, 1},
            {"shuffle_branch", shuffle_branch, NULL, 1},
            {"global_beyond", global_beyond, NULL, 1},
            {"shared_beyond", shared_beyond, NULL, 1},
            {"dynamic_beyond", dynamic_beyond, NULL, 1},
            {"unwritten", unwritten, NULL, 1},
            {"unwritten_by_block", unwritten_by_block, NULL, 2},
            {"no_barrier", no_barrier, NULL, 1},
            {"no_second_barrier", no_second_barrier, NULL, 1},
            {"no_syncwarp", no_syncwarp, NULL, 1},
            {"half_syncwarp", half_syncwarp, NULL, 1},
            {"shuffle_no_fence", shuffle_no_fence, NULL, 1},
            {"two_writers", two_writers, NULL, 1},
            {"write_after_reads", write_after_reads, NULL, 1},
            {"last_reader_writes", last_reader_writes, NULL, 1},
            {"two_blocks", two_blocks, NULL, 2},
            {"block_reads_block", block_reads_block, NULL, 2},
            {"threads_in_global", threads_in_global, NULL, 1},
            {"unatomic", unatomic, NULL, 1},
            {"use_after_free", NULL, use_after_free, 1},
            {"host_reads_device", NULL, host_reads_device, 1},
            {"kernel_reads_host", NULL, kernel_reads_host, 1},
            {"no_event_wait", NULL, no_event_wait, 1},
            {"pinned_too_early", NULL, pinned_too_early, 1},
            {"stale_shared", NULL, stale_shared, 1},
            {"shared_too_large", NULL, shared_too_large, 1}};

int main(int argc, char** argv) {
    for (const auto& bug : bugs) {
        if (argc < 2 || strcmp(argv[1], bug.name) != 0) continue;
        bool fixed = argc > 2, right = true;
        float* x;
        cudaMalloc(&x, bug.blocks * 64 * sizeof(float));
        cudaMemset(x, 0, bug.blocks * 64 * sizeof(float));
        cudaDeviceSynchronize(); // streams that do not wait for the default stream come next
        if (bug.kernel != NULL)
            bug.kernel<<<bug.blocks, 64, 64 * sizeof(float)>>>(x, fixed);
        else
            right = bug.host(x, fixed);
        bool ran = cudaDeviceSynchronize() == cudaSuccess && cudaGetLastError() == cudaSuccess;
        cudaFree(x);
        printf("%s: %s\n", bug.name, right ? "ran through" : "gave a wrong result");
        return ran && right ? 0 : 1;
    }
    fprintf(stderr, "planted: no such bug\n");
    return 2;
}
