// Writing token shards (llmc/shard.h has the format). A shard and its index are written as NAME.bin.tmp and
// NAME.idx.tmp, made durable, and get their names when shard_publish renames them: what carries a final name
// is complete, whatever happened to the program or the machine before.
#pragma once
#include "llmc/shard.h" // defines: ShardHeader, SHARD_KINDS, SHARD_*, shard_index_path
#include "llmc/utils.h" // defines: Error, fail, EXIT_*, String, write_all, malloc_check, realloc_check
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

// The four names of a shard: index before shard, so that a shard that is there has its index.
static inline bool shard_names(char names[2][PATH_MAX], char temporary[2][PATH_MAX + 8], const char* path,
                               Error* err) {
    if (!shard_index_path(names[0], path, err)) return false;
    snprintf(names[1], PATH_MAX, "%s", path);
    for (int i = 0; i < 2; i++) snprintf(temporary[i], sizeof temporary[i], "%s.tmp", names[i]);
    return true;
}

// Removes the temporary files of a shard that will not be.
static inline void shard_discard(const char* path) {
    char names[2][PATH_MAX], temporary[2][PATH_MAX + 8];
    Error ignored = {0, {0}};
    if (!shard_names(names, temporary, path, &ignored)) return;
    for (int i = 0; i < 2; i++) unlink(temporary[i]);
}

static inline int create_temporary(const char* path, Error* err) {
    char temporary[PATH_MAX];
    int n = snprintf(temporary, sizeof temporary, "%s.tmp", path);
    if (n < 0 || n >= PATH_MAX) {
        fail(err, EXIT_USAGE, "path %s is too long", path);
        return -1;
    }
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (fd < 0) fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", temporary, strerror(errno));
    return fd;
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
        size_t room = (SHARD_BUFFER_BYTES - w->buffered) / (size_t)w->token_bytes,
               count = n < room ? n : room;
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

// Gives a finished shard its name and makes that durable. An index left over from an earlier shard of that
// name goes away where the new one has none.
static inline bool shard_publish(const char* path, Error* err) {
    char names[2][PATH_MAX], temporary[2][PATH_MAX + 8];
    if (!shard_names(names, temporary, path, err)) return false;
    if (access(temporary[0], F_OK) != 0) unlink(names[0]);
    for (int i = 0; i < 2; i++)
        if (rename(temporary[i], names[i]) != 0 && !(i == 0 && errno == ENOENT))
            return fail(err, EXIT_CANNOT_WRITE, "cannot rename %s: %s", temporary[i], strerror(errno));
    char* slash = strrchr(names[1], '/');
    if (slash != NULL) slash[slash == names[1]] = '\0';
    int dir = open(slash != NULL ? names[1] : ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = dir >= 0 && fsync(dir) == 0;
    if (dir >= 0) close(dir);
    return ok || fail(err, EXIT_IO, "cannot make %s durable: %s", path, strerror(errno));
}
