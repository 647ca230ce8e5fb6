// How the processes of one run find each other, without MPI: a star of TCP connections around rank 0, which
// stays open for the whole run. Who a process is and where rank 0 is, launch.h finds out.
//
// A connection begins with a handshake, all numbers little-endian:
//     rank 0 -> rank    nonce (16 random bytes)
//     rank -> rank 0    magic (8), rank (4), world size (4), digest of (job digest, nonce, rank)
//     rank 0 -> rank    digest of (job digest, nonce, 2^32 - 1) where it takes the rank, of (..., 2^32 - 2)
//                       where another process has that rank; else nothing: the connection is closed
//     rank 0 -> rank    once all are there, or the time is up: an Error, with code 0 if all is well
// The job digest is XXH3-128 of PRETRAIN_SECRET, the world size and a text that all ranks of the job share.
// It keeps jobs and strays apart; XXH3 is no cryptographic hash, so it does not stop somebody who listens in
// on the network.
#pragma once
#include "llmc/control.h" // defines: Control, control_move_one, control_break, part_move
#include "llmc/launch.h"  // defines: Launch, launch_find, is_loopback
#include "llmc/utils.h"   // defines: Error, fail, EXIT_*, String, seconds_now, malloc_check
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <xxhash.h>

enum {
    CONTROL_PENDING = 64,        // handshakes under way at a time
    CONTROL_ACCEPT_AT_ONCE = 16, // then those under way have their turn
    HANDSHAKE_BYTES = 32,
};
#define CONTROL_MAGIC UINT64_C(0x314c52544e4f4350) // "PCONTRL1"
#define ANSWER_ACCEPTED UINT32_MAX
#define ANSWER_DUPLICATE (UINT32_MAX - 1)
#define HANDSHAKE_SECONDS 2.0
#define HANDSHAKE_GRACE 0.02 // seconds that a handshake has even when more are waiting than there is room for

// ----------------------------------------------------------------------------
// the handshake

typedef struct {
    uint8_t bytes[16];
} Digest;

static inline Digest job_digest(const char* job, int size) {
    const char* secret = getenv("PRETRAIN_SECRET");
    String text = {NULL, 0, 0};
    Digest d;
    string_append(&text, "%d %zu %s %s", size, secret != NULL ? strlen(secret) : 0,
                  secret != NULL ? secret : "", job);
    XXH128_canonicalFromHash((XXH128_canonical_t*)d.bytes, XXH3_128bits(text.data, text.size));
    free(text.data);
    return d;
}

// What only a process of the same job can say after this nonce.
static inline Digest handshake_digest(const Digest* job, const Digest* nonce, uint32_t word) {
    uint8_t text[36];
    Digest d;
    memcpy(text, job->bytes, 16), memcpy(text + 16, nonce->bytes, 16), memcpy(text + 32, &word, 4);
    XXH128_canonicalFromHash((XXH128_canonical_t*)d.bytes, XXH3_128bits(text, sizeof text));
    return d;
}

static inline void handshake_write(uint8_t out[HANDSHAKE_BYTES], const Digest* job, const Digest* nonce,
                                   int rank, int size) {
    uint64_t magic = CONTROL_MAGIC;
    uint32_t numbers[2] = {(uint32_t)rank, (uint32_t)size};
    Digest d = handshake_digest(job, nonce, numbers[0]);
    memcpy(out, &magic, 8), memcpy(out + 8, numbers, 8), memcpy(out + 16, d.bytes, 16);
}

// The rank that a stranger's bytes prove; 0: none.
static inline int handshake_read(const uint8_t in[HANDSHAKE_BYTES], const Digest* job, const Digest* nonce,
                                 int size) {
    uint8_t expected[HANDSHAKE_BYTES];
    uint32_t rank;
    memcpy(&rank, in + 8, 4);
    if (rank == 0 || rank >= (uint32_t)size) return 0;
    handshake_write(expected, job, nonce, (int)rank, size);
    return memcmp(in, expected, HANDSHAKE_BYTES) == 0 ? (int)rank : 0;
}

