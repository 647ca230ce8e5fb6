// What a run says to programs: log.jsonl (one object a line, the source of every plot and report), the newest
// step's numbers in metrics.prom for Prometheus' node exporter, and those of steps and evaluations for
// TensorBoard. What cannot be written never stops a run (sink.h). Nor does it wait for
// a disk that hangs: a thread writes (metrics_in_background).
#pragma once
#include <math.h>

#include "llmc/json.h"        // defines: cJSON, json_append_string
#include "llmc/line_queue.h"  // defines: LineQueue, line_queue_start, line_queue_put, line_queue_flush
#include "llmc/sink.h"        // defines: Sink, sink_append, sink_replace
#include "llmc/tensorboard.h" // defines: tensorboard_scalar, tensorboard_record
#include "llmc/utf8.h"        // defines: utf8_sequence
#include "llmc/utils.h"       // defines: String, string_append

typedef struct {
    Sink log, textfile, tensorboard; // log.jsonl, metrics.prom (path "": none), the event file
    String gauges;                   // what metrics.prom shall hold; size 0: it does
    double textfile_written;         // when, by seconds_now; 0: not yet
    LineQueue queue;                 // in front of all of it
} Metrics;

static inline void metrics_init(Metrics* m) {
    memset(m, 0, sizeof *m);
    sink_init(&m->log), sink_init(&m->textfile), sink_init(&m->tensorboard);
}

