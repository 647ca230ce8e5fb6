// What a training run leaves in its directory for who started it (scripts/train.sbatch):
//   RUN_STATE   `done` or `stopped` (by a signal: go on later), by the first process, behind the last checkpoint
//   FATAL       exit code and reason, where starting again cannot help, by the process that says it
// Exit codes alone do not carry that far: srun returns the highest of all processes, and kills the others when the
// first one ends, with codes that then count. Both files are removed when the next training begins.
#pragma once
#include "llmc/utils.h" // defines: Error, String, replace_file, path_join, on_giving_up

#include <sys/file.h>

static char run_state_directory[PATH_MAX];
static bool run_state_ours; // this run has the directory's lock

static inline bool is_permanent(int code) {
    return code == EXIT_USAGE || code == EXIT_BAD_DATA || code == EXIT_NO_INPUT || code == EXIT_NO_DEVICE ||
           code == EXIT_INTERNAL || code == EXIT_CONFIG;
}

// Another run that has the directory's lock is not to find what ended this one.
static inline bool run_state_taken(void) {
    int fd = run_state_ours ? -1 : open(run_state_directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    bool taken = fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    if (fd >= 0) close(fd);
    return taken;
}

// Where it cannot be written, the exit code has to do.
static inline void write_fatal(int code, const char* reason) {
    char path[PATH_MAX];
    String text = {NULL, 0, 0};
    Error ignored = {0, {0}};
    if (!is_permanent(code) || run_state_taken() || !path_join(path, run_state_directory, "FATAL", &ignored))
        return;
    string_append(&text, "%d %s\n", code, reason);
    replace_file(path, text.data, text.size, &ignored);
    free(text.data);
}

// From here on this process leaves FATAL behind when it gives up.
static inline void run_state_watch(const char* run_dir) {
    snprintf(run_state_directory, sizeof run_state_directory, "%s", run_dir);
    on_giving_up = write_fatal;
}

// By the process that has the run directory's lock.
static inline bool run_state_begin(Error* err) {
    const char* names[] = {"RUN_STATE", "FATAL"};
    char path[PATH_MAX];
    run_state_ours = true;
    for (int i = 0; i < 2; i++) {
        if (!path_join(path, run_state_directory, names[i], err)) return false;
        if (unlink(path) != 0 && errno != ENOENT)
            return fail(err, EXIT_CANNOT_WRITE, "cannot remove %s: %s", path, strerror(errno));
    }
    return true;
}

static inline bool run_state_end(const char* state, Error* err) {
    char path[PATH_MAX], line[32];
    int size = snprintf(line, sizeof line, "%s\n", state);
    return path_join(path, run_state_directory, "RUN_STATE", err) &&
           replace_file(path, line, (size_t)size, err);
}
