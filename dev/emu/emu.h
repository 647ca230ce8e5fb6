// What the parts of the emulator know of each other.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "cuda_runtime.h" // defines: EmuLaunch, cudaError_t ...

// ----------------------------------------------------------------------------
// reports: something a GPU would not forgive, or not show

// Prints one finding about the running kernel (its name, block and thread come first) and ends the program.
enum { EMU_EXIT = 97 };
[[noreturn]] void emu_report(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ----------------------------------------------------------------------------
// host threads: one call of the runtime at a time. A call may wait for a stream, and what it waits for then runs in
// its thread; a kernel's fibers never leave it.

extern std::recursive_mutex emu_mutex;
extern unsigned emu_lock_depth; // how often its thread holds it
struct EmuLock {
    EmuLock() { emu_mutex.lock(), emu_lock_depth++; }
    ~EmuLock() { emu_lock_depth--, emu_mutex.unlock(); }
    EmuLock(const EmuLock&) = delete;
};

// ----------------------------------------------------------------------------
// device.cc

struct EmuDevice {
    bool present;
    int architecture;
    int count;
    size_t memory; // bytes
};
const EmuDevice* emu_device(void); // as the environment describes it

// Remembers the error for cudaGetLastError, and returns it.
cudaError_t emu_error(cudaError_t error);
// cudaErrorInsufficientDriver where there is no driver: what every call that needs the device begins with.
cudaError_t emu_need_device(void);

// EMU_SEED's generator: a number below n, 0 where there is no seed.
bool emu_shuffled(void);
unsigned emu_random(unsigned n);

// ----------------------------------------------------------------------------
// block.cc: the kernel that is running

enum { EMU_ARENA_BYTES = 227 * 1024, EMU_STATIC_LIMIT = 48 * 1024 };
enum { EMU_ARENA_SPACE = EMU_ARENA_BYTES + 8 * 1024 }; // with a gap behind each array

bool emu_in_kernel(void);
unsigned emu_current_thread(void); // its number in the block
size_t emu_dynamic_limit(const void* function);

struct EmuAllocation;
// What check.cc wants to know; NULL in builds without it.
struct EmuChecker {
    void (*begin_launch)(const void* argument, size_t argument_bytes);
    void (*open_shared)(size_t begin, size_t bytes); // of emu_arena: an array of this launch
    void (*begin_block)(size_t block);               // shared memory counts as unwritten from here on
    void (*end_launch)(void);
    void (*barrier)(void); // all threads of the block have met
    // These lanes of the warp have met at __syncwarp. Other warp operations promise no order of memory (CUDA
    // C++ Programming Guide, "Warp Shuffle Functions": "do not imply a memory barrier").
    void (*syncwarp)(unsigned warp, unsigned lanes);
    void (*atomic)(const void* address, size_t bytes, const void* site); // by the current thread
    void (*freed)(EmuAllocation* allocation);
};
extern const EmuChecker* emu_checker;

extern char
    emu_arena[EMU_ARENA_SPACE];        // shared memory: first the dynamic part, then what __shared__ declares
const char* emu_stacks(size_t* bytes); // where the fibers' stacks lie

// ----------------------------------------------------------------------------
// memory.cc

struct EmuAllocation {
    char* begin;
    size_t bytes;
    bool pinned;  // host memory
    void* shadow; // check.cc's
};
// The live allocation that holds the address; NULL if there is none.
EmuAllocation* emu_find_allocation(const void* address);
// In a check build memory of the device lies in a range of its own, so that a host that reads it is found.
bool emu_in_device_range(const void* address);

// ----------------------------------------------------------------------------
// clock.cc: virtual seconds

struct EmuClock {
    bool on;
    double matmul, copy, link, latency;
};
const EmuClock* emu_clock(void); // as EMU_CLOCK says; without it the rates are infinite

// The operation that runs: what stream.cc knows of it, and its time.
struct EmuRunning {
    double now;
    int stream;        // in the order of their creation; 0: the default stream
    const char* range; // the NVTX range in which the host enqueued it
};
extern EmuRunning emu_running;
// The running operation takes so long.
void emu_take(const char* what, double seconds);
const char* emu_range(void); // nvtx.cc: the innermost open range, or ""

// ----------------------------------------------------------------------------
// stream.cc

// Puts into a stream what cannot be done in one go: it is called until it says true.
void emu_stick(void); // EMU_FAULT=memory
cudaError_t emu_enqueue_polled(cudaStream_t stream, std::function<bool()> work);
// Between two attempts at something that another process must do first: gives up the processor, for longer and
// longer while there is no progress.
void emu_pause(bool progress);
// The same for a call that waits: without progress, other threads get the lock meanwhile. Not inside of work.
void emu_pause_unlocked(bool progress);
// Waits for everything in every stream.
void emu_drain(void);
// The error of a call that a capture forbids; cudaSuccess where nothing is being captured. Ends the capture.
cudaError_t emu_forbidden_in_capture(void);
