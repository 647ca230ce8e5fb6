// The run config: one JSON file, read into one struct by one table of knobs (config_knobs.h).
//
// An unknown key, a wrong type, a value out of range or a combination that cannot run is an error that names file,
// line, key, value and rule: a run is never changed silently. Paths are relative to the working directory, everywhere.
#pragma once
#include "llmc/config_knobs.h" // defines: RunConfig, Knob, knobs, find_knob, is_section
#include "llmc/json.h"         // defines: json_parse_object, JsonSource, JsonValue, fail_at, fail_value
#include "llmc/layout.h"       // defines: layout_single
#include "llmc/model_config.h" // defines: model_config_from_json, model_key_alias

// ----------------------------------------------------------------------------
// one knob

// The index of text among "a|b|c", or -1.
static inline int find_choice(const char* choices, const char* text) {
    size_t n = strlen(text);
    for (int index = 0;; index++) {
        const char* end = choices + strcspn(choices, "|");
        if ((size_t)(end - choices) == n && memcmp(choices, text, n) == 0) return index;
        if (*end == '\0') return -1;
        choices = end + 1;
    }
}

static inline bool read_choice(int* out, const char* choices, const JsonValue* v, Error* err) {
    const char* text = cJSON_GetStringValue(v->item);
    int choice = text != NULL ? find_choice(choices, text) : -1;
    if (choice < 0) return fail_value(err, v, "one of %s is wanted", choices);
    *out = choice;
    return true;
}

// One entry of data.train: {"name": TEXT, "path": GLOB, "weight": NUMBER}
static inline bool read_source(DataSourceConfig* s, const cJSON* entry, const JsonValue* train, Error* err) {
    JsonValue v = *train;
    v.item = entry;
    if (!cJSON_IsObject(entry) || cJSON_GetArraySize(entry) != 3)
        return fail_value(err, &v, "a source is {\"name\": TEXT, \"path\": GLOB, \"weight\": NUMBER}");
    JsonValue name = json_member(v.source, v.path, entry, "name"),
              path = json_member(v.source, v.path, entry, "path");
    JsonValue weight = json_member(v.source, v.path, entry, "weight");
    return json_read_text(s->name, sizeof s->name, &name, err) &&
           json_read_text(s->path, sizeof s->path, &path, err) &&
           json_read_number(&s->weight, &weight, false, 1e-9, 1e9, err);
}

static inline bool read_sources(RunConfig* run, const JsonValue* v, Error* err) {
    DataSourceConfig* sources = run->data.sources;
    int count = cJSON_GetArraySize(v->item);
    run->data.num_sources = 1;
    if (cJSON_IsString(v->item)) {
        snprintf(sources[0].name, sizeof sources[0].name, "train");
        sources[0].weight = 1.0;
        return json_read_text(sources[0].path, sizeof sources[0].path, v, err);
    }
    if (!cJSON_IsArray(v->item) || count < 1 || count > MAX_DATA_SOURCES)
        return fail_value(err, v, "a glob or an array of 1 to %d sources is wanted", MAX_DATA_SOURCES);
    run->data.num_sources = 0;
    for (const cJSON* entry = v->item->child; entry != NULL; entry = entry->next)
        if (!read_source(&sources[run->data.num_sources++], entry, v, err)) return false;
    return true;
}

// The model is read on its own, because it may stand in another file.
static inline bool read_knob(RunConfig* run, const Knob* k, const JsonValue* v, Error* err) {
    void* field = (char*)run + k->offset;
    double value = 0;
    switch (k->type) {
    case KNOB_BOOL:
        return json_read_bool((bool*)field, v, err);
    case KNOB_TEXT:
        return json_read_text((char*)field, CONFIG_TEXT, v, err);
    case KNOB_CHOICE:
        return read_choice((int*)field, k->choices, v, err);
    case KNOB_SOURCES:
        return read_sources(run, v, err);
    case KNOB_MODEL:
        return true;
    case KNOB_INT:
    case KNOB_U64:
    case KNOB_NUMBER:
        break;
    }
    if (!json_read_number(&value, v, k->type != KNOB_NUMBER, k->min, k->max, err)) return false;
    if (k->type == KNOB_INT)
        *(int*)field = (int)value;
    else if (k->type == KNOB_U64)
        *(uint64_t*)field = (uint64_t)value;
    else
        *(double*)field = value;
    return true;
}

// ----------------------------------------------------------------------------
// the file, the file of the model, and the overrides become one tree

