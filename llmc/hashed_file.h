// Files that must survive: written or read once, from front to back, hashed on the way.
//
// Writing: the hash is taken from memory, before the bytes touch a disk, so that a damage anywhere behind
// the write() is found by whoever reads. Every write, fsync and close is checked; after a failed fsync the
// file is given up, never synced again (the kernel may have dropped the dirty pages and call them clean).
// Reading: the bytes that are used are the bytes that were hashed; there is no second look at the file.
// The hash is XXH3-128 (https://xxhash.com): it finds accidents, it does not stop a forger.
#pragma once
#include "llmc/utils.h" // defines: Error, fail, write_all, path_join
#include <dirent.h>
#include <sys/statvfs.h>
#include <xxhash.h>

// What is known of a finished file.
typedef struct {
    char name[128]; // plain: no directory
    uint64_t size;  // bytes
    XXH128_hash_t hash;
} FileRecord;

typedef struct {
    int fd;
    char path[PATH_MAX];
    const FileRecord* expected; // reading: what the file must be; NULL when nothing is known of it
    uint64_t file_size;         // reading: of the whole file
    uint64_t done;              // bytes written or read so far
    XXH3_state_t* hash;
} HashedFile;

// Hashing and copying alternate in pieces that stay in the second-level cache.
enum { HASH_PIECE = 256 * 1024 };

static inline size_t hash_piece(uint64_t left) {
    return left < HASH_PIECE ? (size_t)left : (size_t)HASH_PIECE;
}

static inline const char* path_file_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

static inline void hashed_start(HashedFile* f, int fd) {
    f->fd = fd;
    f->expected = NULL;
    f->file_size = f->done = 0;
    f->hash = XXH3_createState();
    CHECK(f->hash != NULL);
    XXH3_128bits_reset(f->hash);
}

// Releases what is open; allowed at any time after hashed_create or hashed_open, and twice.
static inline void hashed_close(HashedFile* f) {
    if (f->fd >= 0) close(f->fd);
    f->fd = -1;
    XXH3_freeState(f->hash);
    f->hash = NULL;
}

// ----------------------------------------------------------------------------
// writing

// Creates dir/name, which must not exist, not even as a link.
static inline bool hashed_create(HashedFile* f, const char* dir, const char* name, Error* err) {
    f->fd = -1, f->hash = NULL;
    if (!path_join(f->path, dir, name, err)) return false;
    int fd = open(f->path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (fd < 0) return fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", f->path, strerror(errno));
    hashed_start(f, fd);
    return true;
}

static inline bool hashed_write(HashedFile* f, const void* data, size_t bytes, Error* err) {
    const char* p = (const char*)data;
    for (size_t at = 0, n; at < bytes; at += n) {
        n = hash_piece(bytes - at);
        XXH3_128bits_update(f->hash, p + at, n);
        if (!write_all(f->fd, p + at, n))
            return fail(err, EXIT_IO, "cannot write %s at byte %llu: %s", f->path,
                        (unsigned long long)f->done, strerror(errno));
        f->done += n;
    }
    return true;
}

// Makes the file durable and closes it; the record says what was written. The file's name becomes durable
// only when its directory is synced too.
static inline bool hashed_finish(HashedFile* f, FileRecord* record, Error* err) {
    const char* name = path_file_name(f->path);
    CHECK(strlen(name) < sizeof record->name);
    memset(record, 0, sizeof *record);
    memcpy(record->name, name, strlen(name));
    record->size = f->done;
    record->hash = XXH3_128bits_digest(f->hash);
    bool synced = fsync(f->fd) == 0;
    int why = errno;
    bool closed = close(f->fd) == 0; // the descriptor is gone either way
    if (synced) why = errno;
    f->fd = -1;
    if (!synced || !closed)
        return fail(err, EXIT_IO, "cannot %s %s: %s", synced ? "close" : "sync", f->path, strerror(why));
    return true;
}

// ----------------------------------------------------------------------------
// reading

// Opens dir/name. With a record, the file must have its size and be no link; without one (another program's
// file, whose directory may be made of links) any regular file will do.
static inline bool hashed_open(HashedFile* f, const char* dir, const char* name, const FileRecord* expected,
                               Error* err) {
    f->fd = -1, f->hash = NULL;
    if (!path_join(f->path, dir, name, err)) return false;
    // Without O_NONBLOCK, opening a FIFO would wait for a writer.
    int fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (expected != NULL ? O_NOFOLLOW : 0));
    if (fd < 0) {
        bool damage = errno == ELOOP || (errno == ENOENT && expected != NULL);
        return fail(err, damage ? EXIT_BAD_DATA : code_of_open(errno), "cannot open %s: %s", f->path,
                    strerror(errno));
    }
    hashed_start(f, fd);
    struct stat st;
    if (fstat(fd, &st) != 0) return fail(err, EXIT_IO, "cannot stat %s: %s", f->path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return fail(err, EXIT_BAD_DATA, "%s is not a regular file", f->path);
    f->expected = expected;
    f->file_size = (uint64_t)st.st_size;
    if (expected != NULL && f->file_size != expected->size)
        return fail(err, EXIT_BAD_DATA, "%s is %llu bytes; its manifest says %llu", f->path,
                    (unsigned long long)f->file_size, (unsigned long long)expected->size);
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    return true;
}

static inline bool hashed_read(HashedFile* f, void* data, size_t bytes, Error* err) {
    char* p = (char*)data;
    for (size_t at = 0; at < bytes;) {
        ssize_t n = read(f->fd, p + at, hash_piece(bytes - at));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0)
            return fail(err, EXIT_IO, "cannot read %s at byte %llu: %s", f->path, (unsigned long long)f->done,
                        strerror(errno));
        if (n == 0)
            return fail(err, EXIT_BAD_DATA, "%s ends at byte %llu, before its data does", f->path,
                        (unsigned long long)f->done);
        XXH3_128bits_update(f->hash, p + at, (size_t)n);
        at += (size_t)n, f->done += (size_t)n;
    }
    return true;
}

