// A thread in every process that ends the run where it cannot go on: a process is gone, or hangs. It has connections of
// its own:
//
//     rank r -> rank 0     once a second: where it is (WatchReport)
//     rank 0 -> rank r     once a second: that it is there, and whether all shall look at what their devices do
//     both                 BYE: it leaves the run, of itself or with an error
//     rank 0 -> rank r     END: everybody ends, and why
//
// What ends a run:
//     a connection that closes without BYE           the process died: known at once
//     silence, for parallel.hang_seconds_min         its machine or network is gone, or somebody stopped it
//     a phase (flight.h) beyond its limit            the process that others wait for, and that waits for nobody, hangs
// The limit is hang_seconds_max; of what takes about as long each time, five times the longest so far, if that is less,
// and not below hang_seconds_min.
//
// Every process then writes what its flight recorder holds of where its device is (RUN_DIR/flight/rank_00003.jsonl), rank 0
// says one sentence (where rank 0 is gone, rank 1 and the first process of each machine do), and all end at once, with
// EXIT_LOST. Communicators are not aborted: that may hang, too, and who ends gives everything back. Time is counted while
// this thread runs, so a job that was stopped as a whole may go on.
#pragma once
#include "llmc/flight.h"  // defines: flight, FlightRecord, axis_color, phase_names, axis_names
#include "llmc/launch.h"  // defines: node_name
#include "llmc/metrics.h" // defines: Metrics, event_begin, event_text, event_end
#include "llmc/program.h" // defines: gpt_look, Control

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/eventfd.h>

enum {
    WATCH_OPEN = 8,
    WATCH_LOOKS = 4,       // beats from the first rank that is late to the verdict
    FLIGHT_WRITTEN = 1024, // records, half of them before the first operation that has not ended
};
#define WATCH_BEAT_SECONDS 1.0
#define WATCH_TARDY 5.0 // times as long as lately is too long

typedef struct {
    uint64_t number, bytes;
    int32_t axis, layer, peer; // peer: rank in the group, of a message; -1: all of the group take part
    char what[16];
} WatchOperation;

// Where a process is.
typedef struct {
    uint64_t step, begun[NUM_AXES]; // begun: operations of each axis that its device got to
    double age, limit, own;         // seconds in this phase, and what it may take; of its own work in a step
    int32_t phase;
    int32_t late, looked,
        waits; // beyond its limit; what follows is of now; for another process, through the control
               // channel
    int32_t num_open;
    WatchOperation open[WATCH_OPEN]; // begun and not ended: what it waits in, the oldest first
} WatchReport;

// Seconds of a process's own work in a step, over all of them.
typedef struct {
    double min, median, max;
    int slowest;
} RankSeconds;

enum WatchKind { WATCH_BEAT, WATCH_BYE, WATCH_END };
typedef struct {
    int32_t kind, look, local_rank;
    char host[64];
    WatchReport report;
    Error err; // of BYE and END
} WatchMessage;

typedef struct {
    WatchMessage in, out, last; // last: what came
    Part receiving, sending;
    double heard; // by the thread's clock
    bool there;   // it has a connection, and has not left
} WatchPeer;

typedef struct {
    Control control; // whose sockets are this thread's alone
    const RunConfig* run;
    GPT* gpt;
    const Control *main, *joined; // of main; atomic: of its thread that main waits for
    Metrics* metrics;
    WatchMessage mine;
    WatchPeer* peers;        // of rank 0: one for each rank; of others: rank 0's
    double clock;            // seconds that this thread was awake
    uint64_t phases;         // the flight recorder's, when age was 0
    int asked;               // rank 0: beats since all were asked to look; 0: they were not
    pthread_mutex_t compare; // over ranks
    RankSeconds ranks;       // rank 0: max 0: not known
    int slow_beats;          // how often the same rank was slow
    uint64_t compared;       // step of the last comparison
    pthread_t thread;
    bool running;
    int wake; // eventfd
    Error bye;
    // a thread of its own asks the device, as its driver may hang, too
    pthread_t looker;
    sem_t calls;
    int look;       // atomic, a WatchLook
    uint64_t moved; // what all devices' operations had begun at the last look; 0: nobody looked
    uint8_t progress[FLIGHT_RECORDS];
} Watchdog;

