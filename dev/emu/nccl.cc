// NCCL with one rank. A collective is then a copy, in the order of its stream; a send reaches the receive of the
// same group. What NCCL would refuse or hang at is refused, and ncclGetLastError says why.
#include "nccl.h" // defines: ncclAllReduce ...

#include <stdarg.h>

#include <set>

#include "emu.h" // defines: emu_find_allocation, emu_report

struct ncclComm {
    bool finalized;
};

static std::set<ncclComm_t> communicators;
static char last_error[256];
static const size_t TYPE_BYTES[ncclNumTypes] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

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
    static unsigned char number;
    memset(id, 0, sizeof *id);
    id->internal[0] = (char)++number;
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int nranks, ncclUniqueId, int rank,
                                    ncclConfig_t* config) {
    ncclResult_t result = check_config(config);
    if (result != ncclSuccess) return result;
    if (emu_need_device() != cudaSuccess) return refuse(ncclUnhandledCudaError, "there is no device");
    if (rank < 0 || rank >= nranks) return refuse(ncclInvalidArgument, "rank %d of %d", rank, nranks);
    if (nranks != 1)
        return refuse(ncclInvalidUsage, "%d ranks: the emulated NCCL has communicators of one", nranks);
    *comm = new ncclComm{false};
    communicators.insert(*comm);
    return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, nranks, id, rank, NULL);
}

ncclResult_t ncclCommSplit(ncclComm_t comm, int color, int, ncclComm_t* newcomm, ncclConfig_t* config) {
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    if (color < 0 && color != NCCL_SPLIT_NOCOLOR) return refuse(ncclInvalidArgument, "color %d", color);
    *newcomm = NULL;
    return color == NCCL_SPLIT_NOCOLOR ? ncclSuccess
                                       : ncclCommInitRankConfig(newcomm, 1, ncclUniqueId{{0}}, 0, config);
}

ncclResult_t ncclCommFinalize(ncclComm_t comm) {
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    if (comm->finalized) return refuse(ncclInvalidArgument, "the communicator is already finalized");
    comm->finalized = true;
    return ncclSuccess;
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    if (comm == NULL) return ncclSuccess;
    ncclResult_t result = check_communicator(comm);
    if (result != ncclSuccess) return result;
    communicators.erase(comm);
    delete comm;
    return ncclSuccess;
}
ncclResult_t ncclCommDestroy(ncclComm_t comm) { return ncclCommAbort(comm); } // alone, nobody is waited for

static ncclResult_t answer(ncclComm_t comm, int* out, int value) {
    *out = value;
    return check_communicator(comm);
}
ncclResult_t ncclCommCount(ncclComm_t comm, int* count) { return answer(comm, count, 1); }
ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) { return answer(comm, rank, 0); }
ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) { return answer(comm, device, 0); }
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    *error = ncclSuccess;
    return check_communicator(comm);
}

// ----------------------------------------------------------------------------
// operations

enum Kind { COLLECTIVE, SEND, RECEIVE };
struct Call {
    Kind kind;
    const char* name;
    const void* send; // NULL for a receive
    void* recv;       // NULL for a send
    size_t count;
    ncclDataType_t type;
    ncclComm_t comm;
    cudaStream_t stream;
};

static int group_depth;
static ncclResult_t group_error;
static std::vector<Call> group;

static void check_memory(const char* name, const void* pointer, size_t bytes) {
    const EmuAllocation* memory = emu_find_allocation(pointer);
    if (memory == NULL || (size_t)(memory->begin + memory->bytes - (const char*)pointer) < bytes)
        emu_report("%s: there are no %zu bytes of the device's memory at %p", name, bytes, pointer);
}

static ncclResult_t copy(const char* name, const void* from, void* to, size_t bytes, cudaStream_t stream) {
    cudaError_t error = emu_enqueue(stream, [=] {
        if (bytes == 0) return;
        check_memory(name, from, bytes);
        check_memory(name, to, bytes);
        const char *a = (const char*)from, *b = (const char*)to;
        if (a != b && a < b + bytes && b < a + bytes) emu_report("%s: its buffers overlap in part", name);
        memmove(to, from, bytes);
    });
    return error == cudaSuccess ? ncclSuccess
                                : refuse(ncclUnhandledCudaError, "%s", cudaGetErrorString(error));
}

