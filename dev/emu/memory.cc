// Memory of the device and page-locked memory of the host: allocations of exactly the size asked for, so that
// AddressSanitizer sees the first byte beyond; filled with 0xFF, NaN in every float type.
#include <stdlib.h>
#include <sys/mman.h>

#include <map>

#include "emu.h" // defines: EmuAllocation

enum { ALIGNMENT = 256, PAGE = 4096 };

static std::map<const char*, EmuAllocation> allocations; // by first byte
static size_t device_bytes;                              // allocated on the device

static EmuAllocation* last_found;

EmuAllocation* emu_find_allocation(const void* address) {
    const char* p = (const char*)address;
    if (last_found != NULL && p >= last_found->begin && p < last_found->begin + last_found->bytes)
        return last_found;
    auto after = allocations.upper_bound(p);
    if (after == allocations.begin()) return NULL;
    EmuAllocation* a = &(--after)->second;
    return p < a->begin + a->bytes ? last_found = a : NULL;
}

// ----------------------------------------------------------------------------
// the range of a check build: no address is used twice, so that what was freed stays invalid

static const size_t RANGE_BYTES = (size_t)1 << 40;
static char *range_begin, *range_used;

bool emu_in_device_range(const void* address) {
    return range_begin != NULL && (const char*)address >= range_begin && (const char*)address < range_used;
}

