// Token shards: the .bin files that `corpus` writes and the data loader reads, and their .idx sidecar.
//
// The layout is llm.c's (github.com/karpathy/llm.c, dev/data/data_common.py), so shards made there are read
// as they stand and ours are read there; what we add sits in header words that those readers ignore.
// A shard is immutable: it appears under its name complete (see dev/data/shard_writer.h) and never changes.
// The parsers take untrusted bytes: any bytes at all give a shard that is safe to read, or an Error.
// Limits: little-endian; token ids below 2^31; tokens themselves are checked where they are read.
#pragma once
#include "llmc/utils.h" // defines: Error, fail, EXIT_*, checked_extent, malloc_check, CHECK, strdup_check
#include <sys/mman.h>

// NAME.bin
//
//   byte   0  +-----------------+
//             | magic           | int32      20240520: 16-bit tokens      20240801: 32-bit tokens
//          4  | version         | int32             1                            7
//          8  | num_tokens32    | int32      token count; -1 where it does not fit and only num_tokens counts
//         12  | flags           | uint32     ShardFlags; from here on llm.c's own files hold zeros
//         16  | vocab_size      | uint32     0: not known
//         20  | eot_id          | int32      the end-of-text token, where flags has SHARD_EOT_FIRST
//         24  | num_documents   | uint64
//         32  | num_tokens      | uint64     0: see num_tokens32
//         40  | tokenizer_hash  | 2 uint64   XXH3-128 of the tokenizer, low half first; 0: not known
//         56  | zero            | uint64
//         64  | source_bytes    | uint64     UTF-8 bytes of the text, for bits per byte; 0: not known
//         72  | payload_hash    | 2 uint64   XXH3-128 of all token bytes, low half first; 0: not known
//         88  | zeros           |
//       1024  +-----------------+
//             | tokens          | uint16 or uint32, num_tokens of them, up to the end of the file
//             +-----------------+
enum { SHARD_HEADER_BYTES = 1024, SHARD_MAX_VOCAB = 1 << 24 };
enum ShardFlags {
    SHARD_HAS_INDEX = 1, // NAME.idx lies beside NAME.bin
    SHARD_EOT_FIRST = 2, // every document begins with the token eot_id
};

typedef struct {
    int32_t magic, version, num_tokens32;
    uint32_t flags, vocab_size;
    int32_t eot_id;
    uint64_t num_documents, num_tokens, tokenizer_hash[2], zero, source_bytes, payload_hash[2];
    uint8_t zeros[SHARD_HEADER_BYTES - 88];
} ShardHeader;

typedef struct {
    int32_t magic, version;
    int token_bytes;
} ShardKind;

static const ShardKind SHARD_KINDS[] = {{20240520, 1, 2}, {20240801, 7, 4}};

typedef struct {
    ShardHeader header; // num_tokens filled in, whichever word it came from
    int token_bytes;    // 2 or 4
    int eot_id;         // -1: not known
    const void* tokens; // header.num_tokens of them, in the mapping
    const void* map;    // the whole file; NULL when parsed from memory
    size_t map_bytes;
    char* path;
} Shard;

// The kind of shard that a header announces; NULL and an Error for anything else.
static inline const ShardKind* shard_kind(const ShardHeader* h, const char* name, Error* err) {
    for (size_t i = 0; i < sizeof SHARD_KINDS / sizeof SHARD_KINDS[0]; i++)
        if (h->magic == SHARD_KINDS[i].magic && h->version == SHARD_KINDS[i].version) return &SHARD_KINDS[i];
    fail(err, EXIT_BAD_DATA,
         "%s is not a token shard: it starts with %d %d instead of 20240520 1 (16-bit tokens) or 20240801 7 "
         "(32-bit tokens); headerless files of other programs go through `corpus convert`",
         name, h->magic, h->version);
    return NULL;
}

