// NCCL between processes: `dev/emu/launch -n N ranks CASE [VARIANT]`. Every rank checks what it gets and exits
// with 1 if something is wrong. RANKS_ID names the file through which the unique id is handed around.
#include <cuda_bf16.h>
#include <glob.h>
#include <math.h>
#include <nccl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

static int rank, ranks, wrong;
static const char* variant = "";

static void expect(const char* what, long long got, long long wanted) {
    if (got == wanted) return;
    printf("rank %d of %d: %s: %lld instead of %lld (%s)\n", rank, ranks, what, got, wanted,
           ncclGetLastError(NULL));
    wrong++;
}
#define OK(call) expect(#call, (long long)(call), 0)

static bool is(const char* name) { return strcmp(variant, name) == 0; }

// ----------------------------------------------------------------------------
// communicators

static std::string id_path(int number) {
    return std::string(getenv("RANKS_ID")) + "." + std::to_string(number);
}
static void write_file(const std::string& path, const void* data, size_t bytes) {
    std::string partial = path + ".part";
    FILE* f = fopen(partial.c_str(), "w");
    if (f == NULL || fwrite(data, 1, bytes, f) != bytes || fclose(f) != 0) exit(1);
    rename(partial.c_str(), path.c_str());
}
static void wait_for_file(const std::string& path) {
    while (access(path.c_str(), R_OK) != 0) usleep(2000);
}

// The number-th id of this run: made by the first rank.
static ncclUniqueId share_id(int number) {
    ncclUniqueId id;
    std::string path = id_path(number);
    if (rank == 0) {
        OK(ncclGetUniqueId(&id));
        write_file(path, &id, sizeof id);
        return id;
    }
    wait_for_file(path);
    FILE* f = fopen(path.c_str(), "r");
    if (f == NULL || fread(&id, sizeof id, 1, f) != 1) exit(1);
    fclose(f);
    return id;
}

static ncclComm_t world(void) {
    ncclComm_t comm = NULL;
    OK(ncclCommInitRank(&comm, ranks, share_id(0), rank));
    return comm;
}

static std::vector<cudaStream_t> streams;
static std::vector<cudaEvent_t> events;

static cudaStream_t new_stream(void) {
    cudaStream_t stream;
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    streams.push_back(stream);
    return stream;
}
static cudaEvent_t new_event(void) {
    cudaEvent_t event;
    OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    events.push_back(event);
    return event;
}
static void destroy_streams_and_events(void) {
    for (cudaStream_t stream : streams) OK(cudaStreamDestroy(stream));
    for (cudaEvent_t event : events) OK(cudaEventDestroy(event));
}

// ----------------------------------------------------------------------------
// values

template <typename X> struct Type;
template <> struct Type<int> { static const ncclDataType_t nccl = ncclInt32; };
template <> struct Type<long long> { static const ncclDataType_t nccl = ncclInt64; };
template <> struct Type<float> { static const ncclDataType_t nccl = ncclFloat32; };
template <> struct Type<double> { static const ncclDataType_t nccl = ncclFloat64; };
template <> struct Type<__nv_bfloat16> { static const ncclDataType_t nccl = ncclBfloat16; };

// Element i of what a rank gives: floats of many sizes, so that another order of a sum has other last bits.
template <typename X> static X value(int of_rank, size_t i) {
    unsigned long long h = (i * 64 + (unsigned)of_rank + 1) * 0x9E3779B97F4A7C15ull;
    h = (h ^ h >> 31) * 0xBF58476D1CE4E5B9ull;
    h ^= h >> 29;
    if (Type<X>::nccl == ncclInt32 || Type<X>::nccl == ncclInt64) return (X)((int)(h % 19) - 9);
    return (X)(((double)(h >> 12) / (double)(1ull << 51) - 1) * (double)(1 << (h & 7)));
}

template <typename X> static X pick(X a, X b, ncclRedOp_t op) {
    if (op == ncclMax) return a < b ? b : a;
    if (op == ncclMin) return b < a ? b : a;
    return op == ncclProd ? (X)(a * b) : (X)(a + b); // rounded to X at every step
}
template <> __nv_bfloat16 pick(__nv_bfloat16 a, __nv_bfloat16 b, ncclRedOp_t op) {
    return __float2bfloat16(pick((float)a, (float)b, op));
}
template <typename X> static X divide(X sum, int n) { return (X)(sum / (X)n); }
template <> __nv_bfloat16 divide(__nv_bfloat16 sum, int n) { return __float2bfloat16((float)sum / (float)n); }