static void* allocate_in_range(size_t bytes) {
    if (range_begin == NULL) {
        void* range = mmap(NULL, RANGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) return NULL;
        range_begin = range_used = (char*)range;
    }
    size_t pages = (bytes + 2 * PAGE - 1) / PAGE * PAGE; // one page at least stays closed behind it
    if (pages > (size_t)(range_begin + RANGE_BYTES - range_used)) return NULL;
    char* memory = range_used;
    range_used += pages;
    return mprotect(memory, (bytes + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE) == 0 ? memory : NULL;
}

static void* take_memory(size_t bytes, bool pinned) {
    void* memory = NULL;
    if (emu_checker != NULL && !pinned) return allocate_in_range(bytes);
    return posix_memalign(&memory, ALIGNMENT, bytes) == 0 ? memory : NULL;
}

static void give_memory(const EmuAllocation* a) {
    if (!emu_in_device_range(a->begin))
        free(a->begin);
    else
        mmap(a->begin, (a->bytes + PAGE - 1) / PAGE * PAGE, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

// ----------------------------------------------------------------------------
// allocation

// EMU_FAULT=memory: after every operation the last bit of each large allocation's 1000th word is 1.
void emu_stick(void) {
    static const char* fault = getenv("EMU_FAULT");
    if (fault == NULL || strcmp(fault, "memory") != 0) return;
    for (const auto& a : allocations)
        if (!a.second.pinned && a.second.bytes >= 1 << 20) ((uint32_t*)(void*)a.second.begin)[1000] |= 1;
}

static cudaError_t allocate(void** pointer, size_t bytes, bool pinned) {
    EmuLock lock;
    *pointer = NULL;
    if (emu_in_kernel()) emu_report("allocates memory: a kernel cannot");
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    cudaError_t forbidden = emu_forbidden_in_capture();
    if (forbidden != cudaSuccess) return emu_error(forbidden);
    if (bytes == 0) return cudaSuccess;
    if (!pinned && (bytes > emu_device()->memory || device_bytes > emu_device()->memory - bytes))
        return emu_error(cudaErrorMemoryAllocation);
    void* memory = take_memory(bytes, pinned);
    if (memory == NULL) return emu_error(cudaErrorMemoryAllocation);
    memset(memory, 0xFF, bytes);
    if (!pinned) device_bytes += bytes;
    allocations[(char*)memory] = {(char*)memory, bytes, pinned, NULL};
    *pointer = memory;
    return cudaSuccess;
}

static cudaError_t release(void* pointer, bool pinned) {
    EmuLock lock;
    if (pointer == NULL) return cudaSuccess;
    cudaError_t forbidden = emu_forbidden_in_capture();
    if (forbidden != cudaSuccess) return emu_error(forbidden);
    emu_drain(); // as cudaFree does
    auto found = allocations.find((char*)pointer);
    if (found == allocations.end() || found->second.pinned != pinned) return emu_error(cudaErrorInvalidValue);
    if (!pinned) device_bytes -= found->second.bytes;
    if (emu_checker != NULL) emu_checker->freed(&found->second);
    give_memory(&found->second);
    last_found = NULL;
    allocations.erase(found);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, false); }
cudaError_t cudaFree(void* pointer) { return release(pointer, false); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes, true); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) { return allocate(pointer, bytes, true); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer, true); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    *total_bytes = emu_device()->memory;
    *free_bytes = emu_device()->memory - device_bytes;
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// copies

static void take_time(const char* what, size_t touched) {
    emu_take(what, (double)touched / emu_clock()->copy);
}

typedef enum { PLACE_PAGEABLE, PLACE_PINNED, PLACE_DEVICE, PLACE_WRONG } Place;

static Place place_of(const void* p, size_t bytes) {
    const EmuAllocation* a = emu_find_allocation(p);
    if (a == NULL) return PLACE_PAGEABLE;
    if ((size_t)((const char*)p - a->begin) + bytes > a->bytes) return PLACE_WRONG;
    return a->pinned ? PLACE_PINNED : PLACE_DEVICE;
}

static cudaError_t check_copy(Place dst, Place src, cudaMemcpyKind kind) {
    if (dst == PLACE_WRONG || src == PLACE_WRONG) return cudaErrorInvalidValue;
    if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    if (kind == cudaMemcpyDefault) return cudaSuccess;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    bool fits = (dst == PLACE_DEVICE) == to_device && (src == PLACE_DEVICE) == from_device;
    return fits ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    if (bytes == 0) return cudaSuccess;
    Place to = place_of(dst, bytes), from = place_of(src, bytes);
    cudaError_t error = check_copy(to, from, kind);
    if (error != cudaSuccess) return emu_error(error);
    if (from == PLACE_PAGEABLE) { // the driver takes a copy of it before it returns
        auto staged = std::make_shared<std::vector<char>>((const char*)src, (const char*)src + bytes);
        error = emu_enqueue(stream, [=] {
            memcpy(dst, staged->data(), bytes);
            take_time("memcpy", 2 * bytes);
        });
    } else {
        error = emu_enqueue(stream, [=] {
            memmove(dst, src, bytes);
            take_time("memcpy", 2 * bytes);
        });
    }
    if (error == cudaSuccess && to == PLACE_PAGEABLE) error = cudaStreamSynchronize(stream);
    return error;
}

cudaError_t cudaMemcpy2DAsync(void* dst, size_t dst_pitch, const void* src, size_t src_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
    EmuLock lock;
    if (width > dst_pitch || width > src_pitch) return emu_error(cudaErrorInvalidPitchValue);
    for (size_t row = 0; row < height; row++) {
        cudaError_t error = cudaMemcpyAsync((char*)dst + row * dst_pitch, (const char*)src + row * src_pitch,
                                            width, kind, stream);
        if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* dst, const void* src, size_t bytes, cudaMemcpyKind kind) {
    EmuLock lock;
    cudaError_t error = cudaMemcpyAsync(dst, src, bytes, kind, 0);
    bool late = kind == cudaMemcpyDeviceToDevice; // returns before the device has done it
    return error != cudaSuccess || late ? error : cudaStreamSynchronize(0);
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    if (bytes == 0) return cudaSuccess;
    Place place = place_of(pointer, bytes);
    if (place != PLACE_DEVICE && place != PLACE_PINNED) return emu_error(cudaErrorInvalidValue);
    return emu_enqueue(stream, [=] {
        memset(pointer, value, bytes);
        take_time("memset", bytes);
    });
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
    EmuLock lock;
    return cudaMemsetAsync(pointer, value, bytes, 0);
}
