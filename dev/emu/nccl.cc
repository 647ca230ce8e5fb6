// NCCL between processes of one machine, which meet in shared memory. What NCCL would refuse is refused, and
// ncclGetLastError says why; where NCCL would hang, so does this: a rank that was killed is waited for.
//
//     EMU_NCCL_DETECT=1      ncclCommGetAsyncError says ncclRemoteError once a rank of the communicator is gone
//     EMU_NCCL_TRAFFIC=path  path.RANK lists calls and bytes of each communicator that ended, by operation
//     EMU_NCCL_TOKEN=word    begins the names in /dev/shm; dev/emu/launch removes what a killed rank left there
//
// Reductions take place in the element type: ((rank 0 + rank 1) + rank 2) + ..., rounded at every addition; the
// average divides the sum once. Operations of a communicator run in the order of their calls, whatever streams
// they are in. Collectives go through shared memory piece by piece:
//
//     segment   | header: pids, splits | rank 0: posted, read, call, STAGE bytes | rank 1 ... | pair 0 0 | 0 1 ...
//     a piece   every rank puts its part into its stage and counts `posted`; when all have, every rank takes what
//               it needs and counts `read`; when all have, the stages are free for the next piece
//     a pair    (sender, receiver): a stage with the counters `put` and `got`; a send is done when all of it was got
#include "nccl.h" // defines: ncclAllReduce ...

#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <string>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emu.h" // defines: emu_find_allocation, emu_report, emu_enqueue_polled

enum { MAX_RANKS = 256, STAGE_BYTES = 128 << 10, PAIR_BYTES = 32 << 10 };

enum Kind { ALL_REDUCE, REDUCE, BROADCAST, REDUCE_SCATTER, ALL_GATHER, SEND, RECEIVE, NUM_KINDS };
static const char* const KIND_NAMES[NUM_KINDS] = {"ncclAllReduce",     "ncclReduce",    "ncclBroadcast",
                                                  "ncclReduceScatter", "ncclAllGather", "ncclSend",
                                                  "ncclRecv"};
