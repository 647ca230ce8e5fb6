// For tests of shards and of what reads them: a folder that goes away, and shards made of short lists.
#include "llmc/utils.h"            // defines: Error, CHECK, write_all, remove_tree
#include "dev/data/shard_writer.h" // defines: ShardWriter, shard_writer_*, shard_publish

static char temp_dir[128];

// NAME in the test's own folder; the last 16 answers stay valid.
static inline const char* temp_path(const char* name) {
    static char paths[16][PATH_MAX];
    static int next;
    next = (next + 1) % 16;
    CHECK(snprintf(paths[next], PATH_MAX, "%s/%s", temp_dir, name) < PATH_MAX);
    return paths[next];
}

static inline int make_temp_dir(void** state) {
    (void)state;
    const char* root = getenv("TMPDIR");
    snprintf(temp_dir, sizeof temp_dir, "%s/test_shards_XXXXXX", root != NULL ? root : "/tmp");
    return mkdtemp(temp_dir) == NULL;
}

static inline int remove_temp_dir(void** state) {
    (void)state;
    Error err = {0, {0}};
    return remove_tree(temp_dir, &err) ? 0 : -1;
}

static inline void write_file(const char* path, const void* bytes, size_t size) {
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    CHECK(fd >= 0 && write_all(fd, bytes, size));
    close(fd);
}

static inline void patch_file(const char* path, off_t at, const void* bytes, size_t size) {
    int fd = open(path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, bytes, size, at) == (ssize_t)size);
    close(fd);
}

// A published shard of one document: tokens first, first + 1, ... modulo vocab_size.
static inline void write_counting_shard(const char* path, int token_bytes, uint32_t vocab_size,
                                        uint32_t first, uint64_t n) {
    ShardWriter w;
    Error err = {0, {0}};
    CHECK(shard_writer_open(&w, path, token_bytes, vocab_size, -1, NULL, &err));
    for (uint64_t i = 0; i < n; i++) {
        uint32_t token = (uint32_t)((first + i) % vocab_size);
        CHECK(shard_writer_tokens(&w, &token, 1, &err));
    }
    shard_writer_end_document(&w, 0);
    CHECK(shard_writer_finish(&w, &err) && shard_publish(path, &err));
}

// A file as llm.c's scripts write it: magic, version, count, zeros. Its payload is a hole: it reads as zeros.
static inline void write_sparse_shard(const char* path, int token_bytes, uint64_t num_tokens) {
    ShardHeader h;
    memset(&h, 0, sizeof h);
    h.magic = token_bytes == 2 ? 20240520 : 20240801;
    h.version = token_bytes == 2 ? 1 : 7;
    h.num_tokens32 = num_tokens <= INT32_MAX ? (int32_t)num_tokens : -1;
    h.num_tokens = num_tokens <= INT32_MAX ? 0 : num_tokens;
    write_file(path, &h, sizeof h);
    CHECK(truncate(path, (off_t)(SHARD_HEADER_BYTES + num_tokens * (uint64_t)token_bytes)) == 0);
}
