// What collectives, messages and communicators do where all ranks call the same.
#pragma once
#include <glob.h>

#include "dev/test/emu/ranks.cuh" // defines: world, share_id, new_stream, value, fill, fetch, same, ring

// ----------------------------------------------------------------------------
// collectives

enum Collective { ALL_REDUCE, REDUCE, BROADCAST, REDUCE_SCATTER, ALL_GATHER, NUM_COLLECTIVES };
static const char* const NAMES[] = {"all-reduce", "reduce", "broadcast", "reduce-scatter", "all-gather"};

// What the output (n elements, or n of each rank) must hold; kept where the rank gets nothing.
template <typename X>
static std::vector<X> wanted_output(Collective what, size_t n, ncclRedOp_t op, int root,
                                    std::vector<X> kept) {
    if (what == REDUCE && rank != root) return kept;
    for (size_t i = 0; i < kept.size(); i++) {
        size_t shift = what == REDUCE_SCATTER ? (size_t)rank * n : 0;
        if (what == BROADCAST)
            kept[i] = value<X>(root, i);
        else if (what == ALL_GATHER)
            kept[i] = value<X>((int)(i / n), i % n);
        else
            kept[i] = reduced<X>(shift + i, op);
    }
    return kept;
}

template <typename X>
static void collective(ncclComm_t comm, Collective what, size_t n, ncclRedOp_t op, int root, bool in_place,
                       cudaStream_t stream) {
    size_t all = n * (size_t)ranks, sent = what == REDUCE_SCATTER ? all : n;
    size_t received = what == ALL_GATHER ? all : n;
    X *in = device<X>(all), *out = in_place ? in : device<X>(received);
    if (in_place && what == REDUCE_SCATTER) out = in + (size_t)rank * n;
    X* send = in_place && what == ALL_GATHER ? in + (size_t)rank * n : in;
    fill(send, sent, rank, 0, stream);
    std::vector<X> before = fetch(out, received, stream);
    ncclDataType_t type = Type<X>::nccl;
    if (what == ALL_REDUCE) OK(ncclAllReduce(send, out, n, type, op, comm, stream));
    if (what == REDUCE) OK(ncclReduce(send, rank == root ? out : NULL, n, type, op, root, comm, stream));
    if (what == BROADCAST) OK(ncclBroadcast(rank == root ? send : NULL, out, n, type, root, comm, stream));
    if (what == REDUCE_SCATTER) OK(ncclReduceScatter(send, out, n, type, op, comm, stream));
    if (what == ALL_GATHER) OK(ncclAllGather(send, out, n, type, comm, stream));
    same(NAMES[what], fetch(out, received, stream), wanted_output(what, n, op, root, before));
    if (!in_place) {
        std::vector<X> untouched(sent);
        for (size_t i = 0; i < sent; i++) untouched[i] = value<X>(rank, i);
        same("the input", fetch(send, sent, stream), untouched);
        OK(cudaFree(out));
    }
    OK(cudaFree(in));
}

template <typename X> static void collectives_of(ncclComm_t comm, cudaStream_t stream) {
    static const ncclRedOp_t ops[] = {ncclSum, ncclAvg, ncclMax, ncclMin, ncclProd};
    static const size_t sizes[] = {0, 1, 7, 1025,
                                   70001}; // the last one is larger than the stage in every type
    for (int what = ALL_REDUCE; what < NUM_COLLECTIVES; what++)
        for (size_t s = 0; s < 5; s++)
            for (size_t o = 0; o < 5; o++) {
                bool reduces = what != BROADCAST && what != ALL_GATHER;
                if (s == 4 ? o != (reduces && Type<X>::nccl == ncclBfloat16) : o > 0 && !reduces) continue;
                int root = (int)(s + o) % ranks;
                collective<X>(comm, (Collective)what, sizes[s], ops[o], root, false, stream);
                collective<X>(comm, (Collective)what, sizes[s], ops[o], root, true, stream);
            }
}

