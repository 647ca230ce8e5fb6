// `checkpoint verify|info|diff`: what a person asks of a checkpoint on disk. Each function prints to stdout,
// explains a failure on stderr, and returns the exit code.
#pragma once
#include "llmc/checkpoint.h"     // defines: CheckpointData, checkpoint_read, train_state_load
#include "llmc/manifest.h"       // defines: Manifest, manifest_load, manifest_add
#include "llmc/model_config.h"   // defines: model_config_load
#include "llmc/model_files.h"    // defines: model_config_difference
#include "llmc/stored_tensors.h" // defines: TensorFile, tensor_file_open, floats_from

static inline int tool_result(const Error* err) {
    if (err->code != 0) fprintf(stderr, "error: %s\n", err->text);
    return err->code;
}

static inline bool directory_config_load(ModelConfig* model, const char* dir, Error* err) {
    char path[PATH_MAX];
    return path_join(path, dir, "config.json", err) && model_config_load(model, path, err);
}

// ----------------------------------------------------------------------------
// verify

// Every hash, every header against the model's tensor table, the state: EXIT_OK only if a load would succeed.
static inline int checkpoint_verify(const char* dir) {
    Error err = {0, {0}};
    Manifest manifest = {NULL, 0};
    ModelConfig model;
    CheckpointData data;
    memset(&data, 0, sizeof data);
    double start = seconds_now();
    bool ok = manifest_load(&manifest, dir, &err);
    // The config's own hash comes first: the rest is checked against what it says.
    const FileRecord* config = manifest_find(&manifest, "config.json");
    if (ok && config != NULL) ok = file_verify(dir, config, &err);
    ok = ok && directory_config_load(&model, dir, &err);
    data.model = &model;
    ok = ok && checkpoint_read(dir, &data, &err);
    uint64_t bytes = 0;
    for (int i = 0; i < manifest.count; i++) bytes += manifest.files[i].size;
    double seconds = seconds_now() - start;
    if (ok)
        printf("%s: step %llu is whole: %d files, %.1f MB, verified in %.2f s (%.1f GB/s)\n", dir,
               (unsigned long long)data.state.step, manifest.count + 1, (double)bytes * 1e-6, seconds,
               (double)bytes * 1e-9 / seconds);
    manifest_free(&manifest);
    return tool_result(&err);
}

// ----------------------------------------------------------------------------
// every tensor of a directory, whatever program wrote it

typedef struct {
    TensorFile* files; // open, in the order of their names
    int count;
} TensorDirectory;

static inline void tensor_directory_close(TensorDirectory* d) {
    for (int i = 0; i < d->count; i++) tensor_file_close(&d->files[i]);
    free(d->files);
}

// Opens every safetensors file of the directory and parses its header. Close it in either case.
static inline bool tensor_directory_open(TensorDirectory* d, const char* path, Error* err) {
    struct dirent** names = NULL;
    d->files = NULL, d->count = 0;
    int n = scandir(path, &names, NULL, alphasort);
    bool ok = n >= 0 || fail(err, EXIT_NO_INPUT, "cannot open directory %s: %s", path, strerror(errno));
    d->files = (TensorFile*)calloc_check((size_t)(n > 0 ? n : 0), sizeof *d->files);
    for (int i = 0; i < n; i++) {
        if (ok && tensor_file_name(names[i]->d_name))
            ok = tensor_file_open(&d->files[d->count++], path, names[i]->d_name, NULL, err);
        free(names[i]);
    }
    free(names);
    return ok && (d->count > 0 || fail(err, EXIT_NO_INPUT, "%s holds no safetensors file", path));
}

static inline const SafetensorsTensor* tensor_directory_find(const TensorDirectory* d, const char* name,
                                                             const TensorFile** file) {
    for (int i = 0; i < d->count; i++) {
        for (int k = 0; k < d->files[i].header.count; k++) {
            *file = &d->files[i];
            if (strcmp(d->files[i].header.tensors[k].name, name) == 0) return &d->files[i].header.tensors[k];
        }
    }
    return NULL;
}

// ----------------------------------------------------------------------------
// info