static const size_t TYPE_BYTES[ncclNumTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

// What all ranks of a collective must agree on.
struct Signature {
    int kind, type, op, root;
    size_t count;
};
struct alignas(64) RankArea {
    std::atomic<unsigned long> posted, read; // pieces
    Signature call;                          // that the last posted piece belongs to
    double start;                            // of it here, by the virtual clock
    std::atomic<unsigned long> split, split_read;
    int color, key;
    alignas(64) char stage[STAGE_BYTES];
};
struct alignas(64) PairArea {
    std::atomic<unsigned long> put, got;
    size_t bytes;    // of the whole message
    double start[2]; // of its receive and of its send, by the virtual clock
    alignas(64) char stage[PAIR_BYTES];
};
struct alignas(64) Header {
    std::atomic<int> joined;
    std::atomic<int> pid[MAX_RANKS];
};

struct ncclComm {
    int rank, size, device;
    std::string name;
    char* segment;
    size_t segment_bytes;
    bool finalized, aborted;
    unsigned long issued, served; // operations
    unsigned long pieces;         // of collectives so far
    unsigned long splits;
    double free_at; // when the last operation has ended, by the virtual clock
    int number;     // in the order in which this process made them
    std::map<int, std::pair<unsigned long, double>> traffic; // kind -> calls, bytes

    Header* header() { return (Header*)(void*)segment; }
    RankArea* area(int r) { return (RankArea*)(void*)(segment + sizeof(Header)) + r; }
    PairArea* pair(int from, int to) { return (PairArea*)(void*)area(size) + from * size + to; }
    bool ready() { return header()->joined.load() == size; }
};

static std::set<ncclComm_t> communicators;
static auto& given_up = *new std::vector<ncclComm_t>; // aborted: what still lies in streams asks them
static char last_error[256];
static FILE* traffic_file;

__attribute__((format(printf, 2, 3))) static ncclResult_t refuse(ncclResult_t result, const char* format,
                                                                 ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return result;
}

ncclResult_t ncclGetVersion(int* version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
const char* ncclGetLastError(ncclComm_t) { return last_error; }
const char* ncclGetErrorString(ncclResult_t result) {
    static const char* const texts[ncclNumResults] = {"no error",
                                                      "unhandled cuda error",
                                                      "unhandled system error",
                                                      "internal error",
                                                      "invalid argument",
                                                      "invalid usage",
                                                      "remote process exited or there was a network error",
                                                      "NCCL operation in progress"};
    return result >= 0 && result < ncclNumResults ? texts[result] : "unknown result code";
}

// ----------------------------------------------------------------------------
// communicators

static ncclResult_t check_communicator(ncclComm_t comm) {
    if (communicators.count(comm) == 0) return refuse(ncclInvalidArgument, "the communicator does not exist");
    return ncclSuccess;
}
static ncclResult_t check_config(const ncclConfig_t* config) {
    if (config == NULL || (config->magic == NCCL_CONFIG_MAGIC && config->size == sizeof *config))
        return ncclSuccess;
    return refuse(ncclInvalidArgument, "the config was not begun with NCCL_CONFIG_INITIALIZER");
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    unsigned char bytes[16];
    FILE* random = fopen("/dev/urandom", "r");
    bool ok = random != NULL && fread(bytes, sizeof bytes, 1, random) == 1;
    if (random != NULL) fclose(random);
    if (!ok) return refuse(ncclSystemError, "no random numbers");
    memset(id, 0, sizeof *id);
    const char* token = getenv("EMU_NCCL_TOKEN");
    int n = snprintf(id->internal, sizeof id->internal, "/emu_nccl_%.40s_", token != NULL ? token : "");
    for (unsigned char byte : bytes) n += snprintf(id->internal + n, 3, "%02x", byte);
    return ncclSuccess;
}

// False if another thread aborted the communicator meanwhile.
static bool wait_until(ncclComm_t comm, const std::function<bool()>& condition) {
    while (!comm->aborted && !condition()) emu_pause_unlocked(false);
    emu_pause(true);
    return !comm->aborted;
}

// The segment of a communicator: of this process alone, or the same for all that know the name.
static char* map_segment(const std::string& name, int size, size_t bytes) {
    int flags = size == 1 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd = -1;
    if (size > 1 && ((fd = shm_open(name.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600)) < 0 ||
                     ftruncate(fd, (off_t)bytes) != 0))
        return NULL;
    void* memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (fd >= 0) close(fd);
    return memory == MAP_FAILED ? NULL : (char*)memory;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* result, int nranks, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
    EmuLock lock;
    static int number;
    ncclResult_t checked = check_config(config);
    if (checked != ncclSuccess) return checked;
    if (emu_need_device() != cudaSuccess) return refuse(ncclUnhandledCudaError, "there is no device");
    if (rank < 0 || rank >= nranks) return refuse(ncclInvalidArgument, "rank %d of %d", rank, nranks);
    if (nranks > MAX_RANKS) return refuse(ncclInvalidUsage, "%d ranks: emulated are %d", nranks, MAX_RANKS);
    size_t bytes = sizeof(Header) + (size_t)nranks * sizeof(RankArea) +
                   (size_t)nranks * (size_t)nranks * sizeof(PairArea);
    ncclComm_t comm = new ncclComm{};
    comm->rank = rank, comm->size = nranks, comm->name = std::string(id.internal, strnlen(id.internal, 100));
    comm->segment = map_segment(comm->name, nranks, bytes), comm->segment_bytes = bytes;
    comm->number = number++;
    cudaGetDevice(&comm->device);
    if (comm->segment == NULL) {
        delete comm;
        return refuse(ncclSystemError, "no shared memory: %s", strerror(errno));
    }
    if (comm->header()->pid[rank].exchange(getpid()) != 0)
        emu_report("ncclCommInitRank: rank %d is there twice", rank);
    communicators.insert(comm);
    *result = comm;
    if (comm->header()->joined.fetch_add(1) == nranks - 1 && nranks > 1) shm_unlink(comm->name.c_str());
    if (config != NULL && config->blocking == 0) return comm->ready() ? ncclSuccess : ncclInProgress;
    if (!wait_until(comm, [=] { return comm->ready(); })) return refuse(ncclInvalidUsage, "aborted");
    return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, nranks, id, rank, NULL);
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int key, ncclComm_t* newcomm, ncclConfig_t* config) {
    EmuLock lock;
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    if (color < 0 && color != NCCL_SPLIT_NOCOLOR) return refuse(ncclInvalidArgument, "color %d", color);
    RankArea* mine = comm->area(comm->rank);
    unsigned long now = ++comm->splits;
    for (int r = 0; r < comm->size; r++)
        if (!wait_until(comm, [=] { return comm->area(r)->split_read.load() >= now - 1; }))
            return refuse(ncclInvalidUsage, "aborted");
    mine->color = color, mine->key = key;
    mine->split.store(now);
    int rank = 0, size = 0;
    for (int r = 0; r < comm->size; r++) {
        RankArea* other = comm->area(r);
        if (!wait_until(comm, [=] { return other->split.load() >= now; }))
            return refuse(ncclInvalidUsage, "aborted");
        if (other->color != color) continue;
        size++;
        if (other->key < key || (other->key == key && r < comm->rank)) rank++;
    }
    mine->split_read.store(now);
    *newcomm = NULL;
    if (color == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
    ncclUniqueId id;
    memset(&id, 0, sizeof id);
    size_t hash =
        std::hash<std::string>()(comm->name + " " + std::to_string(now) + " " + std::to_string(color));
    snprintf(id.internal, sizeof id.internal, "%.*s%016zx", (int)comm->name.rfind('_') + 1,
             comm->name.c_str(), hash);
    return ncclCommInitRankConfig(newcomm, size, id, rank, config);
}

static void count_traffic(ncclComm_t comm) {
    const char* path = getenv("EMU_NCCL_TRAFFIC");
    if (path == NULL || comm->traffic.empty()) return;
    const char* rank = getenv("RANK");
    std::string name = std::string(path) + "." + (rank != NULL ? rank : "0");
    if (traffic_file == NULL) traffic_file = fopen(name.c_str(), "w");
    if (traffic_file == NULL) return;
    for (const auto& t : comm->traffic)
        fprintf(traffic_file, "%d %d %s %lu %.0f\n", comm->number, comm->size, KIND_NAMES[t.first],
                t.second.first, t.second.second);
    fflush(traffic_file);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    EmuLock lock;
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    if (comm->finalized) return refuse(ncclInvalidUsage, "the communicator is already finalized");
    emu_drain();
    comm->finalized = true;
    return ncclSuccess;
}
static ncclResult_t remove_communicator(ncclComm_t comm, bool abort) {
    if (comm == NULL) return ncclSuccess;
    EmuLock lock;
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    comm->aborted = abort;
    if (!abort) {
        emu_drain();
        result = check_communicator(comm); // another thread may have aborted it
        if (result != ncclSuccess) return result;
        comm->header()->pid[comm->rank].store(-1); // from here on it may end without being missed
    }
    count_traffic(comm);
    communicators.erase(comm);
    munmap(comm->segment, comm->segment_bytes);
    if (abort)
        given_up.push_back(comm); // waits for nothing: other communicators may have lost the same rank
    else
        delete comm;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) { return remove_communicator(comm, true); }
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return remove_communicator(comm, false); }

static ncclResult_t answer(ncclComm_t comm, int* out, int ncclComm::*value) {
    EmuLock lock;
    ncclResult_t result = check_communicator(comm);
    if (result == ncclSuccess) *out = comm->*value;
    return result;
}
ncclResult_t ncclCommCount(ncclComm_t comm, int* count) { return answer(comm, count, &ncclComm::size); }
ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) { return answer(comm, rank, &ncclComm::rank); }
ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) {
    return answer(comm, device, &ncclComm::device);
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    EmuLock lock;
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    *error = comm->ready() ? ncclSuccess : ncclInProgress;
    if (getenv("EMU_NCCL_DETECT") == NULL) return ncclSuccess;
    for (int r = 0; r < comm->size; r++) {
        int pid = comm->header()->pid[r].load();
        if (pid > 0 && kill(pid, 0) != 0) *error = ncclRemoteError;
    }
    return ncclSuccess;
}

