// Lines on their way to a log. A thread of its own takes them from memory to the disk, so that one that stands still
// (a network's, most often) holds up nothing but the log.
//
//     training   put | put | put | put ...                a full queue takes no more, which is said
//     thread           write(line, line) | write(line)
#pragma once
#include "llmc/utils.h" // defines: String, string_append_bytes

#include <pthread.h>

enum { LINE_QUEUE_BYTES = 16 << 20 };

typedef struct {
    void (*write)(void* to, const char* line, size_t size); // called by the thread, for each line
    void* to;
    const char* name;       // of what is written, for messages
    pthread_mutex_t mutex;  // of the rest
    pthread_cond_t changed; // any of it
    String waiting;         // each with its zero
    size_t limit;           // of bytes that wait
    bool writing, closing, full;
    bool running; // there is a thread
    pthread_t thread;
} LineQueue;

static inline void* line_queue_main(void* argument) {
    LineQueue* q = (LineQueue*)argument;
    String lines = {NULL, 0, 0};
    pthread_mutex_lock(&q->mutex);
    while (q->waiting.size > 0 || !q->closing) {
        if (q->waiting.size == 0) {
            pthread_cond_wait(&q->changed, &q->mutex);
            continue;
        }
        String empty = lines;
        empty.size = 0, lines = q->waiting, q->waiting = empty, q->writing = true;
        pthread_mutex_unlock(&q->mutex);
        for (size_t at = 0, size; at < lines.size; at += size + 1) {
            size = strlen(lines.data + at);
            q->write(q->to, lines.data + at, size);
        }
        pthread_mutex_lock(&q->mutex);
        q->writing = false;
        pthread_cond_broadcast(&q->changed);
    }
    pthread_mutex_unlock(&q->mutex);
    free(lines.data);
    return NULL;
}

// Without a thread (none can be had, or this was not called) line_queue_put takes nothing.
static inline void line_queue_start(LineQueue* q, void (*write)(void*, const char*, size_t), void* to,
                                    const char* name) {
    memset(q, 0, sizeof *q);
    q->write = write, q->to = to, q->name = name, q->limit = LINE_QUEUE_BYTES;
    pthread_mutexattr_t checked;
    pthread_mutexattr_init(&checked);
    pthread_mutexattr_settype(&checked, PTHREAD_MUTEX_ERRORCHECK);
    pthread_mutex_init(&q->mutex, &checked);
    pthread_mutexattr_destroy(&checked);
    pthread_condattr_t clock; // a wait must not end, or last, when somebody sets the time of day
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&q->changed, &clock);
    pthread_condattr_destroy(&clock);
    q->running = pthread_create(&q->thread, NULL, line_queue_main, q) == 0;
}

// One line, a string. False: there is no queue, and the caller writes it.
static inline bool line_queue_put(LineQueue* q, const char* line, size_t size) {
    if (!q->running) return false;
    pthread_mutex_lock(&q->mutex);
    bool room = q->waiting.size + size <= q->limit, first = !room && !q->full;
    if (room) string_append_bytes(&q->waiting, line, size + 1);
    q->full = !room;
    pthread_cond_broadcast(&q->changed);
    pthread_mutex_unlock(&q->mutex);
    if (first)
        fprintf(stderr, "warning: %s has taken nothing for so long that lines are lost; training goes on\n",
                q->name);
    return true;
}

// Until everything is written, for at most so many seconds. False: it is not.
static inline bool line_queue_flush(LineQueue* q, int seconds) {
    struct timespec until;
    if (!q->running) return true;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += seconds;
    int late = 0;
    if (pthread_mutex_lock(&q->mutex) != 0)
        return false; // memory was out in line_queue_put, which then exits
    while ((q->waiting.size > 0 || q->writing) && late == 0)
        late = pthread_cond_timedwait(&q->changed, &q->mutex, &until);
    bool written = q->waiting.size == 0 && !q->writing;
    pthread_mutex_unlock(&q->mutex);
    return written;
}

// False: after so many seconds the thread still waits for the disk. It keeps what it writes to, and *q, until the
// process ends.
static inline bool line_queue_stop(LineQueue* q, int seconds) {
    if (!q->running) return true;
    bool written = line_queue_flush(q, seconds);
    q->running = false;
    if (!written) {
        fprintf(stderr, "warning: %s takes nothing any more: the last lines are not in it\n", q->name);
        return false;
    }
    pthread_mutex_lock(&q->mutex);
    q->closing = true;
    pthread_cond_broadcast(&q->changed);
    pthread_mutex_unlock(&q->mutex);
    pthread_join(q->thread, NULL);
    pthread_cond_destroy(&q->changed);
    pthread_mutex_destroy(&q->mutex);
    free(q->waiting.data);
    return true;
}
