// Runs kernels: blocks one after the other, a block's threads as fibers on one OS thread.
//
// A fiber runs threads one by one until one has to wait (at a barrier or for the lanes of its warp); then
// another fiber goes on. A kernel that never waits never switches. Which thread goes on is fixed: the lowest
// that can of the warp that ran last, or, with EMU_SEED, any.
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <boost/context/detail/fcontext.hpp>

#include "emu.h" // defines: EmuChecker, emu_report, emu_random

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifdef EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

using namespace boost::context::detail;

enum { WARP = 32, MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / WARP };
enum { STACK_BYTES = 256 << 10, GUARD_BYTES = 4096 }; // touched pages only cost memory

enum { ARENA_GAP = 32, MAX_SHARED_ARRAYS = 128 };

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
__attribute__((weak)) const EmuChecker* emu_checker = NULL; // check.cc has one
alignas(1024) char emu_arena[EMU_ARENA_SPACE];

// A stack, and where on it to go on.
struct Fiber {
    fcontext_t context;
    char* stack;
    void* fake_stack; // AddressSanitizer's
    Fiber* next_free;
};

// Lanes of a warp that meet at an operation, and the values they bring.
struct Meeting {
    unsigned mask, arrived, holders; // holders: lanes that may still read the values
    const char* operation;
    const char* file;
    int line;
    size_t bytes; // of one lane's value
    alignas(16) char values[WARP * EMU_MAX_EXCHANGE];
};
// A lane holds one meeting and waits at one more
enum { MAX_MEETINGS = 2 * WARP };

struct Warp {
    unsigned ready;   // lanes that can run
    unsigned waiting; // lanes in a meeting that is not complete
    unsigned exited;  // or never there
    unsigned long used_meetings;
    Meeting meetings[MAX_MEETINGS];
};

struct Thread {
    Fiber* fiber; // NULL until it first waits
    uint3 index;
    Meeting *held, *joined;
    bool at_barrier;
};

static Thread threads[MAX_THREADS];
static Warp warps[MAX_WARPS];

static struct {
    const EmuLaunch* launch; // NULL outside kernels
    unsigned long launches;  // so far
    void (*thread)(void*);
    void* argument;
    unsigned num_threads, exited;
    unsigned current;     // the running thread
    unsigned ready_warps; // bit w: warps[w].ready is not 0
    unsigned at_barrier;
    const char* barrier_file;
    int barrier_line;
    unsigned barriers; // passed
    int votes[2];      // of the barrier before and of this one
    struct {
        size_t begin, bytes;
    } arrays[MAX_SHARED_ARRAYS]; // in emu_arena
    unsigned num_arrays;
    size_t static_used;
    Fiber *running, *free_fibers, *came_from;
    Fiber host;
    char* stacks;
    unsigned num_fibers;
} b;

bool emu_in_kernel(void) { return b.launch != NULL; }
unsigned emu_current_thread(void) { return b.current; }
unsigned emu_lane(void) { return b.current % WARP; }

// ----------------------------------------------------------------------------
// reports