// After the last byte: the hash is the record's. Nothing read before may be used unless this holds.
static inline bool hashed_verify(HashedFile* f, Error* err) {
    if (f->expected == NULL) return true;
    if (f->done != f->expected->size || !XXH128_isEqual(XXH3_128bits_digest(f->hash), f->expected->hash))
        return fail(err, EXIT_BAD_DATA, "%s is damaged: its hash is not the one in its manifest", f->path);
    return true;
}

// Bytes that only their hash is wanted of.
static inline bool hashed_skip(HashedFile* f, uint64_t bytes, char scratch[HASH_PIECE], Error* err) {
    for (uint64_t n; bytes > 0; bytes -= n) {
        n = hash_piece(bytes);
        if (!hashed_read(f, scratch, (size_t)n, err)) return false;
    }
    return true;
}

// The whole file against its record.
static inline bool file_verify(const char* dir, const FileRecord* expected, Error* err) {
    char* scratch = (char*)malloc_check(HASH_PIECE);
    HashedFile f;
    bool ok = hashed_open(&f, dir, expected->name, expected, err) &&
              hashed_skip(&f, f.file_size, scratch, err) && hashed_verify(&f, err);
    hashed_close(&f);
    free(scratch);
    return ok;
}

// ----------------------------------------------------------------------------
// directories

// Makes the names in a directory durable.
static inline bool directory_sync(const char* path, Error* err) {
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool ok = fd >= 0 && fsync(fd) == 0;
    int why = errno;
    if (fd >= 0 && close(fd) != 0 && ok) ok = false, why = errno;
    return ok || fail(err, EXIT_IO, "cannot sync directory %s: %s", path, strerror(why));
}

// Removes a directory and the files in it. Ours hold no directories: one that does is not ours and stays.
static inline bool directory_remove(const char* path, Error* err) {
    DIR* dir = opendir(path);
    if (dir == NULL) return fail(err, EXIT_IO, "cannot open directory %s: %s", path, strerror(errno));
    bool ok = true;
    for (struct dirent* entry; ok && (entry = readdir(dir)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (unlinkat(dirfd(dir), entry->d_name, 0) != 0 && errno != ENOENT)
            ok = fail(err, EXIT_IO, "cannot remove %s/%s: %s", path, entry->d_name, strerror(errno));
    }
    closedir(dir);
    if (ok && rmdir(path) != 0) ok = fail(err, EXIT_IO, "cannot remove %s: %s", path, strerror(errno));
    return ok;
}

// Whether `bytes` more fit where path is; false fills err. A filesystem that does not tell is believed.
static inline bool free_space_check(const char* path, uint64_t bytes, Error* err) {
    struct statvfs fs;
    uint64_t available;
    if (statvfs(path, &fs) != 0) return fail(err, EXIT_IO, "cannot stat %s: %s", path, strerror(errno));
    if (fs.f_blocks == 0 || !checked_mul(fs.f_bavail, fs.f_frsize, &available) || available >= bytes)
        return true;
    return fail(err, EXIT_IO, "%s has %.3f GB free and %.3f GB are needed: free some space", path,
                (double)available * 1e-9, (double)bytes * 1e-9);
}