// ----------------------------------------------------------------------------
// arithmetic, in the element type

template <typename X> static X combine(X a, X b, int op) {
    switch (op) {
    case ncclProd:
        return a * b;
    case ncclMax:
        return a > b ? a : b;
    case ncclMin:
        return a < b ? a : b;
    default:
        return a + b;
    }
}

// out (n) = the reduction of parts[0] (n), parts[1] (n), ...
template <typename X>
static void reduce_as(void* out, const std::vector<const char*>& parts, size_t n, int op) {
    for (size_t i = 0; i < n; i++) {
        X sum = ((const X*)(const void*)parts[0])[i];
        for (size_t r = 1; r < parts.size(); r++)
            sum = combine(sum, ((const X*)(const void*)parts[r])[i], op);
        if (op == ncclAvg) sum = (X)(sum / (X)parts.size());
        ((X*)out)[i] = sum;
    }
}
static void reduce_bf16(void* out, const std::vector<const char*>& parts, size_t n, int op) {
    for (size_t i = 0; i < n; i++) {
        __nv_bfloat16 sum = ((const __nv_bfloat16*)(const void*)parts[0])[i];
        for (size_t r = 1; r < parts.size(); r++)
            sum = __float2bfloat16_rn(
                combine(__bfloat162float(sum),
                        __bfloat162float(((const __nv_bfloat16*)(const void*)parts[r])[i]), op));
        if (op == ncclAvg) sum = __float2bfloat16_rn(__bfloat162float(sum) / (float)parts.size());
        ((__nv_bfloat16*)out)[i] = sum;
    }
}

