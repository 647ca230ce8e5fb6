// The control channel: a star of TCP connections around rank 0, for what processes tell each other outside of
// collectives. rendezvous.h opens it.
#pragma once
#include "llmc/launch.h" // defines: parse_digits, RANKS_MAX
#include "llmc/utils.h"  // defines: Error, fail, EXIT_OS, String, seconds_now, calloc_check
#include <poll.h>
#include <sys/socket.h>

enum { CONTROL_TEXT_MAX = 64 << 20 };

// ----------------------------------------------------------------------------
// waiting and moving bytes: sockets are non-blocking, every wait has a deadline (seconds_now's; 0: none)

typedef struct {
    int rank, size;
    int* sockets;   // rank 0: one for each rank, its own is -1; others: sockets[0]; -1: closed after an error
    double timeout; // seconds that any call may wait, <= 0: for ever; the caller may change it
    bool waiting;   // atomic: for another process
} Control;

static inline bool control_waits(const Control* c) { return __atomic_load_n(&c->waiting, __ATOMIC_RELAXED); }

typedef struct {
    char* data;
    size_t left; // bytes still to be moved from or to one rank
} Part;

static inline double deadline_after(double seconds) { return seconds > 0 ? seconds_now() + seconds : 0; }
static inline bool deadline_passed(double deadline) { return deadline != 0 && seconds_now() >= deadline; }

// poll's argument, rounded up
static inline int poll_wait(double deadline) {
    double left = deadline != 0 ? deadline - seconds_now() : 60;
    return left <= 0 ? 0 : left > 60 ? 60000 : (int)(left * 1000) + 1;
}