template <typename X> static X reduced(size_t i, ncclRedOp_t op) {
    X sum = value<X>(0, i);
    for (int r = 1; r < ranks; r++) sum = pick<X>(sum, value<X>(r, i), op);
    return op == ncclAvg ? divide<X>(sum, ranks) : sum;
}

template <typename X> static X* device(size_t n) {
    X* memory = NULL;
    OK(cudaMalloc(&memory, (n > 0 ? n : 1) * sizeof(X)));
    return memory;
}
template <typename X> static void fill(X* memory, size_t n, int of_rank, size_t first, cudaStream_t stream) {
    std::vector<X> values(n);
    for (size_t i = 0; i < n; i++) values[i] = value<X>(of_rank, first + i);
    OK(cudaMemcpyAsync(memory, values.data(), n * sizeof(X), cudaMemcpyHostToDevice, stream));
}
template <typename X> static std::vector<X> fetch(const X* memory, size_t n, cudaStream_t stream) {
    std::vector<X> values(n);
    OK(cudaMemcpyAsync(values.data(), memory, n * sizeof(X), cudaMemcpyDeviceToHost, stream));
    OK(cudaStreamSynchronize(stream));
    return values;
}

template <typename X>
static void same(const char* what, const std::vector<X>& got, const std::vector<X>& wanted) {
    for (size_t i = 0; i < wanted.size(); i++)
        if (memcmp(&got[i], &wanted[i], sizeof(X)) != 0) {
            printf("rank %d of %d: %s, type %d: element %zu of %zu is %.17g, not %.17g\n", rank, ranks, what,
                   (int)Type<X>::nccl, i, wanted.size(), (double)got[i], (double)wanted[i]);
            wrong++;
            return;
        }
}

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

static void ring(ncclComm_t comm, size_t n, cudaStream_t stream) {
    float *out = device<float>(n), *in = device<float>(n);
    int next = (rank + 1) % ranks, before = (rank + ranks - 1) % ranks;
    fill(out, n, rank, 0, stream);
    OK(ncclGroupStart());
    OK(ncclSend(out, n, ncclFloat32, next, comm, stream));
    OK(ncclRecv(in, n, ncclFloat32, before, comm, stream));
    OK(ncclGroupEnd());
    std::vector<float> wanted(n);
    for (size_t i = 0; i < n; i++) wanted[i] = value<float>(before, i);
    same("a ring", fetch(in, n, stream), wanted);
    if (ranks > 1) { // down the line without a group
        if (rank > 0) OK(ncclRecv(in, n, ncclFloat32, rank - 1, comm, stream));
        if (rank == 0) OK(cudaMemcpyAsync(in, out, n * sizeof(float), cudaMemcpyDeviceToDevice, stream));
        if (rank + 1 < ranks) OK(ncclSend(in, n, ncclFloat32, rank + 1, comm, stream));
        for (size_t i = 0; i < n; i++) wanted[i] = value<float>(0, i);
        same("a line", fetch(in, n, stream), wanted);
    }
    OK(cudaFree(out)), OK(cudaFree(in));
}

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

// ----------------------------------------------------------------------------

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

// ----------------------------------------------------------------------------
// the virtual clock: a byte of a memset or of a message takes a microsecond, a message a millisecond besides

static cudaEvent_t began;
static char* bytes; // of the device

static void spend(int ms, cudaStream_t stream) { OK(cudaMemsetAsync(bytes, 0, 1000 * (size_t)ms, stream)); }
static cudaEvent_t mark(cudaStream_t stream) {
    cudaEvent_t event;
    OK(cudaEventCreate(&event));
    events.push_back(event);
    OK(cudaEventRecord(event, stream));
    return event;
}
// What is enqueued from here on begins at 0, in all ranks.
static void begin_clock(cudaStream_t stream, ncclComm_t comm = NULL) {
    OK(cudaDeviceSynchronize());
    if (comm != NULL) OK(ncclAllReduce(bytes, bytes, 1, ncclInt8, ncclMax, comm, stream));
    began = mark(stream);
    OK(cudaEventSynchronize(began));
}
static void expect_at(const char* what, cudaEvent_t event, double wanted) {
    float ms = -1;
    OK(cudaDeviceSynchronize());
    OK(cudaEventElapsedTime(&ms, began, event));
    expect(what, llround(1000 * (double)ms), llround(1000 * wanted));
}

