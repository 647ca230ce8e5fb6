// Writing token shards (llmc/shard.h has the format). A shard and its index are written as NAME.bin.tmp and
// NAME.idx.tmp, made durable, and get their names when shard_publish renames them: what carries a final name
// is complete, whatever happened to the program or the machine before.
#pragma once
#include "llmc/shard.h" // defines: ShardHeader, SHARD_KINDS, SHARD_*, shard_index_path
#include "llmc/utils.h" // defines: Error, fail, EXIT_*, CHECK, write_all, malloc_check, realloc_check
#include <xxhash.h>

typedef struct {
    char* path; // the final name
    int fd;
    ShardHeader header;
    int token_bytes;
    XXH3_state_t* payload_hash;
    char* buffer; // (SHARD_BUFFER_BYTES)
    size_t buffered;
    uint64_t* ends; // (ends_capacity), header.num_documents in use
    uint64_t ends_capacity;
} ShardWriter;

enum { SHARD_BUFFER_BYTES = 1 << 20 };

// The name that a file has until it is complete.
static inline bool temporary_path(char out[PATH_MAX], const char* path, Error* err) {
    int n = snprintf(out, PATH_MAX, "%s.tmp", path);
    return (n > 0 && n < PATH_MAX) || fail(err, EXIT_USAGE, "path %s is too long", path);
}

static inline int create_temporary(const char* path, Error* err) {
    char temporary[PATH_MAX];
    if (!temporary_path(temporary, path, err)) return -1;
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0) fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", temporary, strerror(errno));
    return fd;
}

// Removes the temporary files of a shard that will not be.
static inline void shard_discard(const char* path) {
    char index[PATH_MAX], temporary[PATH_MAX];
    Error ignored = {0, {0}};
    if (temporary_path(temporary, path, &ignored)) unlink(temporary);
    if (shard_index_path(index, path, &ignored) && temporary_path(temporary, index, &ignored))
        unlink(temporary);
}

static inline bool shard_writer_flush(ShardWriter* w, Error* err) {
    if (!write_all(w->fd, w->buffer, w->buffered))
        return fail(err, EXIT_IO, "cannot write %s.tmp: %s", w->path, strerror(errno));
    XXH3_128bits_update(w->payload_hash, w->buffer, w->buffered);
    w->buffered = 0;
    return true;
}

static inline void shard_writer_free(ShardWriter* w) {
    if (w->fd >= 0) close(w->fd);
    if (w->payload_hash != NULL) XXH3_freeState(w->payload_hash);
    free(w->path);
    free(w->buffer);
    free(w->ends);
    memset(w, 0, sizeof *w);
    w->fd = -1;
}

// Starts a shard of 2- or 4-byte tokens. vocab_size 0: not known. eot_id >= 0: every document that is written
// begins with it. tokenizer_hash may be NULL. End with shard_writer_finish, or give up with
// shard_writer_free and shard_discard.
static inline bool shard_writer_open(ShardWriter* w, const char* path, int token_bytes, uint32_t vocab_size,
                                     int eot_id, const uint64_t* tokenizer_hash, Error* err) {
    memset(w, 0, sizeof *w);
    shard_discard(path); // of a program that was killed
    w->fd = create_temporary(path, err);
    if (w->fd < 0) return false;
    w->path = strdup_check(path);
    const ShardKind* kind = &SHARD_KINDS[token_bytes == 2 ? 0 : 1];
    w->token_bytes = kind->token_bytes;
    w->header.magic = kind->magic;
    w->header.version = kind->version;
    w->header.vocab_size = vocab_size;
    if (eot_id >= 0) {
        w->header.flags |= SHARD_EOT_FIRST;
        w->header.eot_id = eot_id;
    }
    if (tokenizer_hash != NULL)
        memcpy(w->header.tokenizer_hash, tokenizer_hash, sizeof w->header.tokenizer_hash);
    w->payload_hash = XXH3_createState();
    CHECK(w->payload_hash != NULL);
    XXH3_128bits_reset(w->payload_hash);
    w->buffer = (char*)malloc_check(SHARD_BUFFER_BYTES);
    if (write_all(w->fd, &w->header, sizeof w->header)) return true; // its place: finish knows what it says
    fail(err, EXIT_IO, "cannot write %s.tmp: %s", path, strerror(errno));
    shard_writer_free(w);
    shard_discard(path);
    return false;
}

// Stores n tokens with their low 2 or 4 bytes; returns the largest.
static inline uint32_t narrow_tokens(char* out, int token_bytes, const uint32_t* tokens, size_t n) {
    uint32_t largest = 0;
    for (size_t i = 0; i < n; i++) largest = tokens[i] > largest ? tokens[i] : largest;
    if (token_bytes == 2)
        for (size_t i = 0; i < n; i++) ((uint16_t*)(void*)out)[i] = (uint16_t)tokens[i];
    else
        memcpy(out, tokens, n * sizeof *tokens);
    return largest;
}