typedef struct {
    cJSON* root;
    JsonSource source;       // the run config
    JsonSource model_source; // what the model section stands in: the same, or a config.json
    char model_path[CONFIG_TEXT], *model_text;
    Error* err;
} ConfigReader;

// A model section that is a path becomes the object in that file.
static inline bool load_model_section(ConfigReader* r) {
    JsonValue v = json_member(&r->source, "", r->root, "model");
    if (!cJSON_IsString(v.item)) return true;
    if (!json_read_text(r->model_path, sizeof r->model_path, &v, r->err)) return false;
    Error unreadable = {0, {0}};
    free(r->model_text);
    JsonSource* s = &r->model_source;
    *s = r->source;
    s->name = r->model_path, s->section = "model", s->size = 0;
    s->text = r->model_text = read_file(r->model_path, JSON_MAX_BYTES, &s->size, &unreadable);
    if (r->model_text == NULL) return fail_value(r->err, &v, "%s", unreadable.text);
    cJSON* model = json_parse_object(r->model_text, s, r->err);
    return model != NULL && cJSON_ReplaceItemInObjectCaseSensitive(r->root, "model", model);
}

static inline cJSON* override_value(const char* text, const Knob* knob) {
    size_t size = strlen(text);
    bool safe = json_find_nul(text, size) == size && json_depth(text, size) <= JSON_MAX_DEPTH;
    cJSON* value = safe ? cJSON_ParseWithOpts(text, NULL, 1) : NULL;
    if (value != NULL && (knob == NULL || knob->type != KNOB_TEXT || cJSON_IsString(value))) return value;
    cJSON_Delete(value);
    return cJSON_CreateString(text);
}

// The dot between section and key; NULL: the key is one of the top level.
static inline const char* override_dot(const char* override) {
    return (const char*)memchr(override, '.', strcspn(override, "="));
}

// "section.key=value": the value is JSON if it can be, else text; a knob that is text needs no quotes.
static inline bool apply_override(ConfigReader* r, const char* override) {
    char section[64] = "", key[64] = "";
    const char* equals = override + strcspn(override, "=");
    const char* dot = override_dot(override);
    const uint8_t *value_begin = (const uint8_t*)equals, *value_end = value_begin + strlen(equals);
    const char* begin = dot != NULL ? dot + 1 : override;
    if (*equals == '\0' || dot == override || begin == equals || equals - override >= (ptrdiff_t)sizeof key ||
        memchr(begin, '.', (size_t)(equals - begin)) != NULL)
        return fail(r->err, EXIT_USAGE, "command line: %.200s: section.key=value is wanted", override);
    if (utf8_skip(value_begin, value_end) != value_end)
        return fail(r->err, EXIT_CONFIG, "command line: %.*s: the value is not UTF-8",
                    (int)(equals - override), override);
    if (dot != NULL) memcpy(section, override, (size_t)(dot - override));
    memcpy(key, begin, (size_t)(equals - begin));
    cJSON* object = dot == NULL ? r->root : cJSON_GetObjectItemCaseSensitive(r->root, section);
    if (object == NULL) object = cJSON_AddObjectToObject(r->root, section);
    if (!cJSON_IsObject(object))
        return fail(r->err, EXIT_CONFIG, "command line: %.200s: %s is not an object in %s", override, section,
                    r->source.name);
    cJSON* value = override_value(equals + 1, find_knob(section, key));
    if (strcmp(section, "model") == 0 && model_key_alias(key) != NULL)
        cJSON_DeleteItemFromObjectCaseSensitive(object, model_key_alias(key));
    cJSON_DeleteItemFromObjectCaseSensitive(object, key);
    cJSON_AddItemToObject(object, key, value);
    JsonValue v = json_member(&r->source, section, object, key);
    return json_check_keys(value, v.path, &r->source, r->err);
}

// Keys of the top level come first: model=PATH is the ground for model.key=value, whichever is given first.
static inline bool apply_overrides(ConfigReader* r, bool dotted) {
    bool ok = true;
    for (int i = 0; i < r->source.num_overrides && ok; i++)
        if ((override_dot(r->source.overrides[i]) != NULL) == dotted)
            ok = apply_override(r, r->source.overrides[i]);
    return ok;
}

// ----------------------------------------------------------------------------
// the tree becomes the struct

// The key that was meant, "section.key" or the name of a section: similar, and rather in the same section.
static inline void nearest_knob(char out[128], const char* section, const char* key) {
    int best = INT_MAX;
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        int distance = name_distance(key, k->key) + (strcmp(section, k->section) != 0);
        if (distance < best) {
            best = distance;
            snprintf(out, 128, "%s%s%s", k->section, k->section[0] != '\0' ? "." : "", k->key);
        }
        if (section[0] == '\0' && k->section[0] != '\0' && name_distance(key, k->section) < best) {
            best = name_distance(key, k->section);
            snprintf(out, 128, "%s", k->section);
        }
    }
}

