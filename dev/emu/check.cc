// Follows every load and store of a kernel: the source was compiled with -fsanitize=thread, whose calls end
// here and not in ThreadSanitizer. Found, exactly, and in whatever order the threads happen to run:
//
//   - a read of shared memory that nobody of the block has written
//   - a write and another access to the same bytes, in shared or global memory, by two threads that nothing
//     orders: no __syncthreads between them, nor, within a warp, a __syncwarp of both (a shuffle or a vote orders
//     no memory); threads of different blocks are never ordered. Atomics are ordered among each other.
//   - an access outside of live allocations; the host's access to memory of the device
//
// Order is kept as numbers: a block counts its barriers (epoch); every thread has a clock that __syncwarp
// moves on, and knows up to which clock it has heard of each lane of its warp.
#include <sys/mman.h>
#include <unistd.h>

#include "emu.h" // defines: EmuChecker, emu_report

enum { WARP = 32, MAX_THREADS = 1024, ATOMIC = 0x8000 };

// The latest write to a cell, and the latest reads by two different warps: if more warps than two have read
// it, any writer has one of another warp among these.
struct Writer {
    unsigned block, clock, site;
    unsigned short epoch, thread; // thread: with ATOMIC
};
struct Readers {
    unsigned block, clock, lanes, site;
    unsigned short epoch, warp;
};
struct Cell {
    unsigned
        stamp; // of the block (shared memory) or launch (global) that all of this belongs to; else it is void
    bool written;
    Writer writer;
    Readers readers[2];
};
enum { GLOBAL_CELL = 2 }; // bytes; one in shared memory

static Cell shared_cells[EMU_ARENA_SPACE];
static unsigned shared_opened[EMU_ARENA_SPACE]; // the last launch that has an array here

static struct {
    const char* argument;
    size_t argument_bytes;
    unsigned launch, block_stamp, block, epoch;
    const char* stacks;
    size_t stack_bytes;
} now;
static unsigned clocks[MAX_THREADS], known[MAX_THREADS][WARP];
static __thread bool in_kernel; // this OS thread runs the kernel

extern "C" char __executable_start, _end;

// ----------------------------------------------------------------------------
// what the kernel did

static void begin_launch(const void* argument, size_t argument_bytes) {
    now.argument = (const char*)argument;
    now.argument_bytes = argument_bytes;
    now.stacks = emu_stacks(&now.stack_bytes);
    now.launch++;
    in_kernel = true;
}
static void open_shared(size_t begin, size_t bytes) {
    for (size_t i = begin; i < begin + bytes; i++) shared_opened[i] = now.launch;
}
static void end_launch(void) { in_kernel = false; }

static void begin_block(size_t block) {
    now.block_stamp++;
    now.block = (unsigned)block;
    now.epoch = 0;
    for (unsigned i = 0; i < MAX_THREADS; i++) clocks[i] = 1;
    memset(known, 0, sizeof known);
}

static void barrier(void) { now.epoch++; }

static void syncwarp(unsigned warp, unsigned lanes) {
    unsigned joined[WARP] = {0}, latest = 0;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!(lanes >> lane & 1)) continue;
        unsigned t = warp * WARP + lane;
        latest = clocks[t] > latest ? clocks[t] : latest;
        for (unsigned k = 0; k < WARP; k++) joined[k] = known[t][k] > joined[k] ? known[t][k] : joined[k];
    }
    for (unsigned lane = 0; lane < WARP; lane++)
        if (lanes >> lane & 1) joined[lane] = latest;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!(lanes >> lane & 1)) continue;
        memcpy(known[warp * WARP + lane], joined, sizeof joined);
        clocks[warp * WARP + lane] = latest + 1;
    }
}

// ----------------------------------------------------------------------------
// reports

static unsigned site_of(const void* address) {
    return (unsigned)((const char*)address - &__executable_start);
}

// "file:line" of a place in the program, the functions it was inlined into behind it.
static void describe_site(unsigned site, char* text, size_t size) {
    char command[256];
    snprintf(command, sizeof command, "addr2line -i -e /proc/%d/exe 0x%x 2>/dev/null", (int)getpid(),
             site - 1);
    FILE* pipe = popen(command, "r");
    size_t used = 0;
    text[0] = '\0';
    char line[512];
    while (pipe != NULL && fgets(line, sizeof line, pipe) != NULL && used < size - 1) {
        line[strcspn(line, "\n (")] = '\0';
        used += (size_t)snprintf(text + used, size - used, "%s%s", used > 0 ? " < " : "", line);
    }
    if (pipe != NULL) pclose(pipe);
    if (used == 0) snprintf(text, size, "0x%x", site);
}