enum WatchLook { LOOK_IDLE, LOOK_WANTED, LOOK_DONE, LOOK_STOP, LOOK_STOPPED };

// ----------------------------------------------------------------------------
// where this process is

// What the device is at, from the flight recorder. A computation that goes on is not held up by the pipeline's messages,
// which have streams of their own and begin ahead of their time.
static inline void watch_look(Watchdog* w, WatchReport* r) {
    const uint8_t* progress = w->progress;
    const Flight* f = flight();
    uint64_t end = __atomic_load_n(&f->count, __ATOMIC_ACQUIRE),
             first = end > FLIGHT_RECORDS ? end - FLIGHT_RECORDS : 0;
    bool known[NUM_AXES] = {false}, computes = false;
    r->num_open = 0, r->looked = 1;
    for (int a = 0; a < NUM_AXES; a++) r->begun[a] = f->issued[a];
    for (uint64_t k = first; k < end; k++) {
        const FlightRecord* record = &f->records[k % FLIGHT_RECORDS];
        int axis = record->axis, now = progress[k % FLIGHT_RECORDS];
        if (axis < 0) continue;
        computes = computes || (axis == AXIS_COMPUTE && now == OPERATION_BEGUN);
        if (axis < NUM_AXES && (!known[axis] || now != OPERATION_ISSUED))
            r->begun[axis] = record->number - (now == OPERATION_ISSUED);
        if (axis < NUM_AXES) known[axis] = true;
        if (now != OPERATION_BEGUN || axis == AXIS_COMPUTE || r->num_open == WATCH_OPEN) continue;
        WatchOperation* open = &r->open[r->num_open++];
        open->number = record->number, open->bytes = record->bytes;
        open->axis = axis, open->layer = record->layer, open->peer = record->peer;
        snprintf(open->what, sizeof open->what, "%s", record->what);
    }
    int kept = 0;
    for (int k = 0; k < r->num_open; k++)
        if (!computes || r->open[k].axis < AXIS_FORWARD) r->open[kept++] = r->open[k];
    r->num_open = kept;
}