// What a group does: collectives as they come, the n-th send of a communicator to its n-th receive.
static ncclResult_t run_group(std::vector<Call> calls) {
    ncclResult_t result = ncclSuccess;
    for (size_t i = 0; i < calls.size() && result == ncclSuccess; i++) {
        Call* call = &calls[i];
        if (call->comm == NULL) continue; // was the other half of a pair
        if (call->kind == COLLECTIVE) {
            result =
                copy(call->name, call->send, call->recv, call->count * TYPE_BYTES[call->type], call->stream);
            continue;
        }
        size_t k = i + 1;
        while (k < calls.size() &&
               (calls[k].comm != call->comm || calls[k].kind + call->kind != SEND + RECEIVE))
            k++;
        if (k == calls.size())
            return refuse(ncclInvalidUsage, "%s: nobody meets it in its group; NCCL would hang", call->name);
        Call *send = call->kind == SEND ? call : &calls[k], *recv = call->kind == SEND ? &calls[k] : call;
        if (send->count * TYPE_BYTES[send->type] != recv->count * TYPE_BYTES[recv->type])
            return refuse(ncclInvalidUsage, "ncclSend of %zu elements meets ncclRecv of %zu", send->count,
                          recv->count);
        if (send->stream != recv->stream)
            return refuse(ncclInvalidUsage, "ncclSend and ncclRecv of one rank are in different streams");
        result = copy("ncclSend", send->send, recv->recv, send->count * TYPE_BYTES[send->type], send->stream);
        calls[k].comm = NULL;
    }
    return result;
}

static ncclResult_t check_call(const Call* call, int op, int peer) {
    ncclResult_t result = check_communicator(call->comm);
    if (result != ncclSuccess) return result;
    if (call->comm->finalized)
        return refuse(ncclInvalidUsage, "%s: the communicator is finalized", call->name);
    if (call->type < 0 || call->type >= ncclNumTypes)
        return refuse(ncclInvalidArgument, "%s: data type %d", call->name, (int)call->type);
    if (op < 0 || op >= ncclNumOps) return refuse(ncclInvalidArgument, "%s: operation %d", call->name, op);
    if (peer != 0) return refuse(ncclInvalidArgument, "%s: rank %d of 1", call->name, peer);
    if (call->count > 0 &&
        ((call->kind != RECEIVE && call->send == NULL) || (call->kind != SEND && call->recv == NULL)))
        return refuse(ncclInvalidArgument, "%s: a buffer is NULL", call->name);
    return ncclSuccess;
}

static ncclResult_t submit(const Call& call, int op, int peer) {
    ncclResult_t result = check_call(&call, op, peer);
    if (group_depth == 0) return result == ncclSuccess ? run_group({call}) : result;
    if (group_error == ncclSuccess) group_error = result;
    if (result == ncclSuccess) group.push_back(call);
    return result;
}

ncclResult_t ncclGroupStart(void) {
    group_depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd(void) {
    if (group_depth == 0) return refuse(ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart");
    if (--group_depth > 0) return ncclSuccess;
    std::vector<Call> calls = std::move(group);
    ncclResult_t result = group_error;
    group.clear(), group_error = ncclSuccess;
    return result == ncclSuccess ? run_group(std::move(calls)) : result;
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return submit({COLLECTIVE, "ncclAllReduce", send, recv, count, type, comm, stream}, op, 0);
}
ncclResult_t ncclReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                        int root, ncclComm_t comm, cudaStream_t stream) {
    return submit({COLLECTIVE, "ncclReduce", send, recv, count, type, comm, stream}, op, root);
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return submit({COLLECTIVE, "ncclBroadcast", send, recv, count, type, comm, stream}, ncclSum, root);
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t recvcount, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return submit({COLLECTIVE, "ncclReduceScatter", send, recv, recvcount, type, comm, stream}, op, 0);
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t sendcount, ncclDataType_t type,
                           ncclComm_t comm, cudaStream_t stream) {
    return submit({COLLECTIVE, "ncclAllGather", send, recv, sendcount, type, comm, stream}, ncclSum, 0);
}
ncclResult_t ncclSend(const void* send, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return submit({SEND, "ncclSend", send, NULL, count, type, comm, stream}, ncclSum, peer);
}
ncclResult_t ncclRecv(void* recv, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
    return submit({RECEIVE, "ncclRecv", NULL, recv, count, type, comm, stream}, ncclSum, peer);
}
