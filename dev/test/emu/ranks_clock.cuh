// The virtual clock: a byte of a memset or of a message takes a microsecond, a message a millisecond besides.
#pragma once
#include <math.h>

#include <thread>

#include "dev/test/emu/ranks.cuh" // defines: world, new_stream, events, device, expect

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
