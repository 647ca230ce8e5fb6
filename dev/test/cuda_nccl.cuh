// NCCL in one process: what a communicator of one rank does, and how it refuses. Runs with NCCL itself and with
// dev/emu's.
#pragma once
#include <nccl.h>

#include "dev/test/cuda_harness.cuh" // defines: tap_check, random_values, to_device, poisoned_device, same_bits
#include "llmc/exposed.cuh" // defines: Exposed, exposed_begin_step, exposed_begin, exposed_end, exposed_share

#define NCCL_OK(call) tap_check((call) == ncclSuccess, "%s", #call)

enum { NCCL_COUNT = 1000 };

static void test_collectives(ncclComm_t comm, cudaStream_t stream) {
    size_t n = NCCL_COUNT;
    float* in = to_device<float>(random_values(n, 1), n);
    float* out[6];
    for (int i = 0; i < 6; i++) out[i] = poisoned_device<float>(n);
    CUDA_CHECK(cudaDeviceSynchronize()); // the stream does not wait for what poisons them
    NCCL_OK(ncclAllReduce(in, out[0], n, ncclFloat32, ncclSum, comm, stream));
    NCCL_OK(ncclReduce(in, out[1], n, ncclFloat32, ncclMax, 0, comm, stream));
    NCCL_OK(ncclBroadcast(in, out[2], n, ncclFloat32, 0, comm, stream));
    NCCL_OK(ncclReduceScatter(in, out[3], n, ncclFloat32, ncclAvg, comm, stream));
    NCCL_OK(ncclAllGather(in, out[4], n, ncclFloat32, comm, stream));
    NCCL_OK(ncclAllReduce(out[4], out[4], n, ncclFloat32, ncclSum, comm, stream)); // in place
    NCCL_OK(ncclGroupStart());
    NCCL_OK(ncclGroupStart()); // groups nest; the outermost one counts
    NCCL_OK(ncclSend(in, n, ncclFloat32, 0, comm, stream));
    NCCL_OK(ncclGroupEnd());
    NCCL_OK(ncclRecv(out[5], n, ncclFloat32, 0, comm, stream));
    NCCL_OK(ncclGroupEnd());
    CUDA_CHECK(cudaStreamSynchronize(stream));
    for (int i = 0; i < 6; i++)
        tap_check(same_bits(in, out[i], n), "collective %d of one rank copies, and no more than it should",
                  i);
}

static void test_refusals(ncclComm_t comm, ncclUniqueId id, cudaStream_t stream) {
    float* x = poisoned_device<float>(NCCL_COUNT);
    ncclComm_t none = NULL;
    tap_check(ncclCommInitRank(&none, 1, id, 1) == ncclInvalidArgument, "there is no rank 1 of 1");
    tap_check(ncclBroadcast(x, x, NCCL_COUNT, ncclFloat32, 1, comm, stream) == ncclInvalidArgument,
              "there is no root 1: %s", ncclGetLastError(comm));
    tap_check(ncclAllReduce(x, x, NCCL_COUNT, ncclNumTypes, ncclSum, comm, stream) == ncclInvalidArgument,
              "an unknown type is refused: %s", ncclGetLastError(comm));
    tap_check(ncclAllReduce(x, x, NCCL_COUNT, ncclFloat32, ncclNumOps, comm, stream) == ncclInvalidArgument,
              "an unknown operation is refused");
    tap_check(ncclGroupEnd() == ncclInvalidUsage, "a group must begin before it ends");
    tap_check(strcmp(ncclGetErrorString(ncclInvalidUsage), "no error") != 0, "errors have names");
}

static void sleep_milliseconds(void* number) { usleep(1000 * (useconds_t)(uintptr_t)number); }
static void wait_in(cudaStream_t stream, int milliseconds) {
    CUDA_CHECK(cudaLaunchHostFunc(stream, sleep_milliseconds, (void*)(uintptr_t)milliseconds));
}

static void test_exposed(cudaStream_t stream, cudaStream_t other) {
    Exposed x = {};
    x.stream = stream;
    uint64_t measured = 0;
    for (int step = 0; step < 40; step++) {
        exposed_begin_step(&x);
        exposed_begin(&x, stream), exposed_end(&x, stream);
        if (x.used != 0) measured |= UINT64_C(1) << step;
        CUDA_CHECK(cudaStreamSynchronize(stream));
        exposed_share(&x, 1);
    }
    tap_check(measured == (1 | UINT64_C(1) << 1 | UINT64_C(1) << 17 | UINT64_C(1) << 33),
              "the first step is measured, and one in 16: %llx", (unsigned long long)measured);
    x.steps = 1;
    exposed_begin_step(&x);
    exposed_begin(&x, stream), exposed_begin(&x, stream);
    wait_in(stream, 60);
    exposed_end(&x, stream), exposed_end(&x, stream);
    wait_in(stream, 600);
    exposed_begin(&x, other), exposed_end(&x, other);
    for (int i = 0; i < 100; i++) exposed_begin(&x, stream), exposed_end(&x, stream);
    tap_check(x.used == 2 * 101, "pairs of one stream, however often they are begun and ended");
    CUDA_CHECK(cudaStreamSynchronize(stream));
    double share = exposed_share(&x, 1);
    tap_check(share >= 0.06 && share < 0.5, "what is between them counts: %g s", share);
    exposed_begin_step(&x);
    exposed_begin(&x, stream);
    tap_check(x.used == 0 && exposed_share(&x, 1) == share, "and stands for the steps that are not measured");
    exposed_free(&x);
    Exposed alone = {};
    exposed_begin_step(&alone), exposed_begin(&alone, stream), exposed_end(&alone, stream);
    tap_check(alone.used == 0 && exposed_share(&alone, 1) == 0, "one rank waits for nobody");
    exposed_free(&alone);
}

static void test_nccl(void) {
    ncclUniqueId id;
    ncclComm_t comm, half, other;
    ncclResult_t state = ncclInternalError;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    cudaStream_t stream, second;
    int version = 0, ranks = 0, rank = -1;
    CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    tap_check(ncclGetVersion(&version) == ncclSuccess && version >= 21800, "NCCL %d", version);
    NCCL_OK(ncclGetUniqueId(&id));
    NCCL_OK(ncclCommInitRankConfig(&comm, 1, id, 0, &config));
    tap_check(ncclCommCount(comm, &ranks) == ncclSuccess && ncclCommUserRank(comm, &rank) == ncclSuccess &&
                  ranks == 1 && rank == 0,
              "rank 0 of 1");
    NCCL_OK(ncclCommSplit(comm, 3, 0, &half, NULL));
    tap_check(ncclCommSplit(comm, NCCL_SPLIT_NOCOLOR, 0, &other, NULL) == ncclSuccess && other == NULL,
              "who has no colour gets no communicator");
    test_collectives(comm, stream);
    test_collectives(half, stream);
    test_refusals(comm, id, stream);
    tap_check(ncclCommGetAsyncError(comm, &state) == ncclSuccess && state == ncclSuccess, "all is well");
    NCCL_OK(ncclCommDestroy(half));
    NCCL_OK(ncclCommFinalize(comm));
    NCCL_OK(ncclCommDestroy(comm));
    CUDA_CHECK(cudaStreamCreateWithFlags(&second, cudaStreamNonBlocking));
    test_exposed(stream, second);
    CUDA_CHECK(cudaStreamDestroy(second));
    CUDA_CHECK(cudaStreamDestroy(stream));
    release_all();
}
