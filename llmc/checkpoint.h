// Checkpoints that can be trusted, and that other tools open as they stand.
//
//     checkpoints/
//       step_00001000/                        complete: the rename that gave it this name was the commit
//         config.json  generation_config.json what transformers, vLLM and others read
//         model.safetensors                   the fp32 weights, which are the optimizer's master weights too
//         tokenizer.json  tokenizer_config.json
//         optim-00001-of-00001.safetensors    AdamW's moments, by global tensor name and element range
//         run_config.json                     the resolved run config
//         state.json                          TrainState
//         manifest.json                       size and hash of every file above, and of itself; written last
//       step_00001500.tmp/                    being written, or left by a crash: removed at the next start
//       step_00000500.delete/                 being removed
//       step_00000900.bad/                    set aside, since it cannot be used; never touched again
//
// A save: write into .tmp (every file hashed in memory, written, fsynced), manifest, fsync the directory,
// rename, fsync the parent. Killed at any point, the previous checkpoint is whole and the next save works.
// A load verifies every hash of what it uses and falls back to the next older checkpoint in the same call.
// One process at a time writes a directory of checkpoints (flock). Who loads without moments, which is all but training,
// changes nothing there: it may read meanwhile from any node, whatever locks are worth between them.
#pragma once
#include "llmc/hashed_file.h"    // defines: directory_sync, directory_remove, free_space_check
#include "llmc/manifest.h"       // defines: Manifest, manifest_load, manifest_write, manifest_find
#include "llmc/model_files.h"    // defines: model_files_write, model_weights_read, model_config_check
#include "llmc/stored_tensors.h" // defines: stored_moments, tensors_write, tensors_read, stored_complete
#include "llmc/rendezvous.h"     // defines: Control, control_agree
#include "llmc/train_state.h"    // defines: TrainState, train_state_write, train_state_load
#include <sys/file.h>
#include <sys/syscall.h>

static const char save_id_name[] = "save_id";

// A directory that one process has for itself, with its share of a checkpoint alone (fast_tier.h).
typedef struct {
    bool alone;             // what is written or read is such a directory
    char id[ID_DIGITS + 1]; // alone: of this save, the same in all processes
    char source[PATH_MAX];  // saving: the tensors are copied from such a directory; "": they come from memory
} CheckpointPart;

typedef struct {
    const ModelConfig* model;
    float* params; // (num_parameters), laid out by parameter_layout
    float *m, *v;  // the same, AdamW's moments; NULL: the model alone
    TrainState state;
    const char* config_json; // the resolved run config, stored as run_config.json; NULL: none; not read back
    const char* tokenizer_path; // a tokenizer.json to store with the model; NULL or "": none; not read back
    // Where several processes save and load together, all of them in each call: elements [begin, end) of memory are
    // here (layout.h: tensors_owned). NULL: one process, which has all.
    size_t begin, end;
    Control* control;
    const CheckpointPart* part; // NULL: directories hold whole checkpoints, saved from memory
} CheckpointData;

static inline bool checkpoint_alone(const CheckpointData* data) {
    return data->part != NULL && data->part->alone;
}

static inline Share checkpoint_share(const CheckpointData* data) {
    Share share = whole_share(data->model);
    if (data->control != NULL && data->control->size > 1) {
        share.begin = data->begin, share.end = data->end;
        share.rank = data->control->rank, share.size = data->control->size;
    }
    share.alone = checkpoint_alone(data);
    return share;
}

// This process makes the directory, and writes what is in it once.
static inline bool checkpoint_makes(const CheckpointData* data) {
    return checkpoint_alone(data) || checkpoint_share(data).rank == 0;
}

// False on all processes if it failed (err) on any.
static inline bool checkpoint_agree(const CheckpointData* data, Error* err) {
    return data->control == NULL ? err->code == 0 : control_agree(data->control, err);
}

// ----------------------------------------------------------------------------
// the directory of checkpoints

