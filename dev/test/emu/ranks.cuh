// One rank of ranks.cu: its communicators and streams, and the values that ranks give and must get.
#pragma once
#include <cuda_bf16.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <string>
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

// Around the ring, then down the line.
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
