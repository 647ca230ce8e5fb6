// The fast tier: checkpoints on a disk of each node, from where they are copied to the run's directory while training
// goes on (saves.h).
//
//     FAST_DIR/                       checkpoint.fast_dir; it must be there: what is made where no disk is mounted fills
//       0123456789abcdef.../          the run's id, in RUN_DIR/run_id            the disk that is
//         rank_00003-of-00008/        of one process: no other one writes or reads here, so that nobody minds whether
//           step_00001000/            processes share the disk
//             model-*.safetensors  optim-*.safetensors      the files that it writes of a checkpoint, as they are there
//             config.json  generation_config.json  state.json
//             save_id                 a number that all processes' parts of this save have
//             manifest.json
//
// A save and what is left of one that was killed are as in checkpoint.h. A step counts if every process has its part of
// the same save, and is loaded if every part verifies. Whatever is wrong with the tier, the durable checkpoints do.
#pragma once
#include "llmc/checkpoint.h" // defines: CheckpointData, checkpoint_save, checkpoint_read, checkpoint_load_above
#include <limits.h>
#include <sys/random.h>

enum { FAST_KEEP = 2 }; // newest ones; the one that is being copied stays besides, and one is being written

typedef struct {
    char base[PATH_MAX], run[PATH_MAX];
    char directory[PATH_MAX]; // this process's; "": there is no fast tier
    // by the last load: it was from here; there is no durable one of that step; what else is whole here, newest first
    bool loaded, to_copy;
    uint64_t older[2 * FAST_KEEP];
    int num_older;
} FastTier;

static inline bool draw_id(char id[ID_DIGITS + 1], Error* err) {
    unsigned char bytes[ID_DIGITS / 2];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes)
        return fail(err, EXIT_OS, "cannot draw random numbers: %s", strerror(errno));
    for (int i = 0; i < ID_DIGITS / 2; i++) snprintf(id + 2 * i, 3, "%02x", bytes[i]);
    return true;
}

// ----------------------------------------------------------------------------
// whose checkpoints they are

// RUN_DIR/run_id: "ID PATH", PATH that of RUN_DIR. Where it is missing, or came with a copy of another run's directory,
// a new one is made.
static inline bool run_id(const char* run_dir, char id[ID_DIGITS + 1], Error* err) {
    char path[PATH_MAX], real[PATH_MAX], expected[PATH_MAX + ID_DIGITS + 4];
    size_t size;
    Error why = {0, {0}};
    if (!path_join(path, run_dir, "run_id", err)) return false;
    if (realpath(run_dir, real) == NULL)
        return fail(err, EXIT_CANNOT_WRITE, "cannot resolve %s: %s", run_dir, strerror(errno));
    bool missing = access(path, F_OK) != 0 && errno == ENOENT;
    char* text = missing ? NULL : read_file(path, sizeof expected, &size, &why);
    if (!missing && text == NULL)
        return fail(err, why.code, "%s; remove it to give up what checkpoint.fast_dir has", why.text);
    snprintf(id, ID_DIGITS + 1, "%s", text != NULL ? text : "");
    snprintf(expected, sizeof expected, "%s %s\n", id, real);
    bool ours = text != NULL && strspn(id, "0123456789abcdef") == ID_DIGITS && strcmp(text, expected) == 0;
    if (text != NULL && !ours)
        fprintf(stderr, "note: %s is not of this directory: what a fast tier has by that id is not used\n",
                path);
    free(text);
    if (ours) return true;
    if (!draw_id(id, err)) return false;
    size = (size_t)snprintf(expected, sizeof expected, "%s %s\n", id, real);
    return replace_file(path, expected, size, err) && directory_sync(run_dir, err);
}

// A directory of the durable checkpoints is no place for it: those are removed when newer ones are there.
static inline bool fast_is_elsewhere(const char* fast_dir, const char* run_dir, Error* err) {
    char durable[PATH_MAX], whole[PATH_MAX];
    if (!path_join(durable, run_dir, "checkpoints", err)) return false;
    char *fast = realpath(fast_dir, NULL), *kept = realpath(durable, whole);
    size_t n = kept != NULL ? strlen(kept) : 0;
    bool inside =
        fast != NULL && kept != NULL && strncmp(fast, kept, n) == 0 && (fast[n] == '/' || fast[n] == '\0');
    free(fast);
    return !inside ||
           fail(err, EXIT_CONFIG,
                "checkpoint.fast_dir, %s, is in %s, from which the run removes old checkpoints: name a "
                "directory on a disk of the node",
                fast_dir, durable);
}

