// Event files that TensorBoard reads: a header, then a scalar of an event for each number of it. Encoded by
// hand, as a dozen bytes of protobuf need no library.
//
//     RUN_DIR/tensorboard/events.out.tfevents.SECONDS.HOST.PID      one for each launch
//
//     u64 length | u32 masked crc32c of it | data | u32 masked crc32c of the data        a record (TFRecord)
//
//     Event    1 wall_time: double   2 step: int64   3 file_version: "brain.Event:2"   5 summary   7 session_log
//     Summary  1 value: { 1 tag: string   2 simple_value: float } ...                  (tensorflow's event.proto)
//     SessionLog  1 status: 1, START: what was logged from `step` on is done again, and is dropped by readers
#pragma once
#include "llmc/sink.h"  // defines: Sink, sink_append
#include "llmc/utils.h" // defines: String, string_append_bytes, path_join, make_directories

// ----------------------------------------------------------------------------
// records

// CRC-32C (Castagnoli), reflected, bit by bit: a step's record is some hundred bytes.
static inline uint32_t crc32c(const void* data, size_t size) {
    const uint8_t* p = (const uint8_t*)data;
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < size; i++) {
        crc ^= p[i];
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82F63B78u : 0);
    }
    return ~crc;
}

static inline uint32_t masked_crc32c(const void* data, size_t size) {
    uint32_t crc = crc32c(data, size);
    return (crc >> 15 | crc << 17) + 0xA282EAD8u;
}

static inline void tensorboard_record(Sink* b, const String* event) {
    String record = {NULL, 0, 0};
    uint64_t length = event->size;
    uint32_t of_length = masked_crc32c(&length, sizeof length),
             of_data = masked_crc32c(event->data, event->size);
    string_append_bytes(&record, &length, sizeof length);
    string_append_bytes(&record, &of_length, sizeof of_length);
    string_append_bytes(&record, event->data, event->size);
    string_append_bytes(&record, &of_data, sizeof of_data);
    sink_append(b, record.data, record.size);
    free(record.data);
}

// ---------------------------------------------------------------------------- protobuf: a field is its
// number and wire type (0 varint, 1 eight bytes, 2 bytes with their length, 5 four bytes)

static inline void proto_varint(String* out, uint64_t value) {
    for (;; value >>= 7) {
        uint8_t byte = (uint8_t)((value & 127) | (value > 127 ? 128 : 0));
        string_append_bytes(out, &byte, 1);
        if (value <= 127) return;
    }
}

static inline void proto_key(String* out, int field, int wire) {
    proto_varint(out, (uint64_t)(field << 3 | wire));
}

static inline void proto_bytes(String* out, int field, const void* bytes, size_t size) {
    proto_key(out, field, 2);
    proto_varint(out, size);
    string_append_bytes(out, bytes, size);
}

static inline String tensorboard_event(double time, uint64_t step) {
    String event = {NULL, 0, 0};
    proto_key(&event, 1, 1);
    string_append_bytes(&event, &time, sizeof time);
    proto_key(&event, 2, 0);
    proto_varint(&event, step);
    return event;
}

static inline void tensorboard_scalar(String* summary, const char* tag, double value) {
    String scalar = {NULL, 0, 0};
    float number = (float)value;
    proto_bytes(&scalar, 1, tag, strlen(tag));
    proto_key(&scalar, 2, 5);
    string_append_bytes(&scalar, &number, sizeof number);
    proto_bytes(summary, 1, scalar.data, scalar.size);
    free(scalar.data);
}

// ----------------------------------------------------------------------------

// What was logged behind `step` is done again, or is done now for the first time.
static inline void tensorboard_session(Sink* b, uint64_t step) {
    if (b->fd < 0) return;
    String start = tensorboard_event((double)time(NULL), step + 1);
    proto_bytes(&start, 7, "\x08\x01", 2);
    tensorboard_record(b, &start);
    free(start.data);
}

// A launch that goes on behind `step`. A file that cannot be had is said, and no error.
static inline void tensorboard_open(Sink* b, const char* run_dir, uint64_t step) {
    char host[256] = "unknown";
    Error err = {0, {0}};
    double now = (double)time(NULL);
    gethostname(host, sizeof host - 1);
    bool ok = path_join(b->path, run_dir, "tensorboard", &err) && make_directories(b->path, &err);
    if (ok) {
        size_t n = strlen(b->path);
        snprintf(b->path + n, sizeof b->path - n, "/events.out.tfevents.%010.0f.%s.%d", now, host,
                 (int)getpid());
        b->fd = open(b->path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    }
    if (b->fd < 0) {
        fprintf(stderr, "warning: cannot open %s: %s; training goes on without it\n", b->path,
                ok ? strerror(errno) : err.text);
        return;
    }
    String version = tensorboard_event(now, 0);
    proto_bytes(&version, 3, "brain.Event:2", 13);
    tensorboard_record(b, &version);
    tensorboard_session(b, step);
    free(version.data);
}
