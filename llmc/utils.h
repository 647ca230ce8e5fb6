// Errors, exit codes, checked size arithmetic, memory and files: what every other header stands on.
//
// Two kinds of failure, two mechanisms:
//   * the user's (a wrong config, a damaged shard, a full disk): functions return false and fill an Error
//     with one sentence (name, value, rule, remedy) and the exit code that a caller who gives up must use;
//   * our own (a broken invariant): CHECK prints file and line and aborts.
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifdef __cplusplus
#define restrict __restrict__
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "every file format here is little-endian and read in place: a big-endian machine needs byte swaps"
#endif

// ----------------------------------------------------------------------------
// exit codes: sysexits(3), what scripts/ and a scheduler decide by (README.md has the table)

enum ExitCode {
    EXIT_OK = 0,
    EXIT_USAGE = 64,        // the command line
    EXIT_BAD_DATA = 65,     // a damaged or foreign shard, checkpoint or tokenizer
    EXIT_NO_INPUT = 66,     // a file that is not there or cannot be read
    EXIT_NO_DEVICE = 69,    // no GPU that this program can use: driver, device or architecture
    EXIT_INTERNAL = 70,     // an invariant of ours failed, or training diverged (guard)
    EXIT_OS = 71,           // out of memory, no thread, a GPU that fails
    EXIT_CANNOT_WRITE = 73, // an output cannot be created
    EXIT_IO = 74,           // reading or writing failed half-way (disk full, I/O error)
    EXIT_STOPPED = 75,      // stopped by a signal after saving: run again to go on
    EXIT_LOST = 76,         // another process of the run ended or hangs: run again to go on
    EXIT_CONFIG = 78,       // the run config
};

typedef struct {
    int code;       // an ExitCode; 0 while nothing has failed
    char text[960]; // one sentence: what, where, the rule, the remedy
} Error;

// Bytes of somebody else's text that would move a terminal's cursor, or worse, become '?'.
static inline void replace_controls(char* text) {
    for (; *text != '\0'; text++)
        if ((unsigned char)*text < 32 || *text == 127) *text = '?';
}

// Fills err (the first failure wins, later ones are consequences) and returns false, so that callers can
// write `return fail(err, EXIT_BAD_DATA, "...")`.
__attribute__((format(printf, 3, 4))) static inline bool fail(Error* err, int code, const char* format, ...) {
    if (err->code != 0) return false;
    err->code = code;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    replace_controls(err->text);
    return false;
}

// Called with the exit code and the reason before a program that cannot go on ends; NULL: nothing is.
static void (*on_giving_up)(int code, const char* reason) = NULL;

static inline void say_error(const Error* err) {
    fflush(stdout);
    if (on_giving_up != NULL) on_giving_up(err->code, err->text);
    fprintf(stderr, "error: %s\n", err->text);
}

// The end of a program that cannot go on: the sentence on stderr, the code to the caller.
static inline void exit_with(const Error* err) {
    say_error(err);
    exit(err->code);
}

__attribute__((format(printf, 3, 4), noreturn)) static inline void internal_error(const char* file, int line,
                                                                                  const char* format, ...) {
    char text[960];
    va_list args;
    va_start(args, format);
    int n = snprintf(text, sizeof text, "internal error at %s:%d: ", file, line);
    vsnprintf(text + n, sizeof text - (size_t)n, format, args);
    va_end(args);
    fflush(stdout);
    fprintf(stderr, "%s\n", text);
    if (on_giving_up != NULL) on_giving_up(EXIT_INTERNAL, text);
    exit(EXIT_INTERNAL);
}

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) internal_error(__FILE__, __LINE__, "CHECK(%s) failed", #condition);                \
    } while (0)

// ----------------------------------------------------------------------------
// size arithmetic on untrusted numbers: every product or sum of sizes that come from a file goes through
// these; false means that the result does not fit into 64 bits

static inline bool checked_mul(uint64_t a, uint64_t b, uint64_t* out) {
    return !__builtin_mul_overflow(a, b, out);
}
static inline bool checked_add(uint64_t a, uint64_t b, uint64_t* out) {
    return !__builtin_add_overflow(a, b, out);
}
// base + count * size, the shape of every "header, then n records" file
static inline bool checked_extent(uint64_t base, uint64_t count, uint64_t size, uint64_t* out) {
    uint64_t bytes;
    return checked_mul(count, size, &bytes) && checked_add(base, bytes, out);
}

