// Communication between ranks. Every call goes through here, returns at once where its group has one rank, and
// leaves a record of what it was.
//
//     world   everybody: the step's sums, checkpoints
//     tp      ranks that share every matmul            kv      those of them with the same key/value head
//     dp      ranks with the same weights              cp      those of them with the same rows of the batch
//     tied    first and last stage: the embedding's matrix
//     links   from a stage to the next and back, each with a communicator of its own, since operations of one
//             communicator wait for each other: even stages' links, odd ones', and the one around
//
// Buffers of collectives are in place: a rank's part lies where it is in the whole.
#pragma once
#include "llmc/cuda_common.cuh" // defines: CUDA_CHECK
#include "llmc/layout.h"        // defines: Layout
#include "llmc/rendezvous.h"    // defines: Control, control_broadcast

#ifdef USE_NCCL
#include <nccl.h>
#else // one rank: the calls are there and never made
typedef void* ncclComm_t;
typedef int ncclDataType_t;
enum { ncclFloat, ncclBfloat16, ncclInt64 };
#endif

enum Axis {
    AXIS_WORLD,
    AXIS_TP,
    AXIS_DP,
    AXIS_KV,
    AXIS_CP,
    AXIS_TIED,
    AXIS_FORWARD, // links of even stages, of odd ones, around
    AXIS_BACKWARD = AXIS_FORWARD + 3,
    NUM_AXES = AXIS_BACKWARD + 3
};
static const char* const axis_names[NUM_AXES] = {"world",
                                                 "tensor parallel",
                                                 "data parallel",
                                                 "key/value heads",
                                                 "context parallel",
                                                 "tied embedding",
                                                 "pipeline forward",
                                                 "pipeline forward",
                                                 "pipeline forward",
                                                 "pipeline backward",
                                                 "pipeline backward",
                                                 "pipeline backward"};

typedef struct {
    ncclComm_t comm;
    int rank, size;
} Group;

// What the last operations were, newest at (count - 1) % COMM_RECORDS.
enum { COMM_RECORDS = 256 };
typedef struct {
    const char* what;
    int axis, layer;
    size_t bytes; // of a rank's part
} CommRecord;

typedef struct {
    Group group[NUM_AXES];
    CommRecord records[COMM_RECORDS];
    uint64_t count;
    int layer; // that the program is at
} Comm;

// ----------------------------------------------------------------------------
// operations

template <typename X> static inline ncclDataType_t nccl_type(void) {
    return std::is_same_v<X, float> ? ncclFloat : std::is_same_v<X, long long> ? ncclInt64 : ncclBfloat16;
}

#ifdef USE_NCCL
static inline void nccl_check(const Comm* c, ncclResult_t status, const char* file, int line) {
    if (status == ncclSuccess) return;
    const CommRecord* r = &c->records[(c->count + COMM_RECORDS - 1) % COMM_RECORDS];
    internal_error(file, line, "rank %d: NCCL: %s; the last operation was %s of %zu bytes (%s, layer %d)",
                   c->group[AXIS_WORLD].rank, ncclGetErrorString(status), r->what != NULL ? r->what : "none",
                   r->bytes, axis_names[r->axis], r->layer);
}
#define NCCL_CHECK(c, call) nccl_check((c), (call), __FILE__, __LINE__)
#else
#define NCCL_CHECK(c, call) CHECK(!"more than one rank without NCCL")
#endif

static inline Group* comm_record(Comm* c, int axis, const char* what, size_t bytes) {
    CommRecord record = {what, axis, c->layer, bytes};
    c->records[c->count++ % COMM_RECORDS] = record;
    return &c->group[axis];
}

// data (n) = its sum over the group
template <typename X>
static inline void comm_all_reduce(Comm* c, int axis, X* data, size_t n, cudaStream_t stream) {
    if (c->group[axis].size == 1 || n == 0) return;
    Group* g = comm_record(c, axis, "all-reduce", n * sizeof(X));
    NCCL_CHECK(c, ncclAllReduce(data, data, n, nccl_type<X>(), ncclSum, g->comm, stream));
    (void)g, (void)data, (void)stream;
}

// data (size, n): every rank's part (n), from where it lies
template <typename X>
static inline void comm_all_gather(Comm* c, int axis, X* data, const X* part, size_t n, cudaStream_t stream) {
    if (c->group[axis].size == 1 || n == 0) return;
    Group* g = comm_record(c, axis, "all-gather", n * sizeof(X));
    NCCL_CHECK(c, ncclAllGather(part, data, n, nccl_type<X>(), g->comm, stream));
    (void)g, (void)data, (void)part, (void)stream;
}

// part (n) = the sum over the group of this rank's part of data (size, n)
template <typename X>
static inline void comm_reduce_scatter(Comm* c, int axis, X* part, const X* data, size_t n,
                                       cudaStream_t stream) {
    if (c->group[axis].size == 1 || n == 0) return;
    Group* g = comm_record(c, axis, "reduce-scatter", n * sizeof(X));
    NCCL_CHECK(c, ncclReduceScatter(data, part, n, nccl_type<X>(), ncclSum, g->comm, stream));
    (void)g, (void)data, (void)part, (void)stream;
}

template <typename X>
static inline void comm_send(Comm* c, int axis, const X* data, size_t n, int to, cudaStream_t stream) {
    Group* g = comm_record(c, axis, "send", n * sizeof(X));
    NCCL_CHECK(c, ncclSend(data, n, nccl_type<X>(), to, g->comm, stream));
    (void)g, (void)data, (void)to, (void)stream;
}
template <typename X>
static inline void comm_receive(Comm* c, int axis, X* data, size_t n, int from, cudaStream_t stream) {
    Group* g = comm_record(c, axis, "receive", n * sizeof(X));
    NCCL_CHECK(c, ncclRecv(data, n, nccl_type<X>(), from, g->comm, stream));
    (void)g, (void)data, (void)from, (void)stream;
}

// What stands between these is one operation.
static inline void comm_begin(const Comm* c) {
    if (c->group[AXIS_WORLD].size > 1) NCCL_CHECK(c, ncclGroupStart());
}
static inline void comm_end(const Comm* c) {
    if (c->group[AXIS_WORLD].size > 1) NCCL_CHECK(c, ncclGroupEnd());
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
        return fail(err, EXIT_NO_DEVICE,
                    "NCCL cannot connect rank %d of %d: %s (%s); NCCL_DEBUG=INFO says more", l->rank, l->size,
                    ncclGetErrorString(status), ncclGetLastError(NULL));
    int stage = l->dp + l->dp_size * l->pp, column = l->tp + l->tp_size * l->dp;
    comm_split(c, AXIS_TP, stage, l->tp);
    comm_split(c, AXIS_DP, l->tp + l->tp_size * l->pp, l->dp);
    comm_split(c, AXIS_KV, stage * l->tp_size + l->tp / replicas, l->tp);
    comm_split(c, AXIS_CP, l->tp + l->tp_size * (replica(l) + num_replicas(l) * l->pp), l->cp);
    bool tied = l->pp == 0 || l->pp == l->pp_size - 1;
    comm_split(c, AXIS_TIED, tied ? column : l->size + l->rank, l->pp);
    for (int axis = AXIS_FORWARD; axis < NUM_AXES && l->pp_size > 1; axis++)
        comm_split(c, axis, column, l->pp);
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
    for (int i = NUM_AXES - 1; i >= 0; i--)
        if (c->group[i].comm != NULL) NCCL_CHECK(c, ncclCommDestroy(c->group[i].comm));
#endif
    memset(c, 0, sizeof *c);
}
