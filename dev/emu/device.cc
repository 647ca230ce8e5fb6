// The device that is emulated, as the environment describes it; errors; what a launch may ask for.
//
//     EMU_MEMORY=bytes    its memory (16 GiB)
//     EMU_ARCH=70         its compute capability times ten (90); kernels run from 80 on
//     EMU_NAME=text       what it is called (emulated GPU)
//     EMU_NO_DRIVER=1     a machine without a driver; =device: with a driver and without a device
//     EMU_DEVICES=n       how many of them there are (1); each process has its own memory of each
//     EMU_SEED=n          orders that CUDA leaves open (threads, blocks, streams) are drawn, not fixed
#include <stdlib.h>

#include <map>

#include "emu.h" // defines: EmuDevice

std::recursive_mutex emu_mutex;

enum {
    OLDEST_ARCHITECTURE = 80,
    MULTIPROCESSORS = 132,
    MAX_THREADS = 1024,
    THREADS_PER_MULTIPROCESSOR = 2048
};
enum { SHARED_DEFAULT = 48 << 10, SHARED_PER_MULTIPROCESSOR = 228 << 10, SHARED_RESERVED = 1 << 10 };

static cudaError_t last_error = cudaSuccess;
static int current_device;
static std::map<const void*, int> function_limits; // kernel -> bytes of dynamic shared memory

static unsigned long long environment_number(const char* name, unsigned long long otherwise) {
    const char* text = getenv(name);
    return text != NULL && *text != '\0' ? strtoull(text, NULL, 10) : otherwise;
}

const EmuDevice* emu_device(void) {
    static const EmuDevice device = {getenv("EMU_NO_DRIVER") == NULL, (int)environment_number("EMU_ARCH", 90),
                                     (int)environment_number("EMU_DEVICES", 1),
                                     (size_t)environment_number("EMU_MEMORY", 16ull << 30)};
    return &device;
}

// ----------------------------------------------------------------------------
// errors

cudaError_t emu_error(cudaError_t error) {
    if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
    return error;
}

cudaError_t emu_need_device(void) {
    if (emu_device()->present) return cudaSuccess;
    bool driver = strcmp(getenv("EMU_NO_DRIVER"), "device") == 0;
    return emu_error(driver ? cudaErrorNoDevice : cudaErrorInsufficientDriver);
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
    EmuLock lock;
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
#define EMU_ENTRY(name, value, text) {name, #name, text},
    EMU_ERRORS(EMU_ENTRY)
#undef EMU_ENTRY
};

const char* cudaGetErrorName(cudaError_t error) {
    for (const auto& e : errors)
        if (e.error == error) return e.name;
    return "unrecognized error code";
}
const char* cudaGetErrorString(cudaError_t error) {
    for (const auto& e : errors)
        if (e.error == error) return e.text;
    return "unrecognized error code";
}

// ----------------------------------------------------------------------------
// properties

cudaError_t cudaDriverGetVersion(int* version) {
    EmuLock lock;
    *version = emu_device()->present ? CUDART_VERSION : 0;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    EmuLock lock;
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
    EmuLock lock;
    *count = emu_device()->present ? emu_device()->count : 0;
    return emu_need_device();
}
cudaError_t cudaSetDevice(int device) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    if (device < 0 || device >= emu_device()->count) return emu_error(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
    EmuLock lock;
    *device = current_device;
    return emu_need_device();
}