// "step_00001000" and what follows; NULL for a name that no checkpoint ever has.
static inline const char* step_parse(const char* name, uint64_t* step) {
    if (strncmp(name, "step_", 5) != 0) return NULL;
    size_t digits = strspn(name + 5, "0123456789");
    if (digits < 8 || digits > 19 || (digits > 8 && name[5] == '0')) return NULL;
    *step = strtoull(name + 5, NULL, 10);
    return name + 5 + digits;
}

static inline bool step_path(char out[PATH_MAX], const char* dir, uint64_t step, const char* suffix,
                             Error* err) {
    char name[64];
    snprintf(name, sizeof name, "step_%08llu%s", (unsigned long long)step, suffix);
    return path_join(out, dir, name, err);
}

typedef struct {
    uint64_t* steps; // complete checkpoints, newest first
    int count;
    int damaged; // how many were found so, now or earlier
} StepList;

static inline int newest_first(const void* a, const void* b) {
    uint64_t s = *(const uint64_t*)a, t = *(const uint64_t*)b;
    return s < t ? 1 : s > t ? -1 : 0;
}

// Lists what is in the directory; with clean, first removes what a killed save or removal left there.
// A directory that does not exist holds nothing, a link that leads nowhere may have held a run. Caller frees .steps,
// also after a failure.
static inline bool steps_list(const char* path, bool clean, StepList* list, Error* err) {
    memset(list, 0, sizeof *list);
    DIR* dir = opendir(path);
    struct stat link;
    if (dir == NULL && errno == ENOENT)
        return lstat(path, &link) != 0 ||
               fail(err, EXIT_IO, "%s leads nowhere: is its file system mounted?", path);
    if (dir == NULL)
        return fail(err, code_of_open(errno), "cannot open directory %s: %s", path, strerror(errno));
    bool ok = true;
    struct dirent* entry;
    while (ok && (errno = 0, entry = readdir(dir)) != NULL) {
        uint64_t step;
        char full[PATH_MAX];
        const char* suffix = step_parse(entry->d_name, &step);
        if (suffix == NULL) continue;
        if (suffix[0] == '\0') {
            list->steps =
                (uint64_t*)realloc_check(list->steps, (size_t)(list->count + 1) * sizeof *list->steps);
            list->steps[list->count++] = step;
        } else if (strncmp(suffix, ".bad", 4) == 0) {
            list->damaged++;
        } else if (clean && (strcmp(suffix, ".tmp") == 0 || strcmp(suffix, ".delete") == 0)) {
            Error warning = {0, {0}};
            if (!path_join(full, path, entry->d_name, &warning) || !directory_remove(full, &warning))
                fprintf(stderr, "warning: a left-over stays: %s\n", warning.text);
        }
    }
    if (ok && errno != 0) ok = fail(err, EXIT_IO, "cannot list %s: %s", path, strerror(errno));
    closedir(dir);
    if (list->count > 0) qsort(list->steps, (size_t)list->count, sizeof *list->steps, newest_first);
    return ok;
}

// The right to change the directory, held until the descriptor is closed; -1 when another process keeps it
// for longer than `patience` seconds, or the directory cannot be opened. Who loads to train holds it for
// an instant. A filesystem without locks gives it to everybody.
static inline int directory_lock(const char* path, double patience, Error* err) {
    double deadline = seconds_now() + patience;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) fail(err, EXIT_CANNOT_WRITE, "cannot open directory %s: %s", path, strerror(errno));
    while (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
        if (seconds_now() < deadline) {
            usleep(10000);
            continue;
        }
        fail(err, EXIT_CANNOT_WRITE, "another process is writing checkpoints in %s", path);
        close(fd);
        fd = -1;
    }
    return fd;
}

// ----------------------------------------------------------------------------
// saving

enum { SAVE_PATIENCE = 10 }; // seconds