// Where this process's checkpoints are. All processes call it, and fail together.
static inline bool fast_open(FastTier* tier, const char* fast_dir, const char* run_dir, Control* control,
                             Error* err) {
    char id[ID_DIGITS + 1] = "", name[64];
    snprintf(name, sizeof name, "rank_%05d-of-%05d", control->rank, control->size);
    if (control->rank == 0 && fast_is_elsewhere(fast_dir, run_dir, err)) run_id(run_dir, id, err);
    snprintf(tier->base, sizeof tier->base, "%s", fast_dir);
    return control_agree(control, err) && control_broadcast(control, id, sizeof id, err) &&
           path_join(tier->run, fast_dir, id, err) && path_join(tier->directory, tier->run, name, err);
}

// A checkpoint was written without a tier: whatever one has by this run's id is of a past that the run did not go on from.
static inline void fast_abandon(const char* run_dir) {
    char path[PATH_MAX];
    Error ignored = {0, {0}};
    if (path_join(path, run_dir, "run_id", &ignored) && unlink(path) == 0) directory_sync(run_dir, &ignored);
}

// ----------------------------------------------------------------------------
// saving

static inline bool fast_make_directory(const char* parent, const char* path, Error* err) {
    if (mkdir(path, 0777) == 0) return directory_sync(parent, err);
    return errno == EEXIST || fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", path, strerror(errno));
}

// Does anything on this node belong to another number of processes? remove: not any more.
static inline bool fast_of_others(const FastTier* tier, bool remove) {
    DIR* dir = opendir(tier->run);
    const char* own = strstr(path_file_name(tier->directory), "-of-");
    bool others = false;
    for (struct dirent* entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        const char* of = strstr(entry->d_name, "-of-");
        char path[PATH_MAX];
        Error ignored = {0, {0}};
        StepList list = {NULL, 0, 0};
        if (of == NULL || strcmp(of, own) == 0) continue;
        others = true;
        if (!remove || !path_join(path, tier->run, entry->d_name, &ignored)) continue;
        steps_list(path, true, &list,
                   &ignored); // other processes of this node do the same: what is gone is gone
        for (int i = 0; i < list.count; i++) checkpoint_remove(path, list.steps[i], &ignored);
        rmdir(path);
        free(list.steps);
    }
    if (dir != NULL) closedir(dir);
    return others;
}

// What is newer than the step just saved is of a past that the run did not go on from.
static inline bool fast_prune(const FastTier* tier, uint64_t saved, uint64_t copied, Error* err) {
    StepList list;
    bool ok = steps_list(tier->directory, false, &list, err);
    for (int i = 0, kept = 0; ok && i < list.count; i++) {
        uint64_t step = list.steps[i];
        if (step <= saved && (kept++ < FAST_KEEP || step == copied)) continue;
        ok = checkpoint_remove(tier->directory, step, err);
    }
    free(list.steps);
    return ok;
}

// Every process saves its part; data->part is *part. copied: a step that stays.
static inline bool fast_save(const FastTier* tier, const CheckpointData* data, CheckpointPart* part,
                             uint64_t copied, Error* err) {
    Error warning = {0, {0}};
    if (access(tier->base, F_OK) != 0)
        fail(err, EXIT_CANNOT_WRITE, "checkpoint.fast_dir, %s, is not there: is its disk mounted?",
             tier->base);
    else if (fast_make_directory(tier->base, tier->run, err))
        fast_make_directory(tier->run, tier->directory, err);
    if (err->code == 0 && data->control->rank == 0) draw_id(part->id, err);
    part->alone = true;
    bool ok = checkpoint_agree(data, err) &&
              control_broadcast(data->control, part->id, sizeof part->id, err) &&
              checkpoint_save(tier->directory, data, INT_MAX, 0, err);
    // That some process has its part is of no use, and each failure would leave one more. Where the answer of the others
    // is missing, all may have theirs.
    if (!ok && err->code != EXIT_LOST) checkpoint_remove(tier->directory, data->state.step, &warning);
    if (!ok) return false;
    if (!fast_prune(tier, data->state.step, copied, &warning))
        fprintf(stderr, "warning: old checkpoints stay: %s\n", warning.text);
    fast_of_others(tier, true);
    return true;
}

// ----------------------------------------------------------------------------
// loading

