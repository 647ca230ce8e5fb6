// The fast tier: checkpoints on a disk of each node, from where they are copied to the run's directory while training
// goes on (saves.h).
//
//     FAST_DIR/                       checkpoint.fast_dir; it must be there: what is made where no disk is mounted fills
//       0123456789abcdef.../          the run's id, in RUN_DIR/run_id            the disk that is
//         fedcba9876543210.../        the run's past, there as well (run_identity.h)
//           rank_00003-of-00008/      of one process: no other one writes or reads here, so that nobody minds whether
//             step_00001000/          processes share the disk
//               model-*.safetensors  optim-*.safetensors    the files that it writes of a checkpoint, as they are there
//               config.json  generation_config.json  state.json
//               save_id               a number that all processes' parts of this save have
//               manifest.json
//
// A save and what is left of one that was killed are as in checkpoint.h. A step counts if every process has its part of
// the same save, and is loaded if every part verifies. Whatever is wrong with the tier, the durable checkpoints do.
//
// A run that goes on from a step here keeps its past, and takes away what is newer. One that goes on from elsewhere
// begins another past: no part by the old name is ever loaded again, on whatever node it comes back, and the first save
// on a node removes what is there by other names.
#pragma once
#include "llmc/checkpoint.h" // defines: CheckpointData, checkpoint_save, checkpoint_read, checkpoint_load_above
#include "llmc/run_identity.h" // defines: RunIdentity, run_identity_new_past

enum { FAST_KEEP = 2 }; // newest ones; the one that is being copied stays besides, and one is being written

typedef struct {
    char base[PATH_MAX], run[PATH_MAX], past[PATH_MAX]; // FAST_DIR, FAST_DIR/ID, FAST_DIR/ID/PAST
    char directory[PATH_MAX];                           // this process's; "": there is no fast tier
    // by the last load: it was from here; there is no durable one of that step; what else is whole here, newest first
    bool loaded, to_copy;
    uint64_t older[2 * FAST_KEEP];
    int num_older;
} FastTier;

// ----------------------------------------------------------------------------
// whose checkpoints they are

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

// Where this process's checkpoints of the run's past are.
static inline bool fast_place(FastTier* tier, const RunIdentity* identity, const Control* control,
                              Error* err) {
    char name[64];
    snprintf(name, sizeof name, "rank_%05d-of-%05d", control->rank, control->size);
    return path_join(tier->run, tier->base, identity->id, err) &&
           path_join(tier->past, tier->run, identity->past, err) &&
           path_join(tier->directory, tier->past, name, err);
}

// All processes call it, and fail together.
static inline bool fast_open(FastTier* tier, const char* fast_dir, const RunIdentity* identity,
                             Control* control, Error* err) {
    if (control->rank == 0) fast_is_elsewhere(fast_dir, identity->directory, err);
    if (identity->foreign)
        fprintf(stderr,
                "note: %s/run_id was not of this directory: what a fast tier has by that id is not used\n",
                identity->directory);
    snprintf(tier->base, sizeof tier->base, "%s", fast_dir);
    return control_agree(control, err) && fast_place(tier, identity, control, err);
}

// Has this node anything of another past of the run? remove: not any more.
static inline bool fast_other_pasts(const FastTier* tier, bool remove) {
    DIR* dir = opendir(tier->run);
    const char* own = path_file_name(tier->past);
    bool others = false;
    for (struct dirent* entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        char path[PATH_MAX];
        Error ignored = {0, {0}};
        if (strspn(entry->d_name, "0123456789abcdef") != ID_DIGITS || strcmp(entry->d_name, own) == 0)
            continue;
        others = true;
        if (remove && path_join(path, tier->run, entry->d_name, &ignored)) remove_tree(path, &ignored);
    }
    if (dir != NULL) closedir(dir);
    return others;
}

