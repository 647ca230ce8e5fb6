#pragma once
#include "llmc/utils.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
typedef struct {
    int rank, size, local_rank, local_size;
    char host[256];
    int port;
    bool by_launcher;
} Launch;
typedef struct {
    int rank, size;
    int* sockets;
    double timeout;
} Control;
static inline bool launch_find(Launch* l, int* argc, char** argv, Error* err) {
    (void)argc, (void)argv, (void)err;
    memset(l, 0, sizeof *l);
    const char* r = getenv("RANK");
    l->size = 1;
    if (!r) return true;
    l->rank = atoi(r), l->size = atoi(getenv("WORLD_SIZE")), l->local_rank = atoi(getenv("LOCAL_RANK")),
    l->port = atoi(getenv("MASTER_PORT"));
    return true;
}
static inline bool ctl_io(int fd, void* p, size_t n, bool out, Error* err) {
    char* at = (char*)p;
    while (n > 0) {
        ssize_t k = out ? send(fd, at, n, MSG_NOSIGNAL) : recv(fd, at, n, 0);
        if (k <= 0) return fail(err, EXIT_OS, "a peer went away");
        at += k, n -= (size_t)k;
    }
    return true;
}
static inline bool control_open(Control* c, const Launch* l, const char* job, double timeout, Error* err) {
    (void)job, (void)timeout;
    memset(c, 0, sizeof *c);
    c->rank = l->rank, c->size = l->size;
    if (l->size == 1) return true;
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET, a.sin_port = htons((uint16_t)l->port), a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->sockets = (int*)calloc_check((size_t)l->size, sizeof(int));
    if (l->rank == 0) {
        int s = socket(AF_INET, SOCK_STREAM, 0), one = 1;
        setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(s, (struct sockaddr*)&a, sizeof a) != 0) return fail(err, EXIT_OS, "bind");
        listen(s, 64);
        for (int i = 1; i < l->size; i++) {
            int fd = accept(s, NULL, NULL), r = 0;
            if (!ctl_io(fd, &r, sizeof r, false, err)) return false;
            c->sockets[r] = fd;
        }
        close(s);
    } else {
        for (;;) {
            c->sockets[0] = socket(AF_INET, SOCK_STREAM, 0);
            if (connect(c->sockets[0], (struct sockaddr*)&a, sizeof a) == 0) break;
            close(c->sockets[0]);
            usleep(20000);
        }
        return ctl_io(c->sockets[0], &c->rank, sizeof c->rank, true, err);
    }
    return true;
}
static inline bool control_broadcast(Control* c, void* data, size_t n, Error* err) {
    bool ok = true;
    for (int r = 1; r < c->size && c->rank == 0; r++) ok = ok && ctl_io(c->sockets[r], data, n, true, err);
    if (c->rank > 0) ok = ctl_io(c->sockets[0], data, n, false, err);
    return ok;
}
static inline bool control_gather(Control* c, const void* mine, size_t n, void* all, Error* err) {
    if (c->size == 0 || c->rank == 0) {
        memcpy(all, mine, n);
        for (int r = 1; r < c->size; r++)
            if (!ctl_io(c->sockets[r], (char*)all + (size_t)r * n, n, false, err)) return false;
        return true;
    }
    return ctl_io(c->sockets[0], (void*)mine, n, true, err);
}
static inline bool control_gather_text(Control* c, const char* mine, String* all, Error* err) {
    size_t n = strlen(mine);
    if (c->rank > 0)
        return ctl_io(c->sockets[0], &n, sizeof n, true, err) &&
               ctl_io(c->sockets[0], (void*)mine, n, true, err);
    string_append(all, "%s", mine);
    for (int r = 1; r < c->size; r++) {
        if (!ctl_io(c->sockets[r], &n, sizeof n, false, err)) return false;
        char* t = (char*)malloc_check(n + 1);
        t[n] = 0;
        if (!ctl_io(c->sockets[r], t, n, false, err)) return false;
        string_append(all, "%s", t);
        free(t);
    }
    return true;
}
static inline bool control_agree(Control* c, Error* err) {
    if (c->size <= 1) return err->code == 0;
    Error e;
    Error* all = (Error*)calloc_check((size_t)c->size, sizeof e);
    Error io = {0, {0}};
    e = *err;
    bool ok = control_gather(c, &e, sizeof e, all, &io);
    if (c->rank == 0) {
        memset(&e, 0, sizeof e);
        for (int r = c->size - 1; r >= 0; r--)
            if (all[r].code) e = all[r];
    }
    free(all);
    ok = ok && control_broadcast(c, &e, sizeof e, &io);
    *err = ok ? e : io;
    return err->code == 0;
}
static inline void control_close(Control* c) {
    if (c->sockets != NULL)
        for (int r = 0; r < (c->rank ? 1 : c->size); r++)
            if (c->sockets[r] > 0) close(c->sockets[r]);
    free(c->sockets);
    memset(c, 0, sizeof *c);
}