static inline uint64_t checkpoint_bytes(const CheckpointData* data) {
    struct stat st;
    bool tokenizer = data->tokenizer_path != NULL && stat(data->tokenizer_path, &st) == 0;
    uint64_t copies = data->m != NULL ? 3 : 1, slack = 1 << 20; // headers and small files
    Share share = checkpoint_share(data);
    return copies * sizeof(float) *
               (share.alone ? share.end - share.begin : model_num_parameters(data->model)) +
           (tokenizer ? (uint64_t)st.st_size : 0) + slack;
}

// The moments of this process's tensors, in one file of its own.
static inline bool moments_write(const char* dir, const CheckpointData* data, Manifest* manifest,
                                 Error* err) {
    Share share = checkpoint_share(data);
    StoredTensors moments = stored_moments(data->model, data->m, data->v);
    char name[64];
    snprintf(name, sizeof name, "optim-%05d-of-%05d.safetensors", share.rank + 1, share.size);
    stored_keep(&moments, share.begin, share.end);
    stored_drop_others(&moments);
    bool ok = moments.count == 0 || tensors_write(dir, name, &moments, 0, moments.count, manifest, err);
    free(moments.tensors);
    return ok;
}

// Adds what the other processes wrote to the manifest of the first one.
static inline bool manifest_gather(const CheckpointData* data, Manifest* manifest, Error* err) {
    String mine = {NULL, 0, 0}, all = {NULL, 0, 0};
    if (checkpoint_share(data).size == 1) return true;
    string_append(&mine, "%s", "");
    for (int i = 0; i < manifest->count; i++) {
        char hex[MANIFEST_DIGITS + 1];
        hash_to_hex(hex, manifest->files[i].hash);
        string_append(&mine, "%s %llu %s\n", manifest->files[i].name,
                      (unsigned long long)manifest->files[i].size, hex);
    }
    bool ok = control_gather_text(data->control, mine.data, &all, err);
    char *rest = all.data, *line;
    for (int i = 0; ok && rest != NULL && (line = strsep(&rest, "\n")) != NULL && line[0] != '\0'; i++) {
        FileRecord record;
        char hex[64];
        unsigned long long size;
        memset(&record, 0, sizeof record);
        if (i < manifest->count &&
            strncmp(line, manifest->files[i].name, strlen(manifest->files[i].name)) == 0)
            continue; // the first process's own
        ok = (sscanf(line, "%63s %llu %63s", record.name, &size, hex) == 3 &&
              hash_from_hex(&record.hash, hex, strlen(hex))) ||
             fail(err, EXIT_INTERNAL, "another process says of its files: %s", line);
        record.size = size;
        if (ok) manifest_add(manifest, &record);
    }
    free(mine.data), free(all.data);
    return ok;
}

// The tensors' files of another directory, each with the hash that its manifest says.
static inline bool tensors_copy(const char* dir, const char* source, Manifest* manifest, Error* err) {
    Manifest from;
    Error why = {0, {0}};
    char* piece = (char*)malloc_check(HASH_PIECE);
    bool ok = manifest_load(&from, source, &why);
    for (int i = 0; ok && i < from.count; i++) {
        const FileRecord* file = &from.files[i];
        if (strncmp(file->name, "model", 5) != 0 && strncmp(file->name, "optim", 5) != 0) continue;
        HashedFile in, out;
        FileRecord record;
        out.fd = -1, out.hash = NULL;
        ok = hashed_open(&in, source, file->name, file, &why) && hashed_create(&out, dir, file->name, &why);
        for (uint64_t left = file->size, n; ok && left > 0; left -= n) {
            n = hash_piece(left);
            ok = hashed_read(&in, piece, (size_t)n, &why) && hashed_write(&out, piece, (size_t)n, &why);
        }
        ok = ok && hashed_verify(&in, &why) && hashed_finish(&out, &record, &why);
        hashed_close(&in), hashed_close(&out);
        if (ok) manifest_add(manifest, &record);
    }
    manifest_free(&from);
    free(piece);
    return ok || fail(err, EXIT_IO, "%s", why.text); // a copy that is damaged is no end of a run
}