[[noreturn]] static void report_race(const char* verb, const char* before, unsigned block, unsigned thread,
                                     unsigned site, unsigned earlier_site, const void* address,
                                     const char* memory) {
    char here[1024], there[1024], by[64];
    describe_site(site, here, sizeof here);
    describe_site(earlier_site, there, sizeof there);
    if (block != now.block)
        snprintf(by, sizeof by, "block %u", block);
    else
        snprintf(by, sizeof by, "thread %u", thread);
    emu_report(
        "race: %s %s memory at %p that %s has %s with nothing in between to order them\n    here:   %s\n"
        "    before: %s",
        verb, memory, address, by, before, here, there);
}

// ----------------------------------------------------------------------------
// one cell

// Whether an access at (block, epoch, clock) by a thread is before everything that the current thread does
// now.
static inline bool ordered(unsigned block, unsigned epoch, unsigned clock, unsigned thread,
                           unsigned current) {
    if (block != now.block) return false;
    if (thread == current || epoch != (now.epoch & 0xFFFF)) return true;
    return thread / WARP == current / WARP && known[current][thread % WARP] >= clock;
}

static void check_writer(const Cell* cell, unsigned current, bool atomic, const char* verb, unsigned site,
                         const void* address, const char* memory) {
    const Writer* w = &cell->writer;
    unsigned thread = w->thread & (ATOMIC - 1);
    if (!cell->written || (atomic && (w->thread & ATOMIC))) return;
    if (!ordered(w->block, w->epoch, w->clock, thread, current))
        report_race(verb, "written", w->block, thread, site, w->site, address, memory);
}

static void add_reader(Cell* cell, unsigned current, unsigned site) {
    unsigned warp = current / WARP, bit = 1u << current % WARP;
    Readers* free_slot = NULL;
    for (Readers& r : cell->readers) {
        bool live = r.lanes != 0 && r.block == now.block && r.epoch == (now.epoch & 0xFFFF);
        bool other_block = r.lanes != 0 && r.block != now.block;
        if (live && r.warp == warp) {
            bool all_before = true;
            for (unsigned left = r.lanes & ~bit; left != 0; left &= left - 1)
                all_before = all_before && known[current][__builtin_ctz(left)] >= r.clock;
            r.lanes = all_before ? bit : r.lanes | bit;
            r.clock = clocks[current] > r.clock ? clocks[current] : r.clock;
            r.site = site;
            return;
        }
        if (!live && !other_block) free_slot = &r;
    }
    if (free_slot == NULL && cell->readers[0].block != now.block && cell->readers[1].block != now.block)
        free_slot = &cell->readers[1]; // keep one of another block, and the own warp
    if (free_slot != NULL)
        *free_slot = {now.block, clocks[current], bit, site, (unsigned short)now.epoch, (unsigned short)warp};
}

static void check_readers(const Cell* cell, unsigned current, const char* verb, unsigned site,
                          const void* address, const char* memory) {
    for (const Readers& r : cell->readers)
        for (unsigned left = r.lanes; left != 0; left &= left - 1) {
            unsigned thread = r.warp * WARP + (unsigned)__builtin_ctz(left);
            if (!ordered(r.block, r.epoch, r.clock, thread, current))
                report_race(verb, "read", r.block, thread, site, r.site, address, memory);
        }
}

enum Access { READ, WRITE, UPDATE };
static const char* const doing[] = {"reads", "writes", "updates"};

static void access_cell(Cell* cell, unsigned stamp, Access kind, unsigned site, const void* address,
                        const char* memory) {
    unsigned current = emu_current_thread();
    if (cell->stamp != stamp) {
        memset(cell, 0, sizeof *cell);
        cell->stamp = stamp;
    }
    check_writer(cell, current, kind == UPDATE, doing[kind], site, address, memory);
    if (kind == READ) {
        add_reader(cell, current, site);
        return;
    }
    check_readers(cell, current, doing[kind], site, address, memory);
    cell->written = true;
    cell->writer = {now.block, clocks[current], site, (unsigned short)now.epoch,
                    (unsigned short)(current | (kind == UPDATE ? ATOMIC : 0))};
    for (Readers& r : cell->readers) r.lanes = 0; // all of them are before this write
}

// ----------------------------------------------------------------------------
// an access of a kernel: which memory

static void access_shared(const char* p, size_t bytes, Access kind, unsigned site) {
    for (size_t i = 0; i < bytes; i++) {
        size_t offset = (size_t)(p + i - emu_arena);
        Cell* cell = &shared_cells[offset];
        const char* wrong = NULL;
        if (shared_opened[offset] != now.launch)
            wrong = "shared memory outside of the block's arrays";
        else if (kind != WRITE && (cell->stamp != now.block_stamp || !cell->written))
            wrong = "shared memory that no thread of the block has written";
        if (wrong != NULL) {
            char here[1024];
            describe_site(site, here, sizeof here);
            emu_report("%s %s\n    here:   %s", doing[kind], wrong, here);
        }
        access_cell(cell, now.block_stamp, kind, site, p + i, "shared");
    }
}

