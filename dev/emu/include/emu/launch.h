// What rewrite.py makes of kernel<<<grid, block, shared, stream>>>(arguments), and of __shared__.
#pragma once
#include <functional>
#include <tuple>

struct EmuLaunch {
    const char* name;     // the kernel as the source has it
    const void* function; // NULL where its template arguments were deduced
    dim3 grid, block;
    size_t shared; // dynamic, bytes
    cudaStream_t stream;
};

// Says whether the device would take this launch; if not, cudaGetLastError() says why.
bool emu_launchable(const EmuLaunch& launch);

// Puts work behind what the stream has. It runs when somebody waits for it, or is recorded by a capture.
// Returns cudaSuccess, or why the stream does not take it (and so does cudaGetLastError).
cudaError_t emu_enqueue(cudaStream_t stream, std::function<void()> work);

// Runs a kernel now: thread(argument) once for every thread of every block.
void emu_run_kernel(const EmuLaunch& launch, void (*thread)(void* argument), void* argument,
                    size_t argument_bytes);

template <typename Kernel, typename... P> struct EmuCall {
    Kernel kernel;
    std::tuple<P...> arguments;
    static void thread(void* call) {
        EmuCall* self = static_cast<EmuCall*>(call);
        std::apply(self->kernel, self->arguments); // by value: each thread has its own parameters
    }
};

template <typename Kernel, typename... P>
static inline void emu_submit(const EmuLaunch& launch, const EmuCall<Kernel, P...>& call) {
    if (!emu_launchable(launch)) return;
    emu_enqueue(launch.stream, [launch, own = EmuCall<Kernel, P...>(call)]() mutable {
        emu_run_kernel(launch, own.thread, &own, sizeof own);
    });
}

template <typename... P> struct EmuTypedLaunch {
    EmuLaunch launch;
    void (*kernel)(P...);
    void operator()(P... arguments) const {
        emu_submit(launch, EmuCall<void (*)(P...), P...>{kernel, std::tuple<P...>(arguments...)});
    }
};
template <typename Kernel> struct EmuDeducedLaunch {
    EmuLaunch launch;
    Kernel kernel;
    template <typename... P> void operator()(P... arguments) const {
        emu_submit(launch, EmuCall<Kernel, P...>{kernel, std::tuple<P...>(arguments...)});
    }
};

template <typename... P>
static inline EmuTypedLaunch<P...> emu_launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block,
                                              size_t shared = 0, cudaStream_t stream = 0) {
    return {{name, reinterpret_cast<const void*>(kernel), grid, block, shared, stream}, kernel};
}
template <typename Kernel>
static inline EmuDeducedLaunch<Kernel> emu_launch_deduced(const char* name, Kernel kernel, dim3 grid,
                                                          dim3 block, size_t shared = 0,
                                                          cudaStream_t stream = 0) {
    return {{name, NULL, grid, block, shared, stream}, kernel};
}

// A __shared__ declaration: where it lies in the shared memory of the launch that used it last.
struct EmuPlace {
    const char* name;
    unsigned long launch;
    void* address;
};
void* emu_static_shared(EmuPlace* place, size_t bytes, size_t type_alignment, size_t asked_alignment);
void* emu_dynamic_shared(void);