// What there is once: the configuration, the state and, last, the manifest, durably.
static inline bool checkpoint_finish(const char* dir, const CheckpointData* data, Manifest* manifest,
                                     Error* err) {
    String text = {NULL, 0, 0}, state = {NULL, 0, 0};
    bool alone = checkpoint_alone(data);
    bool ok = model_files_write(dir, data->model, alone ? NULL : data->tokenizer_path, manifest, err);
    if (ok && alone) ok = bytes_write(dir, save_id_name, data->part->id, ID_DIGITS, manifest, err);
    if (ok && !alone && data->config_json != NULL)
        ok = bytes_write(dir, "run_config.json", data->config_json, strlen(data->config_json), manifest, err);
    train_state_write(data->state, &state);
    ok = ok && bytes_write(dir, "state.json", state.data, state.size, manifest, err);
    if (ok) manifest_write(manifest, &text);
    ok = ok && bytes_write(dir, manifest_name, text.data, text.size, NULL, err) && directory_sync(dir, err);
    free(state.data), free(text.data);
    return ok;
}

// Everything of a checkpoint (alone: of its share) into the new directory dir, durably, the manifest last. All processes write the tensors
// that they have.
static inline bool checkpoint_write(const char* dir, const CheckpointData* data, Error* err) {
    bool makes = checkpoint_makes(data);
    if (makes && mkdir(dir, 0777) != 0)
        fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", dir, strerror(errno));
    if (makes && err->code == 0) free_space_check(dir, checkpoint_bytes(data), err);
    if (!checkpoint_agree(data, err)) return false;
    Manifest manifest = {NULL, 0};
    bool ok = data->part != NULL && data->part->source[0] != '\0'
                  ? tensors_copy(dir, data->part->source, &manifest, err)
                  : model_weights_write(dir, data->model, data->params, checkpoint_share(data),
                                        MAX_SHARD_BYTES, &manifest, err) &&
                        (data->m == NULL || moments_write(dir, data, &manifest, err));
    ok = checkpoint_agree(data, err) && ok;
    ok = ok && (checkpoint_alone(data) || manifest_gather(data, &manifest, err));
    ok = ok && (!makes || checkpoint_finish(dir, data, &manifest, err));
    manifest_free(&manifest);
    return ok;
}

// Gives a complete directory its name. One that has the name already is exchanged in the same instant, so
// that there is no moment without a checkpoint of that step; it is then under the other name.
static inline bool checkpoint_commit(const char* from, const char* to, Error* err) {
    if (rename(from, to) == 0) return true;
    // RENAME_EXCHANGE and renameat2 of stdio.h, which glibc hides where a system header came before ours.
    const int rename_exchange = 2;
    if ((errno == ENOTEMPTY || errno == EEXIST) &&
        syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, rename_exchange) == 0)
        return true;
    return fail(err, EXIT_IO, "cannot rename %s to %s: %s", from, to, strerror(errno));
}

// First the name goes, durably, then the files: what has the name is whole.
static inline bool checkpoint_remove(const char* dir, uint64_t step, Error* err) {
    char path[PATH_MAX], doomed[PATH_MAX];
    if (!step_path(path, dir, step, "", err) || !step_path(doomed, dir, step, ".delete", err)) return false;
    if (rename(path, doomed) != 0) return fail(err, EXIT_IO, "cannot rename %s: %s", path, strerror(errno));
    return directory_sync(dir, err) && directory_remove(doomed, err);
}

// Removes the checkpoints that are neither among the keep_last newest, nor at a multiple of permanent_every
// steps, nor the one of step `saved`.
static inline bool checkpoint_prune(const char* dir, uint64_t saved, int keep_last, uint64_t permanent_every,
                                    Error* err) {
    StepList list;
    bool ok = steps_list(dir, false, &list, err);
    for (int i = keep_last > 1 ? keep_last : 1; ok && i < list.count; i++) {
        uint64_t step = list.steps[i];
        if (step == saved || (permanent_every != 0 && step % permanent_every == 0)) continue;
        ok = checkpoint_remove(dir, step, err);
    }
    free(list.steps);
    return ok;
}