static inline void socket_prepare(int fd) {
    const int options[][3] = {{IPPROTO_TCP, TCP_NODELAY, 1},
                              {SOL_SOCKET, SO_KEEPALIVE, 1},
                              {IPPROTO_TCP, TCP_KEEPIDLE, 60},
                              {IPPROTO_TCP, TCP_KEEPINTVL, 10},
                              {IPPROTO_TCP, TCP_KEEPCNT, 6}};
    for (int i = 0; i < 5; i++) setsockopt(fd, options[i][0], options[i][1], &options[i][2], sizeof(int));
}

static inline int control_port(int first, int i) { return first + i <= 65535 ? first + i : first - i; }

// ----------------------------------------------------------------------------
// rank 0: takes connections until all ranks are there

typedef struct {
    int fd;
    double since;
    Digest nonce;
    uint8_t answer[HANDSHAKE_BYTES];
    size_t left; // bytes of the answer that have not come
} Handshake;

typedef struct {
    Control* control;
    Digest job;
    int listener, connected, refused;
    int num_pending;
    Handshake pending[CONTROL_PENDING]; // the oldest first
} Meeting;

// A socket that listens on a port, on this host alone where rank 0's host is the loopback; -1: errno says
// why.
static inline int listen_on(const char* host, int port) {
    struct sockaddr_in6 six;
    struct sockaddr_in four;
    int one = 1, zero = 0;
    bool local = is_loopback(host), want_six = !local || strcmp(host, "::1") == 0;
    memset(&six, 0, sizeof six), memset(&four, 0, sizeof four);
    six.sin6_family = AF_INET6, six.sin6_port = htons((uint16_t)port);
    six.sin6_addr = local ? in6addr_loopback : in6addr_any;
    four.sin_family = AF_INET, four.sin_port = htons((uint16_t)port);
    four.sin_addr.s_addr = htonl(local ? INADDR_LOOPBACK : INADDR_ANY);
    if (local && !want_six && host[0] != 'l') inet_pton(AF_INET, host, &four.sin_addr);
    for (int i = want_six ? 0 : 1; i < 2; i++) { // IPv6 takes IPv4's connections, too, where this host has it
        int fd = socket(i == 0 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (i == 0) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof zero);
        const struct sockaddr* address =
            i == 0 ? (const struct sockaddr*)&six : (const struct sockaddr*)&four;
        if (bind(fd, address, i == 0 ? sizeof six : sizeof four) == 0 && listen(fd, 4096) == 0) return fd;
        int reason = errno;
        close(fd);
        errno = reason;
        if (reason != EADDRNOTAVAIL && reason != EAFNOSUPPORT) return -1;
    }
    return -1;
}

static inline bool meeting_listen(Meeting* m, const Launch* launch, Error* err) {
    for (int i = 0; i < CONTROL_PORTS; i++) {
        m->listener = listen_on(launch->host, control_port(launch->port, i));
        if (m->listener >= 0) return true;
        if (errno != EADDRINUSE)
            return fail(err, EXIT_OS, "rank 0 cannot listen on port %d: %s", control_port(launch->port, i),
                        strerror(errno));
    }
    return fail(err, EXIT_OS, "rank 0 cannot listen: ports %d to %d are all taken; choose another port",
                launch->port, control_port(launch->port, CONTROL_PORTS - 1));
}

static inline void meeting_forget(Meeting* m, int i, bool close_it) {
    if (close_it) close(m->pending[i].fd);
    memmove(&m->pending[i], &m->pending[i + 1], (size_t)(--m->num_pending - i) * sizeof *m->pending);
}

// Forgets the connection of a rank that has closed it: it gave up waiting, and tries again, or died.
static inline void meeting_drop_dead(Meeting* m, int rank) {
    char peek;
    int* fd = &m->control->sockets[rank];
    if (*fd < 0) return;
    ssize_t n = recv(*fd, &peek, 1, MSG_PEEK);
    if (n > 0 || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))) return;
    close(*fd);
    *fd = -1;
    m->connected--;
}