// Header and size of a shard in memory. Fills *shard (tokens point into bytes, which must be 4-byte aligned
// and outlive it). `name` is for messages.
static inline bool shard_parse(Shard* shard, const void* bytes, size_t size, const char* name, Error* err) {
    memset(shard, 0, sizeof *shard);
    ShardHeader* h = &shard->header;
    if (size < SHARD_HEADER_BYTES)
        return fail(err, EXIT_BAD_DATA, "%s is %zu bytes: shorter than the %d-byte header of a token shard",
                    name, size, SHARD_HEADER_BYTES);
    memcpy(h, bytes, SHARD_HEADER_BYTES);
    const ShardKind* kind = shard_kind(h, name, err);
    if (kind == NULL) return false;

    if (h->num_tokens32 >= 0 && h->num_tokens == 0) h->num_tokens = (uint64_t)h->num_tokens32;
    if (h->num_tokens32 < -1 || (h->num_tokens32 >= 0 && h->num_tokens != (uint64_t)h->num_tokens32))
        return fail(err, EXIT_BAD_DATA,
                    "%s: the header gives two token counts, %d and %llu; the file is damaged", name,
                    h->num_tokens32, (unsigned long long)h->num_tokens);
    uint64_t expected;
    if (!checked_extent(SHARD_HEADER_BYTES, h->num_tokens, (uint64_t)kind->token_bytes, &expected) ||
        expected != size)
        return fail(err, EXIT_BAD_DATA,
                    "%s is %zu bytes, but its header announces %llu tokens of %d bytes; the file is "
                    "truncated or damaged: write or copy it again",
                    name, size, (unsigned long long)h->num_tokens, kind->token_bytes);
    if ((h->flags & ~(uint32_t)(SHARD_HAS_INDEX | SHARD_EOT_FIRST)) != 0)
        return fail(err, EXIT_BAD_DATA,
                    "%s: unknown header flags 0x%x; it was written by a newer version or is damaged", name,
                    h->flags);
    if (h->vocab_size > SHARD_MAX_VOCAB || (kind->token_bytes == 2 && h->vocab_size > 65536))
        return fail(err, EXIT_BAD_DATA,
                    "%s: vocabulary of %u does not fit %d-byte tokens; the header is damaged", name,
                    h->vocab_size, kind->token_bytes);
    if (h->num_documents > h->num_tokens)
        return fail(err, EXIT_BAD_DATA,
                    "%s: the header announces %llu documents in %llu tokens; it is damaged", name,
                    (unsigned long long)h->num_documents, (unsigned long long)h->num_tokens);
    bool has_eot = (h->flags & SHARD_EOT_FIRST) != 0;
    if (has_eot && (h->eot_id < 0 || (h->vocab_size != 0 && (uint32_t)h->eot_id >= h->vocab_size)))
        return fail(err, EXIT_BAD_DATA,
                    "%s: end-of-text token %d is outside the vocabulary of %u; the header is damaged", name,
                    h->eot_id, h->vocab_size);
    shard->eot_id = has_eot ? h->eot_id : -1;
    shard->token_bytes = kind->token_bytes;
    shard->tokens = (const char*)bytes + SHARD_HEADER_BYTES;
    return true;
}

// Maps a whole regular file; *map is NULL for an empty one.
static inline bool shard_map_file(const char* path, const void** map, size_t* bytes, Error* err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // non-blocking: a FIFO must not hang the open
    struct stat st;
    *map = NULL, *bytes = 0;
    if (fd < 0 || fstat(fd, &st) != 0) {
        fail(err, code_of_open(errno), "cannot open %s: %s", path, strerror(errno));
    } else if (!S_ISREG(st.st_mode)) {
        fail(err, EXIT_NO_INPUT, "%s is not a regular file", path);
    } else if (st.st_size > 0) {
        void* p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        if (p == MAP_FAILED)
            fail(err, EXIT_OS, "cannot map %s into memory: %s", path, strerror(errno));
        else
            *map = p, *bytes = (size_t)st.st_size;
    }
    if (fd >= 0) close(fd);
    return err->code == 0;
}

static inline void shard_close(Shard* shard) {
    if (shard->map != NULL) munmap((void*)shard->map, shard->map_bytes);
    free(shard->path);
    memset(shard, 0, sizeof *shard);
}

// Maps a shard file and checks its header against its size. Close with shard_close.
static inline bool shard_open(Shard* shard, const char* path, Error* err) {
    memset(shard, 0, sizeof *shard);
    const void* map;
    size_t bytes;
    if (!shard_map_file(path, &map, &bytes, err)) return false;
    bool ok = shard_parse(shard, map, bytes, path, err);
    shard->map = map;
    shard->map_bytes = bytes;
    shard->path = strdup_check(path);
    if (!ok) shard_close(shard);
    return ok;
}

// A mapped file that shrinks kills its readers with SIGBUS; asking for its size before each read turns nearly
// all of those deaths into a sentence (what remains is a truncation within the same microsecond).
static inline bool shard_unchanged(const Shard* shard, Error* err) {
    struct stat st;
    if (shard->map == NULL) return true;
    if (stat(shard->path, &st) != 0)
        return fail(err, EXIT_NO_INPUT, "token shard %s went away while it was in use: %s", shard->path,
                    strerror(errno));
    if ((uint64_t)st.st_size != shard->map_bytes)
        return fail(err, EXIT_BAD_DATA,
                    "token shard %s changed from %zu to %lld bytes while it was in use; restore it and "
                    "resume: a shard must not be rewritten during a run",
                    shard->path, shard->map_bytes, (long long)st.st_size);
    return true;
}

static inline uint32_t shard_token(const Shard* shard, uint64_t i) {
    return shard->token_bytes == 2 ? ((const uint16_t*)shard->tokens)[i]
                                   : ((const uint32_t*)shard->tokens)[i];
}