static inline void info_print_file(const char* name, uint64_t size, const TensorDirectory* tensors,
                                   const FileRecord* record) {
    char count[32] = "", hex[MANIFEST_DIGITS + 1] = "";
    for (int i = 0; i < tensors->count; i++)
        if (strcmp(path_file_name(tensors->files[i].file.path), name) == 0)
            snprintf(count, sizeof count, "%d tensors", tensors->files[i].header.count);
    if (record != NULL) hash_to_hex(hex, record->hash);
    printf("  %-36s %16llu bytes  %-14s %s\n", name, (unsigned long long)size, count, hex);
}

// What the directory is, without reading more than headers: files, tensors, model, state.
static inline int checkpoint_info(const char* dir) {
    Error err = {0, {0}}, no_manifest = {0, {0}};
    Manifest manifest = {NULL, 0};
    TensorDirectory tensors;
    ModelConfig model;
    TrainState state;
    bool ok = tensor_directory_open(&tensors, dir, &err) && directory_config_load(&model, dir, &err);
    bool ours = ok && manifest_load(&manifest, dir, &no_manifest);
    if (ours) ok = train_state_load(&state, dir, &err);
    if (ok) {
        printf("%s: %s\n", dir,
               ours ? "checkpoint" : "model directory without a manifest: cannot be verified");
        printf("  %-28s %s, %.3f M parameters\n", "model", model.family->model_type,
               (double)model_num_parameters(&model) * 1e-6);
    }
    for (int i = 0; ok && ours && i < NUM_TRAIN_STATE_FIELDS; i++)
        printf(train_state_fields[i].hex ? "  %-28s %016llx\n" : "  %-28s %llu\n", train_state_fields[i].name,
               (unsigned long long)train_state_field(&state, i));
    for (int i = 0; ok && ours && i < manifest.count; i++)
        info_print_file(manifest.files[i].name, manifest.files[i].size, &tensors, &manifest.files[i]);
    for (int i = 0; ok && !ours && i < tensors.count; i++) {
        const HashedFile* file = &tensors.files[i].file;
        info_print_file(path_file_name(file->path), file->file_size, &tensors, NULL);
    }
    manifest_free(&manifest);
    tensor_directory_close(&tensors);
    return tool_result(&err);
}

// ----------------------------------------------------------------------------
// diff

enum { DIFF_PIECE = 1 << 16 }; // elements compared at a time

typedef struct {
    double absolute, relative; // the largest; relative to the larger of the two values
    uint64_t elements;         // that differ in any bit
} Difference;

static inline bool pread_all(const HashedFile* f, void* data, size_t bytes, uint64_t offset, Error* err) {
    for (size_t at = 0; at < bytes;) {
        ssize_t n = pread(f->fd, (char*)data + at, bytes - at, (off_t)(offset + at));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            return fail(err, EXIT_IO, "cannot read %s: %s", f->path,
                        n == 0 ? "it became shorter" : strerror(errno));
        at += (size_t)n;
    }
    return true;
}

// The next n elements from `first` of a tensor, as fp32.
static inline const float* tensor_piece(const TensorFile* file, const SafetensorsTensor* t, uint64_t first,
                                        size_t n, float buffer[2 * DIFF_PIECE], Error* err) {
    size_t width = t->type->bits / 8;
    if (!pread_all(&file->file, buffer, n * width, file->header.data_begin + t->begin + first * width, err))
        return NULL;
    return floats_from(t->type, buffer + DIFF_PIECE, buffer, n);
}

static inline bool tensors_compare(Difference* d, const TensorFile* fa, const SafetensorsTensor* a,
                                   const TensorFile* fb, const SafetensorsTensor* b, float* buffers,
                                   Error* err) {
    memset(d, 0, sizeof *d);
    for (uint64_t at = 0, n; at < a->count; at += n) {
        n = a->count - at < DIFF_PIECE ? a->count - at : (uint64_t)DIFF_PIECE;
        const float* x = tensor_piece(fa, a, at, (size_t)n, buffers, err);
        const float* y = tensor_piece(fb, b, at, (size_t)n, buffers + 2 * DIFF_PIECE, err);
        if (x == NULL || y == NULL) return false;
        for (uint64_t i = 0; i < n; i++) {
            if (memcmp(&x[i], &y[i], sizeof x[i]) == 0) continue;
            double absolute = fabs((double)x[i] - (double)y[i]),
                   size = fmax(fabs((double)x[i]), fabs((double)y[i]));
            if (isnan(absolute)) absolute = INFINITY; // not a number on one side alone
            d->absolute = fmax(d->absolute, absolute);
            d->relative = fmax(d->relative, absolute == 0 ? 0 : absolute / size);
            d->elements++;
        }
    }
    return true;
}