// Appends to RUN_DIR/log.jsonl. Only a log that cannot be opened at all is an error: most likely it is in the
// wrong place.
static inline bool metrics_open(Metrics* m, const char* run_dir, Error* err) {
    metrics_init(m);
    Sink* log = &m->log;
    if (!path_join(log->path, run_dir, "log.jsonl", err) ||
        !path_join(m->textfile.path, run_dir, "metrics.prom", err))
        return false;
    log->fd = open(log->path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (log->fd < 0) return fail(err, EXIT_CANNOT_WRITE, "cannot open %s: %s", log->path, strerror(errno));
    // a run that was killed may have left half a line: end it, so that it spoils no other
    char last = '\n';
    off_t size = lseek(log->fd, 0, SEEK_END);
    if (size > 0 && pread(log->fd, &last, 1, size - 1) == 1 && last != '\n') sink_append(log, "\n", 1);
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

// An array of numbers, `stride` doubles from one to the next.
static inline void event_array(String* line, const char* key, const double* values, int count, int stride) {
    string_append(line, ",\"%s\":[", key);
    for (int i = 0; i < count; i++) {
        const double value = values[i * stride];
        string_append(line, isfinite(value) ? "%s%.9g" : "%snull", i > 0 ? "," : "", value);
    }
    string_append(line, "]");
}

static inline void event_text(String* line, const char* key, const char* text) {
    string_append(line, ",\"%s\":", key);
    json_append_string(line, text);
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

typedef void (*UseNumber)(String* out, const char* key, double value);

static inline void use_number(const cJSON* item, const char* key, UseNumber use, String* out) {
    if (cJSON_IsNumber(item) || cJSON_IsNull(item))
        use(out, key, cJSON_IsNull(item) ? NAN : item->valuedouble);
}

// Calls `use` for every number of an event, for those of an array as KEY/0, KEY/1 ...; what is null is a number
// that is not finite.
static inline void event_numbers(const cJSON* event, const char* prefix, UseNumber use, String* out) {
    char key[128];
    const cJSON *item, *element;
    cJSON_ArrayForEach(item, event) {
        int index = 0;
        snprintf(key, sizeof key, "%s%s", prefix, item->string);
        use_number(item, key, use, out);
        cJSON_ArrayForEach(element, item) {
            snprintf(key, sizeof key, "%s%s/%d", prefix, item->string, index++);
            use_number(element, key, use, out);
        }
    }
}

// A gauge in Prometheus' text format 0.0.4.
static inline void append_gauge(String* out, const char* key, double value) {
    string_append(out, "# TYPE pretrain_%s gauge\npretrain_%s ", key, key);
    string_append(out, isfinite(value) ? "%.15g\n" : "NaN\n", value);
}

static inline void metrics_write_textfile(Metrics* m) {
    if (m->textfile.path[0] == '\0' || m->gauges.size == 0) return;
    sink_replace(&m->textfile, m->gauges.data, m->gauges.size);
    m->gauges.size = 0, m->textfile_written = seconds_now();
}

// Once a second, as nobody reads it more often: ext4 begins to write a file that replaces another to the
// disk, which takes longer than everything else here.
static inline void metrics_textfile(Metrics* m, const cJSON* event) {
    m->gauges.size = 0;
    event_numbers(event, "", append_gauge, &m->gauges);
    if (m->textfile_written == 0 || seconds_now() - m->textfile_written >= 1) metrics_write_textfile(m);
}

static inline void metrics_tensorboard(Metrics* m, cJSON* event, const char* kind) {
    String summary = {NULL, 0, 0};
    char prefix[16];
    if (m->tensorboard.fd < 0) return;
    cJSON* time = cJSON_DetachItemFromObject(event, "time");
    cJSON* step = cJSON_DetachItemFromObject(event, "step");
    String record = tensorboard_event(time->valuedouble, (uint64_t)step->valuedouble);
    cJSON_Delete(time), cJSON_Delete(step);
    snprintf(prefix, sizeof prefix, "%s/", kind);
    event_numbers(event, prefix, tensorboard_scalar, &summary);
    proto_bytes(&record, 5, summary.data, summary.size);
    tensorboard_record(&m->tensorboard, &record);
    free(record.data), free(summary.data);
}

// One line, to where it belongs: steps, evaluations and measured layers have numbers only, which go to the other places,
// too; after a rewind TensorBoard forgets what was behind it.
static inline void metrics_line(void* metrics, const char* line, size_t size) {
    enum { STEP, EVAL, LAYERS, REWIND, NUM_KINDS };
    static const char* const kinds[NUM_KINDS] = {"step", "eval", "layers", "rewind"};
    Metrics* m = (Metrics*)metrics;
    sink_append(&m->log, line, size);
    const char* kind = line + 10; // {"event":"
    for (int i = 0; i < NUM_KINDS; i++) {
        size_t n = strlen(kinds[i]);
        if (strncmp(kind, kinds[i], n) != 0 || kind[n] != '"') continue;
        cJSON* event = cJSON_Parse(line);
        if (i == STEP) metrics_textfile(m, event);
        if (i != REWIND) metrics_tensorboard(m, event, kinds[i]);
        if (i == REWIND)
            tensorboard_session(&m->tensorboard, (uint64_t)cJSON_GetObjectItem(event, "step")->valuedouble);
        cJSON_Delete(event);
    }
}

static inline void event_end(Metrics* m, String* line) {
    string_append(line, "}\n");
    if (!line_queue_put(&m->queue, line->data, line->size)) metrics_line(m, line->data, line->size);
    free(line->data);
}

// A process that gives up at once, over an error of its device for one, is not to lose the lines that led to it.
static LineQueue* metrics_queue = NULL;
static inline void metrics_flush_at_exit(void) {
    if (metrics_queue != NULL) line_queue_flush(metrics_queue, 2);
}

// From now on a thread writes what events say; all that is written to is open. One log in a process has that.
static inline void metrics_in_background(Metrics* m) {
    static bool registered = false;
    line_queue_start(&m->queue, metrics_line, m, m->log.path);
    metrics_queue = &m->queue;
    if (!registered) registered = atexit(metrics_flush_at_exit) == 0;
}

static inline void metrics_close(Metrics* m) {
    enum { PATIENCE = 10 }; // seconds
    if (metrics_queue == &m->queue) metrics_queue = NULL;
    if (!line_queue_stop(&m->queue, PATIENCE)) return; // its thread has the rest
    metrics_write_textfile(m);
    free(m->gauges.data);
    sink_close(&m->log), sink_close(&m->tensorboard);
    metrics_init(m);
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