// The steps that all processes have, newest first; on all of them. Caller frees .steps, also after a failure.
static inline bool fast_steps(const FastTier* tier, const CheckpointData* data, StepList* list, Error* err) {
    String mine = {NULL, 0, 0}, all = {NULL, 0, 0};
    Error why = {0, {0}};
    if (!steps_list(tier->directory, true, list, &why)) {
        fprintf(stderr, "warning: checkpoint.fast_dir is not used: %s\n", why.text);
        list->count = 0;
    }
    string_append(&mine, "%s", "");
    for (int i = 0; i < list->count; i++) string_append(&mine, " %llu ", (unsigned long long)list->steps[i]);
    bool ok = control_gather_text(data->control, mine.data, &all, err), first = data->control->rank == 0;
    int common = 0, size = data->control->size;
    for (int i = 0; ok && first && i < list->count; i++) {
        char step[32];
        int have = 0;
        snprintf(step, sizeof step, " %llu ", (unsigned long long)list->steps[i]);
        for (const char* at = all.data; (at = strstr(at, step)) != NULL; at++) have++;
        if (have == size) list->steps[common++] = list->steps[i];
    }
    if (first) list->count = common;
    uint64_t newest = common > 0 ? list->steps[0] : 0, lost = 0;
    for (char *at = all.data, *end; ok && first && at != NULL && at[0] != '\0'; at = end) {
        uint64_t step = strtoull(at, &end, 10);
        if (end == at) break;
        if (step > lost) lost = step;
    }
    if (lost > newest)
        fprintf(stderr, "note: step %llu is not in checkpoint.fast_dir of every process, and is not used\n",
                (unsigned long long)lost);
    if (first && fast_of_others(tier, false))
        fprintf(stderr,
                "note: %s has checkpoints of another number of processes, which are not used and go with the "
                "first save\n",
                tier->run);
    free(mine.data), free(all.data);
    return ok && steps_share(data, list, err);
}

// One step, by all processes together: none has it unless each could read its part, and all parts are of one save.
static inline bool fast_read(const FastTier* tier, uint64_t step, CheckpointData* into, Error* err) {
    static const CheckpointPart part = {true, {0}, {0}};
    char path[PATH_MAX], file[PATH_MAX], id[ID_DIGITS + 1] = "", first[ID_DIGITS + 1] = "";
    size_t size;
    Error lost = {0, {0}};
    CheckpointData mine = *into;
    mine.part = &part;
    bool ok = step_path(path, tier->directory, step, "", err) && path_join(file, path, save_id_name, err) &&
              checkpoint_read(path, &mine, err);
    char* text = ok ? read_file(file, ID_DIGITS + 1, &size, err) : NULL;
    if (text != NULL) snprintf(id, sizeof id, "%s", text);
    free(text);
    memcpy(first, id, sizeof id);
    if (!control_broadcast(into->control, first, sizeof first, &lost))
        return fail(err, lost.code, "%s", lost.text);
    if (ok && mine.state.step != step)
        fail(err, EXIT_BAD_DATA, "%s holds step %llu", path, (unsigned long long)mine.state.step);
    else if (ok && memcmp(first, id, sizeof id) != 0)
        fail(err, EXIT_BAD_DATA, "%s is of another save than what the first process has", path);
    if (!checkpoint_agree(into, err)) return false;
    into->state = mine.state;
    return true;
}

// The newest checkpoint of both tiers that verifies in all processes, the fast one where both have it: as
// checkpoint_load_newest says. What cannot be read here is named, and removed if it is damaged: older ones do, or the
// durable ones.
static inline bool fast_load_newest(FastTier* tier, const char* checkpoints_dir, CheckpointData* into,
                                    bool* found, Error* err) {
    StepList list;
    char path[PATH_MAX];
    bool ok = fast_steps(tier, into, &list, err);
    *found = tier->loaded = tier->to_copy = false;
    for (int i = 0; ok && !*found && i <= list.count; i++) {
        Error why = {0, {0}}, ignored = {0, {0}};
        bool none = i == list.count;
        ok = checkpoint_load_above(checkpoints_dir, into, none ? -1 : (int64_t)list.steps[i], found, err);
        if (!ok || *found || none) break;
        *found = tier->loaded = fast_read(tier, list.steps[i], into, &why);
        if (*found && into->control->rank == 0) checkpoints_pass_over(checkpoints_dir, list.steps[i]);
        if (*found) break;
        bool damaged = why.code == EXIT_BAD_DATA, unread = why.code == EXIT_IO || why.code == EXIT_NO_INPUT;
        if (!damaged && !unread) {
            ok = fail(err, why.code, "%s", why.text);
            break;
        }
        if (into->control->rank == 0)
            fprintf(stderr, "warning: step %llu of checkpoint.fast_dir cannot be used%s: %s\n",
                    (unsigned long long)list.steps[i], damaged ? " and is removed" : "", why.text);
        if (damaged) checkpoint_remove(tier->directory, list.steps[i], &ignored);
    }
    tier->num_older = 0;
    for (int i = 0; i < list.count && tier->num_older < 2 * FAST_KEEP; i++)
        if (list.steps[i] < into->state.step) tier->older[tier->num_older++] = list.steps[i];
    free(list.steps);
    if (!ok || !tier->loaded) return ok;
    tier->to_copy = !step_path(path, checkpoints_dir, into->state.step, "", err) || access(path, F_OK) != 0;
    return control_broadcast(into->control, &tier->to_copy, sizeof tier->to_copy, err);
}