// One line for each tensor that differs or is in one directory only; returns how many.
static inline int tensor_directories_compare(const TensorDirectory* a, const TensorDirectory* b,
                                             const char* names[2], Error* err) {
    int different = 0, same = 0;
    float* buffers = (float*)malloc_check(4 * DIFF_PIECE * sizeof(float));
    const TensorFile* other_file;
    for (int i = 0; err->code == 0 && i < a->count; i++) {
        for (int k = 0; err->code == 0 && k < a->files[i].header.count; k++) {
            const SafetensorsTensor* t = &a->files[i].header.tensors[k];
            const SafetensorsTensor* other = tensor_directory_find(b, t->name, &other_file);
            Difference d;
            if (other == NULL) {
                printf("%-48s only in %s\n", t->name, names[0]);
            } else if (other->num_dims != t->num_dims || memcmp(other->dims, t->dims, sizeof t->dims) != 0) {
                printf("%-48s has another shape\n", t->name);
            } else if (!readable_type(t->type) || !readable_type(other->type)) {
                printf("%-48s is %s and %s: not compared\n", t->name, t->type->name, other->type->name);
            } else if (!tensors_compare(&d, &a->files[i], t, other_file, other, buffers, err)) {
                break;
            } else if (d.elements == 0) {
                same++;
                continue;
            } else {
                printf("%-48s max |a-b| %.3e  relative %.3e  in %llu of %llu elements\n", t->name, d.absolute,
                       d.relative, (unsigned long long)d.elements, (unsigned long long)t->count);
            }
            different++;
        }
    }
    for (int i = 0; i < b->count; i++) {
        for (int k = 0; k < b->files[i].header.count; k++) {
            if (tensor_directory_find(a, b->files[i].header.tensors[k].name, &other_file) != NULL) continue;
            printf("%-48s only in %s\n", b->files[i].header.tensors[k].name, names[1]);
            different++;
        }
    }
    free(buffers);
    printf("%d tensors are the same to the bit, %d are not\n", same, different);
    return different;
}

// EXIT_OK if both hold the same model, tensors and training state, 1 if they differ, another code on failure.
static inline int checkpoint_diff(const char* dir_a, const char* dir_b) {
    Error err = {0, {0}}, no_state = {0, {0}};
    const char* names[2] = {dir_a, dir_b};
    TensorDirectory tensors[2];
    ModelConfig model[2];
    TrainState state[2];
    int different = 0, states = 0;
    for (int side = 0; side < 2; side++) {
        tensor_directory_open(&tensors[side], names[side], &err);
        directory_config_load(&model[side], names[side], &err);
        states += train_state_load(&state[side], names[side], &no_state);
    }
    if (err.code == 0) {
        String difference = {NULL, 0, 0};
        if (model_config_difference(&model[0], &model[1], &difference)) {
            printf("config.json: %s\n", difference.data);
            different++;
        }
        free(difference.data);
        for (int i = 0; states == 2 && i < NUM_TRAIN_STATE_FIELDS; i++) {
            unsigned long long x = train_state_field(&state[0], i), y = train_state_field(&state[1], i);
            if (x == y) continue;
            printf("state.json: %s is %llu and %llu\n", train_state_fields[i].name, x, y);
            different++;
        }
        if (states == 1) printf("state.json is on one side only\n"), different++;
        different += tensor_directories_compare(&tensors[0], &tensors[1], names, &err);
    }
    for (int side = 0; side < 2; side++) tensor_directory_close(&tensors[side]);
    return err.code != 0 ? tool_result(&err) : different == 0 ? EXIT_OK : 1;
}
