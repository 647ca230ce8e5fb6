// The bytes of a file, decompressed on the way if its name ends in .gz or .zst. What such a file holds must
// be what its name says, to its end: a truncated download is an error, not a shorter text.
#pragma once
#include "llmc/utils.h" // defines: Error, fail, EXIT_*, malloc_check
#include <zlib.h>
#include <zstd.h>

typedef struct {
    const char* path; // not ours: must outlive the stream
    int fd;
    gzFile gzip;            // NULL: not .gz
    ZSTD_DStream* zstd;     // NULL: not .zst
    void* compressed;       // (compressed_capacity): what zstd reads from
    ZSTD_inBuffer unread;   // of compressed
    bool frame_is_complete; // zstd: the end of the file may come here
} ByteStream;

static inline bool ends_with(const char* s, const char* end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && strcmp(s + n - m, end) == 0;
}

static inline bool byte_stream_open(ByteStream* stream, const char* path, Error* err) {
    memset(stream, 0, sizeof *stream);
    stream->path = path;
    stream->frame_is_complete = true;
    stream->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (stream->fd < 0) return fail(err, EXIT_NO_INPUT, "cannot open %s: %s", path, strerror(errno));
    if (ends_with(path, ".gz")) {
        stream->gzip = gzdopen(stream->fd, "rb");
        CHECK(stream->gzip != NULL);
        gzbuffer(stream->gzip, 1 << 18);
    } else if (ends_with(path, ".zst")) {
        stream->zstd = ZSTD_createDStream();
        CHECK(stream->zstd != NULL);
        stream->compressed = malloc_check(ZSTD_DStreamInSize());
    }
    return true;
}

static inline void byte_stream_close(ByteStream* stream) {
    if (stream->gzip != NULL)
        gzclose(stream->gzip); // closes fd
    else
        close(stream->fd);
    ZSTD_freeDStream(stream->zstd);
    free(stream->compressed);
    memset(stream, 0, sizeof *stream);
}

static inline ssize_t read_some(int fd, void* out, size_t n) {
    ssize_t got;
    do got = read(fd, out, n);
    while (got < 0 && errno == EINTR);
    return got;
}

static inline bool read_gzip(ByteStream* stream, void* out, size_t n, size_t* got, Error* err) {
    int count = gzread(stream->gzip, out, (unsigned)(n < 1 << 30 ? n : 1 << 30)), code;
    const char* problem = gzerror(stream->gzip, &code);
    if (count > 0 && gzdirect(stream->gzip))
        count = -1, problem = "it does not start as a gzip file does";
    else if (count == 0 && code == Z_BUF_ERROR)
        count = -1, problem = "it is truncated";
    if (count < 0) return fail(err, EXIT_BAD_DATA, "cannot decompress %s: %s", stream->path, problem);
    *got = (size_t)count;
    return true;
}

static inline bool read_zstd(ByteStream* stream, void* out, size_t n, size_t* got, Error* err) {
    ZSTD_outBuffer output = {out, n, 0};
    while (output.pos == 0) {
        if (stream->unread.pos == stream->unread.size) {
            ssize_t count = read_some(stream->fd, stream->compressed, ZSTD_DStreamInSize());
            if (count < 0) return fail(err, EXIT_IO, "cannot read %s: %s", stream->path, strerror(errno));
            if (count == 0) break;
            ZSTD_inBuffer input = {stream->compressed, (size_t)count, 0};
            stream->unread = input;
        }
        size_t hint = ZSTD_decompressStream(stream->zstd, &output, &stream->unread);
        if (ZSTD_isError(hint))
            return fail(err, EXIT_BAD_DATA, "cannot decompress %s: %s", stream->path,
                        ZSTD_getErrorName(hint));
        stream->frame_is_complete = hint == 0;
    }
    if (output.pos == 0 && !stream->frame_is_complete)
        return fail(err, EXIT_BAD_DATA, "cannot decompress %s: it is truncated", stream->path);
    *got = output.pos;
    return true;
}

// Reads 1 to n bytes; *got is 0 at the end of the file and only there.
static inline bool byte_stream_read(ByteStream* stream, void* out, size_t n, size_t* got, Error* err) {
    if (stream->gzip != NULL) return read_gzip(stream, out, n, got, err);
    if (stream->zstd != NULL) return read_zstd(stream, out, n, got, err);
    ssize_t count = read_some(stream->fd, out, n);
    if (count < 0) return fail(err, EXIT_IO, "cannot read %s: %s", stream->path, strerror(errno));
    *got = (size_t)count;
    return true;
}