static void reduce_parts(void* out, const std::vector<const char*>& parts, size_t n, int type, int op) {
    switch (type) {
    case ncclInt8:
        return reduce_as<signed char>(out, parts, n, op);
    case ncclUint8:
        return reduce_as<unsigned char>(out, parts, n, op);
    case ncclInt32:
        return reduce_as<int>(out, parts, n, op);
    case ncclUint32:
        return reduce_as<unsigned>(out, parts, n, op);
    case ncclInt64:
        return reduce_as<long long>(out, parts, n, op);
    case ncclUint64:
        return reduce_as<unsigned long long>(out, parts, n, op);
    case ncclFloat32:
        return reduce_as<float>(out, parts, n, op);
    case ncclFloat64:
        return reduce_as<double>(out, parts, n, op);
    case ncclBfloat16:
        return reduce_bf16(out, parts, n, op);
    default:
        emu_report("sums of NCCL type %d are not emulated", type);
    }
}

// ----------------------------------------------------------------------------
// operations

struct Call {
    Signature what; // of a send or a receive, root is the peer
    const char* send;
    char* recv;
    ncclComm_t comm;
    cudaStream_t stream;
    size_t done;    // elements of a collective, bytes of a message
    unsigned phase; // of a piece: 0 not posted, 1 posted
    bool finished;
    double start; // by the virtual clock: when all ranks are there
};

static void check_memory(const Call& call, const void* pointer, size_t bytes) {
    if (bytes == 0) return;
    const EmuAllocation* memory = emu_find_allocation(pointer);
    if (memory == NULL || (size_t)(memory->begin + memory->bytes - (const char*)pointer) < bytes)
        emu_report("%s: there are no %zu bytes of the device's memory at %p", KIND_NAMES[call.what.kind],
                   bytes, pointer);
}

// The sizes of what a collective reads and writes here, in elements.
static size_t elements_sent(const Call& c) {
    return c.what.kind == REDUCE_SCATTER ? c.what.count * (size_t)c.comm->size : c.what.count;
}
static size_t elements_received(const Call& c) {
    return c.what.kind == ALL_GATHER ? c.what.count * (size_t)c.comm->size : c.what.count;
}
static bool sends_here(const Call& c) {
    return c.what.kind != RECEIVE && (c.what.kind != BROADCAST || c.comm->rank == c.what.root);
}
static bool receives_here(const Call& c) {
    return c.what.kind != SEND && (c.what.kind != REDUCE || c.comm->rank == c.what.root);
}

static void check_buffers(const Call& c) {
    size_t element = TYPE_BYTES[c.what.type], sent = elements_sent(c) * element;
    size_t received = elements_received(c) * element, part = c.what.count * element;
    if (sends_here(c)) check_memory(c, c.send, sent);
    if (receives_here(c)) check_memory(c, c.recv, received);
    if (c.what.kind >= SEND || !sends_here(c) || !receives_here(c)) return;
    size_t shift = part * (size_t)c.comm->rank;
    bool overlap = c.send < c.recv + received && c.recv < c.send + sent;
    bool in_place = c.what.kind == ALL_GATHER       ? c.send == c.recv + shift
                    : c.what.kind == REDUCE_SCATTER ? c.recv == c.send + shift
                                                    : c.send == c.recv;
    if (overlap && !in_place) emu_report("%s: its buffers overlap in part", KIND_NAMES[c.what.kind]);
}