// Appends tokens to the document being written. Fails on one that the vocabulary or the width excludes.
static inline bool shard_writer_tokens(ShardWriter* w, const uint32_t* tokens, size_t n, Error* err) {
    uint32_t limit = w->token_bytes == 2 ? 65536 : (uint32_t)SHARD_MAX_VOCAB;
    if (w->header.vocab_size != 0) limit = w->header.vocab_size;
    while (n > 0) {
        size_t room = (SHARD_BUFFER_BYTES - w->buffered) / (size_t)w->token_bytes;
        size_t count = n < room ? n : room;
        if (narrow_tokens(w->buffer + w->buffered, w->token_bytes, tokens, count) >= limit) {
            size_t bad = 0;
            while (tokens[bad] < limit) bad++;
            return fail(err, EXIT_BAD_DATA, "token %llu for %s is %u; it must be below %u",
                        (unsigned long long)(w->header.num_tokens + bad), w->path, tokens[bad], limit);
        }
        w->buffered += count * (size_t)w->token_bytes;
        w->header.num_tokens += count;
        tokens += count, n -= count;
        if (w->buffered == SHARD_BUFFER_BYTES && !shard_writer_flush(w, err)) return false;
    }
    return true;
}

// Ends a document; one without any token is none.
static inline void shard_writer_end_document(ShardWriter* w, uint64_t source_bytes) {
    uint64_t n = w->header.num_documents;
    w->header.source_bytes += source_bytes;
    if (w->header.num_tokens == (n != 0 ? w->ends[n - 1] : 0)) return;
    if (n == w->ends_capacity) {
        w->ends_capacity = w->ends_capacity * 2 + 1024;
        w->ends = (uint64_t*)realloc_check(w->ends, w->ends_capacity * sizeof *w->ends);
    }
    w->ends[n] = w->header.num_tokens;
    w->header.num_documents++;
}

static inline bool shard_writer_write_index(const ShardWriter* w, Error* err) {
    char path[PATH_MAX];
    if (!shard_index_path(path, w->path, err)) return false;
    int fd = create_temporary(path, err);
    if (fd < 0) return false;
    uint64_t count = w->header.num_documents;
    bool ok = write_all(fd, SHARD_INDEX_MAGIC, sizeof SHARD_INDEX_MAGIC) &&
              write_all(fd, &count, sizeof count) && write_all(fd, w->ends, count * sizeof *w->ends) &&
              fsync(fd) == 0;
    if (!ok) fail(err, EXIT_IO, "cannot write %s.tmp: %s", path, strerror(errno));
    close(fd);
    return ok;
}

// Completes the temporary files, on disk when this returns, and frees the writer, also on failure.
static inline bool shard_writer_finish(ShardWriter* w, Error* err) {
    ShardHeader* h = &w->header;
    bool ok = shard_writer_flush(w, err);
    if (ok && h->num_documents != 0) {
        h->flags |= SHARD_HAS_INDEX;
        ok = shard_writer_write_index(w, err);
    }
    if (ok) {
        XXH128_hash_t hash = XXH3_128bits_digest(w->payload_hash);
        h->num_tokens32 = h->num_tokens <= INT32_MAX ? (int32_t)h->num_tokens : -1;
        h->payload_hash[0] = hash.low64;
        h->payload_hash[1] = hash.high64;
        ok = pwrite(w->fd, h, sizeof *h, 0) == (ssize_t)sizeof *h && fsync(w->fd) == 0;
        if (!ok) fail(err, EXIT_IO, "cannot write %s.tmp: %s", w->path, strerror(errno));
    }
    shard_writer_free(w);
    return ok;
}

static inline bool publish_file(const char* path, Error* err) {
    char temporary[PATH_MAX];
    if (!temporary_path(temporary, path, err)) return false;
    return rename(temporary, path) == 0 ||
           fail(err, EXIT_CANNOT_WRITE, "cannot rename %s: %s", temporary, strerror(errno));
}

static inline bool sync_directory_of(const char* path, Error* err) {
    const char* slash = strrchr(path, '/');
    char dir[PATH_MAX] = ".";
    if (slash != NULL) snprintf(dir, sizeof dir, "%.*s", (int)(slash - path) + 1, path);
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && fsync(fd) == 0;
    if (!ok) fail(err, EXIT_IO, "cannot sync directory %s: %s", dir, strerror(errno));
    if (fd >= 0) close(fd);
    return ok;
}

// Gives a finished shard its name, its index first, and makes that durable. An index of an earlier shard of
// that name goes away where the new one has none.
static inline bool shard_publish(const char* path, Error* err) {
    char index[PATH_MAX], temporary[PATH_MAX];
    if (!shard_index_path(index, path, err) || !temporary_path(temporary, index, err)) return false;
    if (access(temporary, F_OK) != 0)
        unlink(index);
    else if (!publish_file(index, err))
        return false;
    return publish_file(path, err) && sync_directory_of(path, err);
}