static void case_collectives(void) {
    ncclComm_t comm = world();
    cudaStream_t stream = new_stream();
    int answer = -1;
    OK(ncclCommCount(comm, &answer));
    expect("the number of ranks", answer, ranks);
    OK(ncclCommUserRank(comm, &answer));
    expect("the rank", answer, rank);
    collective<int>(comm, ALL_REDUCE, 5, ncclSum, 0, false, stream);
    glob_t left;
    std::string names = std::string("/dev/shm/emu_nccl_") + getenv("EMU_NCCL_TOKEN") + "_*";
    expect("names in /dev/shm once all are there", glob(names.c_str(), 0, NULL, &left), GLOB_NOMATCH);
    collectives_of<int>(comm, stream);
    collectives_of<long long>(comm, stream);
    collectives_of<float>(comm, stream);
    collectives_of<double>(comm, stream);
    collectives_of<__nv_bfloat16>(comm, stream);
    OK(ncclCommFinalize(comm));
    OK(ncclCommDestroy(comm));
}

// ----------------------------------------------------------------------------
// messages

enum { MESSAGE = 20001 }; // floats: more than the stage of a pair

// Two messages of different lengths from each rank to each, itself included.
static void all_to_all(ncclComm_t comm, size_t n, cudaStream_t stream) {
    size_t one = n + n / 2, all = one * (size_t)ranks;
    float *out = device<float>(all), *in = device<float>(all);
    fill(out, all, rank, 0, stream);
    std::vector<float> wanted(all);
    OK(ncclGroupStart());
    for (int k = 0; k < ranks; k++) {
        int to = (rank + k) % ranks, from = (rank + ranks - k) % ranks;
        float *there = out + (size_t)to * one, *here = in + (size_t)from * one;
        OK(ncclRecv(here, n, ncclFloat32, from, comm, stream));
        OK(ncclSend(there, n, ncclFloat32, to, comm, stream));
        OK(ncclSend(there + n, n / 2, ncclFloat32, to, comm, stream));
        OK(ncclRecv(here + n, n / 2, ncclFloat32, from, comm, stream));
        for (size_t i = 0; i < one; i++)
            wanted[(size_t)from * one + i] = value<float>(from, (size_t)rank * one + i);
    }
    OK(ncclGroupEnd());
    same("all to all", fetch(in, all, stream), wanted);
    OK(cudaFree(out)), OK(cudaFree(in));
}

static void case_messages(void) {
    ncclComm_t comm = world();
    cudaStream_t stream = new_stream(), other = new_stream();
    for (size_t n : {(size_t)0, (size_t)1, (size_t)333, (size_t)MESSAGE}) {
        ring(comm, n, stream);
        for (int times = 0; times < 3; times++) all_to_all(comm, n, stream);
    }
    float* x = device<float>(2);
    expect("a send to itself alone", ncclSend(x, 1, ncclFloat32, rank, comm, stream), ncclInvalidUsage);
    OK(ncclGroupStart());
    OK(ncclSend(x, 1, ncclFloat32, rank, comm, stream));
    OK(ncclRecv(x + 1, 1, ncclFloat32, rank, comm, other));
    expect("messages of a group in two streams", ncclGroupEnd(), ncclInvalidUsage);
    ring(comm, 5, stream); // all is well after that
    OK(cudaFree(x));
    OK(ncclCommDestroy(comm));
}

// ----------------------------------------------------------------------------
// communicators of communicators

// The world's ranks of a communicator, in its order.
static std::vector<int> members(ncclComm_t comm, cudaStream_t stream) {
    int size = 0;
    OK(ncclCommCount(comm, &size));
    int* all = device<int>((size_t)size + 1);
    OK(cudaMemcpyAsync(all + size, &rank, sizeof rank, cudaMemcpyHostToDevice, stream));
    OK(ncclAllGather(all + size, all, 1, ncclInt32, comm, stream));
    std::vector<int> result = fetch(all, (size_t)size, stream);
    OK(cudaFree(all));
    return result;
}