// Saves into checkpoints_dir/step_N, N = data->state.step, then removes old checkpoints (checkpoint_prune).
// On failure the older checkpoints are as they were, nothing half-written stays under the name of a
// checkpoint, and training may go on. Old checkpoints that cannot be removed are only warned of: the new
// one is safe.
static inline bool checkpoint_save(const char* checkpoints_dir, const CheckpointData* data, int keep_last,
                                   uint64_t permanent_every, Error* err) {
    char path[PATH_MAX], temporary[PATH_MAX], parent[PATH_MAX];
    StepList list = {NULL, 0, 0};
    bool makes = checkpoint_makes(data);
    int lock = step_path(path, checkpoints_dir, data->state.step, "", err) &&
                       step_path(temporary, checkpoints_dir, data->state.step, ".tmp", err) &&
                       path_join(parent, checkpoints_dir, "..", err) && makes &&
                       make_directories(checkpoints_dir, err)
                   ? directory_lock(checkpoints_dir, SAVE_PATIENCE, err)
                   : -1;
    if (lock >= 0) {
        bool listed = directory_sync(parent, err) && steps_list(checkpoints_dir, true, &list, err);
        CHECK(listed || err->code != 0);
        free(list.steps);
    }
    bool ok = checkpoint_agree(data, err);
    if (ok) {
        Error ignored = {0, {0}};
        ok = checkpoint_write(temporary, data, err) && (!makes || checkpoint_commit(temporary, path, err));
        if (!ok && makes) directory_remove(temporary, &ignored);
        ok = ok && (!makes || directory_sync(checkpoints_dir, err));
        ok = checkpoint_agree(data, err) && ok;
    }
    if (ok && makes) {
        Error warning = {0, {0}};
        if (access(temporary, F_OK) == 0) directory_remove(temporary, &warning); // what had the name before
        checkpoint_prune(checkpoints_dir, data->state.step, keep_last, permanent_every, &warning);
        if (warning.code != 0) fprintf(stderr, "warning: old checkpoints stay: %s\n", warning.text);
    }
    if (lock >= 0) close(lock);
    return ok;
}

// Writes a Hugging Face model directory, which must not exist yet or be empty: complete or not at all.
static inline bool checkpoint_export(const char* dir, const CheckpointData* data, Error* err) {
    char path[PATH_MAX], temporary[PATH_MAX], parent[PATH_MAX];
    if (!path_join(path, dir, "", err)) return false;
    for (size_t n = strlen(path); n > 1 && path[n - 1] == '/'; n--) path[n - 1] = '\0';
    if (!path_join(parent, path, "..", err)) return false;
    int n = snprintf(temporary, sizeof temporary, "%s.XXXXXX", path);
    if (n < 0 || n >= (int)sizeof temporary) return fail(err, EXIT_USAGE, "path %s is too long", dir);
    // Making it makes its parents; an empty directory is in nobody's way.
    if (!make_directories(path, err)) return false;
    if (rmdir(path) != 0)
        return fail(err, EXIT_CANNOT_WRITE, "%s is there already: %s", path, strerror(errno));
    if (mkdtemp(temporary) == NULL || chmod(temporary, 0755) != 0)
        return fail(err, EXIT_CANNOT_WRITE, "cannot create %s: %s", temporary, strerror(errno));
    Manifest manifest = {NULL, 0};
    Error ignored = {0, {0}};
    bool ok = free_space_check(temporary, checkpoint_bytes(data), err) &&
              model_files_write(temporary, data->model, data->tokenizer_path, &manifest, err) &&
              model_weights_write(temporary, data->model, data->params, whole_share(data->model),
                                  MAX_SHARD_BYTES, &manifest, err) &&
              directory_sync(temporary, err);
    if (ok && rename(temporary, path) != 0)
        ok = fail(err, EXIT_CANNOT_WRITE, "cannot rename %s to %s: %s", temporary, path, strerror(errno));
    if (!ok) directory_remove(temporary, &ignored);
    ok = ok && path_join(parent, path, "..", err) && directory_sync(parent, err);
    manifest_free(&manifest);
    return ok;
}