static inline void* look_main(void* argument) {
    static uint8_t progress[FLIGHT_RECORDS];
    Watchdog* w = (Watchdog*)argument;
    int look;
    do {
        while (sem_wait(&w->calls) != 0) continue; // a signal
        look = __atomic_load_n(&w->look, __ATOMIC_ACQUIRE);
        if (look != LOOK_WANTED) continue;
        gpt_look(w->gpt, progress);
        memcpy(w->progress, progress,
               sizeof progress); // nobody reads it while a look is wanted, but who ends
        __atomic_compare_exchange_n(&w->look, &look, LOOK_DONE, false, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
    } while (look != LOOK_STOP);
    __atomic_store_n(&w->look, LOOK_STOPPED, __ATOMIC_RELEASE);
    return NULL;
}

static inline void call_looker(Watchdog* w, enum WatchLook what) {
    __atomic_store_n(&w->look, what, __ATOMIC_RELEASE);
    sem_post(&w->calls);
}

// What was looked at since the last beat, and another look. A device that got on since the last one makes the time that
// passed worth nothing: others were waited for, and now they are there.
static inline void watch_looked(Watchdog* w, WatchReport* r) {
    uint64_t moved = 1;
    if (__atomic_load_n(&w->look, __ATOMIC_ACQUIRE) == LOOK_DONE) {
        watch_look(w, r);
        for (int a = 0; a < NUM_AXES; a++) moved += r->begun[a];
        if (w->moved != 0 && moved != w->moved) r->age = 0, r->late = 0;
        w->moved = moved;
    }
    if (__atomic_load_n(&w->look, __ATOMIC_ACQUIRE) != LOOK_WANTED) call_looker(w, LOOK_WANTED);
}

// Main is about to wait for a thread of its own, which talks to others by this channel.
static inline void watchdog_joins(Watchdog* w, const Control* channel) {
    __atomic_store_n(&w->joined, channel, __ATOMIC_RELEASE);
}

static inline void watch_self(Watchdog* w, double awake, bool look) {
    const Flight* f = flight();
    WatchReport* r = &w->mine.report;
    uint64_t phases = __atomic_load_n(&f->phases, __ATOMIC_ACQUIRE);
    double least = w->run->parallel.hang_seconds_min, most = w->run->parallel.hang_seconds_max;
    r->age = phases == w->phases ? r->age + awake : 0;
    w->phases = phases;
    r->phase = f->phase, r->step = f->step, r->own = f->own_seconds;
    bool known = phase_is_regular[r->phase] && f->longest[r->phase] > 0;
    r->limit = known ? fmin(fmax(WATCH_TARDY * f->longest[r->phase], least), most) : most;
    r->late = r->age > r->limit;
    const Control* joined = r->phase == PHASE_SAVE ? __atomic_load_n(&w->joined, __ATOMIC_ACQUIRE) : w->main;
    r->waits = control_waits(w->main) || control_waits(joined);
    r->looked = 0, r->num_open = 0;
    if (look || r->late)
        watch_looked(w, r);
    else
        w->moved = 0;
}

// ----------------------------------------------------------------------------
// who is it?

// Does the operation of rank `from` wait for rank `to`, whose device has not got to it?
static inline bool watch_awaits(const WatchReport* reports, const Layout* layout, int replicas, int from,
                                int to, const WatchOperation* op) {
    Layout a = layout_at(*layout, from), b = layout_at(*layout, to);
    int key_a, key_b;
    return from != to && op->axis != AXIS_STATE && // where numbers are not of pairs
           axis_color(&a, op->axis, replicas, &key_a) == axis_color(&b, op->axis, replicas, &key_b) &&
           (op->peer < 0 || op->peer == key_b) && reports[to].begun[op->axis] < op->number;
}

// The rank that somebody waits for and that waits for nobody; of several, the one that has stood still longest. -1: there
// is none, as all wait for each other, or for the network. *by, *op: the rank that waits, and in what; -1, 0: not in an
// operation; where there is no culprit, an operation that has begun everywhere, or the first that has.
static inline int watch_culprit(const WatchReport* reports, const Layout* layout, int replicas, int* by,
                                int* op) {
    int culprit = -1, size = layout->size;
    bool* waits = (bool*)calloc_check((size_t)size, sizeof *waits);
    *by = -1, *op = 0;
    for (int r = 0; r < size; r++) {
        waits[r] = reports[r].waits;
        for (int k = 0; k < reports[r].num_open && !waits[r]; k++) waits[r] = true;
    }
    for (int r = 0; r < size; r++) {
        int waiter = -1, in = 0;
        for (int from = 0; from < size && waiter < 0; from++)
            for (int k = 0; k < reports[from].num_open && waiter < 0; k++)
                if (watch_awaits(reports, layout, replicas, from, r, &reports[from].open[k]))
                    waiter = from, in = k;
        bool better =
            culprit < 0 || (waiter >= 0) > (*by >= 0) ||
            ((waiter >= 0) == (*by >= 0) && reports[r].age > reports[culprit].age + 2 * WATCH_BEAT_SECONDS);
        if (!waits[r] && better) culprit = r, *by = waiter, *op = in;
    }
    for (int r = 0; r < size && culprit < 0; r++)
        for (int k = 0; k < reports[r].num_open; k++) {
            bool everywhere = true;
            for (int to = 0; to < size; to++)
                everywhere =
                    everywhere && !watch_awaits(reports, layout, replicas, r, to, &reports[r].open[k]);
            if (*by >= 0 && !everywhere) continue;
            *by = r, *op = k;
            if (everywhere) r = size, k = WATCH_OPEN;
        }
    free(waits);
    return culprit;
}

static inline void append_operation(String* text, const WatchOperation* op) {
    string_append(text, "%s of %llu bytes (%s", op->what, (unsigned long long)op->bytes,
                  axis_names[op->axis]);
    if (op->layer >= 0) string_append(text, ", layer %d", op->layer);
    string_append(text, ")");
}

static inline void append_rank(String* text, int rank, int size, const WatchMessage* m) {
    string_append(text, "rank %d of %d", rank, size);
    if (m->host[0] != '\0') string_append(text, " (%s, GPU %d)", m->host, m->local_rank);
}

static inline void watch_sentence(const WatchReport* reports, const WatchMessage* culprit, int rank, int size,
                                  int by, int op, Error* err) {
    String text = {NULL, 0, 0};
    const WatchReport* first = &reports[rank >= 0 ? rank : by >= 0 ? by : 0];
    if (rank >= 0) {
        append_rank(&text, rank, size, culprit);
        string_append(&text, " hangs: it has been %s for %.0f s, in step %llu", phase_names[first->phase],
                      first->age, (unsigned long long)first->step);
    } else {
        string_append(&text, "no process gets on: rank %d of %d has been %s for %.0f s, in step %llu",
                      by >= 0 ? by : 0, size, phase_names[first->phase], first->age,
                      (unsigned long long)first->step);
    }
    if (by >= 0) {
        string_append(&text, rank >= 0 ? ", and rank %d waits for it in " : ", rank %d in ", by);
        append_operation(&text, &reports[by].open[op]);
    }
    string_append(&text, "%s; see flight/ in log.run_dir, and run again to go on from the newest checkpoint",
                  rank >= 0 ? "" : ": look at the network, and at NCCL_DEBUG=INFO");
    fail(err, EXIT_LOST, "%s", text.data);
    free(text.data);
}

// ----------------------------------------------------------------------------
// messages

static inline int watch_num_peers(const Watchdog* w) {
    return w->control.size == 1 ? 0 : w->control.rank == 0 ? w->control.size : 1;
}

// What can be sent now, of this message or the one before; a peer that takes nothing misses some.
static inline void watch_send(Watchdog* w, int peer, enum WatchKind kind, const Error* err) {
    WatchPeer* p = &w->peers[peer];
    if (!p->there) return;
    if (p->sending.left == 0) {
        p->out = w->mine;
        p->out.kind = kind, p->out.look = w->asked > 0;
        if (err != NULL) p->out.err = *err;
        p->sending.data = (char*)&p->out, p->sending.left = sizeof p->out;
    }
    part_move(w->control.sockets[peer], &p->sending, true); // that it is gone is seen when receiving
}

static inline void watch_send_all(Watchdog* w, enum WatchKind kind, const Error* err) {
    for (int i = 0; i < watch_num_peers(w); i++) watch_send(w, i, kind, err);
}

// The last words to everybody, for at most two seconds.
static inline void watch_part(Watchdog* w, enum WatchKind kind, const Error* err) {
    double deadline = deadline_after(2);
    bool left = true;
    for (int i = 0; i < watch_num_peers(w); i++) // what was begun comes first
        while (w->peers[i].there && w->peers[i].sending.left > 0 && !deadline_passed(deadline)) {
            if (!part_move(w->control.sockets[i], &w->peers[i].sending, true)) break;
            if (w->peers[i].sending.left > 0) usleep(1000);
        }
    watch_send_all(w, kind, err);
    while (left && !deadline_passed(deadline)) {
        left = false;
        for (int i = 0; i < watch_num_peers(w); i++) {
            WatchPeer* p = &w->peers[i];
            if (p->there && p->sending.left > 0 && part_move(w->control.sockets[i], &p->sending, true))
                left = left || p->sending.left > 0;
        }
        if (left) usleep(1000);
    }
}

// ----------------------------------------------------------------------------
// the end

static inline void flight_write(const Watchdog* w, const Error* why) {
    static const char* const progress_names[] = {"issued", "begun", "ended"};
    const uint8_t* progress = w->progress;
    const Flight* f = flight();
    String text = {NULL, 0, 0};
    char path[PATH_MAX], name[32];
    Error ignored = {0, {0}};
    uint64_t end = f->count, first = end > FLIGHT_RECORDS ? end - FLIGHT_RECORDS : 0, at = first;
    double now = seconds_now();
    while (at < end &&
           (f->records[at % FLIGHT_RECORDS].axis < 0 || progress[at % FLIGHT_RECORDS] == OPERATION_ENDED))
        at++;
    if (at > first + FLIGHT_WRITTEN / 2) first = at - FLIGHT_WRITTEN / 2;
    if (end > first + FLIGHT_WRITTEN) end = first + FLIGHT_WRITTEN;
    string_append(&text,
                  "{\"time\":%lld,\"rank\":%d,\"size\":%d,\"local_rank\":%d,\"host\":", (long long)time(NULL),
                  w->control.rank, w->control.size, w->mine.local_rank);
    json_append_string(&text, w->mine.host);
    string_append(&text, ",\"phase\":\"%s\",\"step\":%llu,\"seconds\":%.3f,\"why\":", phase_names[f->phase],
                  (unsigned long long)f->step, now - f->since);
    json_append_string(&text, why->text);
    string_append(&text, "}\n");
    for (uint64_t k = first; k < end; k++) {
        const FlightRecord* r = &f->records[k % FLIGHT_RECORDS];
        string_append(&text, "{\"what\":\"%s\",\"step\":%llu,\"seconds_ago\":%.6f", r->what,
                      (unsigned long long)r->step, now - r->time);
        if (r->axis >= 0)
            string_append(&text,
                          ",\"number\":%llu,\"axis\":\"%s\",\"layer\":%d,\"bytes\":%zu,\"progress\":\"%s\"",
                          (unsigned long long)r->number, axis_names[r->axis], r->layer, r->bytes,
                          progress_names[progress[k % FLIGHT_RECORDS]]);
        string_append(&text, "}\n");
    }
    snprintf(name, sizeof name, "rank_%05d.jsonl", w->control.rank);
    if (!path_join(path, w->run->log.run_dir, "flight", &ignored) || !make_directories(path, &ignored))
        return;
    size_t length = strlen(path);
    snprintf(path + length, sizeof path - length, "/%s", name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return;
    if (!write_all(fd, text.data, text.size)) unlink(path);
    close(fd);
}

// Everybody ends. say: this process is who says why on stderr.
static inline void watch_give_up(int number) {
    (void)number;
    _exit(EXIT_LOST);
}

__attribute__((noreturn)) static inline void watch_end(Watchdog* w, const Error* why, bool say) {
    sigset_t set;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = watch_give_up;
    sigemptyset(&set), sigaddset(&set, SIGALRM);
    sigaction(SIGALRM, &action, NULL);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    alarm(8); // a disk or a terminal that hangs, too, does not keep it
    if (w->control.rank == 0) watch_part(w, WATCH_END, why);
    // where the device is, if that can be known soon
    call_looker(w, LOOK_WANTED);
    for (int i = 0; i < 50 && __atomic_load_n(&w->look, __ATOMIC_ACQUIRE) == LOOK_WANTED; i++) usleep(20000);
    if (say) dprintf(STDERR_FILENO, "error: %s\n", why->text);
    String line = event_begin("lost", flight()->step);
    event_text(&line, "error", why->text);
    event_end(w->metrics, &line); // the first process has a log
    flight_write(w, why);
    line_queue_flush(&w->metrics->queue, 2);
    _exit(why->code);
}

// A rank's process is gone (closed), or says nothing any more.
static inline void watch_lost(Watchdog* w, int rank, bool closed) {
    const WatchMessage* m = &w->peers[w->control.rank == 0 ? rank : 0].last;
    String text = {NULL, 0, 0};
    Error err = {0, {0}};
    append_rank(&text, rank, w->control.size, m);
    if (closed)
        string_append(&text, " has ended, in step %llu (%s); its own messages say more",
                      (unsigned long long)m->report.step, phase_names[m->report.phase]);
    else
        string_append(
            &text,
            " has said nothing for %d s, last in step %llu (%s): it was stopped, or its machine or the "
            "network to it is gone",
            w->run->parallel.hang_seconds_min, (unsigned long long)m->report.step,
            phase_names[m->report.phase]);
    string_append(&text, ". Run again to go on from the newest checkpoint");
    fail(&err, EXIT_LOST, "%s", text.data);
    free(text.data);
    watch_end(w, &err, rank > 0 || w->control.rank == 1 || w->mine.local_rank == 0);
}

// What came from a peer is whole. rank: whose it is.
static inline void watch_take(Watchdog* w, WatchPeer* p, int rank) {
    p->last = p->in, p->heard = w->clock;
    p->last.host[sizeof p->last.host - 1] = '\0', p->last.err.text[sizeof p->last.err.text - 1] = '\0';
    if (p->last.err.code < 0 || p->last.err.code > 255) p->last.err.code = EXIT_LOST;
    replace_controls(p->last.host), replace_controls(p->last.err.text);
    WatchReport* r = &p->last.report;
    if (r->phase < 0 || r->phase >= NUM_PHASES || r->num_open < 0 || r->num_open > WATCH_OPEN)
        memset(r, 0, sizeof *r);
    for (int k = 0; k < r->num_open; k++) {
        if (r->open[k].axis < 0 || r->open[k].axis >= NUM_AXES) r->num_open = 0;
        r->open[k].what[sizeof r->open[k].what - 1] = '\0';
    }
    if (p->last.kind == WATCH_BEAT) return;
    p->there = false;
    if (p->last.err.code == 0) return;
    Error err = p->last.err;
    if (p->last.kind == WATCH_BYE) name_rank(&err, rank);
    watch_end(w, &err, false); // who leaves with an error says so itself
}

static inline void watch_receive(Watchdog* w, int peer) {
    WatchPeer* p = &w->peers[peer];
    int rank = w->control.rank == 0 ? peer : 0;
    while (p->there) {
        if (p->receiving.left == 0) p->receiving.data = (char*)&p->in, p->receiving.left = sizeof p->in;
        bool open = part_move(w->control.sockets[peer], &p->receiving, false);
        if (p->receiving.left == 0)
            watch_take(w, p, rank);
        else if (!open)
            watch_lost(w, rank, true);
        else
            return;
    }
}

// ----------------------------------------------------------------------------
// the thread

// Rank 0: is somebody beyond his limit? Then all look, and the culprit ends the run if he is beyond his, too.
static inline void watch_judge(Watchdog* w) {
    int size = w->control.size, by, op;
    bool late = w->mine.report.late, looked = w->mine.report.looked, all_late = late;
    for (int r = 1; r < size; r++) {
        const WatchPeer* p = &w->peers[r];
        late = late || (p->there && p->last.report.late),
        all_late = all_late && (!p->there || p->last.report.late);
        looked = looked && (!p->there || p->last.report.looked);
    }
    w->asked = late ? w->asked + 1 : 0;
    if (w->asked < WATCH_LOOKS || (!looked && w->asked < 2 * WATCH_LOOKS))
        return; // a driver that hangs does not answer
    WatchReport* reports = (WatchReport*)calloc_check((size_t)size, sizeof *reports);
    for (int r = 0; r < size; r++) reports[r] = r == 0 ? w->mine.report : w->peers[r].last.report;
    Layout layout = w->run->layout;
    if (layout.size != size) layout = layout_single(), layout.size = size;
    int culprit = watch_culprit(reports, &layout, kv_replicas(&w->run->model, &layout), &by, &op);
    Error err = {0, {0}};
    if (culprit < 0 ? all_late : reports[culprit].late) {
        watch_sentence(reports, culprit > 0 ? &w->peers[culprit].last : &w->mine, culprit, size, by, op,
                       &err);
        watch_end(w, &err, true);
    }
    free(reports);
}

// Rank 0: who is slow? Said once of a rank that was the slowest, by a fifth of the median, for hang_seconds_min.
static inline void watch_compare(Watchdog* w) {
    int size = w->control.size, slowest = 0, known = 0;
    double* own = (double*)calloc_check((size_t)size, sizeof *own);
    for (int r = 0; r < size; r++) {
        own[r] = r == 0 ? w->mine.report.own : w->peers[r].last.report.own;
        known += own[r] > 0;
        if (own[r] > own[slowest]) slowest = r;
    }
    double median = sort_for_median(own, size);
    RankSeconds now = {own[0], median, own[size - 1], slowest};
    free(own);
    if (known < size) return;
    bool slow = now.max > 1.2 * now.median && (w->slow_beats == 0 || slowest == w->ranks.slowest);
    bool news = w->mine.report.step != w->compared; // not so during a save or an evaluation
    w->compared = w->mine.report.step;
    w->slow_beats = slow ? w->slow_beats + news : 0;
    pthread_mutex_lock(&w->compare);
    w->ranks = now;
    pthread_mutex_unlock(&w->compare);
    if (!news || w->slow_beats * WATCH_BEAT_SECONDS != w->run->parallel.hang_seconds_min) return;
    String text = {NULL, 0, 0};
    append_rank(&text, slowest, size, slowest > 0 ? &w->peers[slowest].last : &w->mine);
    dprintf(STDERR_FILENO, "warning: %s is slow: %.3g s of its own work in a step, the median is %.3g s\n",
            text.data, now.max, now.median);
    free(text.data);
}

// False: there is nothing to compare.
static inline bool watchdog_ranks(Watchdog* w, RankSeconds* out) {
    if (!w->running || w->control.size == 1) return false;
    pthread_mutex_lock(&w->compare);
    *out = w->ranks;
    pthread_mutex_unlock(&w->compare);
    return out->max > 0;
}

static inline void watch_beat(Watchdog* w, double awake) {
    bool first = w->control.rank == 0;
    watch_self(w, awake, first ? w->asked > 0 : watch_num_peers(w) > 0 && w->peers[0].last.look);
    for (int i = 0; i < watch_num_peers(w); i++)
        if (w->peers[i].there && w->clock - w->peers[i].heard > w->run->parallel.hang_seconds_min)
            watch_lost(w, first ? i : 0, false);
    if (first) watch_judge(w), watch_compare(w);
    watch_send_all(w, WATCH_BEAT, NULL);
}

static inline void* watch_main(void* argument) {
    Watchdog* w = (Watchdog*)argument;
    int count = watch_num_peers(w);
    struct pollfd* polls = (struct pollfd*)calloc_check((size_t)count + 1, sizeof *polls);
    double before = seconds_now(), beaten = -WATCH_BEAT_SECONDS; // the first at once: it says who this is
    bool stop = false;
    while (!stop) {
        for (int i = 0; i <= count; i++) {
            polls[i].fd = i == count ? w->wake : w->peers[i].there ? w->control.sockets[i] : -1;
            polls[i].events = POLLIN, polls[i].revents = 0;
        }
        poll(polls, (nfds_t)count + 1, (int)(250 * WATCH_BEAT_SECONDS));
        double now = seconds_now();
        w->clock += fmin(now - before, 2 * WATCH_BEAT_SECONDS);
        before = now;
        for (int i = 0; i < count; i++)
            if (polls[i].revents != 0) watch_receive(w, i);
        stop = polls[count].revents != 0;
        if (stop || w->clock - beaten < WATCH_BEAT_SECONDS) continue;
        watch_beat(w, w->clock - beaten);
        beaten = w->clock;
    }
    watch_part(w, WATCH_BYE, &w->bye);
    free(polls);
    return NULL;
}

// w->control is open; run, gpt, main, joined, metrics and mine.local_rank are set.
static inline bool watchdog_start(Watchdog* w, Error* err) {
    node_name(w->mine.host);
    w->peers = (WatchPeer*)calloc_check((size_t)watch_num_peers(w) + 1, sizeof *w->peers);
    for (int i = w->control.rank == 0 ? 1 : 0; i < watch_num_peers(w); i++) w->peers[i].there = true;
    pthread_mutex_init(&w->compare, NULL);
    sem_init(&w->calls, 0, 0);
    w->wake = eventfd(0, EFD_CLOEXEC);
    sigset_t all, before; // signals are for the loop of training
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    bool looks = w->wake >= 0 && pthread_create(&w->looker, NULL, look_main, w) == 0;
    w->running = looks && pthread_create(&w->thread, NULL, watch_main, w) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    flight()->patience = w->run->parallel.hang_seconds_min + 5;
    return w->running || fail(err, EXIT_OS, "cannot start a thread for the watchdog: %s", strerror(errno));
}

// This process leaves the run: by itself (err->code 0), or with an error that the others must know of.
static inline void watchdog_stop(Watchdog* w, const Error* err) {
    uint64_t one = 1;
    if (!w->running) return;
    w->bye = *err;
    if (write(w->wake, &one, sizeof one) == (ssize_t)sizeof one) pthread_join(w->thread, NULL);
    call_looker(w, LOOK_STOP);
    for (int i = 0; i < 5000 && __atomic_load_n(&w->look, __ATOMIC_ACQUIRE) != LOOK_STOPPED; i++)
        usleep(1000);
    close(w->wake);
    free(w->peers);
    control_close(&w->control);
    w->running = false;
}