static void case_split(void) {
    ncclComm_t comm = world(), parity, reversed, odd_one, nested;
    cudaStream_t stream = new_stream();
    std::vector<int> even_or_odd, backwards, pair;
    for (int r = rank % 2; r < ranks; r += 2) even_or_odd.push_back(r);
    for (int r = ranks - 1; r >= 0; r--) backwards.push_back(r);
    OK(ncclCommSplit(comm, rank % 2, 0, &parity, NULL)); // equal keys: the order of the parent
    OK(ncclCommSplit(comm, 0, -rank, &reversed, NULL));
    same("a split by colours", members(parity, stream), even_or_odd);
    same("a split that reverses", members(reversed, stream), backwards);
    OK(ncclCommSplit(comm, rank == 0 ? 5 : NCCL_SPLIT_NOCOLOR, 0, &odd_one, NULL));
    expect("a communicator where there is a colour", odd_one != NULL, rank == 0);
    if (rank == 0) same("alone", members(odd_one, stream), std::vector<int>{0});
    int at = rank / 2; // in the parity
    OK(ncclCommSplit(parity, at / 2, -at, &nested, NULL));
    for (int r = at / 2 * 2 + 1; r >= at / 2 * 2; r--)
        if (2 * r + rank % 2 < ranks) pair.push_back(2 * r + rank % 2);
    same("a split of a split", members(nested, stream), pair);
    OK(ncclCommDestroy(parity)); // the parent may go first
    same("afterwards", members(nested, stream), pair);
    for (ncclComm_t c : {nested, reversed, odd_one, comm})
        if (c != NULL) OK(ncclCommDestroy(c));
    expect("a colour below zero", ncclCommSplit(comm, -7, 0, &nested, NULL), ncclInvalidArgument);
}

static void case_nonblocking(void) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    ncclComm_t comm;
    ncclResult_t state = ncclInternalError;
    config.blocking = 0;
    ncclUniqueId id = share_id(0);
    float* x = device<float>(1);
    if (rank > 0) wait_for_file(id_path(1));
    ncclResult_t result = ncclCommInitRankConfig(&comm, ranks, id, rank, &config);
    if (rank == 0) {
        expect("the first is early", result, ranks == 1 ? ncclSuccess : ncclInProgress);
        OK(ncclCommGetAsyncError(comm, &state));
        expect("and nothing changes", state, ranks == 1 ? ncclSuccess : ncclInProgress);
        if (ranks > 1)
            expect("too early", ncclAllReduce(x, x, 1, ncclFloat32, ncclSum, comm, 0), ncclInvalidUsage);
        write_file(id_path(1), "", 0);
    }
    do {
        OK(ncclCommGetAsyncError(comm, &state));
        usleep(1000);
    } while (state == ncclInProgress);
    expect("all are there", state, ncclSuccess);
    ring(comm, 3, 0);
    OK(ncclCommDestroy(comm));
    OK(cudaFree(x));
}

// ----------------------------------------------------------------------------
// streams

__global__ void scale(float* out, const float* in, size_t n, float factor) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < n) out[i] = in[i] * factor;
}

// Rounds of: all-reduce in one stream, x / 2 in another; `bug`: nothing orders them.
static void case_streams(void) {
    enum { N = 1000, ROUNDS = 6 };
    ncclComm_t comm = world();
    cudaStream_t net = new_stream(), work = new_stream();
    cudaEvent_t reduced_x = new_event(), halved = new_event();
    float *x = device<float>(N), *sum = device<float>(N);
    std::vector<float> wanted(N, 1);
    OK(cudaMemcpyAsync(x, wanted.data(), N * sizeof(float), cudaMemcpyHostToDevice, work));
    for (int round = 0; round < ROUNDS; round++) {
        OK(cudaEventRecord(halved, work));
        if (!is("bug")) OK(cudaStreamWaitEvent(net, halved, 0));
        OK(ncclAllReduce(x, sum, N, ncclFloat32, ncclSum, comm, net));
        OK(cudaEventRecord(reduced_x, net));
        if (!is("bug")) OK(cudaStreamWaitEvent(work, reduced_x, 0));
        scale<<<(N + 127) / 128, 128, 0, work>>>(x, sum, N, 0.5f);
        for (float& w : wanted) w = w * (float)ranks * 0.5f;
    }
    same("rounds in two streams", fetch(x, N, work), wanted);
    OK(ncclCommDestroy(comm));
    OK(cudaFree(x)), OK(cudaFree(sum));
}