// Takes the rank whose answer is complete, or refuses it.
static inline void meeting_decide(Meeting* m, int i) {
    Handshake* h = &m->pending[i];
    Control* c = m->control;
    int rank = handshake_read(h->answer, &m->job, &h->nonce, c->size);
    if (rank == 0 && m->refused++ == 0)
        fprintf(
            stderr,
            "warning: a process with another run config or PRETRAIN_SECRET was refused: if it is a rank of "
            "this run, its arguments or files are not those of the others\n");
    if (rank > 0) meeting_drop_dead(m, rank);
    bool taken = rank > 0 && c->sockets[rank] < 0;
    Digest d = handshake_digest(&m->job, &h->nonce, taken ? ANSWER_ACCEPTED : ANSWER_DUPLICATE);
    if (rank > 0 && send(h->fd, d.bytes, sizeof d.bytes, MSG_NOSIGNAL) != (ssize_t)sizeof d.bytes)
        taken = false;
    if (taken) {
        c->sockets[rank] = h->fd;
        m->connected++;
    }
    meeting_forget(m, i, !taken);
}

// Goes on with every handshake that has new bytes, and ends those that have been too slow.
static inline void meeting_read(Meeting* m, const struct pollfd* polls) {
    double now = seconds_now();
    for (int i = m->num_pending - 1; i >= 0; i--) {
        Handshake* h = &m->pending[i];
        bool late = now > h->since + HANDSHAKE_SECONDS; // then the other side may have given up
        Part rest = {(char*)h->answer + HANDSHAKE_BYTES - h->left, h->left};
        bool open = polls[i].revents == 0 || part_move(h->fd, &rest, false);
        h->left = rest.left;
        if (late || !open)
            meeting_forget(m, i, true);
        else if (h->left == 0)
            meeting_decide(m, i);
    }
    for (int r = 1; m->connected == m->control->size - 1 && r < m->control->size; r++)
        meeting_drop_dead(m, r);
}

static inline bool meeting_full(const Meeting* m) {
    return m->num_pending == CONTROL_PENDING && seconds_now() < m->pending[0].since + HANDSHAKE_GRACE;
}

static inline bool meeting_accept(Meeting* m, Error* err) {
    for (int i = 0; i < CONTROL_ACCEPT_AT_ONCE && !meeting_full(m); i++) {
        if (m->num_pending == CONTROL_PENDING) meeting_forget(m, 0, true);
        int fd = accept(m->listener, NULL, NULL); // accept4 would need a macro before the first system header
        if (fd >= 0 && (fcntl(fd, F_SETFL, O_NONBLOCK) != 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) != 0))
            close(fd), fd = -1;
        if (fd < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        bool exhausted =
            fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM);
        if (exhausted && m->num_pending == 0)
            return fail(err, EXIT_OS, "rank 0 cannot take the connections of %d ranks: %s; raise ulimit -n",
                        m->control->size, strerror(errno));
        if (exhausted) meeting_forget(m, 0, true);
        if (fd < 0) continue; // a connection that broke before it was taken
        Handshake* h = &m->pending[m->num_pending];
        socket_prepare(fd);
        h->fd = fd, h->since = seconds_now();
        h->left = HANDSHAKE_BYTES;
        if (getrandom(h->nonce.bytes, sizeof h->nonce, 0) != (ssize_t)sizeof h->nonce ||
            send(fd, h->nonce.bytes, sizeof h->nonce, MSG_NOSIGNAL) != (ssize_t)sizeof h->nonce)
            close(fd);
        else
            m->num_pending++;
    }
    return true;
}

static inline bool meeting_late(const Meeting* m, double timeout, Error* err) {
    Control* c = m->control;
    char list[256];
    bool* missing = (bool*)calloc_check((size_t)c->size, sizeof *missing);
    for (int r = 1; r < c->size; r++) missing[r] = c->sockets[r] < 0;
    ranks_listed(missing, c->size, list);
    free(missing);
    return fail(err, EXIT_OS,
                "after %g s, ranks %s of %d are missing (%d connections with another run config or "
                "PRETRAIN_SECRET were refused); look at their messages, or wait longer",
                timeout, list, c->size, m->refused);
}

