// What a run says: log.jsonl for programs (one object a line, the source of every plot and report), the newest
// step's numbers in metrics.prom for Prometheus' node exporter, and the step line for people. What cannot be
// written never stops a run: it is said once, and training goes on.
#pragma once
#include <math.h>

#include "llmc/json.h"  // defines: json_append_string
#include "llmc/utf8.h"  // defines: utf8_sequence
#include "llmc/utils.h" // defines: String, string_append, write_all

typedef struct {
    int fd;                                  // of log.jsonl; -1 once writing failed
    char path[PATH_MAX], textfile[PATH_MAX]; // log.jsonl; metrics.prom, "" once writing failed
} Metrics;

static inline void metrics_close(Metrics* m) {
    if (m->fd >= 0) close(m->fd);
    m->fd = -1;
}

static inline void metrics_write(Metrics* m, const char* data, size_t size) {
    if (m->fd < 0 || write_all(m->fd, data, size)) return;
    fprintf(stderr, "warning: cannot write %s: %s; training goes on without the log\n", m->path,
            strerror(errno));
    metrics_close(m);
}

// Appends to RUN_DIR/log.jsonl. Only a log that cannot be opened at all is an error: most likely it is in the
// wrong place.
static inline bool metrics_open(Metrics* m, const char* run_dir, Error* err) {
    if (!path_join(m->path, run_dir, "log.jsonl", err) ||
        !path_join(m->textfile, run_dir, "metrics.prom", err))
        return false;
    m->fd = open(m->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (m->fd < 0) return fail(err, EXIT_CANNOT_WRITE, "cannot open %s: %s", m->path, strerror(errno));
    // a run that was killed may have left half a line: end it, so that it spoils no other
    char last = '\n';
    off_t size = lseek(m->fd, 0, SEEK_END);
    if (size > 0 && pread(m->fd, &last, 1, size - 1) == 1 && last != '\n') metrics_write(m, "\n", 1);
    return true;
}

// A line is built field by field (event_begin, event_number ..., event_end) and written by one write(2).
static inline String event_begin(const char* event, uint64_t step) {
    String line = {NULL, 0, 0};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    string_append(&line, "{\"event\":\"%s\",\"time\":%.3f,\"step\":%llu", event,
                  (double)now.tv_sec + 1e-9 * (double)now.tv_nsec, (unsigned long long)step);
    return line;
}

// Counts are written in full, other numbers to nine digits, more than fp32 has.
static inline void event_number(String* line, const char* key, double value) {
    bool count = value == floor(value) && fabs(value) < 9007199254740992.0;
    if (isfinite(value))
        string_append(line, count ? ",\"%s\":%.0f" : ",\"%s\":%.9g", key, value);
    else
        string_append(line, ",\"%s\":null", key); // JSON has no NaN
}

static inline void event_text(String* line, const char* key, const char* text) {
    string_append(line, ",\"%s\":", key);
    json_append_string(line, text);
}

// The numbers of an event without texts, as gauges in Prometheus' text format 0.0.4. A reader finds this file or the
// one before; after a power cut there may be none.
static inline void metrics_textfile(Metrics* m, const String* line) {
    String text = {NULL, 0, 0};
    char temporary[PATH_MAX + 8];
    if (m->textfile[0] == '\0') return;
    for (const char* at = strchr(line->data, ','); at != NULL; at = strchr(at + 1, ',')) {
        int key = (int)strcspn(at + 2, "\""); // ,"key":number
        const char* number = at + key + 4;
        if (*number == 'n') number = "NaN"; // null
        int digits = (int)strcspn(number, ",}");
        string_append(&text, "# TYPE pretrain_%.*s gauge\npretrain_%.*s %.*s\n", key, at + 2, key, at + 2,
                      digits, number);
    }
    snprintf(temporary, sizeof temporary, "%s.tmp", m->textfile);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    bool ok = fd >= 0 && write_all(fd, text.data, text.size);
    if (fd >= 0) ok = close(fd) == 0 && ok;
    free(text.data);
    if (ok && rename(temporary, m->textfile) == 0) return;
    fprintf(stderr, "warning: cannot write %s: %s; training goes on without it\n", m->textfile,
            strerror(errno));
    unlink(temporary);
    m->textfile[0] = '\0';
}

// Text of a model: any bytes. JSON is UTF-8 and a C string ends at a NUL, so what is not UTF-8, and NULs,
// become U+FFFD, the replacement character.
static inline void event_bytes(String* line, const char* key, const char* bytes, size_t size) {
    String text = {NULL, 0, 0};
    const uint8_t *p = (const uint8_t*)bytes, *end = p + size;
    string_append_bytes(&text, "", 0);
    while (p < end) {
        size_t n = *p != '\0' ? utf8_sequence(p, end) : 0;
        if (n == 0)
            string_append_bytes(&text, "\xEF\xBF\xBD", 3);
        else
            string_append_bytes(&text, p, n);
        p += n != 0 ? n : 1;
    }
    event_text(line, key, text.data);
    free(text.data);
}

static inline void event_end(Metrics* m, String* line) {
    string_append(line, "}\n");
    metrics_write(m, line->data, line->size);
    free(line->data);
}

// "12d03h", "1h02m", "3m07s", "12s"; no time and what is not a number are "0s"
static inline void format_duration(char out[24], double seconds) {
    long s = seconds > 0 ? (long)(fmin(seconds, 1e15) + 0.5) : 0;
    if (s >= 172800)
        snprintf(out, 24, "%ldd%02ldh", s / 86400, s / 3600 % 24);
    else if (s >= 3600)
        snprintf(out, 24, "%ldh%02ldm", s / 3600, s / 60 % 60);
    else if (s >= 60)
        snprintf(out, 24, "%ldm%02lds", s / 60, s % 60);
    else
        snprintf(out, 24, "%lds", s);
}

// Text of a model for a person's terminal: control bytes would move the cursor or worse, so they are shown
// as \xNN; bytes of UTF-8 sequences pass.
static inline void print_escaped(FILE* out, const char* text, size_t size) {
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '\n' || c == '\t' || (c >= 32 && c != 127))
            fputc(c, out);
        else
            fprintf(out, "\\x%02x", c);
    }
}
