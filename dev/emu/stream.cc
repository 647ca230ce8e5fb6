// Streams, events and graphs. What is put into a stream runs late: when the host waits for it, and then only
// that and what it depends on. So a wait that the program forgot shows up: the work it should have waited for
// has not run. With EMU_SEED, whatever may run by the rules runs in a drawn order instead.
//
// The rules: a stream's operations run in order; an operation behind cudaStreamWaitEvent waits for the
// event's recording; the legacy default stream waits for all blocking streams, and they for it.
//
// An operation that needs another process (a collective) is asked again and again until it is done. Meanwhile
// whatever else can run does, since the other process may wait for that: on a GPU, too, streams are beside
// each other.
//
// The virtual clock (clock.cc) follows the same rules: an operation begins when its stream has got to it, what it
// waits for has ended and the host has enqueued it; a host that waits for one goes on when that has ended.
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <deque>

#include "emu.h" // defines: emu_error, emu_random

struct Operation {
    std::function<bool()> work; // false: not done yet, ask again; empty: only orders others
    std::vector<std::shared_ptr<Operation>> after; // in other streams
    bool captured;                                 // part of a graph, and never done by itself
    std::weak_ptr<EmuGraph> capture;               // the recording, while it lasts
    unsigned long number;                          // of all operations
    bool done;
    double earliest, end; // by the virtual clock: not to begin before; has ended
    const char* range;
};
typedef std::shared_ptr<Operation> OperationRef;

struct EmuGraph {
    std::vector<OperationRef> nodes;
    EmuStream* origin;
    bool invalid;
};
struct EmuGraphExec {
    std::vector<OperationRef> nodes;
};

struct EmuStream {
    bool blocking; // takes part in the default stream's rule
    std::deque<OperationRef> queue;
    std::vector<OperationRef> pending_waits; // what the next operation runs after
    std::shared_ptr<EmuGraph> capture;       // NULL, or what records this stream
    OperationRef captured;                   // the stream's last node in it
    int number;                              // in the order of creation
    double time, waited;                     // when its last operation has ended; what was waited for
};
struct EmuEvent {
    bool timing;
    OperationRef recorded; // by the last cudaEventRecord
    std::shared_ptr<double> time;
};

static EmuStream default_stream = {true, {}, {}, nullptr, nullptr, 0, 0, 0};
static std::vector<EmuStream*> streams = {&default_stream};
static unsigned long operations;
static thread_local double host_time; // of each thread of its own

static EmuStream* stream_of(cudaStream_t stream) {
    if (stream == NULL || stream == cudaStreamLegacy) return &default_stream;
    for (EmuStream* s : streams)
        if (s == stream) return s;
    return NULL;
}

// ----------------------------------------------------------------------------
// execution

// The legacy default stream's rule.
static bool ordered(const EmuStream* a, const EmuStream* b) {
    return a != b && a->blocking && b->blocking && (a == &default_stream || b == &default_stream);
}

// The first operation that has to be done before this one, and in which stream; NULL if it can run.
static bool blocked_by(EmuStream* stream, const OperationRef& op, EmuStream** where, OperationRef* what) {
    for (const OperationRef& other : op->after)
        if (!other->done)
            for (EmuStream* s : streams)
                for (const OperationRef& queued : s->queue)
                    if (queued == other) {
                        *where = s, *what = other;
                        return true;
                    }
    if (!stream->blocking) return false;
    for (EmuStream* s : streams) {
        if (!ordered(s, stream) || s->queue.empty() || s->queue.front()->number > op->number) continue;
        *where = s, *what = s->queue.front();
        return true;
    }
    return false;
}

// By the virtual clock. Of streams that are ordered, what has a lower number has run, and nothing else.
static double start_of(const EmuStream* stream, const OperationRef& op) {
    double start = std::max(stream->time, op->earliest);
    for (const OperationRef& other : op->after) start = std::max(start, other->end);
    for (const EmuStream* s : streams)
        if (ordered(s, stream)) start = std::max(start, s->time);
    return start;
}

// False: it waits for another process.
static bool run_front(EmuStream* stream) {
    OperationRef op = stream->queue.front();
    emu_running = {start_of(stream, op), stream->number, op->range};
    if (op->work && !op->work()) return false;
    op->end = stream->time = emu_running.now;
    op->done = true;
    op->work = nullptr;
    op->after.clear();
    stream->queue.pop_front();
    return true;
}