// Moves what can be moved now. False: the connection is lost, errno says why, 0 if the peer closed it.
static inline bool part_move(int fd, Part* part, bool sending) {
    while (part->left > 0) {
        size_t most = part->left < (1u << 30) ? part->left : (1u << 30);
        ssize_t n = sending ? send(fd, part->data, most, MSG_NOSIGNAL) : recv(fd, part->data, most, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        if (n == 0) errno = 0;
        if (n <= 0) return false;
        part->data += n, part->left -= (size_t)n;
    }
    return true;
}

// "3, 5-7" of the ranks whose flag is set; the list ends with ... when it gets long.
static inline void ranks_listed(const bool* flags, int size, char out[256]) {
    size_t n = 0;
    out[0] = '\0';
    for (int r = 0; r < size; r++) {
        int last = r;
        if (!flags[r]) continue;
        while (last + 1 < size && flags[last + 1]) last++;
        const char* comma = n > 0 ? ", " : "";
        if (n > 220)
            n += (size_t)snprintf(out + n, 256 - n, ", ...");
        else if (last > r)
            n += (size_t)snprintf(out + n, 256 - n, "%s%d-%d", comma, r, last);
        else
            n += (size_t)snprintf(out + n, 256 - n, "%s%d", comma, r);
        if (n > 225) return;
        r = last;
    }
}

// After an error nobody knows how far a message got: all connections end, so that the peers learn of it at
// once.
static inline void control_break(Control* c) {
    for (int i = 0; c->sockets != NULL && i < (c->rank == 0 ? c->size : 1); i++) {
        if (c->sockets[i] >= 0) close(c->sockets[i]);
        c->sockets[i] = -1;
    }
}

static inline bool control_late(Control* c, const Part* parts, int count, Error* err) {
    char list[256] = "0";
    bool* late = (bool*)calloc_check((size_t)count, sizeof *late);
    for (int i = 0; i < count; i++) late[i] = parts[i].left > 0;
    if (c->rank == 0) ranks_listed(late, count, list);
    free(late);
    return fail(err, EXIT_LOST, "rank %d waited %g s for rank %s of %d: it hangs, or needs longer", c->rank,
                c->timeout, list, c->size);
}

// Moves the parts, one for each socket, all of them at a time: a rank that goes away is seen while others are
// slow.
static inline bool control_move(Control* c, Part* parts, bool sending, Error* err) {
    int count = c->rank == 0 ? c->size : 1;
    double deadline = deadline_after(c->timeout);
    struct pollfd* polls = (struct pollfd*)calloc_check((size_t)count, sizeof *polls);
    bool ok = true, first = true, more = true;
    while (ok && more) {
        more = false;
        for (int i = 0; ok && i < count; i++) {
            if (parts[i].left > 0 && (first || polls[i].revents != 0)) {
                errno = EPIPE;
                if (c->sockets[i] < 0 || !part_move(c->sockets[i], &parts[i], sending))
                    ok = fail(err, EXIT_LOST, "rank %d lost rank %d of %d: %s; its own messages say more",
                              c->rank, i, c->size, errno == 0 ? "it ended" : strerror(errno));
            }
            polls[i].fd = parts[i].left > 0 ? c->sockets[i] : -1;
            polls[i].events = sending ? POLLOUT : POLLIN;
            more = more || parts[i].left > 0;
        }
        first = false;
        if (!ok || !more) break;
        __atomic_store_n(&c->waiting, true, __ATOMIC_RELAXED);
        if (deadline_passed(deadline)) {
            ok = control_late(c, parts, count, err);
        } else if (poll(polls, (nfds_t)count, poll_wait(deadline)) < 0) {
            if (errno != EINTR) ok = fail(err, EXIT_OS, "poll failed: %s", strerror(errno));
            for (int i = 0; i < count; i++) polls[i].revents = 0;
        }
    }
    __atomic_store_n(&c->waiting, false, __ATOMIC_RELAXED);
    free(polls);
    if (!ok) control_break(c);
    return ok;
}

// The same number of bytes from or to every rank; rank 0's side is (size, bytes), or (bytes) where it sends.
static inline bool control_move_all(Control* c, void* data, size_t bytes, bool sending, Error* err) {
    int count = c->rank == 0 ? c->size : 1;
    Part* parts = (Part*)calloc_check((size_t)count, sizeof *parts);
    for (int i = c->rank == 0 ? 1 : 0; i < count; i++) {
        parts[i].data = (char*)data + (sending ? 0 : (size_t)i * bytes);
        parts[i].left = bytes;
    }
    bool ok = control_move(c, parts, sending, err);
    free(parts);
    return ok;
}

// The connection to one rank (rank 0's side), or to rank 0 (the others').
static inline bool control_move_one(Control* c, int index, void* data, size_t bytes, bool sending,
                                    Error* err) {
    Part* parts = (Part*)calloc_check(c->rank == 0 ? (size_t)c->size : 1, sizeof *parts);
    parts[index].data = (char*)data, parts[index].left = bytes;
    bool ok = control_move(c, parts, sending, err);
    free(parts);
    return ok;
}

// ----------------------------------------------------------------------------
// the calls of a run. All ranks make the same calls in the same order; after false each following one fails
// at once.

// rank 0's data to all
static inline bool control_broadcast(Control* c, void* data, size_t bytes, Error* err) {
    return c->size <= 1 || control_move_all(c, data, bytes, c->rank == 0, err);
}

// all: (size, bytes) on rank 0; not used elsewhere
static inline bool control_gather(Control* c, const void* mine, size_t bytes, void* all, Error* err) {
    if (c->rank > 0) return control_move_all(c, (void*)mine, bytes, true, err);
    if (bytes > 0) memmove(all, mine, bytes);
    return c->size <= 1 || control_move_all(c, all, bytes, false, err);
}

// Appends every rank's text, of at most CONTROL_TEXT_MAX bytes, to rank 0's `all`, in the order of ranks;
// `all` is not used elsewhere.
static inline bool control_gather_text(Control* c, const char* mine, String* all, Error* err) {
    uint64_t size = strlen(mine), total = 0;
    uint64_t* sizes = (uint64_t*)calloc_check((size_t)(c->size > 1 ? c->size : 1), sizeof *sizes);
    bool ok = control_gather(c, &size, sizeof size, sizes, err);
    for (int r = 0; ok && r < (c->rank == 0 && c->size > 1 ? c->size : 1); r++) {
        uint64_t bytes = c->rank == 0 ? sizes[r] : size;
        if (bytes > CONTROL_TEXT_MAX)
            ok = fail(err, EXIT_OS, "rank %d's text has %llu bytes; at most %d can be sent",
                      c->rank == 0 ? r : c->rank, (unsigned long long)bytes, CONTROL_TEXT_MAX);
        if (r > 0) total += bytes;
    }
    if (!ok) control_break(c);
    if (ok && c->rank > 0) ok = control_move_one(c, 0, (void*)mine, size, true, err);
    if (ok && c->rank == 0) {
        char* texts = (char*)malloc_check(total);
        Part* parts = (Part*)calloc_check((size_t)(c->size > 1 ? c->size : 1), sizeof *parts);
        char* at = texts;
        for (int r = 1; r < c->size; at += sizes[r++]) parts[r].data = at, parts[r].left = sizes[r];
        ok = c->size <= 1 || control_move(c, parts, false, err);
        if (ok) string_append_bytes(all, mine, size), string_append_bytes(all, texts, total);
        free(parts);
        free(texts);
    }
    free(sizes);
    return ok;
}

// "rank 3: TEXT"; a text that names its rank already stays as it is.
static inline void name_rank(Error* err, int rank) {
    Error plain = *err;
    const char* at = plain.text + 5;
    uint64_t named;
    if (strncmp(plain.text, "rank ", 5) == 0 && parse_digits(&at, RANKS_MAX, &named) && at[0] == ':') return;
    err->code = 0;
    fail(err, plain.code, "rank %d: %.940s", rank, plain.text);
}

// Every rank comes with its err (code 0: all is well). False on all of them if any failed: err is then that
// of the lowest such rank, "rank 3: ...", everywhere.
static inline bool control_agree(Control* c, Error* err) {
    if (c->size <= 1) return err->code == 0;
    int32_t code = err->code, failed = -1;
    int32_t* codes = (int32_t*)calloc_check((size_t)c->size, sizeof *codes);
    Error lost = {0, {0}}, theirs = *err;
    bool ok = control_gather(c, &code, sizeof code, codes, &lost);
    for (int r = c->size - 1; r >= 0; r--)
        if (codes[r] != 0) failed = r;
    free(codes);
    ok = ok && control_broadcast(c, &failed, sizeof failed, &lost);
    if (ok && failed > 0 && c->rank == failed)
        ok = control_move_one(c, 0, &theirs, sizeof theirs, true, &lost);
    if (ok && failed > 0 && c->rank == 0)
        ok = control_move_one(c, failed, &theirs, sizeof theirs, false, &lost);
    if (ok && failed >= 0) ok = control_broadcast(c, &theirs, sizeof theirs, &lost);
    if (ok && failed >= 0) {
        theirs.text[sizeof theirs.text - 1] = '\0';
        name_rank(&theirs, failed);
        *err = theirs;
    }
    if (!ok) fail(err, lost.code, "%s", lost.text); // this rank's own error, if any, says more
    return ok && failed < 0;
}

static inline void control_close(Control* c) {
    control_break(c);
    free(c->sockets);
    memset(c, 0, sizeof *c);
    c->size = 1;
}
