// Files that tell of a run. A disk that is full or gone for a while costs them what they should get meanwhile, and no more:
// never half a line or record, nor what comes when the disk is there again. Training never knows.
#pragma once
#include "llmc/utils.h" // defines: write_all

typedef struct {
    int fd;       // of one that grows; -1: it is not open
    bool failing; // which was said
    bool torn;    // behind `whole` bytes it ends in part of a record
    off_t whole;
    char path[PATH_MAX + 320];
} Sink;

static inline void sink_init(Sink* s) {
    memset(s, 0, sizeof *s);
    s->fd = -1;
}

static inline void sink_close(Sink* s) {
    if (s->fd >= 0) close(s->fd);
    s->fd = -1;
}

// error: an errno, or 0. Said when it begins and when it is over.
static inline void sink_result(Sink* s, int error) {
    if (error != 0 && !s->failing)
        fprintf(stderr, "warning: cannot write %s: %s; training goes on, and tries again\n", s->path,
                strerror(error));
    if (error == 0 && s->failing)
        fprintf(stderr, "note: %s is written again; what came meanwhile is lost\n", s->path);
    s->failing = error != 0;
}

// All of it, or nothing. fd is open with O_APPEND.
static inline void sink_append(Sink* s, const void* data, size_t size) {
    if (s->fd < 0) return;
    int error = s->torn && ftruncate(s->fd, s->whole) != 0 ? errno : 0;
    if (error == 0) {
        s->torn = false, s->whole = lseek(s->fd, 0, SEEK_END); // no file: -1, as behind the write
        if (!write_all(s->fd, data, size)) {
            error = errno;
            s->torn = lseek(s->fd, 0, SEEK_END) != s->whole && ftruncate(s->fd, s->whole) != 0;
        }
    }
    sink_result(s, error);
}

// A reader finds this file or the one before; after a power cut there may be none.
static inline void sink_replace(Sink* s, const void* data, size_t size) {
    char temporary[sizeof s->path + 8];
    snprintf(temporary, sizeof temporary, "%s.tmp", s->path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666), error = 0;
    if (fd < 0 || !write_all(fd, data, size)) error = errno;
    if (fd >= 0 && close(fd) != 0 && error == 0) error = errno;
    if (error == 0 && rename(temporary, s->path) != 0) error = errno;
    if (error != 0) unlink(temporary);
    sink_result(s, error);
}