void emu_pause(bool progress) {
    static std::atomic<unsigned> idle;
    unsigned times = idle = progress ? 0 : idle + 1;
    if (times > 200)
        usleep(times > 2000 ? 500 : 50);
    else if (times > 0)
        sched_yield();
}

unsigned emu_lock_depth;

void emu_pause_unlocked(bool progress) {
    unsigned depth = progress ? 0 : emu_lock_depth;
    if (depth > 0) emu_lock_depth = 0;
    for (unsigned i = 0; i < depth; i++) emu_mutex.unlock();
    emu_pause(progress);
    for (unsigned i = 0; i < depth; i++) emu_mutex.lock();
    if (depth > 0) emu_lock_depth = depth;
}

// The streams whose first operation may run.
static std::vector<EmuStream*> able_streams(void) {
    std::vector<EmuStream*> able;
    EmuStream* where;
    OperationRef what;
    for (EmuStream* s : streams)
        if (!s->queue.empty() && !blocked_by(s, s->queue.front(), &where, &what)) able.push_back(s);
    return able;
}

// Where an operation waits for another process: one of some other stream, if there is any that can run.
static void run_elsewhere(EmuStream* waiting) {
    bool progress = false;
    for (EmuStream* s : able_streams())
        if (s != waiting && !progress) progress = run_front(s);
    emu_pause_unlocked(progress);
}

// Runs the stream up to and including the operation.
static void run_until(EmuStream* stream, const OperationRef& last) {
    while (!last->done) {
        EmuStream* where;
        OperationRef what;
        if (blocked_by(stream, stream->queue.front(), &where, &what))
            run_until(where, what);
        else if (!run_front(stream))
            run_elsewhere(stream);
    }
}

// One operation of any stream that can run.
static void run_any(void) {
    std::vector<EmuStream*> able = able_streams();
    emu_pause_unlocked(run_front(able[emu_random((unsigned)able.size())]));
}

static void wait_for(EmuStream* stream, const OperationRef& op) {
    if (!emu_shuffled()) {
        run_until(stream, op);
        return;
    }
    while (!op->done) run_any();
    for (unsigned more = emu_random(4); more > 0; more--) // the device does not stop there
        for (EmuStream* s : streams)
            if (!s->queue.empty()) {
                run_any();
                break;
            }
}

static void drain(EmuStream* stream) {
    if (!stream->queue.empty()) wait_for(stream, OperationRef(stream->queue.back()));
}
static void host_waited(double time) { host_time = std::max(host_time, time); }

void emu_drain(void) {
    for (size_t i = 0; i < streams.size(); i++) { // other threads may add some meanwhile
        drain(streams[i]);
        host_waited(streams[i]->time);
    }
}

// ----------------------------------------------------------------------------
// captures

static EmuStream* capturing_stream(void) {
    for (EmuStream* s : streams)
        if (s->capture != nullptr) return s;
    return NULL;
}

static cudaError_t invalidate(const std::shared_ptr<EmuGraph>& graph, cudaError_t error) {
    if (graph != nullptr) graph->invalid = true;
    return emu_error(error);
}

cudaError_t emu_forbidden_in_capture(void) {
    EmuStream* s = capturing_stream();
    return s == NULL ? cudaSuccess : invalidate(s->capture, cudaErrorStreamCaptureUnsupported);
}

// Puts an operation behind what the stream has; the result is NULL where the stream does not take it.
static OperationRef append(EmuStream* stream, std::function<bool()> work, cudaError_t* error) {
    EmuStream* capturing = capturing_stream();
    *error = cudaSuccess;
    if (stream == &default_stream && capturing != NULL && capturing->blocking)
        *error = invalidate(capturing->capture, cudaErrorStreamCaptureImplicit);
    else if (stream->capture != nullptr && stream->capture->invalid)
        *error = emu_error(cudaErrorStreamCaptureInvalidated);
    if (*error != cudaSuccess) return NULL;
    OperationRef op(new Operation{std::move(work), stream->pending_waits, stream->capture != nullptr,
                                  stream->capture, ++operations, false, std::max(host_time, stream->waited),
                                  0, emu_range()});
    stream->pending_waits.clear();
    if (stream->capture == nullptr) {
        stream->queue.push_back(op);
    } else {
        if (stream->captured != nullptr) op->after.push_back(stream->captured);
        stream->captured = op;
        stream->capture->nodes.push_back(op);
    }
    return op;
}