static void check_agreement(const Call& c) {
    for (int r = 0; r < c.comm->size; r++) {
        const Signature& other = c.comm->area(r)->call;
        if (memcmp(&other, &c.what, sizeof other) != 0)
            emu_report(
                "rank %d of %d calls %s of %zu elements (type %d, operation %d, root %d) where rank %d "
                "calls %s of %zu (type %d, operation %d, root %d)",
                c.comm->rank, c.comm->size, KIND_NAMES[c.what.kind], c.what.count, c.what.type, c.what.op,
                c.what.root, r, KIND_NAMES[other.kind], other.count, other.type, other.op, other.root);
    }
}

// Elements [c.done, c.done + n) of each part: into the stage, or out of the stages.
static void post_piece(const Call& c, size_t n) {
    size_t element = TYPE_BYTES[c.what.type],
           parts = c.what.kind == REDUCE_SCATTER ? (size_t)c.comm->size : 1;
    char* stage = c.comm->area(c.comm->rank)->stage;
    for (size_t p = 0; p < parts && sends_here(c); p++)
        memcpy(stage + p * n * element, c.send + (p * c.what.count + c.done) * element, n * element);
}
static void take_piece(const Call& c, size_t n) {
    size_t element = TYPE_BYTES[c.what.type], at = c.done * element, bytes = n * element;
    int kind = c.what.kind, size = c.comm->size;
    if (!receives_here(c)) return;
    if (kind == ALL_GATHER) {
        for (int r = 0; r < size; r++)
            memcpy(c.recv + (size_t)r * c.what.count * element + at, c.comm->area(r)->stage, bytes);
    } else if (kind == BROADCAST) {
        memcpy(c.recv + at, c.comm->area(c.what.root)->stage, bytes);
    } else {
        std::vector<const char*> parts;
        size_t first = kind == REDUCE_SCATTER ? (size_t)c.comm->rank * bytes : 0;
        for (int r = 0; r < size; r++) parts.push_back(c.comm->area(r)->stage + first);
        reduce_parts(c.recv + at, parts, n, c.what.type, c.what.op);
    }
}

// As much of a collective as can be done now; true when it is done.
static bool advance_collective(Call& c) {
    ncclComm_t comm = c.comm;
    size_t parts = c.what.kind == REDUCE_SCATTER ? (size_t)comm->size : 1;
    size_t room = STAGE_BYTES / TYPE_BYTES[c.what.type] / parts;
    while (c.done < c.what.count) {
        size_t n = c.what.count - c.done < room ? c.what.count - c.done : room;
        RankArea* mine = comm->area(comm->rank);
        if (c.phase == 0) {
            for (int r = 0; r < comm->size; r++)
                if (comm->area(r)->read.load() < comm->pieces) return false;
            mine->call = c.what, mine->start = c.start;
            post_piece(c, n);
            mine->posted.store(comm->pieces + 1);
            c.phase = 1;
        }
        for (int r = 0; r < comm->size; r++)
            if (comm->area(r)->posted.load() <= comm->pieces) return false;
        check_agreement(c);
        for (int r = 0; r < comm->size; r++) c.start = std::max(c.start, comm->area(r)->start);
        take_piece(c, n);
        mine->read.store(++comm->pieces);
        c.phase = 0, c.done += n;
        emu_pause(true);
    }
    return true;
}

static bool advance_message(Call& c) {
    size_t bytes = c.what.count * TYPE_BYTES[c.what.type];
    bool sending = c.what.kind == SEND;
    PairArea* pair =
        sending ? c.comm->pair(c.comm->rank, c.what.root) : c.comm->pair(c.what.root, c.comm->rank);
    while (c.done < bytes) {
        size_t n = bytes - c.done < PAIR_BYTES ? bytes - c.done : (size_t)PAIR_BYTES;
        bool full = pair->put.load() != pair->got.load();
        if (full == sending) return false;
        pair->start[sending] = c.start;
        if (sending) {
            pair->bytes = bytes;
            memcpy(pair->stage, c.send + c.done, n);
            pair->put.fetch_add(1);
        } else {
            if (pair->bytes != bytes)
                emu_report("ncclSend of %zu bytes from rank %d meets ncclRecv of %zu in rank %d", pair->bytes,
                           c.what.root, bytes, c.comm->rank);
            memcpy(c.recv + c.done, pair->stage, n);
            c.start = std::max(c.start, pair->start[1]);
            pair->got.fetch_add(1);
        }
        c.done += n;
        emu_pause(true);
    }
    if (!sending) return true;
    if (pair->put.load() != pair->got.load()) return false;
    if (bytes > 0) c.start = std::max(c.start, pair->start[0]);
    return true;
}