// Every key of an object sets a knob or is a section.
static inline bool read_keys(ConfigReader* r, RunConfig* run, const cJSON* object, const char* section) {
    for (const cJSON* item = object->child; item != NULL; item = item->next) {
        JsonValue v = json_member(&r->source, section, object, item->string);
        const Knob* knob = find_knob(section, item->string);
        char meant[128];
        if (knob != NULL) {
            if (!read_knob(run, knob, &v, r->err)) return false;
        } else if (section[0] == '\0' && is_section(item->string)) {
            if (!cJSON_IsObject(item)) return fail_value(r->err, &v, "an object, { ... }, is wanted");
            if (!read_keys(r, run, item, item->string)) return false;
        } else {
            nearest_knob(meant, section, item->string);
            return fail_at(r->err, &v, ": unknown key; did you mean %s?", meant);
        }
    }
    return true;
}

static inline bool set_defaults(RunConfig* run, Error* err) {
    const JsonSource source = {"the table of knobs", "", 0, "", 0, NULL};
    for (int i = 0; i < NUM_KNOBS; i++) {
        if (knobs[i].standard == NULL) continue;
        cJSON* object = cJSON_CreateObject();
        cJSON_AddItemToObject(object, knobs[i].key, cJSON_Parse(knobs[i].standard));
        JsonValue v = json_member(&source, "", object, knobs[i].key);
        bool ok = read_knob(run, &knobs[i], &v, err);
        cJSON_Delete(object);
        if (!ok) return false;
    }
    return true;
}

static inline bool check_required(const ConfigReader* r) {
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        const cJSON* section =
            k->section[0] == '\0' ? r->root : cJSON_GetObjectItemCaseSensitive(r->root, k->section);
        JsonValue v = json_member(&r->source, k->section, section, k->key);
        if (k->standard == NULL && v.item == NULL)
            return fail_at(r->err, &v, " is missing; it has no default: %s", k->meaning);
    }
    return true;
}

static inline bool read_model(ConfigReader* r, RunConfig* run) {
    JsonValue v = json_member(&r->source, "", r->root, "model");
    String notes = {NULL, 0, 0};
    bool own_file = r->model_text != NULL;
    if (!cJSON_IsObject(v.item))
        return fail_value(r->err, &v,
                          "the keys of a Hugging Face config.json, or the path of one, are wanted");
    bool ok = model_config_from_json(&run->model, v.item, own_file ? &r->model_source : &r->source, "model",
                                     own_file ? &notes : NULL, r->err);
    if (ok && notes.size != 0) fputs(notes.data, stderr);
    free(notes.data);
    return ok;
}

// A bound on what a micro-batch leaves in memory, in floats: beyond any machine, yet no size that is computed
// from it overflows.
static inline bool micro_batch_fits(const RunConfig* run) {
    const ModelConfig* c = &run->model;
    uint64_t width = model_dim(c, DIM_QKV) + 8 * model_dim(c, DIM_HIDDEN) + 4 * model_dim(c, DIM_FC), floats;
    uint64_t tokens = (uint64_t)run->batch.micro_batch_size * (uint64_t)run->batch.sequence_length;
    return tokens <= 1u << 30 && checked_mul(tokens, (uint64_t)c->num_hidden_layers * width, &floats) &&
           checked_extent(floats, tokens, model_dim(c, DIM_VOCAB), &floats) && floats <= (uint64_t)1 << 48;
}

// "WHERE is VALUE; " and the formatted rule that section.key breaks.
__attribute__((format(printf, 4, 5))) static inline bool fail_rule(const ConfigReader* r, const char* section,
                                                                   const char* key, const char* format, ...) {
    char rule[512];
    va_list args;
    va_start(args, format);
    vsnprintf(rule, sizeof rule, format, args);
    va_end(args);
    JsonValue v = json_member(&r->source, section, cJSON_GetObjectItemCaseSensitive(r->root, section), key);
    return fail_value(r->err, &v, "%s", rule);
}