// Widens tokens [first, first + n) into out (n) and returns the largest of them: one pass, vectorised.
// A 32-bit id of 2^31 or more comes out negative; the caller's bound on the largest excludes it.
static inline uint32_t shard_copy(int32_t* restrict out, const Shard* shard, uint64_t first, size_t n) {
    CHECK(first <= shard->header.num_tokens && n <= shard->header.num_tokens - first);
    uint32_t largest = 0;
    if (shard->token_bytes == 2) {
        const uint16_t* tokens = (const uint16_t*)shard->tokens + first;
        for (size_t i = 0; i < n; i++) {
            out[i] = (int32_t)tokens[i];
            largest = tokens[i] > largest ? tokens[i] : largest;
        }
    } else {
        const uint32_t* tokens = (const uint32_t*)shard->tokens + first;
        for (size_t i = 0; i < n; i++) {
            out[i] = (int32_t)tokens[i];
            largest = tokens[i] > largest ? tokens[i] : largest;
        }
    }
    return largest;
}

// ----------------------------------------------------------------------------
// NAME.idx: where each document of NAME.bin ends
//
//   byte 0             8               16            24
//        +-------------+---------------+-------------+-------------+- - -
//        | "PTCIDX1\0" | num_documents | end of      | end of      |  uint64 each, in tokens, exclusive:
//        |             | uint64        | document 0  | document 1  |  document i is [end(i-1), end(i))
//        +-------------+---------------+-------------+-------------+- - -

static const char SHARD_INDEX_MAGIC[8] = {'P', 'T', 'C', 'I', 'D', 'X', '1', '\0'};
enum { SHARD_INDEX_HEADER_BYTES = 16 };

typedef struct {
    uint64_t num_documents;
    const uint64_t* ends;
    const void* map; // NULL when parsed from memory
    size_t map_bytes;
} ShardIndex;

// The index of a shard with these counts; bytes must be 8-byte aligned and outlive *index. Holds afterwards:
// the ends ascend strictly and the last one is num_tokens.
static inline bool shard_index_parse(ShardIndex* index, const void* bytes, size_t size,
                                     uint64_t num_documents, uint64_t num_tokens, const char* name,
                                     Error* err) {
    memset(index, 0, sizeof *index);
    uint64_t count, expected;
    if (size < SHARD_INDEX_HEADER_BYTES || memcmp(bytes, SHARD_INDEX_MAGIC, sizeof SHARD_INDEX_MAGIC) != 0)
        return fail(err, EXIT_BAD_DATA, "%s is not a document index: it does not start with PTCIDX1", name);
    memcpy(&count, (const char*)bytes + sizeof SHARD_INDEX_MAGIC, sizeof count);
    if (!checked_extent(SHARD_INDEX_HEADER_BYTES, count, sizeof(uint64_t), &expected) || expected != size)
        return fail(err, EXIT_BAD_DATA,
                    "%s is %zu bytes, but announces %llu documents; the file is truncated or damaged", name,
                    size, (unsigned long long)count);
    if (count != num_documents)
        return fail(err, EXIT_BAD_DATA,
                    "%s has %llu documents, but its shard %llu; the two do not belong together", name,
                    (unsigned long long)count, (unsigned long long)num_documents);
    const uint64_t* ends = (const uint64_t*)(const void*)((const char*)bytes + SHARD_INDEX_HEADER_BYTES);
    for (uint64_t i = 0, end = 0; i < count; end = ends[i++])
        if (ends[i] <= end)
            return fail(err, EXIT_BAD_DATA,
                        "%s: document %llu ends at token %llu, where it starts at %llu; damaged", name,
                        (unsigned long long)i, (unsigned long long)ends[i], (unsigned long long)end);
    uint64_t last = count != 0 ? ends[count - 1] : 0;
    if (last != num_tokens)
        return fail(err, EXIT_BAD_DATA,
                    "%s ends at token %llu, but its shard at %llu; the two do not belong together", name,
                    (unsigned long long)last, (unsigned long long)num_tokens);
    index->num_documents = count;
    index->ends = ends;
    return true;
}

static inline void shard_index_close(ShardIndex* index) {
    if (index->map != NULL) munmap((void*)index->map, index->map_bytes);
    memset(index, 0, sizeof *index);
}

// "x.bin" -> "x.idx"; other names get ".idx" appended.
static inline bool shard_index_path(char out[PATH_MAX], const char* path, Error* err) {
    size_t n = strlen(path);
    if (n > 4 && strcmp(path + n - 4, ".bin") == 0) n -= 4;
    int written = snprintf(out, PATH_MAX, "%.*s.idx", (int)(n < PATH_MAX ? n : PATH_MAX), path);
    if (written < 0 || written >= PATH_MAX) return fail(err, EXIT_USAGE, "path %s is too long", path);
    return true;
}

// Maps the index that lies beside an open shard; close with shard_index_close.
static inline bool shard_index_open(ShardIndex* index, const Shard* shard, Error* err) {
    char path[PATH_MAX];
    const void* map;
    size_t bytes;
    memset(index, 0, sizeof *index);
    if (!shard_index_path(path, shard->path, err) || !shard_map_file(path, &map, &bytes, err)) return false;
    const ShardHeader* h = &shard->header;
    bool ok = shard_index_parse(index, map, bytes, h->num_documents, h->num_tokens, path, err);
    index->map = map;
    index->map_bytes = bytes;
    if (!ok) shard_index_close(index);
    return ok;
}