// What a ring, or a direct send, sends from each rank, in bytes.
static double bytes_sent(const Call& c) {
    double bytes = (double)(c.what.count * TYPE_BYTES[c.what.type]), n = c.comm->size;
    switch (c.what.kind) {
    case ALL_REDUCE:
        return 2 * (n - 1) / n * bytes;
    case REDUCE_SCATTER:
    case ALL_GATHER:
        return (n - 1) * bytes;
    case SEND:
        return bytes;
    case RECEIVE:
        return 0;
    default:
        return (n - 1) / n * bytes;
    }
}

// In messages, one behind the other.
static double messages_sent(const Call& c) {
    if (c.what.count == 0 || c.what.kind >= SEND) return c.what.count > 0;
    return (c.what.kind == ALL_REDUCE ? 2 : 1) * (c.comm->size - 1);
}

// Calls that were made together. Collectives of a communicator run one after the other, and so do messages in
// one direction between the same two ranks; everything else at once.
struct Batch {
    std::vector<Call> calls;
    std::map<ncclComm_t, unsigned long> tickets;
    bool begun;
};

// By the virtual clock, all of them begin when the last rank of any is there, and share one link: they take the time
// of all bytes sent (or received, if these are more) and of the longest chain of messages.
static void take_time(const Batch& o) {
    double sent = 0, received = 0, messages = 0;
    for (const Call& c : o.calls) {
        emu_running.now = std::max(emu_running.now, c.start);
        sent += bytes_sent(c);
        if (c.what.kind == RECEIVE) received += (double)(c.what.count * TYPE_BYTES[c.what.type]);
        messages = std::max(messages, messages_sent(c));
    }
    emu_take(KIND_NAMES[o.calls[0].what.kind],
             std::max(sent, received) / emu_clock()->link + messages * emu_clock()->latency);
    for (const auto& t : o.tickets) t.first->free_at = emu_running.now;
}

static void begin(Batch& o) {
    double start = emu_running.now;
    for (const auto& t : o.tickets) start = std::max(start, t.first->free_at);
    for (Call& c : o.calls) {
        check_buffers(c);
        c.start = start;
    }
}

static bool must_wait(const Batch& o, size_t i) {
    const Call& c = o.calls[i];
    for (size_t k = 0; k < i; k++) {
        const Call& earlier = o.calls[k];
        bool collectives = c.what.kind < SEND && earlier.what.kind < SEND;
        bool one_way =
            c.what.kind >= SEND && c.what.kind == earlier.what.kind && c.what.root == earlier.what.root;
        if (!earlier.finished && earlier.comm == c.comm && (collectives || one_way)) return true;
    }
    return false;
}

static bool advance(Batch& o) {
    bool all = true, aborted = false;
    for (const auto& t : o.tickets) {
        aborted = aborted || t.first->aborted;
        if (!o.begun && t.first->served != t.second && !t.first->aborted) return false;
    }
    if (!o.begun && !aborted) begin(o);
    o.begun = true;
    for (size_t i = 0; i < o.calls.size() && !aborted; i++) {
        Call& c = o.calls[i];
        if (!c.finished && !must_wait(o, i))
            c.finished = c.what.kind < SEND ? advance_collective(c) : advance_message(c);
        all = all && c.finished;
    }
    if (all && !aborted) take_time(o);
    if (all)
        for (const auto& t : o.tickets) t.first->served++;
    return all;
}

static thread_local int group_depth;
static thread_local ncclResult_t group_error;
static thread_local std::vector<Call> group;

// The messages of a group. One to the rank itself needs both ends in it: nobody else would bring the other.
static ncclResult_t check_messages(const std::vector<Call>& calls) {
    int open = 0;
    for (const Call& c : calls)
        if (c.what.kind >= SEND && c.stream != calls[0].stream)
            return refuse(ncclInvalidUsage, "messages of a group in several streams are not emulated");
    for (const Call& c : calls)
        if (c.what.kind >= SEND && c.what.root == c.comm->rank) open += c.what.kind == SEND ? 1 : -1;
    return open == 0 ? ncclSuccess
                     : refuse(ncclInvalidUsage, "a message to the rank itself has one end; NCCL would hang");
}