// ----------------------------------------------------------------------------
// memory: sizes here are our own, so running out is the end of the program

static inline void out_of_memory(size_t bytes) {
    Error err = {0, {0}};
    fail(&err, EXIT_OS, "out of memory: cannot allocate %zu bytes", bytes);
    exit_with(&err);
}

static inline void* malloc_check(size_t bytes) {
    void* p = malloc(bytes != 0 ? bytes : 1);
    if (p == NULL) out_of_memory(bytes);
    return p;
}

static inline void* calloc_check(size_t count, size_t size) {
    size_t bytes;
    CHECK(!__builtin_mul_overflow(count, size, &bytes));
    return memset(malloc_check(bytes), 0, bytes);
}

static inline void* realloc_check(void* old, size_t bytes) {
    void* p = realloc(old, bytes != 0 ? bytes : 1);
    if (p == NULL) out_of_memory(bytes);
    return p;
}

static inline char* strdup_check(const char* s) {
    size_t n = strlen(s) + 1;
    return (char*)memcpy(malloc_check(n), s, n);
}

// Zeroed memory that starts on a cache line; free() releases it. Large pages are asked for: the big arrays
// are walked from end to end, and page faults would be a visible part of the first step.
static inline void* aligned_zeros(size_t bytes) {
    size_t alignment = bytes >= ((size_t)1 << 22) ? (size_t)1 << 21 : 64;
    void* p = NULL;
    if (posix_memalign(&p, alignment, bytes != 0 ? bytes : 1) != 0) out_of_memory(bytes);
    madvise(p, bytes, MADV_HUGEPAGE);
    return memset(p, 0, bytes);
}

// A string that grows: JSON that we write, messages, decoded text. Start from {0}; free(s.data) at the end.
typedef struct {
    char* data; // NUL-terminated once anything was appended
    size_t size, capacity;
} String;

static inline void string_append_bytes(String* s, const void* bytes, size_t n) {
    if (s->size + n + 1 > s->capacity) {
        s->capacity = (s->size + n + 1) * 2;
        s->data = (char*)realloc_check(s->data, s->capacity);
    }
    if (n != 0) memcpy(s->data + s->size, bytes, n);
    s->size += n;
    s->data[s->size] = '\0';
}

__attribute__((format(printf, 2, 3))) static inline void string_append(String* s, const char* format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    CHECK(n >= 0);
    char* buffer = (char*)malloc_check((size_t)n + 1);
    vsnprintf(buffer, (size_t)n + 1, format, again);
    va_end(again);
    string_append_bytes(s, buffer, (size_t)n);
    free(buffer);
}

static inline int compare_doubles(const void* a, const void* b) {
    double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}

// Sorts the values, the least first; returns the median, of an even number the upper one.
static inline double sort_for_median(double* values, int count) {
    qsort(values, (size_t)count, sizeof *values, compare_doubles);
    return values[count / 2];
}

// ----------------------------------------------------------------------------
// names that nothing else has

enum { ID_DIGITS = 32 };

static inline bool draw_id(char id[ID_DIGITS + 1], Error* err) {
    unsigned char bytes[ID_DIGITS / 2];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes)
        return fail(err, EXIT_OS, "cannot draw random numbers: %s", strerror(errno));
    for (int i = 0; i < ID_DIGITS / 2; i++) snprintf(id + 2 * i, 3, "%02x", bytes[i]);
    return true;
}

// ----------------------------------------------------------------------------
// time and files

static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// "DIR/NAME" into out[PATH_MAX]; too long a path is the user's error.
static inline bool path_join(char out[PATH_MAX], const char* dir, const char* name, Error* err) {
    int n = snprintf(out, PATH_MAX, "%s/%s", dir, name);
    if (n < 0 || n >= PATH_MAX) return fail(err, EXIT_USAGE, "path %s/%s is too long", dir, name);
    return true;
}