static void clock_streams(void) {
    cudaStream_t a = new_stream(), b = new_stream(), c = new_stream(), d = new_stream();
    begin_clock(a);
    spend(5, a), spend(2, b);
    cudaEvent_t five = mark(a);
    OK(cudaStreamWaitEvent(b, five, 0));
    spend(1, b), spend(3, a), spend(4, c);
    cudaEvent_t six = mark(b), eight = mark(a), four = mark(c);
    OK(cudaEventSynchronize(five)); // before the host has waited, nothing more can be enqueued
    spend(1, c);
    cudaEvent_t host = mark(c);
    spend(9, d), spend(1, d);
    OK(cudaStreamSynchronize(c));
    cudaEvent_t empty = mark(b), busy = mark(d);
    expect_at("a stream", five, 5);
    expect_at("a stream that waits for an event", six, 6);
    expect_at("what stands behind an event", eight, 8);
    expect_at("a stream of its own", four, 4);
    expect_at("a host that has waited", host, 6);
    expect_at("a stream that is not behind the host", empty, 6);
    expect_at("a stream that the host did not wait for", busy, 15);
}

// Every way in which a host waits; what it enqueues next begins no earlier.
static void clock_host(void) {
    cudaStream_t a = new_stream(), b = new_stream();
    begin_clock(a);
    spend(3, a);
    OK(cudaStreamSynchronize(a));
    spend(1, b), spend(2, b);
    cudaEvent_t six = mark(b);
    OK(cudaDeviceSynchronize());
    spend(1, a);
    cudaEvent_t seven = mark(a);
    while (cudaEventQuery(seven) == cudaErrorNotReady) {
    }
    spend(2, b);
    cudaEvent_t nine = mark(b);
    while (cudaStreamQuery(b) == cudaErrorNotReady) {
    }
    spend(1, a);
    std::thread([=] { // a host of its own, for which nobody waits here
        spend(50, b);
        OK(cudaStreamSynchronize(b));
    })
        .join();
    OK(cudaMemcpyAsync(bytes, bytes + 1000, 1000, cudaMemcpyDeviceToDevice, a)); // read and written
    cudaEvent_t twelve = mark(a);
    expect("the other thread's", cudaStreamQuery(b), cudaSuccess);
    spend(1, a);
    cudaEvent_t sixty = mark(a);
    expect_at("cudaStreamSynchronize", six, 6);
    expect_at("cudaDeviceSynchronize", seven, 7);
    expect_at("cudaEventQuery", nine, 9);
    expect_at("cudaStreamQuery, a copy, and another thread", twelve, 9 + 1 + 2);
    expect_at("cudaStreamQuery of what another thread has waited for", sixty, 9 + 50 + 1);
}

// What an event's operation has already done does not make its time earlier.
static void clock_late_wait(void) {
    cudaStream_t a = new_stream(), b = new_stream();
    begin_clock(a);
    spend(10, a);
    cudaEvent_t ten = mark(a);
    spend(1, a);
    expect("a question", cudaStreamQuery(a), cudaErrorNotReady); // the device has done one thing by now
    expect("another", cudaStreamQuery(a), cudaErrorNotReady);
    OK(cudaStreamWaitEvent(b, ten, 0));
    spend(1, b);
    cudaEvent_t eleven = mark(b);
    expect_at("an event that is waited for late", eleven, 11);
}

static void clock_default_stream(void) {
    cudaStream_t a, b, free_one = new_stream();
    OK(cudaStreamCreate(&a)), OK(cudaStreamCreate(&b));
    streams.push_back(a), streams.push_back(b);
    begin_clock(free_one);
    spend(3, a), spend(1, 0), spend(2, b), spend(1, free_one);
    cudaEvent_t six = mark(b), one = mark(free_one);
    expect_at("the default stream is behind blocking ones, and they behind it", six, 3 + 1 + 2);
    expect_at("others do not", one, 1);
}