// All processes, where the run does not go on from the tier: whatever one has, here or on nodes that the run is not on
// now, is of a past that is given up. Nothing is trained before the new one has its name in RUN_DIR.
static inline bool fast_give_up(FastTier* tier, RunIdentity* identity, Control* control, Error* err) {
    if (!run_identity_new_past(identity, control, err)) return false;
    if (tier->directory[0] == '\0') return true;
    if (!fast_place(tier, identity, control, err)) return false;
    if (control->rank == 0 && fast_other_pasts(tier, false))
        fprintf(
            stderr,
            "note: %s has checkpoints that the run does not go on from: older ones, or of another number of "
            "processes, or not in every process; they are given up\n",
            tier->run);
    return true;
}

// ----------------------------------------------------------------------------
// saving

static inline bool fast_make_directory(const char* parent, const char* path, Error* err) {
    if (mkdir(path, 0777) == 0) return directory_sync(parent, err);
    return errno == EEXIST || fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", path, strerror(errno));
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
    else if (fast_make_directory(tier->base, tier->run, err) &&
             fast_make_directory(tier->run, tier->past, err))
        fast_make_directory(tier->past, tier->directory, err);
    fast_other_pasts(tier, true);
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
    free(mine.data), free(all.data);
    return ok && steps_share(data, list, err);
}

// What is newer than the step that the run goes on from is not in all processes, or cannot be read: before the run saves
// anything, it is gone from those where it is.
static inline bool fast_forget_newer(const FastTier* tier, uint64_t step, const CheckpointData* data,
                                     Error* err) {
    StepList list;
    bool ok = steps_list(tier->directory, false, &list, err);
    for (int i = 0; ok && i < list.count && list.steps[i] > step; i++)
        ok = checkpoint_remove(tier->directory, list.steps[i], err);
    free(list.steps);
    return checkpoint_agree(data, err) && ok;
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
    if (!checkpoint_agree(into, err) || !fast_forget_newer(tier, step, into, err)) return false;
    into->state = mine.state;
    return true;
}

// The newest checkpoint of both tiers that verifies in all processes, the fast one where both have it: as
// checkpoint_load_newest says. What cannot be read here is named: older ones do, or the durable ones. If the run does not
// go on from here, fast_give_up must follow.
static inline bool fast_load_newest(FastTier* tier, const char* checkpoints_dir, CheckpointData* into,
                                    bool* found, Error* err) {
    StepList list;
    char path[PATH_MAX];
    bool ok = fast_steps(tier, into, &list, err);
    *found = tier->loaded = tier->to_copy = false;
    for (int i = 0; ok && !*found && i <= list.count; i++) {
        Error why = {0, {0}};
        bool none = i == list.count;
        ok = checkpoint_load_above(checkpoints_dir, into, none ? -1 : (int64_t)list.steps[i], found, err);
        if (!ok || *found || none) break;
        *found = tier->loaded = fast_read(tier, list.steps[i], into, &why);
        if (*found && into->control->rank == 0) checkpoints_pass_over(checkpoints_dir, list.steps[i]);
        if (*found) break;
        if (why.code != EXIT_BAD_DATA && why.code != EXIT_IO && why.code != EXIT_NO_INPUT) {
            ok = fail(err, why.code, "%s", why.text);
            break;
        }
        if (into->control->rank == 0)
            fprintf(stderr, "warning: step %llu of checkpoint.fast_dir cannot be used: %s\n",
                    (unsigned long long)list.steps[i], why.text);
    }
    tier->num_older = 0;
    for (int i = 0; i < list.count && tier->num_older < 2 * FAST_KEEP; i++)
        if (list.steps[i] < into->state.step) tier->older[tier->num_older++] = list.steps[i];
    free(list.steps);
    if (!ok || !tier->loaded) return ok;
    tier->to_copy = !step_path(path, checkpoints_dir, into->state.step, "", err) || access(path, F_OK) != 0;
    return control_broadcast(into->control, &tier->to_copy, sizeof tier->to_copy, err);
}