void emu_report(const char* format, ...) {
    va_list arguments;
    static char text[4096]; // in one piece: other ranks may report, too
    fflush(stdout);
    setvbuf(stderr, text, _IOFBF, sizeof text);
    fprintf(stderr, "emu: ");
    if (b.launch != NULL)
        fprintf(stderr, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", b.launch->name, blockIdx.x,
                blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    fflush(stderr);
    _exit(EMU_EXIT);
}

// Where every thread of the block is, for a block that cannot go on: one line per place, with its first
// thread.
static void describe_waiting(char* text, size_t size) {
    size_t used = 0;
    for (unsigned i = 0, shown = 0; i < b.num_threads && used < size && shown < 8; i++) {
        const Thread* t = &threads[i];
        const Meeting* m = t->joined;
        if (m == NULL || i % WARP != (unsigned)__builtin_ctz(m->arrived)) continue;
        shown++;
        used += (size_t)snprintf(text + used, size - used,
                                 "\n    lanes 0x%08x of warp %u wait at %s (mask 0x%08x), %s:%d", m->arrived,
                                 i / WARP, m->operation, m->mask, m->file, m->line);
    }
    if (b.at_barrier > 0 && used < size)
        snprintf(text + used, size - used, "\n    %u of %u threads wait at the barrier %s:%d", b.at_barrier,
                 b.num_threads, b.barrier_file, b.barrier_line);
}

[[noreturn]] static void report_stuck(const char* what) {
    char text[2048] = "";
    describe_waiting(text, sizeof text);
    emu_report("%s: %u of %u threads have returned%s", what, b.exited, b.num_threads, text);
}

// ----------------------------------------------------------------------------
// fibers

static void fiber_main(transfer_t from);

const char* emu_stacks(size_t* bytes) {
    *bytes = (size_t)MAX_THREADS * (STACK_BYTES + GUARD_BYTES);
    if (b.stacks == NULL) {
        b.stacks = (char*)mmap(NULL, *bytes, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (b.stacks == MAP_FAILED) emu_report("no memory for stacks");
    }
    return b.stacks;
}

static Fiber* take_fiber(void) {
    static Fiber fibers[MAX_THREADS];
    Fiber* fiber = b.free_fibers;
    if (fiber != NULL) {
        b.free_fibers = fiber->next_free;
        return fiber;
    }
    size_t bytes;
    char* stack = (char*)emu_stacks(&bytes) + (size_t)b.num_fibers * (STACK_BYTES + GUARD_BYTES);
    mprotect(stack, GUARD_BYTES, PROT_NONE); // a stack that overflows is a fault, not a surprise
    fiber = &fibers[b.num_fibers++];
    fiber->stack = stack + GUARD_BYTES;
    size_t skew =
        b.num_fibers % 32 * 320; // tops at equal distances of 4 KiB would share a few lines of the caches
    fiber->context = make_fcontext(fiber->stack + STACK_BYTES - skew, STACK_BYTES - skew, fiber_main);
    return fiber;
}

// The first thing that a fiber does when it runs again.
static void arrived(transfer_t from) {
    b.came_from->context = from.fctx;
#ifdef EMU_ASAN
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(b.running->fake_stack, &bottom, &size);
    if (b.came_from == &b.host) b.host.stack = (char*)(uintptr_t)bottom, b.host.next_free = (Fiber*)size;
#endif
}

static void switch_to(Fiber* fiber) {
    b.came_from = b.running;
    b.running = fiber;
#ifdef EMU_ASAN
    bool host = fiber == &b.host;
    __sanitizer_start_switch_fiber(&b.came_from->fake_stack, fiber->stack,
                                   host ? (size_t)fiber->next_free : (size_t)STACK_BYTES);
#endif
    arrived(jump_fcontext(fiber->context, NULL));
}

// ----------------------------------------------------------------------------
// which thread goes on

static inline void make_ready(unsigned warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    b.ready_warps |= 1u << warp;
}

static unsigned pick_bit(unsigned bits) {
    if (!emu_shuffled()) return (unsigned)__builtin_ctz(bits);
    for (unsigned skip = emu_random((unsigned)__builtin_popcount(bits)); skip > 0; skip--) bits &= bits - 1;
    return (unsigned)__builtin_ctz(bits);
}

// Makes a thread that can run the current one; false if there is none.
static bool pick_thread(void) {
    if (b.ready_warps == 0) return false;
    unsigned warp = b.current / WARP;
    if (emu_shuffled() || warps[warp].ready == 0) warp = pick_bit(b.ready_warps);
    unsigned lane = pick_bit(warps[warp].ready);
    warps[warp].ready &= ~(1u << lane);
    if (warps[warp].ready == 0) b.ready_warps &= ~(1u << warp);
    b.current = warp * WARP + lane;
    threadIdx = threads[b.current].index;
    return true;
}

static void leave(void);

// The body of every fiber: runs threads that have not begun, until the one to go on is on another fiber.
static void fiber_main(transfer_t from) {
    arrived(from);
    for (;;) {
        b.thread(b.argument);
        leave();
        Fiber* self = b.running;
        Fiber* next = &b.host;
        if (b.exited < b.num_threads) {
            if (!pick_thread()) report_stuck("the other threads of the block wait for ever");
            next = threads[b.current].fiber;
            if (next == NULL) continue;
        }
        self->next_free = b.free_fibers;
        b.free_fibers = self;
        switch_to(next);
    }
}

// The current thread waits until somebody makes it ready.
static void suspend(void) {
    Thread* self = &threads[b.current];
    self->fiber = b.running;
    if (!pick_thread()) report_stuck("all threads that are left wait for ever");
    Fiber* next = threads[b.current].fiber;
    if (next != b.running) switch_to(next != NULL ? next : take_fiber());
}

// ----------------------------------------------------------------------------
// meetings of a warp's lanes

static inline bool same_text(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }

static void complete(unsigned warp, Meeting* m) {
    Warp* w = &warps[warp];
    if (m->arrived != 0xFFFFFFFFu)
        for (unsigned lane = 0; lane < WARP; lane++)
            if (!(m->arrived >> lane & 1)) memset(m->values + lane * m->bytes, 0xFF, m->bytes);
    m->holders = m->arrived;
    w->waiting &= ~m->arrived;
    for (unsigned left = m->arrived; left != 0; left &= left - 1) {
        Thread* t = &threads[warp * WARP + (unsigned)__builtin_ctz(left)];
        t->held = m;
        t->joined = NULL;
    }
    if (emu_checker != NULL && strcmp(m->operation, "__syncwarp") == 0)
        emu_checker->syncwarp(warp, m->arrived);
}

static void release(Thread* self, Warp* w, unsigned lane) {
    Meeting* m = self->held;
    if (m == NULL) return;
    m->holders &= ~(1u << lane);
    if (m->holders == 0) w->used_meetings &= ~(1ul << (m - w->meetings));
    self->held = NULL;
}

static Meeting* join(Warp* w, unsigned mask, const char* operation, size_t bytes, const char* file,
                     int line) {
    unsigned present = w->waiting & mask;
    if (present == 0) {
        Meeting* m = &w->meetings[__builtin_ctzl(~w->used_meetings)];
        w->used_meetings |= 1ul << (m - w->meetings);
        m->mask = mask, m->arrived = 0, m->bytes = bytes;
        m->operation = operation, m->file = file, m->line = line;
        return m;
    }
    unsigned warp = b.current / WARP;
    Meeting* m = threads[warp * WARP + (unsigned)__builtin_ctz(present)].joined;
    if (m->mask != mask || (present & ~m->arrived) != 0 || m->line != line || m->bytes != bytes ||
        !same_text(m->operation, operation) || !same_text(m->file, file))
        emu_report(
            "%s with mask 0x%08x at %s:%d, while lanes 0x%08x of the warp are at %s with mask 0x%08x, %s:%d",
            operation, mask, file, line, m->arrived, m->operation, m->mask, m->file, m->line);
    return m;
}

const void* emu_exchange(unsigned mask, const char* operation, const void* value, size_t bytes,
                         const char* file, int line) {
    if (b.launch == NULL) emu_report("%s outside of a kernel, %s:%d", operation, file, line);
    unsigned warp = b.current / WARP, lane = b.current % WARP;
    Thread* self = &threads[b.current];
    Warp* w = &warps[warp];
    if (!(mask >> lane & 1))
        emu_report("%s with mask 0x%08x, which lacks the calling lane %u, %s:%d", operation, mask, lane, file,
                   line);
    release(self, w, lane);
    Meeting* m = join(w, mask, operation, bytes, file, line);
    memcpy(m->values + lane * bytes, value, bytes);
    m->arrived |= 1u << lane;
    if (((m->arrived | w->exited) & mask) == mask) {
        complete(warp, m);
        if ((m->arrived & ~(1u << lane)) != 0) make_ready(warp, m->arrived & ~(1u << lane));
    } else {
        self->joined = m;
        w->waiting |= 1u << lane;
        suspend();
    }
    return m->values;
}

// ----------------------------------------------------------------------------
// barriers, and the end of a thread

int emu_barrier(int vote, bool predicate, const char* file, int line) {
    if (b.launch == NULL) emu_report("a barrier outside of a kernel, %s:%d", file, line);
    if (b.at_barrier > 0 && (b.barrier_line != line || !same_text(b.barrier_file, file)))
        emu_report("divergent barriers: at %s:%d, while %u of %u threads wait at %s:%d", file, line,
                   b.at_barrier, b.num_threads, b.barrier_file, b.barrier_line);
    if (b.exited > 0)
        emu_report("divergent barrier: %u of %u threads have returned without reaching %s:%d", b.exited,
                   b.num_threads, file, line);
    int* votes = &b.votes[b.barriers & 1];
    b.barrier_file = file, b.barrier_line = line;
    *votes += predicate;
    if (++b.at_barrier < b.num_threads) {
        threads[b.current].at_barrier = true;
        suspend();
    } else {
        b.at_barrier = 0;
        b.votes[++b.barriers & 1] = 0;
        if (emu_checker != NULL) emu_checker->barrier();
        for (unsigned warp = 0; warp < (b.num_threads + WARP - 1) / WARP; warp++) {
            unsigned lanes = ~warps[warp].exited;
            if (warp == b.current / WARP) lanes &= ~(1u << b.current % WARP);
            if (lanes != 0) make_ready(warp, lanes);
        }
    }
    threads[b.current].at_barrier = false;
    return vote == EMU_VOTE_COUNT ? *votes : vote == EMU_VOTE_OR ? *votes > 0 : *votes == (int)b.num_threads;
}

static void leave(void) {
    unsigned warp = b.current / WARP, lane = b.current % WARP;
    Warp* w = &warps[warp];
    if (b.at_barrier > 0)
        emu_report("divergent barrier: this thread returns, while %u of %u wait at %s:%d", b.at_barrier,
                   b.num_threads, b.barrier_file, b.barrier_line);
    release(&threads[b.current], w, lane);
    w->exited |= 1u << lane;
    b.exited++;
    for (unsigned left = w->waiting; left != 0;) { // meetings that waited for this lane only
        Meeting* m = threads[warp * WARP + (unsigned)__builtin_ctz(left)].joined;
        left &= ~m->arrived;
        if (((m->arrived | w->exited) & m->mask) != m->mask) continue;
        complete(warp, m);
        make_ready(warp, m->arrived);
    }
}

// ----------------------------------------------------------------------------
// shared memory

void* emu_dynamic_shared(void) { return emu_arena; }

size_t __cvta_generic_to_shared(const void* p) { return (size_t)((const char*)p - emu_arena); }

// Makes a part of the arena an array of this launch.
static void open_array(size_t begin, size_t bytes) {
    if (b.num_arrays == MAX_SHARED_ARRAYS || begin + bytes > sizeof emu_arena)
        emu_report("more shared arrays than the emulator has room for");
    b.arrays[b.num_arrays].begin = begin;
    b.arrays[b.num_arrays++].bytes = bytes;
#ifdef EMU_ASAN
    ASAN_UNPOISON_MEMORY_REGION(emu_arena + begin, bytes);
#endif
    if (emu_checker != NULL) emu_checker->open_shared(begin, bytes);
    memset(emu_arena + begin, 0xFF, bytes); // NaN in every float type
}

// What the last block left there is nothing that the next may find.
static void clear_arrays(void) {
    for (unsigned i = 0; i < b.num_arrays; i++)
        memset(emu_arena + b.arrays[i].begin, 0xFF, b.arrays[i].bytes);
}

void* emu_static_shared(EmuPlace* place, size_t bytes, size_t type_alignment, size_t asked_alignment) {
    if (place->launch == b.launches) return place->address;
    if (b.launch == NULL) emu_report("__shared__ %s outside of a kernel", place->name);
    size_t alignment = type_alignment > asked_alignment ? type_alignment : asked_alignment;
    size_t end = b.arrays[b.num_arrays - 1].begin + b.arrays[b.num_arrays - 1].bytes;
    size_t begin = (end + ARENA_GAP + alignment - 1) / alignment * alignment;
    b.static_used += bytes;
    if (b.static_used > EMU_STATIC_LIMIT)
        emu_report("__shared__ declarations take %zu bytes with %s; the limit is %d", b.static_used,
                   place->name, EMU_STATIC_LIMIT);
    if (b.static_used + b.launch->shared > emu_dynamic_limit(b.launch->function))
        emu_report(
            "%zu bytes of static and %zu of dynamic shared memory are more than the launch may have: %zu",
            b.static_used, b.launch->shared, emu_dynamic_limit(b.launch->function));
    place->launch = b.launches;
    place->address = emu_arena + begin;
    open_array(begin, bytes);
    return place->address;
}

// ----------------------------------------------------------------------------
// the launch

static void begin_block(void) {
    unsigned n = 0;
    b.exited = b.at_barrier = 0;
    b.votes[0] = b.votes[1] = 0;
    for (unsigned z = 0; z < blockDim.z; z++)
        for (unsigned y = 0; y < blockDim.y; y++)
            for (unsigned x = 0; x < blockDim.x; x++, n++) {
                Thread* t = &threads[n];
                t->fiber = NULL, t->held = t->joined = NULL;
                t->index = {x, y, z};
            }
    for (unsigned warp = 0; warp * WARP < n; warp++) {
        unsigned left = n - warp * WARP, lanes = left >= WARP ? 0xFFFFFFFFu : (1u << left) - 1;
        warps[warp].exited = ~lanes;
        warps[warp].waiting = 0;
        warps[warp].used_meetings = 0;
        make_ready(warp, lanes);
    }
}

static void run_block(size_t number) {
    blockIdx = {(unsigned)(number % gridDim.x), (unsigned)(number / gridDim.x % gridDim.y),
                (unsigned)(number / gridDim.x / gridDim.y)};
    begin_block();
    if (emu_checker != NULL) emu_checker->begin_block(number);
    b.current = 0;
    pick_thread();
    switch_to(take_fiber());
}

// The number-th of n in an order that the seed decides: i -> (first + i * step) mod n with step prime to n.
static size_t shuffled_step(size_t n) {
    size_t step = 1 + emu_random(n > 0xFFFFFFFFu ? 0xFFFFFFFFu : (unsigned)n);
    for (;; step++) {
        size_t x = n, y = step;
        while (y != 0) {
            size_t rest = x % y;
            x = y, y = rest;
        }
        if (x == 1) return step;
    }
}

void emu_run_kernel(const EmuLaunch& launch, void (*thread)(void*), void* argument, size_t argument_bytes) {
    size_t blocks = (size_t)launch.grid.x * launch.grid.y * launch.grid.z;
    b.launch = &launch;
    b.launches++;
    b.thread = thread, b.argument = argument;
    blockDim = launch.block, gridDim = launch.grid;
    b.num_threads = launch.block.x * launch.block.y * launch.block.z;
    b.running = &b.host;
    b.static_used = 0;
#ifdef EMU_ASAN
    ASAN_POISON_MEMORY_REGION(emu_arena, sizeof emu_arena);
#endif
    if (emu_checker != NULL) emu_checker->begin_launch(argument, argument_bytes);
    b.num_arrays = 0;
    open_array(0, launch.shared);
    size_t first = emu_shuffled() ? emu_random(blocks > 0xFFFFFFFFu ? 0xFFFFFFFFu : (unsigned)blocks) : 0;
    size_t step = emu_shuffled() ? shuffled_step(blocks) : 1;
    for (size_t i = 0, number = first; i < blocks; i++, number = (number + step) % blocks) {
        run_block(number);
        clear_arrays();
    }
    if (emu_checker != NULL) emu_checker->end_launch();
    b.launch = NULL;
    emu_take(launch.name, 0);
}

// ----------------------------------------------------------------------------
// atomics: nothing runs beside the current thread

template <typename T, typename Change>
static inline __attribute__((always_inline)) T atomic(T* p, Change change) {
    if (emu_checker != NULL) emu_checker->atomic(p, sizeof *p, __builtin_return_address(0));
    T old = *p;
    *p = change(old);
    return old;
}
#define EMU_ATOMICS(T)                                                                                       \
    T atomicAdd(T* p, T x) {                                                                                 \
        return atomic(p, [=](T old) { return (T)((unsigned long long)old + (unsigned long long)x); });       \
    }                                                                                                        \
    T atomicMin(T* p, T x) {                                                                                 \
        return atomic(p, [=](T old) { return x < old ? x : old; });                                          \
    }                                                                                                        \
    T atomicMax(T* p, T x) {                                                                                 \
        return atomic(p, [=](T old) { return x > old ? x : old; });                                          \
    }                                                                                                        \
    T atomicAnd(T* p, T x) {                                                                                 \
        return atomic(p, [=](T old) { return old & x; });                                                    \
    }                                                                                                        \
    T atomicOr(T* p, T x) {                                                                                  \
        return atomic(p, [=](T old) { return old | x; });                                                    \
    }                                                                                                        \
    T atomicExch(T* p, T x) {                                                                                \
        return atomic(p, [=](T) { return x; });                                                              \
    }                                                                                                        \
    T atomicCAS(T* p, T expected, T x) {                                                                     \
        return atomic(p, [=](T old) { return old == expected ? x : old; });                                  \
    }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