static cudaError_t known_device(int device) {
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    return emu_error(device >= 0 && device < emu_device()->count ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    EmuLock lock;
    cudaError_t error = known_device(device);
    if (error != cudaSuccess) return error;
    memset(properties, 0, sizeof *properties);
    const char* name = getenv("EMU_NAME");
    snprintf(properties->name, sizeof properties->name, "%s", name != NULL ? name : "emulated GPU");
    properties->totalGlobalMem = emu_device()->memory;
    properties->major = emu_device()->architecture / 10;
    properties->minor = emu_device()->architecture % 10;
    properties->multiProcessorCount = MULTIPROCESSORS;
    properties->warpSize = warpSize;
    properties->maxThreadsPerBlock = MAX_THREADS;
    properties->maxThreadsPerMultiProcessor = THREADS_PER_MULTIPROCESSOR;
    properties->sharedMemPerBlock = SHARED_DEFAULT;
    properties->sharedMemPerBlockOptin = EMU_ARENA_BYTES;
    properties->sharedMemPerMultiprocessor = SHARED_PER_MULTIPROCESSOR;
    properties->regsPerBlock = 65536;
    properties->l2CacheSize = 50 << 20;
    properties->memoryBusWidth = 6144;
    properties->asyncEngineCount = 3;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    EmuLock lock;
    static const struct {
        cudaDeviceAttr attribute;
        int value;
    } values[] = {{cudaDevAttrMaxThreadsPerBlock, MAX_THREADS},
                  {cudaDevAttrMaxSharedMemoryPerBlock, SHARED_DEFAULT},
                  {cudaDevAttrWarpSize, warpSize},
                  {cudaDevAttrClockRate, 1980000},
                  {cudaDevAttrMultiProcessorCount, MULTIPROCESSORS},
                  {cudaDevAttrMemoryClockRate, 3201000},
                  {cudaDevAttrGlobalMemoryBusWidth, 6144},
                  {cudaDevAttrL2CacheSize, 50 << 20},
                  {cudaDevAttrMaxThreadsPerMultiProcessor, THREADS_PER_MULTIPROCESSOR},
                  {cudaDevAttrComputeCapabilityMajor, emu_device()->architecture / 10},
                  {cudaDevAttrComputeCapabilityMinor, emu_device()->architecture % 10},
                  {cudaDevAttrMaxSharedMemoryPerMultiprocessor, SHARED_PER_MULTIPROCESSOR},
                  {cudaDevAttrMaxSharedMemoryPerBlockOptin, EMU_ARENA_BYTES}};
    cudaError_t error = known_device(device);
    if (error != cudaSuccess) return error;
    for (const auto& v : values)
        if (v.attribute == attribute) {
            *value = v.value;
            return cudaSuccess;
        }
    return emu_error(cudaErrorInvalidValue);
}

cudaError_t cudaDeviceReset(void) { return cudaDeviceSynchronize(); }

// ----------------------------------------------------------------------------
// what a launch may ask for

size_t emu_dynamic_limit(const void* function) {
    auto found = function_limits.find(function);
    return found != function_limits.end() ? (size_t)found->second : (size_t)SHARED_DEFAULT;
}

cudaError_t emu_set_function_limit(const void* kernel, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess; // a hint
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > EMU_ARENA_BYTES)
        return emu_error(cudaErrorInvalidValue);
    if (value > SHARED_DEFAULT) function_limits[kernel] = value;
    return cudaSuccess;
}

cudaError_t emu_occupancy(int* blocks, int threads, size_t dynamic_shared) {
    if (threads < 1 || threads > MAX_THREADS) return emu_error(cudaErrorInvalidValue);
    size_t by_threads = THREADS_PER_MULTIPROCESSOR / (size_t)((threads + 31) / 32 * 32);
    size_t by_shared = SHARED_PER_MULTIPROCESSOR / (dynamic_shared + SHARED_RESERVED);
    *blocks = (int)(by_threads < by_shared ? by_threads : by_shared);
    if (*blocks > 32) *blocks = 32;
    return cudaSuccess;
}

static cudaError_t launch_error(const EmuLaunch& launch) {
    const dim3 &g = launch.grid, &n = launch.block;
    size_t threads = (size_t)n.x * n.y * n.z;
    if (emu_device()->architecture < OLDEST_ARCHITECTURE) return cudaErrorNoKernelImageForDevice;
    if (g.x == 0 || g.y == 0 || g.z == 0 || threads == 0) return cudaErrorInvalidConfiguration;
    if (g.x > 0x7FFFFFFFu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
    if (threads > MAX_THREADS || n.x > MAX_THREADS || n.y > MAX_THREADS || n.z > 64)
        return cudaErrorInvalidConfiguration;
    if (launch.shared > emu_dynamic_limit(launch.function)) return cudaErrorInvalidValue;
    return cudaSuccess;
}

bool emu_launchable(const EmuLaunch& launch) {
    EmuLock lock; // another thread may be running a kernel
    if (emu_in_kernel()) emu_report("launches %s: a kernel cannot", launch.name);
    return emu_need_device() == cudaSuccess && emu_error(launch_error(launch)) == cudaSuccess;
}

// ----------------------------------------------------------------------------
// the seed

static unsigned long long random_state(void) {
    static const unsigned long long seed = environment_number("EMU_SEED", 0);
    return seed;
}
bool emu_shuffled(void) {
    static const bool shuffled = random_state() != 0;
    return shuffled;
}

unsigned emu_random(unsigned n) { // SplitMix64
    static unsigned long long state = random_state() * 0x9E3779B97F4A7C15ull;
    unsigned long long z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return (unsigned)(((z ^ (z >> 31)) >> 32) * n >> 32);
}