// Two communicators in two streams; every other rank calls them, and waits for them, the other way around.
static void case_crossed(void) {
    enum { N = 40001 };
    ncclComm_t comm = world(), second;
    OK(ncclCommSplit(comm, 0, -rank, &second, NULL));
    ncclComm_t comms[2] = {comm, second};
    cudaStream_t both[2] = {new_stream(), new_stream()};
    int* x[2] = {device<int>(N), device<int>(N)};
    std::vector<int> wanted(N);
    for (int round = 0; round < 6; round++) {
        bool grouped = round >= 4; // and in one stream
        for (int k = 0; k < 2; k++) fill(x[k], N, rank, 0, both[k]);
        OK(cudaDeviceSynchronize());
        if (grouped) OK(ncclGroupStart());
        for (int k = 0; k < 2; k++) {
            int c = (k + rank) % 2;
            cudaStream_t stream = both[grouped ? 0 : c];
            OK(ncclAllReduce(x[c], x[c], N, ncclInt32, ncclSum, comms[c], stream));
        }
        if (grouped) OK(ncclGroupEnd());
        if (grouped) OK(cudaStreamSynchronize(both[0]));
        for (size_t i = 0; i < N; i++) wanted[i] = reduced<int>(i, ncclSum);
        for (int k = 0; k < 2; k++) {
            int c = (k + rank + round) % 2;
            same("crossed", fetch(x[c], N, both[c]), wanted);
        }
    }
    for (int k = 0; k < 2; k++) { // one communicator in two streams: the order of the calls is what counts
        fill(x[k], N, rank, 0, both[k]);
        OK(ncclAllReduce(x[k], x[k], N - (size_t)k, ncclInt32, ncclSum, comm, both[k]));
    }
    for (int k = 0; k < 2; k++) OK(cudaStreamSynchronize(both[(k + rank) % 2]));
    wanted[N - 1] = value<int>(rank, N - 1);
    same("the second of two streams", fetch(x[1], N, both[1]), wanted);
    for (int k = 0; k < 2; k++) OK(ncclCommDestroy(comms[(rank + k) % 2])), OK(cudaFree(x[k]));
}

static void case_capture(void) {
    enum { N = 100 };
    ncclComm_t comm = world();
    cudaStream_t stream = new_stream();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    float *in = device<float>(N), *out = device<float>(N);
    OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    ncclResult_t result = ncclAllReduce(in, out, N, ncclFloat32, ncclSum, comm, stream);
    expect("a collective in a graph", result, ranks > 1 ? ncclInvalidUsage : ncclSuccess);
    OK(cudaStreamEndCapture(stream, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int times = 0; times < 3 && ranks == 1; times++) { // each launch does it again
        fill(in, N, times, 0, stream);
        OK(cudaGraphLaunch(exec, stream));
        std::vector<float> wanted = fetch(in, N, stream);
        same("a graph", fetch(out, N, stream), wanted);
    }
    ring(comm, 7, stream); // the order of operations is as it was
    OK(cudaGraphExecDestroy(exec)), OK(cudaGraphDestroy(graph));
    OK(ncclCommDestroy(comm));
    OK(cudaFree(in)), OK(cudaFree(out));
}

// ----------------------------------------------------------------------------
// what e2e_ranks.sh counts

static void case_traffic(void) {
    enum { N = 600 };
    ncclComm_t comm = world(), half;
    float* x = device<float>(N * (size_t)ranks * 2);
    OK(ncclCommSplit(comm, rank % 2, 0, &half, NULL));
    for (int twice = 0; twice < 2; twice++) OK(ncclAllReduce(x, x, N, ncclFloat32, ncclSum, comm, 0));
    OK(ncclReduce(x, x, N, ncclFloat32, ncclSum, 0, comm, 0));
    OK(ncclBroadcast(x, x, N, ncclFloat32, 0, comm, 0));
    OK(ncclReduceScatter(x, x + N * (size_t)ranks, N, ncclFloat32, ncclSum, comm, 0));
    OK(ncclAllGather(x, x + N, N, ncclFloat32, comm, 0));
    OK(ncclAllReduce(x, x, N, ncclBfloat16, ncclSum, half, 0));
    OK(cudaDeviceSynchronize());
    ring(comm, N, 0);
    OK(ncclCommDestroy(comm));
    OK(ncclCommDestroy(half));
    OK(cudaFree(x));
}
