// Communication between ranks. Every call goes through here, returns at once where its group has one rank, and
// leaves a record of what it was (flight.h, which also says what the groups are). Events on both sides of each
// operation tell the watchdog how far the device has got, those around what computing waits for how long it waits.
//
// Buffers of collectives are in place: a rank's part lies where it is in the whole.
#pragma once
#include "llmc/cuda_common.cuh" // defines: CUDA_CHECK
#include "llmc/exposed.cuh"     // defines: Exposed, exposed_begin, exposed_end
#include "llmc/flight.h"        // defines: Axis, axis_color, flight, flight_record
#include "llmc/replay.cuh"      // defines: Replay, replay_point
#include "llmc/rendezvous.h"    // defines: Control, control_broadcast

#ifdef USE_NCCL
#include <nccl.h>
#else // one rank: the calls are there and never made
typedef void* ncclComm_t;
typedef int ncclDataType_t;
enum { ncclFloat, ncclBfloat16, ncclInt64 };
#endif

typedef struct {
    ncclComm_t comm;
    int rank, size;
} Group;

typedef struct {
    Group group[NUM_AXES];
    // of each operation in the flight recorder: its stream, and where the device is before and behind it
    cudaStream_t streams[FLIGHT_RECORDS];
    cudaEvent_t before[FLIGHT_RECORDS], behind[FLIGHT_RECORDS];
    bool watched;        // there are events
    bool together;       // between comm_begin and comm_end
    uint64_t open_since; // flight records at comm_begin
    Replay* replay;      // of passes that are computed twice: what is handed over is hashed; else NULL
    Exposed exposed;
} Comm;

// ----------------------------------------------------------------------------
// operations

template <typename X> static inline ncclDataType_t nccl_type(void) {
    return std::is_same_v<X, float> ? ncclFloat : std::is_same_v<X, long long> ? ncclInt64 : ncclBfloat16;
}

#ifdef USE_NCCL
static inline void nccl_check(const Comm* c, ncclResult_t status, const char* file, int line) {
    if (status == ncclSuccess) return;
    const Flight* f = flight();
    const FlightRecord* r = &f->records[(f->count + FLIGHT_RECORDS - 1) % FLIGHT_RECORDS];
    Error err = {0, {0}};
    bool lost = status == ncclRemoteError || status == ncclSystemError;
    fail(&err, lost ? EXIT_LOST : EXIT_OS,
         "rank %d: NCCL: %s; the last record is %s of %zu bytes (%s, layer %d)", c->group[AXIS_WORLD].rank,
         ncclGetErrorString(status), r->what != NULL ? r->what : "nothing", r->bytes,
         r->axis >= 0 ? axis_names[r->axis] : "a phase", r->layer);
    if (status == ncclInvalidArgument || status == ncclInvalidUsage)
        internal_error(file, line, "%s", err.text);
    if (lost) sleep((unsigned)flight()->patience);
    exit_with(&err);
}
#define NCCL_CHECK(c, call) nccl_check((c), (call), __FILE__, __LINE__)
#else
#define NCCL_CHECK(c, call) CHECK(!"more than one rank without NCCL")
#endif

static inline void comm_mark(Comm* c, cudaEvent_t* event, cudaStream_t stream) {
    if (!c->watched) return;
    if (*event == NULL) CUDA_CHECK(cudaEventCreateWithFlags(event, cudaEventDisableTiming));
    CUDA_CHECK(cudaEventRecord(*event, stream));
}

// One operation, between its events: call(communicator). peer: that a message goes to or comes from, else -1.
template <typename Call>
static inline void comm_run(Comm* c, int axis, const char* what, size_t bytes, int peer, cudaStream_t stream,
                            Call call) {
    int i = flight_record(axis, what, bytes, peer);
    c->streams[i] = stream;
    comm_mark(c, &c->before[i], stream);
    exposed_begin(&c->exposed, stream);
    call(c->group[axis].comm);
    if (c->together) return;
    exposed_end(&c->exposed, stream);
    comm_mark(c, &c->behind[i], stream);
}