// ----------------------------------------------------------------------------
// loading

// A checkpoint of ours. Where into->params is NULL nothing is kept: everything is verified, header by
// header and hash by hash. With params and without m, the optimizer's files are not looked at.
static inline bool checkpoint_read(const char* dir, CheckpointData* into, Error* err) {
    Manifest manifest;
    TrainState state;
    Share share = checkpoint_share(into);
    if (!manifest_load(&manifest, dir, err)) return false;
    bool ok = manifest_check_directory(&manifest, dir, err);
    for (int i = 0; ok && i < manifest.count; i++)
        if (!tensor_file_name(manifest.files[i].name)) ok = file_verify(dir, &manifest.files[i], err);
    static const char* const needed[] = {"config.json", "state.json"};
    for (size_t i = 0; ok && i < sizeof needed / sizeof needed[0]; i++)
        ok = manifest_find(&manifest, needed[i]) != NULL ||
             fail(err, EXIT_BAD_DATA, "%s: the manifest does not name %s", dir, needed[i]);
    ok = ok && train_state_load(&state, dir, err) && model_config_check(dir, into->model, err) &&
         model_weights_read(dir, into->model, into->params, share, &manifest, err);
    if (ok && (into->params == NULL || into->m != NULL)) {
        StoredTensors moments = stored_moments(into->model, into->m, into->v);
        bool any = false;
        stored_keep(&moments, share.begin, share.end);
        if (share.alone) stored_drop_others(&moments);
        for (int i = 0; ok && i < manifest.count; i++) {
            const FileRecord* file = &manifest.files[i];
            if (strncmp(file->name, "optim", 5) != 0 || !tensor_file_name(file->name)) continue;
            any = true;
            ok = tensors_read(dir, file->name, file, &moments, err);
        }
        if (any || into->m != NULL) ok = ok && stored_complete(&moments, dir, err);
        if (ok && into->m != NULL) {
            zero_vocabulary_padding(into->model, into->m, share.begin, share.end);
            zero_vocabulary_padding(into->model, into->v, share.begin, share.end);
        }
        free(moments.tensors);
    }
    if (ok) into->state = state;
    manifest_free(&manifest);
    return ok;
}

// Loads one directory into params (and m and v where they are not NULL): a checkpoint, verified, or a model
// directory of another program, which has no manifest; m, v and the state are then zero.
// into->model must be the model that the directory's config.json describes (EXIT_CONFIG otherwise).
// After a failure what params, m and v hold is of no use.
static inline bool checkpoint_load(const char* dir, CheckpointData* into, Error* err) {
    char manifest[PATH_MAX], state[PATH_MAX];
    Share share = checkpoint_share(into);
    if (!path_join(manifest, dir, manifest_name, err) || !path_join(state, dir, "state.json", err))
        return false;
    if (access(manifest, F_OK) == 0) return checkpoint_read(dir, into, err);
    if (access(state, F_OK) == 0)
        return fail(err, EXIT_BAD_DATA, "%s is a checkpoint without %s: it cannot be verified", dir,
                    manifest_name);
    if (!model_config_check(dir, into->model, err) ||
        !model_weights_read(dir, into->model, into->params, share, NULL, err))
        return false;
    size_t bytes = (share.end - share.begin) * sizeof(float);
    if (into->m != NULL) memset(into->m, 0, bytes);
    if (into->v != NULL) memset(into->v, 0, bytes);
    memset(&into->state, 0, sizeof into->state);
    return true;
}

