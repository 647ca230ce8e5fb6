// What a kernel's threads know and do together: indices, barriers, warp operations, atomics, cached accesses.
#pragma once
#include <type_traits>

extern uint3 threadIdx, blockIdx; // of the thread that runs now; dev/emu/block.cc sets them
extern dim3 blockDim, gridDim;
enum { warpSize = 32 };

// The line of the caller, for messages
#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ----------------------------------------------------------------------------
// barriers

enum EmuVote { EMU_VOTE_COUNT, EMU_VOTE_AND, EMU_VOTE_OR };
int emu_barrier(int vote, bool predicate, const char* file, int line);

static inline void __syncthreads(EMU_SITE) { emu_barrier(EMU_VOTE_COUNT, false, file, line); }
static inline int __syncthreads_count(int x, EMU_SITE) {
    return emu_barrier(EMU_VOTE_COUNT, x != 0, file, line);
}
static inline int __syncthreads_and(int x, EMU_SITE) { return emu_barrier(EMU_VOTE_AND, x != 0, file, line); }
static inline int __syncthreads_or(int x, EMU_SITE) { return emu_barrier(EMU_VOTE_OR, x != 0, file, line); }

static inline void __threadfence(void) {} // one thread runs at a time and every write is seen at once
static inline void __threadfence_block(void) {}
static inline void __threadfence_system(void) {}

// ----------------------------------------------------------------------------
// warp operations: every lane of the mask leaves a value and finds those of all others

enum { EMU_MAX_EXCHANGE = 128 }; // bytes a lane

// Waits for the lanes of the mask at this operation; returns their values, one of `bytes` per lane of the
// warp, valid until this lane's next warp operation. Lanes that are not there have 0xFF bytes.
const void* emu_exchange(unsigned mask, const char* operation, const void* value, size_t bytes,
                         const char* file, int line);
unsigned emu_lane(void);

template <typename T>
static inline const T* emu_lanes(unsigned mask, const char* operation, const T& value, const char* file,
                                 int line) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= EMU_MAX_EXCHANGE, "too much for one lane");
    return static_cast<const T*>(emu_exchange(mask, operation, &value, sizeof value, file, line));
}

// For the emulated bodies of PTX instructions that a whole warp executes together
template <typename T> static inline const T* emu_warp_all(T value, EMU_SITE) {
    return emu_lanes(0xFFFFFFFFu, "emu_warp_all", value, file, line);
}

static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMU_SITE) {
    emu_lanes(mask, "__syncwarp", (char)0, file, line);
}

template <typename T>
static inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, EMU_SITE) {
    unsigned lane = emu_lane();
    const T* all = emu_lanes(mask, "__shfl_sync", value, file, line);
    return all[(lane & ~(unsigned)(width - 1)) | ((unsigned)from & (unsigned)(width - 1))];
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMU_SITE) {
    unsigned lane = emu_lane(), last = lane | (unsigned)(width - 1), from = lane ^ (unsigned)lanes;
    const T* all = emu_lanes(mask, "__shfl_xor_sync", value, file, line);
    return all[from <= last ? from : lane];
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    unsigned lane = emu_lane(), first = lane & ~(unsigned)(width - 1);
    const T* all = emu_lanes(mask, "__shfl_up_sync", value, file, line);
    return all[lane >= first + delta ? lane - delta : lane];
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    unsigned lane = emu_lane(), last = lane | (unsigned)(width - 1);
    const T* all = emu_lanes(mask, "__shfl_down_sync", value, file, line);
    return all[lane + delta <= last ? lane + delta : lane];
}

// The lanes of the mask that are there and satisfy test(value)
template <typename T, typename Test>
static inline unsigned emu_ballot(unsigned mask, const char* operation, const T& value, Test test,
                                  const char* file, int line) {
    struct Present {
        T value;
        int there; // 1; of a lane that has left it reads as -1
    };
    const Present* all = emu_lanes(mask, operation, Present{value, 1}, file, line);
    unsigned bits = 0;
    for (unsigned i = 0; i < warpSize; i++)
        if ((mask >> i & 1) && all[i].there == 1 && test(all[i].value)) bits |= 1u << i;
    return bits;
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
    return emu_ballot(
        mask, "__ballot_sync", predicate, [](int x) { return x != 0; }, file, line);
}
static inline int __any_sync(unsigned mask, int predicate, EMU_SITE) {
    return emu_ballot(
               mask, "__any_sync", predicate, [](int x) { return x != 0; }, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, EMU_SITE) {
    return emu_ballot(
               mask, "__all_sync", predicate, [](int x) { return x == 0; }, file, line) == 0;
}
template <typename T> static inline unsigned __match_any_sync(unsigned mask, T value, EMU_SITE) {
    return emu_ballot(
        mask, "__match_any_sync", value, [&](T x) { return x == value; }, file, line);
}

template <typename T, typename Combine>
static inline T emu_reduce(unsigned mask, const char* operation, T value, Combine combine, const char* file,
                           int line) {
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "__reduce_*_sync is for 32-bit integers");
    T result = value, copy = value;
    bool own = true; // this lane's own value is in the result already
    const T* all = emu_lanes(mask, operation, copy, file, line);
    unsigned lane = emu_lane();
    for (unsigned i = 0; i < warpSize; i++)
        if ((mask >> i & 1) && !(own && i == lane)) result = combine(result, all[i]);
    return result;
}
#define EMU_REDUCE(name, T, expression)                                                                      \
    static inline T name(unsigned mask, T value, EMU_SITE) {                                                 \
        return emu_reduce(                                                                                   \
            mask, #name, value, [](T a, T b) { return (T)(expression); }, file, line);                       \
    }
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_add_sync, int, (unsigned)a + (unsigned)b)
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a& b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef EMU_REDUCE

// ----------------------------------------------------------------------------
// atomics: of integers only. Floats are left out on purpose: their order, and so the sum's bits, would vary.

#define EMU_ATOMICS(T)                                                                                       \
    T atomicAdd(T* p, T x);                                                                                  \
    T atomicMin(T* p, T x);                                                                                  \
    T atomicMax(T* p, T x);                                                                                  \
    T atomicAnd(T* p, T x);                                                                                  \
    T atomicOr(T* p, T x);                                                                                   \
    T atomicExch(T* p, T x);                                                                                 \
    T atomicCAS(T* p, T expected, T x);
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
#undef EMU_ATOMICS

// ----------------------------------------------------------------------------
// accesses with a hint to the cache

#define EMU_LOAD(name)                                                                                       \
    template <typename T> static inline T name(const T* p) { return *p; }
EMU_LOAD(__ldg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldlu)
EMU_LOAD(__ldcv)
#undef EMU_LOAD
#define EMU_STORE(name)                                                                                      \
    template <typename T> static inline void name(T* p, T x) { *p = x; }
EMU_STORE(__stcs)
EMU_STORE(__stcg)
EMU_STORE(__stwb)
EMU_STORE(__stwt)
#undef EMU_STORE

// An address in shared memory as PTX has it: an offset
size_t __cvta_generic_to_shared(const void* p);
static inline size_t __cvta_generic_to_global(const void* p) { return (size_t)p; }