// `stream` goes on when the event was reached in another one, which communicates.
static inline void comm_wait(Comm* c, cudaStream_t stream, cudaEvent_t event) {
    exposed_begin(&c->exposed, stream);
    CUDA_CHECK(cudaStreamWaitEvent(stream, event, 0));
    exposed_end(&c->exposed, stream);
}

// A computation begins in the stream, and ends.
static inline int comm_begin_compute(Comm* c, const char* what, cudaStream_t stream) {
    int i = flight_record(AXIS_COMPUTE, what, 0, -1);
    comm_mark(c, &c->before[i], stream);
    return i;
}
static inline void comm_end_compute(Comm* c, int record, cudaStream_t stream) {
    comm_mark(c, &c->behind[record], stream);
}

// What the passes of a step are about to give to others. Along the data-parallel axis that is weights, which they did not
// compute, and gradients, which reduce_gradients hashes; sums over all (all-reduce) are of gradients, too.
static inline void comm_compare(const Comm* c, int axis, const void* data, size_t bytes,
                                cudaStream_t stream) {
    if (axis != AXIS_DP) replay_point(c->replay, data, bytes, stream);
}

// data (n) = its sum over the group
template <typename X>
static inline void comm_all_reduce(Comm* c, int axis, X* data, size_t n, cudaStream_t stream) {
    if (c->group[axis].size == 1 || n == 0) return;
    comm_run(c, axis, "all-reduce", n * sizeof(X), -1, stream, [=](ncclComm_t comm) {
        NCCL_CHECK(c, ncclAllReduce(data, data, n, nccl_type<X>(), ncclSum, comm, stream));
        (void)comm, (void)data;
    });
}

// data (size, n): every rank's part (n), from where it lies
template <typename X>
static inline void comm_all_gather(Comm* c, int axis, X* data, const X* part, size_t n, cudaStream_t stream) {
    if (c->group[axis].size == 1 || n == 0) return;
    comm_compare(c, axis, part, n * sizeof(X), stream);
    comm_run(c, axis, "all-gather", n * sizeof(X), -1, stream, [=](ncclComm_t comm) {
        NCCL_CHECK(c, ncclAllGather(part, data, n, nccl_type<X>(), comm, stream));
        (void)comm, (void)data, (void)part;
    });
}

// part (n) = the sum over the group of this rank's part of data (size, n)
template <typename X>
static inline void comm_reduce_scatter(Comm* c, int axis, X* part, const X* data, size_t n,
                                       cudaStream_t stream) {
    if (c->group[axis].size == 1 || n == 0) return;
    comm_compare(c, axis, data, n * sizeof(X) * (size_t)c->group[axis].size, stream);
    comm_run(c, axis, "reduce-scatter", n * sizeof(X), -1, stream, [=](ncclComm_t comm) {
        NCCL_CHECK(c, ncclReduceScatter(data, part, n, nccl_type<X>(), ncclSum, comm, stream));
        (void)comm, (void)data, (void)part;
    });
}

template <typename X>
static inline void comm_send(Comm* c, int axis, const X* data, size_t n, int to, cudaStream_t stream) {
    comm_run(c, axis, "send", n * sizeof(X), to, stream, [=](ncclComm_t comm) {
        NCCL_CHECK(c, ncclSend(data, n, nccl_type<X>(), to, comm, stream));
        (void)comm, (void)data, (void)to;
    });
}
template <typename X>
static inline void comm_receive(Comm* c, int axis, X* data, size_t n, int from, cudaStream_t stream) {
    comm_run(c, axis, "receive", n * sizeof(X), from, stream, [=](ncclComm_t comm) {
        NCCL_CHECK(c, ncclRecv(data, n, nccl_type<X>(), from, comm, stream));
        (void)comm, (void)data, (void)from;
    });
}

// What stands between these is one operation.
static inline void comm_begin(Comm* c) {
    if (c->group[AXIS_WORLD].size == 1) return;
    NCCL_CHECK(c, ncclGroupStart());
    c->together = true, c->open_since = flight()->count;
}
static inline void comm_end(Comm* c) {
    if (c->group[AXIS_WORLD].size == 1) return;
    NCCL_CHECK(c, ncclGroupEnd());
    exposed_end(&c->exposed, c->exposed.stream);
    uint64_t end = flight()->count,
             first = end - c->open_since > FLIGHT_RECORDS ? end - FLIGHT_RECORDS : c->open_since;
    for (uint64_t k = first; k < end; k++)
        comm_mark(c, &c->behind[k % FLIGHT_RECORDS], c->streams[k % FLIGHT_RECORDS]);
    c->together = false;
}