// Renames a checkpoint that cannot be used out of the way, to .bad, .bad.2, .bad.3 ...
static inline void checkpoint_set_aside(const char* dir, uint64_t step, const char* path) {
    char aside[PATH_MAX], suffix[16] = ".bad";
    Error why = {0, {0}};
    int lock = directory_lock(dir, 0, &why);
    bool done = false;
    for (int i = 2; lock >= 0 && !done && i < 100 && step_path(aside, dir, step, suffix, &why); i++) {
        done = rename(path, aside) == 0;
        if (!done && errno != ENOTEMPTY && errno != EEXIST) break;
        snprintf(suffix, sizeof suffix, ".bad.%d", i);
    }
    if (done)
        fprintf(stderr, "warning: it was set aside as %s\n", aside);
    else
        fprintf(stderr, "warning: %s could not be set aside: %s\n", path,
                lock < 0 ? why.text : strerror(errno));
    if (done) directory_sync(dir, &why);
    if (lock >= 0) close(lock);
}

// An older one was loaded: those of steps > step, which could not be read, are of a past that the run does not go on
// from.
static inline void checkpoints_pass_over(const char* dir, uint64_t step) {
    char path[PATH_MAX];
    Error ignored = {0, {0}};
    StepList list;
    steps_list(dir, false, &list, &ignored);
    for (int i = 0; i < list.count && list.steps[i] > step; i++)
        if (step_path(path, dir, list.steps[i], "", &ignored)) checkpoint_set_aside(dir, list.steps[i], path);
    free(list.steps);
}

// The first process's list, for all of them.
static inline bool steps_share(const CheckpointData* data, StepList* list, Error* err) {
    if (!checkpoint_agree(data, err)) return false;
    if (data->control == NULL) return true;
    int counts[2] = {list->count, list->damaged};
    if (!control_broadcast(data->control, counts, sizeof counts, err)) return false;
    list->steps = (uint64_t*)realloc_check(list->steps, (size_t)(counts[0] + 1) * sizeof *list->steps);
    list->count = counts[0], list->damaged = counts[1];
    return control_broadcast(data->control, list->steps, (size_t)counts[0] * sizeof *list->steps, err);
}

// Damage, or a node's way to the disk: other processes may find otherwise.
static inline bool is_doubtful(int code) {
    return code == EXIT_BAD_DATA || code == EXIT_IO || code == EXIT_NO_INPUT;
}

// What the first process finds of a checkpoint that not all could load (err: why, own: the first one's code), on all of
// them: EXIT_BAD_DATA, EXIT_IO or none of these. What it could load of it says little of the rest. *vanished: it was
// removed by another process meanwhile.
static inline bool checkpoint_judge(const char* path, const CheckpointData* into, const Error* err, int own,
                                    bool* vanished, int* finding, Error* lost) {
    int found[2] = {own, 0};
    if (checkpoint_share(into).rank == 0) {
        CheckpointData whole;
        Error why = {0, {0}};
        memset(&whole, 0, sizeof whole);
        whole.model = into->model;
        if (own == 0 && is_doubtful(err->code) && !checkpoint_read(path, &whole, &why)) found[0] = why.code;
        found[1] = access(path, F_OK) != 0 && errno == ENOENT;
    }
    bool ok = into->control == NULL || control_broadcast(into->control, found, sizeof found, lost);
    *finding = found[0], *vanished = found[1] != 0;
    return ok;
}