// Creates a directory and its missing parents, as `mkdir -p` does.
static inline bool make_directories(const char* path, Error* err) {
    char partial[PATH_MAX];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof partial) return fail(err, EXIT_USAGE, "bad directory name '%s'", path);
    memcpy(partial, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (partial[i] != '/' && partial[i] != '\0') continue;
        char was = partial[i];
        partial[i] = '\0';
        struct stat st;
        if (mkdir(partial, 0777) != 0 && errno != EEXIST)
            return fail(err, EXIT_CANNOT_WRITE, "cannot create directory %s: %s", partial, strerror(errno));
        if (stat(partial, &st) == 0 && !S_ISDIR(st.st_mode))
            return fail(err, EXIT_CANNOT_WRITE, "cannot create directory %s: a file of that name is there",
                        partial);
        partial[i] = was;
    }
    return true;
}

static inline bool write_all(int fd, const void* data, size_t bytes) {
    const char* p = (const char*)data;
    while (bytes > 0) {
        ssize_t n = write(fd, p, bytes < (1u << 30) ? bytes : (1u << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        p += n, bytes -= (size_t)n;
    }
    return true;
}

// What it means that a file cannot be opened: these stay so; a disk or server that failed may come back.
static inline int code_of_open(int number) {
    static const int lasting[] = {ENOENT, ENOTDIR, EISDIR, EACCES, EPERM,       ELOOP,
                                  ENXIO,  ENODEV,  EMFILE, ENFILE, ENAMETOOLONG};
    for (size_t i = 0; i < sizeof lasting / sizeof lasting[0]; i++)
        if (number == lasting[i]) return EXIT_NO_INPUT;
    return EXIT_IO;
}

// The whole of a regular file of at most max_bytes, with a NUL behind its last byte; NULL on failure.
// Caller frees.
static inline char* read_file(const char* path, size_t max_bytes, size_t* size, Error* err) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // non-blocking: a FIFO must not hang the open
    struct stat st;
    if (fd < 0 || fstat(fd, &st) != 0) {
        fail(err, code_of_open(errno), "cannot open %s: %s", path, strerror(errno));
        if (fd >= 0) close(fd);
        return NULL;
    }
    if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > max_bytes) {
        if (!S_ISREG(st.st_mode))
            fail(err, EXIT_NO_INPUT, "%s is not a regular file", path);
        else
            fail(err, EXIT_BAD_DATA, "%s is %lld bytes; at most %zu are accepted here", path,
                 (long long)st.st_size, max_bytes);
        close(fd);
        return NULL;
    }
    char* data = (char*)malloc_check((size_t)st.st_size + 1);
    size_t got = 0;
    while (got < (size_t)st.st_size) {
        ssize_t n = read(fd, data + got, (size_t)st.st_size - got);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) break;
        got += (size_t)n;
    }
    close(fd);
    if (got != (size_t)st.st_size) {
        fail(err, EXIT_IO, "%s: read %zu of %lld bytes: %s", path, got, (long long)st.st_size,
             strerror(errno));
        free(data);
        return NULL;
    }
    data[got] = '\0';
    *size = got;
    return data;
}

// Writes a whole file so that a reader, or a crash, sees the old content or the new, never a part.
static inline bool replace_file(const char* path, const void* data, size_t size, Error* err) {
    char temporary[PATH_MAX];
    if (snprintf(temporary, sizeof temporary, "%s.tmp", path) >= (int)sizeof temporary)
        return fail(err, EXIT_USAGE, "path %s is too long", path);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", temporary, strerror(errno));
    bool ok = write_all(fd, data, size) && fsync(fd) == 0;
    ok = close(fd) == 0 && ok;
    if (!ok || rename(temporary, path) != 0) {
        int reason = errno;
        unlink(temporary);
        return fail(err, EXIT_IO, "cannot write %s: %s", path, strerror(reason));
    }
    return true;
}

// A directory and all that is in it; none is one, too. Other processes may do the same: what is gone is gone.
static inline bool remove_tree(const char* path, Error* err) {
    DIR* dir = opendir(path);
    bool ok = dir != NULL || errno == ENOENT || unlink(path) == 0;
    for (struct dirent* entry; ok && dir != NULL && (entry = readdir(dir)) != NULL;) {
        char inside[PATH_MAX];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        ok = path_join(inside, path, entry->d_name, err);
        if (ok && unlink(inside) != 0 && errno == EISDIR) ok = remove_tree(inside, err);
    }
    if (dir != NULL) closedir(dir);
    if (err->code != 0) return false;
    return (ok && (dir == NULL || rmdir(path) == 0 || errno == ENOENT)) ||
           fail(err, EXIT_CANNOT_WRITE, "cannot remove %s: %s", path, strerror(errno));
}