// How far the device is with the operations of the flight recorder: each is OPERATION_ISSUED, BEGUN or ENDED. Called by
// another thread than the one that communicates.
static inline void comm_look(const Comm* c, uint8_t progress[FLIGHT_RECORDS]) {
    for (int i = 0; i < FLIGHT_RECORDS; i++) {
        bool begun = c->before[i] != NULL && cudaEventQuery(c->before[i]) == cudaSuccess;
        bool ended = begun && c->behind[i] != NULL && cudaEventQuery(c->behind[i]) == cudaSuccess;
        progress[i] = ended ? OPERATION_ENDED : begun ? OPERATION_BEGUN : OPERATION_ISSUED;
    }
}

// ----------------------------------------------------------------------------
// a communicator's life

#ifdef USE_NCCL
// A part of the world's ranks: those of the same colour, in the order of key.
static inline void comm_split(Comm* c, int axis, int color, int key) {
    Group* g = &c->group[axis];
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    NCCL_CHECK(c, ncclCommSplit(c->group[AXIS_WORLD].comm, color, key, &g->comm, &config));
    NCCL_CHECK(c, ncclCommCount(g->comm, &g->size));
    NCCL_CHECK(c, ncclCommUserRank(g->comm, &g->rank));
}

static inline bool comm_connect(Comm* c, const Layout* l, int replicas, Control* control, Error* err) {
    ncclUniqueId id;
    if (l->rank == 0) NCCL_CHECK(c, ncclGetUniqueId(&id));
    if (!control_broadcast(control, &id, sizeof id, err)) return false;
    ncclResult_t status = ncclCommInitRank(&c->group[AXIS_WORLD].comm, l->size, id, l->rank);
    if (status != ncclSuccess)
        return fail(err, EXIT_OS, "NCCL cannot connect rank %d of %d: %s (%s); NCCL_DEBUG=INFO says more",
                    l->rank, l->size, ncclGetErrorString(status), ncclGetLastError(NULL));
    c->group[AXIS_STATE] = c->group[AXIS_WORLD];
    for (int axis = AXIS_WORLD + 1; axis < (l->pp_size > 1 ? AXIS_STATE : AXIS_FORWARD); axis++) {
        int key, color = axis_color(l, axis, replicas, &key);
        comm_split(c, axis, color, key);
    }
    __atomic_store_n(&c->watched, true, __ATOMIC_RELEASE);
    return true;
}
#endif

// Nothing is connected: where there is one process, nothing need be.
static inline void comm_reset(Comm* c, const Layout* l) {
    memset(c, 0, sizeof *c);
    for (int i = 0; i < NUM_AXES; i++) c->group[i].size = 1;
    c->group[AXIS_WORLD].size = l->size, c->group[AXIS_WORLD].rank = l->rank;
}

// control: open
static inline bool comm_open(Comm* c, const Layout* l, int replicas, Control* control, Error* err) {
    comm_reset(c, l);
    if (l->size == 1) return true;
#ifdef USE_NCCL
    return comm_connect(c, l, replicas, control, err);
#else
    (void)replicas, (void)control;
    return fail(err, EXIT_CONFIG,
                "%d processes were started and this program was built without NCCL: install it, "
                "build again (NCCL_HOME=... says where it is), or start one process",
                l->size);
#endif
}

static inline void comm_close(Comm* c) {
#ifdef USE_NCCL
    for (int i = AXIS_STATE - 1; i >= 0; i--)
        if (c->group[i].comm != NULL) NCCL_CHECK(c, ncclCommDestroy(c->group[i].comm));
#endif
    exposed_free(&c->exposed);
    for (int i = 0; i < FLIGHT_RECORDS; i++) {
        if (c->before[i] != NULL) CUDA_CHECK(cudaEventDestroy(c->before[i]));
        if (c->behind[i] != NULL) CUDA_CHECK(cudaEventDestroy(c->behind[i]));
    }
    memset(c, 0, sizeof *c);
}