static void access_global(const char* p, size_t bytes, Access kind, unsigned site) {
    EmuAllocation* a = emu_find_allocation(p);
    if (a == NULL || (size_t)(p - a->begin) + bytes > a->bytes) {
        char here[1024];
        describe_site(site, here, sizeof here);
        emu_report("%s %zu bytes at %p, %s\n    here:   %s", doing[kind], bytes, (const void*)p,
                   a == NULL ? "which is no live allocation" : "across the end of an allocation", here);
    }
    if (bytes < GLOBAL_CELL) return; // single bytes share a cell
    size_t cells = a->bytes / GLOBAL_CELL + 1;
    if (a->shadow == NULL) {
        a->shadow = mmap(NULL, cells * sizeof(Cell), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (a->shadow == MAP_FAILED) emu_report("no memory to follow an allocation of %zu bytes", a->bytes);
    }
    for (size_t i = 0; i < bytes; i += GLOBAL_CELL)
        access_cell((Cell*)a->shadow + (size_t)(p + i - a->begin) / GLOBAL_CELL, now.launch, kind, site,
                    p + i, "global");
}

static void freed(EmuAllocation* a) {
    if (a->shadow != NULL) munmap(a->shadow, (a->bytes / GLOBAL_CELL + 1) * sizeof(Cell));
}

static inline bool within(const char* p, const char* begin, size_t bytes) {
    return p >= begin && p < begin + bytes;
}

static void access(const void* address, size_t bytes, Access kind, const void* from) {
    const char* p = (const char*)address;
    if (!in_kernel) {
        if (!emu_in_device_range(p)) return;
        char here[1024];
        describe_site(site_of(from), here, sizeof here);
        emu_report("the host %s memory of the device at %p\n    here:   %s", doing[kind], address, here);
    }
    if (within(p, emu_arena, EMU_ARENA_SPACE))
        access_shared(p, bytes, kind, site_of(from));
    else if (!within(p, now.stacks, now.stack_bytes) && !within(p, now.argument, now.argument_bytes) &&
             !within(p, &__executable_start, (size_t)(&_end - &__executable_start)))
        access_global(p, bytes, kind, site_of(from));
}

static void atomic(const void* address, size_t bytes, const void* site) {
    access(address, bytes, UPDATE, site);
}

static const EmuChecker checker = {begin_launch, open_shared, begin_block, end_launch,
                                   barrier,      syncwarp,    atomic,      freed};
const EmuChecker* emu_checker = &checker;

// ----------------------------------------------------------------------------
// what the compiler calls

#define FROM __builtin_return_address(0)
#define HOOKS(n)                                                                                             \
    void __tsan_read##n(void* p) { access(p, n, READ, FROM); }                                               \
    void __tsan_write##n(void* p) { access(p, n, WRITE, FROM); }                                             \
    void __tsan_unaligned_read##n(void* p) { access(p, n, READ, FROM); }                                     \
    void __tsan_unaligned_write##n(void* p) { access(p, n, WRITE, FROM); }                                   \
    void __tsan_volatile_read##n(void* p) { access(p, n, READ, FROM); }                                      \
    void __tsan_volatile_write##n(void* p) { access(p, n, WRITE, FROM); }                                    \
    void __tsan_unaligned_volatile_read##n(void* p) { access(p, n, READ, FROM); }                            \
    void __tsan_unaligned_volatile_write##n(void* p) { access(p, n, WRITE, FROM); }

// The host's C11 atomics, which the instrumentation turns into calls, too
#define ATOMICS(bits, T)                                                                                     \
    T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }  \
    void __tsan_atomic##bits##_store(volatile T* p, T x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }  \
    T __tsan_atomic##bits##_exchange(volatile T* p, T x, int) {                                              \
        return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST);                                                  \
    }                                                                                                        \
    T __tsan_atomic##bits##_fetch_add(volatile T* p, T x, int) {                                             \
        return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                                   \
    }                                                                                                        \
    T __tsan_atomic##bits##_fetch_sub(volatile T* p, T x, int) {                                             \
        return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST);                                                   \
    }                                                                                                        \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T x, int, int) {           \
        return __atomic_compare_exchange_n(p, expected, x, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
    }                                                                                                        \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T x, int, int) {             \
        return __atomic_compare_exchange_n(p, expected, x, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);           \
    }

extern "C" {
void __tsan_init(void) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, long n) { access(p, (size_t)n, READ, FROM); }
void __tsan_write_range(void* p, long n) { access(p, (size_t)n, WRITE, FROM); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
ATOMICS(8, unsigned char)
ATOMICS(32, unsigned)
ATOMICS(64, unsigned long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}
}