// One pass over the checkpoints that are there now, newest first. *vanished: one was removed by another
// process while it was being read, so what is there has changed.
static inline bool checkpoint_try_newest(const char* dir, CheckpointData* into, int64_t above, bool* found,
                                         bool* vanished, Error* err) {
    Error busy = {0, {0}}, unread = {0, {0}};
    StepList list;
    bool first = checkpoint_share(into).rank == 0, renames = first && into->m != NULL, ok = true;
    int lock =
        renames ? directory_lock(dir, 0, &busy) : -1; // a save may be under way: then nothing is cleaned
    memset(&list, 0, sizeof list);
    if (first) ok = steps_list(dir, lock >= 0, &list, err);
    if (lock >= 0) close(lock);
    ok = steps_share(into, &list, err) && ok;
    *vanished = false;
    for (int i = 0; ok && i < list.count && (int64_t)list.steps[i] > above; i++) {
        char path[PATH_MAX];
        int finding;
        Error why = {0, {0}};
        ok = step_path(path, dir, list.steps[i], "", err);
        if (!ok) break;
        *found = checkpoint_read(path, into, &why) &&
                 (into->state.step == list.steps[i] || fail(&why, EXIT_BAD_DATA, "%s holds step %llu", path,
                                                            (unsigned long long)into->state.step));
        int own = why.code;
        *found = checkpoint_agree(into, &why) && *found;
        if (*found) break;
        ok = checkpoint_judge(path, into, &why, own, vanished, &finding, err);
        if (!ok || *vanished) break;
        if (!is_doubtful(why.code) || (why.code == EXIT_NO_INPUT && finding == EXIT_NO_INPUT))
            ok = fail(err, why.code, "%s", why.text);
        else if (finding != EXIT_BAD_DATA && finding != EXIT_IO)
            ok = fail(err, EXIT_IO,
                      "%.700s; rank 0 does not find that, so the checkpoint keeps its name: look at that "
                      "rank's node and how it sees the directory, and start again",
                      why.text);
        if (!ok) break;
        if (finding == EXIT_BAD_DATA) list.damaged++;
        if (finding == EXIT_IO) fail(&unread, EXIT_IO, "%s", why.text); // the newest one's
        if (first) fprintf(stderr, "warning: checkpoint %s cannot be used: %s\n", path, why.text);
        if (renames && finding == EXIT_BAD_DATA) checkpoint_set_aside(dir, list.steps[i], path);
    }
    if (*found && unread.code != 0 && renames) checkpoints_pass_over(dir, into->state.step);
    if (ok && !*found && !*vanished && unread.code != 0 && above < 0)
        ok =
            fail(err, EXIT_IO,
                 "no checkpoint in %s can be used, and what cannot be read may be whole: %.700s; start again "
                 "when it can",
                 dir, unread.text);
    if (ok && !*found && !*vanished && list.damaged > 0 && above < 0)
        ok = fail(
            err, EXIT_BAD_DATA,
            "no checkpoint in %s is whole, and %d are damaged, or were set aside as .bad: repair one, or "
            "move them all away to start anew",
            dir, list.damaged);
    free(list.steps);
    return ok;
}

// Loads the newest checkpoint that verifies, of those of steps > above. One that the first process, too, finds damaged is
// named on stderr and, where training loads it, set aside, and the next older one is tried. So is one that the first
// process cannot read (EXIT_IO), but it is set aside only once an older one was loaded: a disk may come back. What others
// alone find ends the search with EXIT_IO. *found tells whether there was any; some and none that can be used is an error
// where above is < 0, all steps, for a run never starts anew by itself. An error that is no damage (another model's
// config, out of descriptors, no permission) ends the search and leaves everything where it is.
static inline bool checkpoint_load_above(const char* checkpoints_dir, CheckpointData* into, int64_t above,
                                         bool* found, Error* err) {
    enum { PATIENCE = 100 }; // a run that removes checkpoints faster than they can be read
    bool ok = true, vanished = true;
    *found = false;
    for (int i = 0; ok && vanished && i < PATIENCE; i++)
        ok = checkpoint_try_newest(checkpoints_dir, into, above, found, &vanished, err);
    if (ok && vanished) ok = fail(err, EXIT_IO, "the checkpoints in %s keep vanishing", checkpoints_dir);
    return ok;
}

static inline bool checkpoint_load_newest(const char* checkpoints_dir, CheckpointData* into, bool* found,
                                          Error* err) {
    return checkpoint_load_above(checkpoints_dir, into, -1, found, err);
}
