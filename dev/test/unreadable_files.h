// Included first: what the code under test reads of some files may fail.
#ifndef UNREADABLE_FILES_H
#define UNREADABLE_FILES_H
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char* unreadable; // files with this in their path give EIO
static inline ssize_t read_or_eio(int fd, void* data, size_t n) {
    char link[32], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = unreadable != NULL ? readlink(link, path, sizeof path - 1) : 0;
    path[length > 0 ? length : 0] = '\0';
    return unreadable != NULL && strstr(path, unreadable) != NULL ? (errno = EIO, -1) : read(fd, data, n);
}
#define read read_or_eio
#endif