static void clock_graph(void) {
    cudaStream_t a = new_stream(), b = new_stream();
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeThreadLocal));
    cudaEvent_t fork = mark(a);
    OK(cudaStreamWaitEvent(b, fork, 0));
    spend(2, a), spend(2, b); // either may be the first
    cudaEvent_t join = mark(b);
    OK(cudaStreamWaitEvent(a, join, 0));
    OK(cudaStreamEndCapture(a, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    begin_clock(a);
    for (int times = 0; times < 2; times++) OK(cudaGraphLaunch(exec, a));
    cudaEvent_t eight = mark(a);
    expect_at("a graph is one operation after the other", eight, 2 * (2 + 2));
    OK(cudaGraphExecDestroy(exec)), OK(cudaGraphDestroy(graph));
}

static void clock_collectives(ncclComm_t comm) {
    const size_t large = 8 * 9 * 1000; // floats: many pieces
    cudaStream_t a = new_stream(), b = new_stream();
    float* x = device<float>(large);
    int n = ranks, others = n - 1;
    begin_clock(a, comm);
    spend(1 + rank, a); // the last one begins at n
    OK(ncclAllGather(x + 250 * rank, x, 250, ncclFloat32, comm, a));
    cudaEvent_t gathered = mark(a);
    OK(ncclAllReduce(x, x, large, ncclFloat32, ncclSum, comm, b)); // of the same communicator
    cudaEvent_t reduced_all = mark(b);
    double first = n + 2 * others, second = first + 2 * others * (288.0 / n + 1);
    OK(ncclGroupStart()); // two at once: the bytes of both, the messages of one
    OK(ncclAllReduce(x, x, 250, ncclFloat32, ncclSum, comm, b));
    OK(ncclReduceScatter(x, x + 250 * rank, 250, ncclFloat32, ncclSum, comm, b));
    OK(ncclGroupEnd());
    cudaEvent_t grouped = mark(b);
    expect_at("all ranks gather behind the last of them", gathered, first);
    expect_at("a communicator does one thing at a time", reduced_all, second);
    expect_at("a group", grouped, second + others * (2.0 / n + 1 + 2));
    OK(cudaFree(x));
}

// A message of 36 ms from the first rank to the last: it begins when both are there, and ends in both at once.
static void clock_message(ncclComm_t comm, float* x, int sender_ms, int receiver_ms) {
    const size_t n = 9000; // several pieces
    cudaStream_t stream = new_stream();
    begin_clock(stream, comm);
    spend(rank == 0 ? sender_ms : receiver_ms, stream);
    if (rank == 0) OK(ncclSend(x, n, ncclFloat32, ranks - 1, comm, stream));
    if (rank == ranks - 1) OK(ncclRecv(x, n, ncclFloat32, 0, comm, stream));
    bool involved = rank == 0 || rank == ranks - 1;
    cudaEvent_t end = mark(stream);
    expect_at("a message", end, involved ? fmax(sender_ms, receiver_ms) + 37 : receiver_ms);
}

static void clock_messages(ncclComm_t comm) {
    const size_t n = 9000;
    cudaStream_t stream = new_stream();
    float* x = device<float>(2 * n);
    if (ranks > 1) clock_message(comm, x, 5, 1), clock_message(comm, x, 1, 5);
    begin_clock(stream, comm);
    spend(1 + rank, stream);
    OK(ncclGroupStart());
    OK(ncclSend(x, n, ncclFloat32, (rank + 1) % ranks, comm, stream));
    OK(ncclRecv(x + n, n, ncclFloat32, (rank + ranks - 1) % ranks, comm, stream));
    OK(ncclGroupEnd());
    cudaEvent_t end = mark(stream);
    int last = rank == 0 || rank == ranks - 1 ? ranks : rank + 2; // of this rank and its neighbours
    expect_at("both ways at once", end, last + 37);
    OK(cudaFree(x));
}

static void case_clock(void) {
    setenv("EMU_CLOCK", "copy=1e6,link=1e6,latency=1e-3", 1);
    OK(cudaMalloc(&bytes, 50000));
    clock_streams();
    clock_host();
    clock_late_wait();
    clock_default_stream();
    clock_graph();
    ncclComm_t comm = world();
    clock_collectives(comm);
    clock_messages(comm);
    OK(ncclCommDestroy(comm));
    OK(cudaFree(bytes));
}

int main(int argc, char** argv) {
    static const struct {
        const char* name;
        void (*run)(void);
    } cases[] = {{"collectives", case_collectives}, {"messages", case_messages}, {"split", case_split},
                 {"nonblocking", case_nonblocking}, {"streams", case_streams},   {"crossed", case_crossed},
                 {"capture", case_capture},         {"mismatch", case_mismatch}, {"killed", case_killed},
                 {"missing", case_missing},         {"traffic", case_traffic},   {"clock", case_clock}};
    rank = atoi(getenv("RANK")), ranks = atoi(getenv("WORLD_SIZE"));
    setvbuf(stdout, NULL, _IOLBF, 0);
    OK(cudaSetDevice(rank));
    if (argc > 2) variant = argv[2];
    for (const auto& c : cases)
        if (argc > 1 && strcmp(argv[1], c.name) == 0) {
            c.run();
            destroy_streams_and_events();
            return wrong > 0;
        }
    printf("no such case\n");
    return 2;
}