cudaError_t emu_enqueue_polled(cudaStream_t handle, std::function<bool()> work) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    cudaError_t error;
    if (stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    append(stream, std::move(work), &error);
    return error;
}
// EMU_HANG=RANK:N: on this rank the N-th kernel, copy or fill never ends; =RANK:hN: the call that enqueues it does not.
static bool hangs_here(bool host) {
    static const char *setting = getenv("EMU_HANG"), *rank = getenv("RANK");
    static std::atomic<unsigned long> calls;
    const char* number = setting != NULL ? strchr(setting, ':') : NULL;
    if (number == NULL || atoi(setting) != atoi(rank != NULL ? rank : "0") || (number[1] == 'h') != host)
        return false;
    return ++calls == strtoul(number + (host ? 2 : 1), NULL, 10);
}

cudaError_t emu_enqueue(cudaStream_t handle, std::function<void()> work) {
    if (hangs_here(false)) return emu_enqueue_polled(handle, [] { return false; });
    if (hangs_here(true))
        for (EmuLock lock;;) run_elsewhere(NULL); // the device goes on
    return emu_enqueue_polled(handle, [work = std::move(work)] {
        work();
        emu_stick();
        return true;
    });
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    if (stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    if (stream == &default_stream || stream->capture != nullptr)
        return emu_error(cudaErrorStreamCaptureUnsupported);
    stream->capture = std::make_shared<EmuGraph>(EmuGraph{{}, stream, false});
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    *graph = NULL;
    if (stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    std::shared_ptr<EmuGraph> capture = stream->capture;
    if (capture == nullptr) return emu_error(cudaErrorInvalidValue);
    if (capture->origin != stream) return invalidate(capture, cudaErrorStreamCaptureUnmatched);
    bool joined = true; // everything recorded lies before the origin's last node (or what it waits for next)
    std::vector<OperationRef> reached = stream->pending_waits;
    if (stream->captured != nullptr) reached.push_back(stream->captured);
    for (size_t i = 0; i < reached.size(); i++)
        for (const OperationRef& before : reached[i]->after) {
            bool known = false;
            for (const OperationRef& r : reached) known = known || r == before;
            if (!known) reached.push_back(before);
        }
    for (const OperationRef& node : capture->nodes) {
        bool known = false;
        for (const OperationRef& r : reached) known = known || r == node;
        joined = joined && known;
    }
    for (EmuStream* s : streams)
        if (s->capture == capture) {
            s->capture = nullptr;
            s->captured = nullptr;
            s->pending_waits.clear();
        }
    if (capture->invalid) return emu_error(cudaErrorStreamCaptureInvalidated);
    if (!joined) return emu_error(cudaErrorStreamCaptureUnjoined);
    *graph = new EmuGraph(*capture);
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    if (stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    *status = stream->capture == nullptr ? cudaStreamCaptureStatusNone
              : stream->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
    EmuLock lock;
    if (graph == NULL) return emu_error(cudaErrorInvalidValue);
    *exec = new EmuGraphExec{graph->nodes};
    return cudaSuccess;
}

// All nodes, each behind those it depends on: as recorded, or any such order.
static void replay(const std::vector<OperationRef>& nodes) {
    std::vector<bool> done(nodes.size(), false);
    for (size_t left = nodes.size(); left > 0; left--) {
        std::vector<size_t> able;
        for (size_t i = 0; i < nodes.size(); i++) {
            bool can = !done[i];
            for (size_t k = 0; k < nodes.size() && can; k++)
                for (const OperationRef& before : nodes[i]->after)
                    can = can && (before != nodes[k] || done[k]);
            if (can) able.push_back(i);
            if (can && !emu_shuffled()) break;
        }
        size_t next = able[emu_shuffled() ? emu_random((unsigned)able.size()) : 0];
        while (nodes[next]->work && !nodes[next]->work()) emu_pause(false);
        done[next] = true;
    }
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    EmuLock lock;
    if (exec == NULL) return emu_error(cudaErrorInvalidValue);
    return emu_enqueue(stream, [nodes = exec->nodes] { replay(nodes); });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    EmuLock lock;
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
    EmuLock lock;
    delete exec;
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// streams

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    static int number;
    *stream = new EmuStream{(flags & cudaStreamNonBlocking) == 0, {}, {}, nullptr, nullptr, ++number, 0, 0};
    streams.push_back(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    EmuLock lock;
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
    EmuLock lock;
    return cudaStreamCreateWithFlags(stream, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    if (stream == NULL || stream == &default_stream) return emu_error(cudaErrorInvalidResourceHandle);
    drain(stream); // CUDA returns at once and lets the work end; here there is nobody else to do it
    for (size_t i = 0; i < streams.size(); i++)
        if (streams[i] == stream) streams.erase(streams.begin() + (long)i--);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    EmuStream* stream = stream_of(handle);
    if (stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    if (stream->capture != nullptr) return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
    if (stream == &default_stream) { // it is done when the blocking streams before it are
        cudaError_t error;
        if (append(stream, nullptr, &error) == nullptr) return error;
    }
    drain(stream);
    host_waited(stream->time);
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    cudaError_t forbidden = emu_forbidden_in_capture();
    if (forbidden == cudaSuccess) emu_drain();
    return forbidden;
}

// A program that polls gets on: each question lets the device do one thing more.
static cudaError_t query(EmuStream* stream, const OperationRef& op) {
    if (!op->done) {
        EmuStream *where = stream, *next;
        OperationRef what;
        while (blocked_by(where, where->queue.front(), &next, &what)) where = next;
        run_front(where);
    }
    if (op->done) host_waited(op->end);
    return op->done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    if (stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    if (stream->capture != nullptr) return invalidate(stream->capture, cudaErrorStreamCaptureUnsupported);
    if (!stream->queue.empty()) return query(stream, OperationRef(stream->queue.back()));
    host_waited(stream->time);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
    EmuLock lock;
    return emu_enqueue(stream, [=] { function(argument); });
}

// ----------------------------------------------------------------------------
// events

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static EmuStream* stream_with(const OperationRef& op) {
    for (EmuStream* s : streams)
        for (const OperationRef& queued : s->queue)
            if (queued == op) return s;
    return NULL;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    EmuLock lock;
    if (emu_need_device() != cudaSuccess) return cudaPeekAtLastError();
    *event = new EmuEvent{(flags & cudaEventDisableTiming) == 0, nullptr, std::make_shared<double>(0)};
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    EmuLock lock;
    if (event == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    cudaError_t error;
    if (event == NULL || stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    OperationRef op = append(
        stream,
        [time = event->time] {
            *time = emu_clock()->on ? emu_running.now : now();
            return true;
        },
        &error);
    if (op != nullptr) event->recorded = op;
    return error;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
    EmuLock lock;
    EmuStream* stream = stream_of(handle);
    if (event == NULL || stream == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    const OperationRef& op = event->recorded;
    if (op == nullptr) return cudaSuccess; // nothing to wait for
    if (op->captured) {                    // joins the capture that the event was recorded in
        std::shared_ptr<EmuGraph> capture = op->capture.lock();
        if (capture == nullptr) return emu_error(cudaErrorInvalidValue); // it has ended
        if (stream->capture == nullptr && stream != &default_stream) stream->capture = capture;
        if (stream->capture != capture) return invalidate(capture, cudaErrorStreamCaptureIsolation);
    } else if (stream->capture != nullptr) {
        return invalidate(stream->capture, cudaErrorStreamCaptureIsolation);
    }
    if (op->done)
        stream->waited = std::max(stream->waited, op->end);
    else
        stream->pending_waits.push_back(op);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    EmuLock lock;
    if (event == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    if (event->recorded == nullptr) return cudaSuccess;
    if (event->recorded->captured) return invalidate(event->recorded->capture.lock(), cudaErrorCapturedEvent);
    return query(stream_with(event->recorded), event->recorded);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    EmuLock lock;
    if (event == NULL) return emu_error(cudaErrorInvalidResourceHandle);
    if (event->recorded == nullptr) return cudaSuccess;
    if (event->recorded->captured) return invalidate(event->recorded->capture.lock(), cudaErrorCapturedEvent);
    OperationRef op = event->recorded;
    if (!op->done) wait_for(stream_with(op), op);
    host_waited(op->end);
    return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    EmuLock lock;
    if (begin == NULL || end == NULL || !begin->timing || !end->timing || begin->recorded == nullptr ||
        end->recorded == nullptr)
        return emu_error(cudaErrorInvalidResourceHandle);
    if (!begin->recorded->done || !end->recorded->done) return emu_error(cudaErrorNotReady);
    *milliseconds = (float)(1e3 * (*end->time - *begin->time));
    return cudaSuccess;
}