// Rules between knobs.
static inline bool check_rules(const ConfigReader* r, RunConfig* run) {
    int micro = run->batch.micro_batch_size;
    if (run->batch.global_batch_size == 0) run->batch.global_batch_size = micro;
    if (run->batch.global_batch_size % micro != 0)
        return fail_rule(r, "batch", "global_batch_size", "it must be a multiple of micro_batch_size, %d",
                         micro);
    if (run->batch.sequence_length > run->model.max_position_embeddings)
        return fail_rule(r, "batch", "sequence_length",
                         "at most model.max_position_embeddings, %d, is possible",
                         run->model.max_position_embeddings);
    if (!micro_batch_fits(run))
        return fail_rule(r, "batch", "micro_batch_size",
                         "with sequence_length %d this model would need more than "
                         "2^50 bytes",
                         run->batch.sequence_length);
    // GELU of its rounded input, computed again, is not to the bit what the matmul made of its fp32 sum
    bool gelu = run->model.family->activation == ACTIVATION_GELU_TANH;
    bool again = run->batch.recompute == RECOMPUTE_ACTIVATION || run->batch.recompute == RECOMPUTE_NORM;
    if (gelu && again && run->precision.fused_gelu)
        return fail_rule(r, "batch", "recompute",
                         "precision.fused_gelu must then be false; block goes with both");
    if (run->schedule.warmup_steps > run->schedule.max_steps)
        return fail_rule(r, "schedule", "warmup_steps", "at most schedule.max_steps, %d, is possible",
                         run->schedule.max_steps);
    int decay = run->schedule.type == SCHEDULE_WSD
                    ? (int)(run->schedule.decay_fraction * run->schedule.max_steps)
                    : 0;
    if (run->schedule.warmup_steps > run->schedule.max_steps - decay)
        return fail_rule(r, "schedule", "warmup_steps", "the decay, %g of %d steps, leaves at most %d for it",
                         run->schedule.decay_fraction, run->schedule.max_steps,
                         run->schedule.max_steps - decay);
    int every = run->checkpoint.every, permanent = run->checkpoint.permanent_every;
    if (permanent > 0 && (every == 0 || permanent % every != 0))
        return fail_rule(r, "checkpoint", "permanent_every", "it must be a multiple of checkpoint.every, %d",
                         every);
    if (run->checkpoint.fast_every > 0 && run->checkpoint.fast_dir[0] == '\0')
        return fail_rule(r, "checkpoint", "fast_every",
                         "checkpoint.fast_dir is empty: name a directory on a disk of each node");
    if (run->eval.every > 0 && run->data.validation[0] == '\0')
        return fail_rule(r, "eval", "every", "data.validation is empty: name the shards to evaluate on");
    if (run->sample.every > 0 && run->data.tokenizer[0] == '\0')
        return fail_rule(r, "sample", "every", "data.tokenizer is empty: name what turns tokens into text");
    if (run->parallel.hang_seconds_max != 0 &&
        run->parallel.hang_seconds_max < run->parallel.hang_seconds_min)
        return fail_rule(r, "parallel", "hang_seconds_max",
                         "0, or at least hang_seconds_min, %d, is possible", run->parallel.hang_seconds_min);
    if (run->log.run_dir[0] == '\0') return fail_rule(r, "log", "run_dir", "a directory is wanted");
    return true;
}

// ----------------------------------------------------------------------------
// the whole

// text need not end in a NUL. name stands for it in messages; a later override wins.
static inline bool config_parse(RunConfig* run, const char* text, size_t size, const char* name,
                                int num_overrides, char** overrides, Error* err) {
    char* copy = (char*)malloc_check(size + 1); // comments are blanked in it
    memcpy(copy, text, size);
    copy[size] = '\0';
    ConfigReader r;
    memset(&r, 0, sizeof r);
    memset(run, 0, sizeof *run);
    run->layout = layout_single();
    r.source.name = name, r.source.text = copy, r.source.size = size, r.source.section = "";
    r.source.num_overrides = num_overrides, r.source.overrides = overrides;
    r.err = err;
    r.root = json_parse_object(copy, &r.source, err);
    bool ok =
        r.root != NULL && apply_overrides(&r, false) && load_model_section(&r) && apply_overrides(&r, true);
    ok = ok && set_defaults(run, err) && read_keys(&r, run, r.root, "") && check_required(&r) &&
         read_model(&r, run) && check_rules(&r, run);
    cJSON_Delete(r.root);
    free(r.model_text);
    free(copy);
    return ok;
}

static inline bool config_load(RunConfig* run, const char* path, int num_overrides, char** overrides,
                               Error* err) {
    size_t size;
    char* text = read_file(path, JSON_MAX_BYTES, &size, err);
    bool ok = text != NULL && config_parse(run, text, size, path, num_overrides, overrides, err);
    free(text);
    return ok;
}
