// The GPU: is there one, can this program use it, how large is it, and how fast could it be.
#pragma once
#include "llmc/cuda_common.cuh" // defines: CUDA_CHECK
#include "llmc/gpu_peaks.h"     // defines: gpu_peak_flops

enum { OLDEST_ARCHITECTURE = 80 }; // bf16 tensor cores and cp.async came with sm_80

typedef struct {
    char name[256];
    int number;          // among those that are visible
    int architecture;    // 90 for sm_90
    size_t memory;       // bytes
    int driver, runtime; // CUDA versions, 13000 for 13.0
} Device;

static __global__ void device_probe_kernel() {}

// Which of this machine's processes this is, where each has a GPU of its own.
static inline int* device_local_rank(void) {
    static int local_rank;
    return &local_rank;
}

// Finds this process's GPU and makes it current: the only one that is visible, or the one of its number. Anything missing is one sentence and EXIT_NO_DEVICE.
static inline bool device_open(Device* device, Error* err) {
    int count = 0;
    memset(device, 0, sizeof *device);
    cudaDriverGetVersion(&device->driver);
    cudaRuntimeGetVersion(&device->runtime);
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver)
        return fail(
            err, EXIT_NO_DEVICE,
            "there is no NVIDIA driver, or one too old, for CUDA %d.%d, which this program is built with "
            "(the driver speaks %d.%d): install a newer driver, or use train_gpt_cpu",
            device->runtime / 1000, device->runtime % 1000 / 10, device->driver / 1000,
            device->driver % 1000 / 10);
    if (status != cudaSuccess || count == 0) {
        const char* visible = getenv("CUDA_VISIBLE_DEVICES");
        return fail(err, EXIT_NO_DEVICE,
                    "no GPU that CUDA can use (%s; CUDA_VISIBLE_DEVICES is %s): check nvidia-smi, or use "
                    "train_gpt_cpu",
                    status == cudaSuccess ? "none is visible" : cudaGetErrorString(status),
                    visible != NULL ? visible : "not set");
    }
    cudaDeviceProp properties;
    int number = count == 1 ? 0 : *device_local_rank();
    if (number >= count)
        return fail(
            err, EXIT_NO_DEVICE,
            "process %d of this machine has no GPU: %d are visible; start at most that many processes here",
            number, count);
    if ((status = cudaSetDevice(number)) != cudaSuccess ||
        (status = cudaGetDeviceProperties(&properties, number)) != cudaSuccess)
        return fail(err, EXIT_NO_DEVICE, "GPU %d cannot be used: %s", number, cudaGetErrorString(status));
    snprintf(device->name, sizeof device->name, "%s", properties.name);
    device->number = number;
    device->architecture = 10 * properties.major + properties.minor;
    device->memory = properties.totalGlobalMem;
    if (device->architecture < OLDEST_ARCHITECTURE)
        return fail(
            err, EXIT_NO_DEVICE,
            "%s is sm_%d; this program needs sm_%d (A100) or newer: use another GPU, or train_gpt_cpu",
            device->name, device->architecture, OLDEST_ARCHITECTURE);
    device_probe_kernel<<<1, 1>>>();
    if ((status = cudaGetLastError()) != cudaSuccess || (status = cudaDeviceSynchronize()) != cudaSuccess)
        return fail(err, EXIT_NO_DEVICE,
                    "%s (sm_%d) does not run this program: %s; build it for this GPU with `make GPU_ARCH=%d`",
                    device->name, device->architecture, cudaGetErrorString(status), device->architecture);
    return true;
}

// Bytes that can still be allocated on the current GPU.
static inline size_t device_free_memory(void) {
    size_t free_bytes = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
    return free_bytes;
}
