// Ranks that fail: one does something else than the others, is killed, or never comes.
#pragma once
#include <signal.h>

#include <atomic>
#include <thread>

#include "dev/test/emu/ranks.cuh" // defines: world, share_id, is, new_stream, device, ring

// ----------------------------------------------------------------------------
// mistakes: the last rank does something else

static void case_mismatch(void) {
    enum { N = 50 };
    ncclComm_t comm = world();
    bool odd = rank == ranks - 1;
    double* x = device<double>(2 * N);
    size_t n = odd && is("count") ? N - 1 : N;
    ncclDataType_t type = odd && is("type") ? ncclInt32 : ncclFloat32;
    ncclRedOp_t op = odd && is("operation") ? ncclMax : ncclSum;
    if (is("root"))
        OK(ncclBroadcast(x, x, n, type, odd ? 1 : 0, comm, 0));
    else if (odd && is("collective"))
        OK(ncclReduceScatter(x, x + N, 1, type, op, comm, 0));
    else if (is("message") && odd)
        OK(ncclRecv(x, N + 1, type, 0, comm, 0));
    else if (is("message") && rank == 0)
        OK(ncclSend(x, N, type, ranks - 1, comm, 0));
    else if (!is("message"))
        OK(ncclAllReduce(x, x, n, type, op, comm, 0));
    OK(cudaDeviceSynchronize());
    OK(cudaFree(x));
    OK(ncclCommDestroy(comm));
}

// ----------------------------------------------------------------------------
// a rank that is lost

static void lose_rank(void) {
    const char* text = getenv("RANKS_MS");
    useconds_t microseconds = text == NULL ? 0 : (useconds_t)(1000 * atof(text));
    std::thread([=] {
        usleep(microseconds);
        kill(getpid(), SIGKILL);
    }).detach();
}

static std::atomic<long> steps;
static std::atomic<bool> aborted;
static ncclComm_t second;   // has lost the same rank, and is aborted later
static cudaStream_t beside; // where it waits
static float* second_x;

static void give_up(ncclComm_t comm) {
    OK(ncclAllReduce(second_x, second_x, 1, ncclFloat32, ncclSum, second, beside));
    aborted = true;
    OK(ncclCommAbort(comm));
}

// Until a second has gone without a step: then what NCCL says of it, and the end of the communicator.
static void watch(ncclComm_t comm) {
    ncclResult_t state = ncclInternalError;
    long seen = -1;
    for (int still = 0; still < 20; still = steps == seen ? still + 1 : 0) {
        seen = steps;
        usleep(50000);
    }
    OK(ncclCommGetAsyncError(comm, &state));
    expect("what is known", state, getenv("EMU_NCCL_DETECT") != NULL ? ncclRemoteError : ncclSuccess);
    give_up(comm);
}

// The others are a world of their own.
static void go_on(void) {
    int lost = ranks - 1;
    ncclComm_t comm;
    OK(ncclCommInitRank(&comm, lost, share_id(1), rank));
    ranks = lost;
    ring(comm, 9, new_stream());
    OK(ncclCommDestroy(comm));
    printf("rank %d goes on\n", rank);
}

// The last rank is killed amid all-reduces. `thread`: another thread aborts while this one waits; `poll`: this
// one asks, and aborts; `hang`: nobody does.
static void case_killed(void) {
    enum { N = 100000 };
    ncclComm_t comm = world();
    cudaStream_t stream = new_stream();
    cudaEvent_t event = new_event();
    float* x = device<float>(N);
    std::thread watcher;
    second_x = device<float>(1), beside = new_stream();
    OK(ncclCommSplit(comm, 0, 0, &second, NULL));
    OK(cudaMemsetAsync(x, 0, N * sizeof *x, stream));
    if (rank == ranks - 1) lose_rank();
    if (is("thread") && rank < ranks - 1) watcher = std::thread(watch, comm);
    for (int quiet = 0; !aborted; steps++) {
        OK(ncclAllReduce(x, x, N, ncclFloat32, ncclSum, comm, stream));
        OK(cudaEventRecord(event, stream));
        while (is("poll") && quiet < 1000 && cudaEventQuery(event) == cudaErrorNotReady)
            quiet++, usleep(1000);
        if (quiet == 1000) give_up(comm);
        OK(cudaStreamSynchronize(stream));
        quiet = 0;
    }
    if (watcher.joinable()) watcher.join();
    expect("the other one", cudaStreamQuery(beside), cudaErrorNotReady);
    OK(ncclCommAbort(second));
    OK(cudaDeviceSynchronize());
    expect("the end", ncclCommAbort(comm), ncclInvalidArgument);
    OK(cudaFree(x)), OK(cudaFree(second_x));
    go_on();
}

// The last rank never comes. `blocking`: the others wait for good.
static void case_missing(void) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm;
    ncclResult_t state = ncclSuccess;
    ncclUniqueId id = share_id(0);
    if (rank == ranks - 1) {
        usleep(200000); // the others are waiting by then
        _exit(3);
    }
    config.blocking = is("blocking");
    expect("not all are there", ncclCommInitRankConfig(&comm, ranks, id, rank, &config), ncclInProgress);
    sleep(1);
    OK(ncclCommGetAsyncError(comm, &state));
    expect("after a second", state, ncclInProgress);
    OK(ncclCommAbort(comm));
    go_on();
}