static ncclResult_t run_calls(std::vector<Call> calls) {
    ncclResult_t result = check_messages(calls);
    if (result != ncclSuccess) return result;
    while (!calls.empty()) { // an operation for each stream
        auto o = std::make_shared<Batch>();
        std::vector<Call> rest;
        cudaStream_t stream = calls[0].stream;
        for (const Call& c : calls) (c.stream == stream ? o->calls : rest).push_back(c);
        cudaStreamCaptureStatus capture;
        bool graph =
            cudaStreamIsCapturing(stream, &capture) == cudaSuccess && capture != cudaStreamCaptureStatusNone;
        for (const Call& c : o->calls)
            if (graph && c.comm->size > 1)
                return refuse(ncclInvalidUsage, "collectives in a graph are not emulated");
        for (const Call& c : o->calls) {
            if (!graph && o->tickets.count(c.comm) == 0) o->tickets[c.comm] = c.comm->issued++;
            auto& traffic = c.comm->traffic[c.what.kind];
            traffic.first++, traffic.second += bytes_sent(c);
        }
        cudaError_t error = emu_enqueue_polled(stream, [o, graph] {
            Batch again = graph ? *o : Batch{}; // a graph may be launched many times
            return advance(graph ? again : *o);
        });
        if (error != cudaSuccess) return refuse(ncclUnhandledCudaError, "%s", cudaGetErrorString(error));
        calls = rest;
    }
    return ncclSuccess;
}

static ncclResult_t check_call(const Call& c) {
    ncclResult_t result = check_communicator(c.comm);
    const char* name = KIND_NAMES[c.what.kind];
    if (result != ncclSuccess) return result;
    if (c.comm->finalized) return refuse(ncclInvalidUsage, "%s: the communicator is finalized", name);
    if (!c.comm->ready()) return refuse(ncclInvalidUsage, "%s: the communicator is not ready yet", name);
    if (c.what.type < 0 || c.what.type >= ncclNumTypes)
        return refuse(ncclInvalidArgument, "%s: data type %d", name, c.what.type);
    if (c.what.op < 0 || c.what.op >= ncclNumOps)
        return refuse(ncclInvalidArgument, "%s: operation %d", name, c.what.op);
    if (c.what.root < 0 || c.what.root >= c.comm->size)
        return refuse(ncclInvalidArgument, "%s: rank %d of %d", name, c.what.root, c.comm->size);
    if (c.what.count > 0 && ((sends_here(c) && c.send == NULL) || (receives_here(c) && c.recv == NULL)))
        return refuse(ncclInvalidArgument, "%s: a buffer is NULL", name);
    return ncclSuccess;
}

static ncclResult_t submit(Kind kind, const void* send, void* recv, size_t count, ncclDataType_t type, int op,
                           int root, ncclComm_t comm, cudaStream_t stream) {
    EmuLock lock;
    Call call = {{}, (const char*)send, (char*)recv, comm, stream, 0, 0, false, 0};
    memset((void*)&call.what, 0, sizeof call.what); // signatures are compared as bytes
    call.what.kind = kind, call.what.type = type, call.what.op = op, call.what.root = root;
    call.what.count = count;
    ncclResult_t result = check_call(call);
    if (group_depth == 0) return result == ncclSuccess ? run_calls({call}) : result;
    if (group_error == ncclSuccess) group_error = result;
    if (result == ncclSuccess) group.push_back(call);
    return result;
}

ncclResult_t ncclGroupStart(void) {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd(void) {
    EmuLock lock;
    if (group_depth == 0) return refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth > 0) return ncclSuccess;
    std::vector<Call> calls = std::move(group);
    ncclResult_t result = group_error;
    group.clear(), group_error = ncclSuccess;
    return result == ncclSuccess ? run_calls(std::move(calls)) : result;
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return submit(ALL_REDUCE, send, recv, count, type, op, 0, comm, stream);
}
ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream) {
    return submit(REDUCE, send, recv, count, type, op, root, comm, stream);
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return submit(BROADCAST, send, recv, count, type, ncclSum, root, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t recvcount, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return submit(REDUCE_SCATTER, send, recv, recvcount, type, op, 0, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t sendcount, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    return submit(ALL_GATHER, send, recv, sendcount, type, ncclSum, 0, comm, stream);
}
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return submit(SEND, send, NULL, count, type, ncclSum, peer, comm, stream);
}
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return submit(RECEIVE, NULL, recv, count, type, ncclSum, peer, comm, stream);
}
