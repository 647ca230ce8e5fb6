// Where a run is, and the guard with it: state.json of a checkpoint, a loop over the table below.
#pragma once
#include "llmc/safetensors.h" // defines: safetensors_integer, cJSON
#include "llmc/utils.h"       // defines: Error, fail, String, path_join, read_file
#include <math.h>
#include <stddef.h>

// Of a number that each step has: an exponential mean and variance (guard.h). Zeros: no value yet.
typedef struct {
    uint64_t count; // of values that entered
    double mean, variance;
} Detector;

typedef struct {
    uint64_t step;                // optimizer steps done
    uint64_t tokens;              // seen so far
    uint64_t rows;                // next global row of the data order
    uint64_t data_fingerprint;    // of the data that rows counts in
    uint64_t skipped_steps;       // by the guard, in all
    uint64_t consecutive_skipped; // by the guard, up to now without a break
    uint64_t rewinds;             // by the guard, in all
    Detector loss, grad_norm;
} TrainState;

typedef struct {
    const char* name;
    size_t offset;
    bool hex;      // 64 bits (of a double, too), which JSON's numbers do not hold: a string of 16 digits
    bool required; // not so for a field that older versions did not write: it is 0 then
} TrainStateField;

static const TrainStateField train_state_fields[] = {
    {"step", offsetof(TrainState, step), false, true},
    {"tokens", offsetof(TrainState, tokens), false, true},
    {"rows", offsetof(TrainState, rows), false, true},
    {"data_fingerprint", offsetof(TrainState, data_fingerprint), true, true},
    {"skipped_steps", offsetof(TrainState, skipped_steps), false, false},
    {"consecutive_skipped", offsetof(TrainState, consecutive_skipped), false, false},
    {"rewinds", offsetof(TrainState, rewinds), false, false},
    {"loss_count", offsetof(TrainState, loss.count), false, false},
    {"loss_mean", offsetof(TrainState, loss.mean), true, false},
    {"loss_variance", offsetof(TrainState, loss.variance), true, false},
    {"grad_norm_count", offsetof(TrainState, grad_norm.count), false, false},
    {"grad_norm_mean", offsetof(TrainState, grad_norm.mean), true, false},
    {"grad_norm_variance", offsetof(TrainState, grad_norm.variance), true, false},
};
enum { NUM_TRAIN_STATE_FIELDS = sizeof train_state_fields / sizeof train_state_fields[0] };

// The 64 bits of a field.
static inline uint64_t train_state_field(const TrainState* state, int i) {
    uint64_t bits;
    memcpy(&bits, (const char*)state + train_state_fields[i].offset, sizeof bits);
    return bits;
}

static inline void train_state_write(TrainState state, String* out) {
    for (int i = 0; i < NUM_TRAIN_STATE_FIELDS; i++) {
        unsigned long long value = train_state_field(&state, i);
        string_append(out, "%s\n  \"%s\": ", i == 0 ? "{" : ",", train_state_fields[i].name);
        if (train_state_fields[i].hex)
            string_append(out, "\"%016llx\"", value);
        else
            string_append(out, "%llu", value);
    }
    string_append(out, "\n}\n");
}

static inline bool hex64_from_json(const cJSON* item, uint64_t* value) {
    if (!cJSON_IsString(item) || strspn(item->valuestring, "0123456789abcdef") != 16) return false;
    *value = strtoull(item->valuestring, NULL, 16);
    return item->valuestring[16] == '\0';
}

// A field that we do not know is a newer version's, and to go on without it would lose what it says: an
// error, but no damage.
static inline bool train_state_parse(TrainState* state, const char* text, const char* where, Error* err) {
    cJSON* json = cJSON_ParseWithOpts(text, NULL, 1);
    int known = 0;
    bool ok = cJSON_IsObject(json) || fail(err, EXIT_BAD_DATA, "%s is not a JSON object", where);
    memset(state, 0, sizeof *state);
    for (int i = 0; ok && i < NUM_TRAIN_STATE_FIELDS; i++) {
        const TrainStateField* field = &train_state_fields[i];
        const cJSON* item = cJSON_GetObjectItemCaseSensitive(json, field->name);
        if (item == NULL && !field->required) continue;
        uint64_t value = 0;
        known++;
        ok = (field->hex ? hex64_from_json(item, &value) : safetensors_integer(item, &value)) ||
             fail(err, EXIT_BAD_DATA, "%s: %s is missing or not a number", where, field->name);
        memcpy((char*)state + field->offset, &value, sizeof value);
    }
    const Detector* detectors[] = {&state->loss, &state->grad_norm};
    for (int i = 0; ok && i < 2; i++) // a mean that is no number would switch the guard off for good
        ok = (isfinite(detectors[i]->mean) && isfinite(detectors[i]->variance) &&
              detectors[i]->variance >= 0) ||
             fail(err, EXIT_BAD_DATA, "%s: the mean or variance of %s is impossible", where,
                  i == 0 ? "loss" : "grad_norm");
    if (ok && cJSON_GetArraySize(json) != known)
        ok = fail(err, EXIT_CONFIG,
                  "%s has a field that this version does not know: use the version that wrote it", where);
    cJSON_Delete(json);
    return ok;
}

static inline bool train_state_load(TrainState* state, const char* dir, Error* err) {
    char path[PATH_MAX];
    size_t size;
    if (!path_join(path, dir, "state.json", err)) return false;
    char* text = read_file(path, 1 << 16, &size, err);
    bool ok = text != NULL && train_state_parse(state, text, path, err);
    free(text);
    return ok;
}