static inline bool meeting_hold(Meeting* m, double timeout, Error* err) {
    double deadline = deadline_after(timeout);
    while (m->connected < m->control->size - 1) {
        struct pollfd polls[CONTROL_PENDING + 1];
        bool full = meeting_full(m);
        double wake = m->num_pending == 0
                          ? deadline
                          : m->pending[0].since + (full ? HANDSHAKE_GRACE : HANDSHAKE_SECONDS);
        if (deadline != 0 && deadline < wake) wake = deadline;
        for (int i = 0; i <= m->num_pending; i++) { // the listener is the last
            polls[i].fd = i < m->num_pending ? m->pending[i].fd : full ? -1 : m->listener;
            polls[i].events = POLLIN, polls[i].revents = 0;
        }
        int listener = m->num_pending;
        if (poll(polls, (nfds_t)(listener + 1), poll_wait(wake)) < 0) {
            if (errno != EINTR) return fail(err, EXIT_OS, "poll failed: %s", strerror(errno));
            continue;
        }
        meeting_read(m, polls);
        if ((full || polls[listener].revents != 0) && !meeting_accept(m, err)) return false;
        if (deadline_passed(deadline) && m->connected < m->control->size - 1)
            return meeting_late(m, timeout, err);
    }
    return true;
}

static inline bool control_open_first(Control* c, const Launch* launch, const Digest* job, Error* err) {
    Meeting* m = (Meeting*)calloc_check(1, sizeof *m);
    m->control = c, m->job = *job, m->listener = -1;
    bool ok = meeting_listen(m, launch, err) && meeting_hold(m, c->timeout, err);
    while (m->num_pending > 0) meeting_forget(m, 0, true);
    if (m->listener >= 0) close(m->listener);
    free(m);
    return ok;
}

// ----------------------------------------------------------------------------
// the other ranks: try rank 0's ports until it takes them

typedef enum { MET, NOBODY, STRANGER, DUPLICATE } Encounter;

// Moves all of it or fails, with errno.
static inline bool move_until(int fd, void* data, size_t bytes, bool sending, double deadline) {
    Part part = {(char*)data, bytes};
    while (part_move(fd, &part, sending)) {
        struct pollfd p = {fd, (short)(sending ? POLLOUT : POLLIN), 0};
        if (part.left == 0) return true;
        if (deadline_passed(deadline)) {
            errno = ETIMEDOUT;
            return false;
        }
        poll(&p, 1, poll_wait(deadline));
    }
    return false;
}

static inline bool connect_until(int fd, const struct addrinfo* a, double deadline) {
    int failed = 0;
    socklen_t size = sizeof failed;
    if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) return true;
    if (errno != EINPROGRESS && errno != EINTR) return false;
    struct pollfd p = {fd, POLLOUT, 0};
    int ready = 0;
    while (ready <= 0 && !deadline_passed(deadline)) ready = poll(&p, 1, poll_wait(deadline));
    if (ready > 0) getsockopt(fd, SOL_SOCKET, SO_ERROR, &failed, &size);
    errno = ready > 0 ? failed : ETIMEDOUT;
    return errno == 0;
}

static inline double sooner(double deadline, double seconds) {
    double until = seconds_now() + seconds;
    return deadline != 0 && deadline < until ? deadline : until;
}

// One attempt at one address, whose host gets `patience` seconds to say something. MET: c->sockets[0] is the
// connection. NOBODY: errno says why.
static inline Encounter encounter(Control* c, const struct addrinfo* a, const Digest* job, double deadline,
                                  double patience) {
    double until = sooner(deadline, patience);
    Digest nonce, answer;
    uint8_t mine[HANDSHAKE_BYTES];
    int fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return NOBODY;
    socket_prepare(fd);
    Encounter result = NOBODY;
    if (connect_until(fd, a, until)) {
        result = STRANGER;
        if (move_until(fd, &nonce, sizeof nonce, false, until)) {
            until = sooner(deadline, 2 * HANDSHAKE_SECONDS); // rank 0 has taken us by then, or never
            handshake_write(mine, job, &nonce, c->rank, c->size);
            if (move_until(fd, mine, sizeof mine, true, until) &&
                move_until(fd, &answer, sizeof answer, false, until)) {
                Digest yes = handshake_digest(job, &nonce, ANSWER_ACCEPTED),
                       twice = handshake_digest(job, &nonce, ANSWER_DUPLICATE);
                if (memcmp(&answer, &yes, sizeof yes) == 0) result = MET;
                if (memcmp(&answer, &twice, sizeof twice) == 0) result = DUPLICATE;
            }
        }
    }
    int reason = errno;
    if (result == MET)
        c->sockets[0] = fd;
    else
        close(fd);
    errno = reason;
    return result;
}

// All addresses of all ports once. why: what was seen last, for the message of those who give up.
static inline Encounter try_ports(Control* c, const Launch* launch, const Digest* job, double deadline,
                                  double patience, char why[160]) {
    bool stranger = false;
    for (int i = 0; i < CONTROL_PORTS && !deadline_passed(deadline); i++) {
        struct addrinfo hints, *list = NULL;
        char port[16];
        memset(&hints, 0, sizeof hints);
        hints.ai_socktype = SOCK_STREAM;
        snprintf(port, sizeof port, "%d", control_port(launch->port, i));
        int failed = getaddrinfo(launch->host, port, &hints, &list);
        if (failed != 0) {
            snprintf(why, 160, "%s", gai_strerror(failed));
            return NOBODY;
        }
        Encounter result = NOBODY;
        for (struct addrinfo* a = list; a != NULL && (result == NOBODY || result == STRANGER);
             a = a->ai_next) {
            result = encounter(c, a, job, deadline, patience);
            stranger = stranger || result == STRANGER;
            if (result == NOBODY && !stranger) snprintf(why, 160, "%s", strerror(errno));
        }
        freeaddrinfo(list);
        if (result == MET || result == DUPLICATE) return result;
    }
    if (stranger)
        snprintf(why, 160,
                 "only a program that is not this job's rank 0, with this run config and PRETRAIN_SECRET");
    return stranger ? STRANGER : NOBODY;
}

static inline bool control_open_other(Control* c, const Launch* launch, const Digest* job, Error* err) {
    double deadline = deadline_after(c->timeout), patience = 0.25; // a stranger's silence must not cost much
    char why[160] = "no attempt";
    for (useconds_t pause = 20000;; pause = pause < 200000 ? pause * 3 / 2 : pause) {
        Encounter result = try_ports(c, launch, job, deadline, patience, why);
        if (result == MET) return true;
        if (result == DUPLICATE)
            return fail(err, EXIT_CONFIG,
                        "another process is rank %d of %d at %s, too: give each its own rank", c->rank,
                        c->size, launch->host);
        if (deadline_passed(deadline))
            return fail(
                err, EXIT_OS,
                "rank %d of %d: rank 0 did not answer at %s, ports %d to %d, within %g s (%s); start it, or "
                "correct its address",
                c->rank, c->size, launch->host, launch->port, control_port(launch->port, CONTROL_PORTS - 1),
                c->timeout, why);
        if (patience < HANDSHAKE_SECONDS) patience *= 2;
        usleep(pause);
    }
}

// Waits until all ranks of the job have met, at most timeout_seconds (<= 0: for ever), which is also the
// limit of every later call. job: a text that all of its ranks share, and no other job at the same place;
// with PRETRAIN_SECRET, that variable too. False on all ranks that are there if one is missing: rank 0's
// message says which. One rank alone opens no socket. control_close ends it, after false as well.
static inline bool control_open(Control* c, const Launch* launch, const char* job, double timeout_seconds,
                                Error* err) {
    memset(c, 0, sizeof *c);
    c->rank = launch->rank, c->size = launch->size, c->timeout = timeout_seconds;
    if (c->size <= 1) return true;
    int count = c->rank == 0 ? c->size : 1;
    c->sockets = (int*)malloc_check((size_t)count * sizeof *c->sockets);
    for (int i = 0; i < count; i++) c->sockets[i] = -1;
    Digest digest = job_digest(job, c->size);
    Error verdict = {0, {0}};
    if (c->rank > 0) {
        bool ok = control_open_other(c, launch, &digest, err) &&
                  control_move_one(c, 0, &verdict, sizeof verdict, false, err);
        verdict.text[sizeof verdict.text - 1] = '\0';
        if (ok && verdict.code != 0) ok = fail(err, verdict.code, "rank 0: %.940s", verdict.text);
        if (!ok) control_break(c);
        return ok;
    }
    bool ok = control_open_first(c, launch, &digest, err);
    if (ok) return control_broadcast(c, &verdict, sizeof verdict, err);
    for (int r = 1; r < c->size; r++) { // those who are there need not wait for their own deadline
        Part part = {(char*)err, sizeof *err};
        if (c->sockets[r] >= 0) part_move(c->sockets[r], &part, true);
    }
    control_break(c);
    return false;
}
