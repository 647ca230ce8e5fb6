// The run config: one JSON file, one struct, one table of knobs.
//
// A knob's JSON key is its struct field is its printed label. The table drives defaults, types, ranges,
// messages, the resolved config that is stored beside a run, and the reference in the README. An unknown key, a
// wrong type, a value out of range or a combination that cannot run is an error that names file, line, key,
// value and rule: a run is never changed silently. Paths are relative to the working directory.
#pragma once
#include "llmc/json.h"         // defines: json_parse_object, JsonSource, json_where, edit_distance
#include "llmc/model_config.h" // defines: model_config_from_json, model_config_load, model_config_write_json

enum { CONFIG_TEXT = 1024, MAX_DATA_SOURCES = 32 };
enum ScheduleType { SCHEDULE_COSINE, SCHEDULE_LINEAR, SCHEDULE_WSD, SCHEDULE_CONSTANT };
enum ComputePrecision { COMPUTE_FP32, COMPUTE_BF16 }; // in the order of MatmulCompute

typedef struct {
    char name[64], path[CONFIG_TEXT];
    double weight;
} DataSourceConfig;

typedef struct {
    uint64_t seed;
    ModelConfig model;
    struct {
        DataSourceConfig sources[MAX_DATA_SOURCES]; // data.train
        int num_sources;
        char validation[CONFIG_TEXT], tokenizer[CONFIG_TEXT];
        bool document_mask;
    } data;
    struct {
        int micro_batch_size, sequence_length, global_batch_size;
    } batch;
    struct {
        double learning_rate, beta1, beta2, eps, weight_decay, grad_clip;
    } optimizer;
    struct {
        int type, max_steps, warmup_steps; // type: a ScheduleType
        double decay_fraction, final_lr_fraction;
    } schedule;
    struct {
        int threads;
    } parallel;
    struct {
        int compute; // a ComputePrecision
    } precision;
    struct {
        int every, keep_last, permanent_every;
        char load_from[CONFIG_TEXT];
    } checkpoint;
    struct {
        int max_skipped_steps;
    } guard;
    struct {
        char run_dir[CONFIG_TEXT];
        int every;
    } log;
    struct {
        int every, batches;
    } eval;
    struct {
        int every;
        char prompt[CONFIG_TEXT];
        int max_new_tokens;
        double temperature;
        int top_k;
        double top_p;
        uint64_t seed;
        int num_samples;
    } sample;
} RunConfig;

// ----------------------------------------------------------------------------
// the knobs

enum KnobType { KNOB_INT, KNOB_U64, KNOB_NUMBER, KNOB_BOOL, KNOB_TEXT, KNOB_CHOICE };

typedef struct {
    const char *section, *key; // section "": the top level
    enum KnobType type;
    size_t offset;
    const char* standard; // the default as JSON; NULL: must be given
    double min, max;
    const char* choices; // "a|b|c"
    const char* meaning;
} Knob;

// clang-format off
#define AT(field) offsetof(RunConfig, field)
static const Knob knobs[] = {
    {"", "seed", KNOB_U64, AT(seed), "1", 0, 9007199254740992.0, NULL, "initial weights and data order"},
    {"data", "validation", KNOB_TEXT, AT(data.validation), "\"\"", 0, 0, NULL, "glob of the validation shards; empty: no evaluation"},
    {"data", "tokenizer", KNOB_TEXT, AT(data.tokenizer), "\"\"", 0, 0, NULL, "tokenizer.json, a .tiktoken file, or a directory with either or with GPT-2's two files; needed for samples and bits per byte"},
    {"data", "document_mask", KNOB_BOOL, AT(data.document_mask), "false", 0, 0, NULL, "attention stays inside a document"},
    {"batch", "micro_batch_size", KNOB_INT, AT(batch.micro_batch_size), NULL, 1, 65536, NULL, "sequences in one forward and backward pass"},
    {"batch", "sequence_length", KNOB_INT, AT(batch.sequence_length), NULL, 1, 16777216, NULL, "tokens in a sequence (T)"},
    {"batch", "global_batch_size", KNOB_INT, AT(batch.global_batch_size), "0", 0, 16777216, NULL, "sequences in an optimizer step, a multiple of micro_batch_size; 0: the same"},
    {"optimizer", "learning_rate", KNOB_NUMBER, AT(optimizer.learning_rate), NULL, 0, 100, NULL, "peak of the schedule"},
    {"optimizer", "beta1", KNOB_NUMBER, AT(optimizer.beta1), "0.9", 0, 0.999999, NULL, "AdamW's decay of the first moment"},
    {"optimizer", "beta2", KNOB_NUMBER, AT(optimizer.beta2), "0.95", 0, 0.999999, NULL, "AdamW's decay of the second moment"},
    {"optimizer", "eps", KNOB_NUMBER, AT(optimizer.eps), "1e-8", 1e-30, 1, NULL, "AdamW's guard against division by zero"},
    {"optimizer", "weight_decay", KNOB_NUMBER, AT(optimizer.weight_decay), "0.1", 0, 100, NULL, "decoupled; on matrices, not on biases and norms"},
    {"optimizer", "grad_clip", KNOB_NUMBER, AT(optimizer.grad_clip), "1.0", 0, 1e9, NULL, "largest global gradient norm; 0: no clipping"},
    {"schedule", "type", KNOB_CHOICE, AT(schedule.type), "\"cosine\"", 0, 0, "cosine|linear|wsd|constant", "shape behind the warm-up"},
    {"schedule", "max_steps", KNOB_INT, AT(schedule.max_steps), NULL, 1, 2000000000, NULL, "optimizer steps of the whole run"},
    {"schedule", "warmup_steps", KNOB_INT, AT(schedule.warmup_steps), "0", 0, 2000000000, NULL, "steps of linear warm-up"},
    {"schedule", "decay_fraction", KNOB_NUMBER, AT(schedule.decay_fraction), "0.2", 0, 1, NULL, "wsd: share of max_steps at the end that decays"},
    {"schedule", "final_lr_fraction", KNOB_NUMBER, AT(schedule.final_lr_fraction), "0.1", 0, 1, NULL, "learning rate of the last step, as a share of the peak"},
    {"parallel", "threads", KNOB_INT, AT(parallel.threads), "0", 0, 1024, NULL, "CPU threads; 0: one for each core"},
    {"precision", "compute", KNOB_CHOICE, AT(precision.compute), "\"fp32\"", 0, 0, "fp32|bf16", "what matmul inputs are rounded to; sums are fp32"},
    {"checkpoint", "every", KNOB_INT, AT(checkpoint.every), "0", 0, 2000000000, NULL, "steps between checkpoints; 0: only at the end"},
    {"checkpoint", "keep_last", KNOB_INT, AT(checkpoint.keep_last), "2", 1, 1000000, NULL, "newest checkpoints that are kept"},
    {"checkpoint", "permanent_every", KNOB_INT, AT(checkpoint.permanent_every), "0", 0, 2000000000, NULL, "checkpoints whose step is a multiple stay for good; 0: none"},
    {"checkpoint", "load_from", KNOB_TEXT, AT(checkpoint.load_from), "\"\"", 0, 0, NULL, "a checkpoint or Hugging Face model directory whose weights to start from, evaluate, sample or export"},
    {"guard", "max_skipped_steps", KNOB_INT, AT(guard.max_skipped_steps), "10", 1, 1000000, NULL, "steps in a row with a loss or gradient that is not finite, before the run gives up"},
    {"log", "run_dir", KNOB_TEXT, AT(log.run_dir), NULL, 0, 0, NULL, "directory of the run: log.jsonl, run_config.json, checkpoints/"},
    {"log", "every", KNOB_INT, AT(log.every), "1", 1, 2000000000, NULL, "steps between lines of the log"},
    {"eval", "every", KNOB_INT, AT(eval.every), "0", 0, 2000000000, NULL, "steps between evaluations; 0: only at the end"},
    {"eval", "batches", KNOB_INT, AT(eval.batches), "0", 0, 2000000000, NULL, "micro-batches of an evaluation; 0: the whole validation set"},
    {"sample", "every", KNOB_INT, AT(sample.every), "0", 0, 2000000000, NULL, "steps between samples; 0: none during training"},
    {"sample", "prompt", KNOB_TEXT, AT(sample.prompt), "\"\"", 0, 0, NULL, "text to continue"},
    {"sample", "max_new_tokens", KNOB_INT, AT(sample.max_new_tokens), "128", 1, 16777216, NULL, "a sample ends there, at the end of text, or at max_position_embeddings"},
    {"sample", "temperature", KNOB_NUMBER, AT(sample.temperature), "1.0", 0, 100, NULL, "0: always the most probable token"},
    {"sample", "top_k", KNOB_INT, AT(sample.top_k), "0", 0, 16777216, NULL, "only the k most probable tokens; 0: all"},
    {"sample", "top_p", KNOB_NUMBER, AT(sample.top_p), "1.0", 0, 1, NULL, "only the most probable tokens that together hold this share; 1: all"},
    {"sample", "seed", KNOB_U64, AT(sample.seed), "1", 0, 9007199254740992.0, NULL, "the same seed, the same text"},
    {"sample", "num_samples", KNOB_INT, AT(sample.num_samples), "1", 1, 10000, NULL, "texts to generate"},
};
#undef AT
// clang-format on
enum { NUM_KNOBS = sizeof knobs / sizeof knobs[0] };

static inline const Knob* find_knob(const char* section, const char* key) {
    for (int i = 0; i < NUM_KNOBS; i++)
        if (strcmp(knobs[i].section, section) == 0 && strcmp(knobs[i].key, key) == 0) return &knobs[i];
    return NULL;
}

// The index of text among "a|b|c", or -1.
static inline int find_choice(const char* choices, const char* text) {
    size_t n = strlen(text);
    for (int index = 0;; index++) {
        const char* end = strchrnul(choices, '|');
        if ((size_t)(end - choices) == n && memcmp(choices, text, n) == 0) return index;
        if (*end == '\0') return -1;
        choices = end + 1;
    }
}

static inline bool text_fits(const cJSON* item, const char* where, Error* err) {
    const char* text = cJSON_GetStringValue(item);
    if (text == NULL) return fail(err, EXIT_CONFIG, "%s is %s; a text in quotes is wanted", where, json_show(item));
    if (strlen(text) >= CONFIG_TEXT)
        return fail(err, EXIT_CONFIG, "%s is %zu bytes long; at most %d are possible", where, strlen(text), CONFIG_TEXT - 1);
    return true;
}

static inline bool knob_set(RunConfig* run, const Knob* k, const cJSON* item, const char* where, Error* err) {
    char* field = (char*)run + k->offset;
    double value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    const char* text = cJSON_GetStringValue(item);
    switch (k->type) {
    case KNOB_BOOL:
        if (!cJSON_IsBool(item)) return fail(err, EXIT_CONFIG, "%s is %s; true or false is wanted", where, json_show(item));
        *(bool*)field = cJSON_IsTrue(item) != 0;
        return true;
    case KNOB_TEXT:
        if (!text_fits(item, where, err)) return false;
        memcpy(field, text, strlen(text) + 1);
        return true;
    case KNOB_CHOICE:
        if (text == NULL || find_choice(k->choices, text) < 0)
            return fail(err, EXIT_CONFIG, "%s is %s; one of %s is wanted", where, json_show(item), k->choices);
        *(int*)field = find_choice(k->choices, text);
        return true;
    case KNOB_INT:
    case KNOB_U64:
    case KNOB_NUMBER:
        if (!(value >= k->min && value <= k->max) || (k->type != KNOB_NUMBER && value != floor(value)))
            return fail(err, EXIT_CONFIG, "%s is %s; %s from %.16g to %.16g is wanted", where, json_show(item),
                        k->type == KNOB_NUMBER ? "a number" : "a whole number", k->min, k->max);
        if (k->type == KNOB_INT) *(int*)field = (int)value;
        else if (k->type == KNOB_U64) *(uint64_t*)field = (uint64_t)value;
        else *(double*)field = value;
        return true;
    }
    return false;
}

// ----------------------------------------------------------------------------
// reading

// data.train: a glob, or an array of {"name", "path", "weight"}
static inline bool config_sources(RunConfig* run, const cJSON* train, const char* where, Error* err) {
    int n = 0;
    if (cJSON_IsString(train)) {
        if (!text_fits(train, where, err)) return false;
        DataSourceConfig* s = &run->data.sources[n++];
        snprintf(s->name, sizeof s->name, "train");
        snprintf(s->path, sizeof s->path, "%s", train->valuestring);
        s->weight = 1.0;
    } else if (cJSON_IsArray(train)) {
        for (const cJSON* item = train->child; item != NULL; item = item->next, n++) {
            const char* name = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "name"));
            const char* path = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(item, "path"));
            const cJSON* weight = cJSON_GetObjectItemCaseSensitive(item, "weight");
            bool shaped = name != NULL && path != NULL && cJSON_IsNumber(weight) && cJSON_GetArraySize(item) == 3;
            if (n == MAX_DATA_SOURCES) return fail(err, EXIT_CONFIG, "%s has more than %d sources", where, MAX_DATA_SOURCES);
            DataSourceConfig* s = &run->data.sources[n];
            if (!shaped || strlen(name) >= sizeof s->name || strlen(path) >= sizeof s->path || name[0] == '\0')
                return fail(err, EXIT_CONFIG, "%s: entry %d is %s; {\"name\": TEXT, \"path\": GLOB, \"weight\": NUMBER} is "
                            "wanted", where, n + 1, json_show(item));
            if (!(weight->valuedouble > 0 && weight->valuedouble <= 1e12))
                return fail(err, EXIT_CONFIG, "%s: the weight of \"%s\" is %s; a number above 0 is wanted", where, name,
                            json_show(weight));
            memcpy(s->name, name, strlen(name) + 1);
            memcpy(s->path, path, strlen(path) + 1);
            s->weight = weight->valuedouble;
        }
    }
    run->data.num_sources = n;
    if (n > 0) return true;
    return fail(err, EXIT_CONFIG, "%s is %s; a glob or an array of {\"name\", \"path\", \"weight\"} is wanted", where,
                json_show(train));
}

// "section.key=value" into the tree: value as JSON if it is JSON, else as text.
static inline bool config_override(cJSON* root, const char* override, Error* err) {
    const char* equals = strchr(override, '=');
    char section[64] = "", key[64] = "";
    const char* dot = equals != NULL ? (const char*)memchr(override, '.', (size_t)(equals - override)) : NULL;
    const char* key_begin = dot != NULL ? dot + 1 : override;
    if (equals == NULL || equals == key_begin || (dot != NULL && dot - override >= 64) || equals - key_begin >= 64)
        return fail(err, EXIT_USAGE, "command line: %s: section.key=value is wanted", override);
    if (dot != NULL) memcpy(section, override, (size_t)(dot - override));
    memcpy(key, key_begin, (size_t)(equals - key_begin));
    cJSON* object = section[0] == '\0' ? root : cJSON_GetObjectItemCaseSensitive(root, section);
    if (object == NULL) {
        object = cJSON_CreateObject();
        cJSON_AddItemToObject(root, section, object);
    }
    if (!cJSON_IsObject(object))
        return fail(err, EXIT_CONFIG, "command line: %s: %s is not an object in the run config", override, section);
    cJSON* value = json_depth(equals + 1, strlen(equals + 1)) <= JSON_MAX_DEPTH
                       ? cJSON_ParseWithOpts(equals + 1, NULL, 1) : NULL;
    if (value == NULL) value = cJSON_CreateString(equals + 1);
    if (cJSON_GetObjectItemCaseSensitive(object, key) != NULL) cJSON_ReplaceItemInObjectCaseSensitive(object, key, value);
    else cJSON_AddItemToObject(object, key, value);
    return true;
}

// A model section that is a path is replaced by the object in that file before the overrides are applied, so
// that they apply on top.
static inline bool config_model_file(cJSON* root, char path[CONFIG_TEXT], Error* err) {
    const cJSON* model = cJSON_GetObjectItemCaseSensitive(root, "model");
    if (!cJSON_IsString(model)) return true;
    size_t size;
    if (!text_fits(model, "model", err)) return false;
    snprintf(path, CONFIG_TEXT, "%s", model->valuestring);
    char* text = read_file(path, JSON_MAX_BYTES, &size, err);
    cJSON* json = text != NULL ? json_parse_object(text, size, path, err) : NULL;
    free(text);
    return json != NULL && cJSON_ReplaceItemInObjectCaseSensitive(root, "model", json);
}

static inline bool config_unknown(const char* section, const char* key, const JsonSource* source, Error* err) {
    const char* best = section[0] == '\0' ? "data" : "train";
    const char* sections[] = {"model", "batch", "optimizer", "schedule", "parallel", "precision", "checkpoint", "guard",
                              "log", "eval", "sample", "seed"};
    for (size_t i = 0; section[0] == '\0' && i < sizeof sections / sizeof sections[0]; i++)
        if (edit_distance(key, sections[i]) < edit_distance(key, best)) best = sections[i];
    bool first = strcmp(section, "data") != 0;
    for (int i = 0; section[0] != '\0' && i < NUM_KNOBS; i++) {
        if (strcmp(knobs[i].section, section) != 0) continue;
        if (first || edit_distance(key, knobs[i].key) < edit_distance(key, best)) best = knobs[i].key;
        first = false;
    }
    return fail(err, EXIT_CONFIG, "%s: unknown key; did you mean %s%s%s?", json_where(source, section, key), section,
                section[0] != '\0' ? "." : "", best);
}

static inline bool is_section(const char* name) {
    for (int i = 0; i < NUM_KNOBS; i++)
        if (name[0] != '\0' && strcmp(knobs[i].section, name) == 0) return true;
    return false;
}

// Every key of the file sets something, once.
static inline bool config_keys(RunConfig* run, const cJSON* object, const char* section, const JsonSource* source,
                               Error* err) {
    const char* twice = json_duplicate(object);
    if (twice != NULL) return fail(err, EXIT_CONFIG, "%s stands twice", json_where_nth(source, section, twice, 2));
    for (const cJSON* item = object->child; item != NULL; item = item->next) {
        const char* where = json_where(source, section, item->string);
        const Knob* knob = find_knob(section, item->string);
        bool top = section[0] == '\0', ok;
        if (knob != NULL) ok = knob_set(run, knob, item, where, err);
        else if (top && strcmp(item->string, "model") == 0) ok = true; // read on its own
        else if (!top && strcmp(section, "data") == 0 && strcmp(item->string, "train") == 0)
            ok = config_sources(run, item, where, err);
        else if (!top || !is_section(item->string)) ok = config_unknown(section, item->string, source, err);
        else if (!cJSON_IsObject(item)) ok = fail(err, EXIT_CONFIG, "%s is %s; an object is wanted", where, json_show(item));
        else ok = config_keys(run, item, item->string, source, err);
        if (!ok) return false;
    }
    return true;
}

static inline bool config_defaults(RunConfig* run, const cJSON* root, const JsonSource* source, Error* err) {
    for (int i = 0; i < NUM_KNOBS; i++) {
        const Knob* k = &knobs[i];
        const cJSON* section = k->section[0] == '\0' ? root : cJSON_GetObjectItemCaseSensitive(root, k->section);
        bool given = cJSON_GetObjectItemCaseSensitive(section, k->key) != NULL;
        if (k->standard == NULL && !given)
            return fail(err, EXIT_CONFIG, "%s is missing; it has no default: %s", json_where(source, k->section, k->key),
                        k->meaning);
        if (k->standard == NULL) continue;
        cJSON* value = cJSON_Parse(k->standard);
        bool ok = knob_set(run, k, value, k->key, err);
        cJSON_Delete(value);
        if (!ok) return false;
    }
    return true;
}

// Rules between knobs.
static inline bool config_rules(RunConfig* run, const JsonSource* source, Error* err) {
    int micro = run->batch.micro_batch_size;
    if (run->batch.global_batch_size == 0) run->batch.global_batch_size = micro;
    if (run->batch.global_batch_size % micro != 0)
        return fail(err, EXIT_CONFIG, "%s is %d; it must be a multiple of micro_batch_size %d (%d or %d, say)",
                    json_where(source, "batch", "global_batch_size"), run->batch.global_batch_size, micro,
                    (run->batch.global_batch_size / micro + 1) * micro,
                    run->batch.global_batch_size < micro ? micro : run->batch.global_batch_size / micro * micro);
    if (run->batch.sequence_length > run->model.max_position_embeddings)
        return fail(err, EXIT_CONFIG, "%s is %d; at most model.max_position_embeddings, %d, is possible",
                    json_where(source, "batch", "sequence_length"), run->batch.sequence_length,
                    run->model.max_position_embeddings);
    if ((uint64_t)micro * (uint64_t)run->batch.sequence_length > INT_MAX / 2)
        return fail(err, EXIT_CONFIG, "%s is %d: with sequence_length %d a micro-batch has more than 2^30 tokens",
                    json_where(source, "batch", "micro_batch_size"), micro, run->batch.sequence_length);
    if (run->schedule.warmup_steps > run->schedule.max_steps)
        return fail(err, EXIT_CONFIG, "%s is %d; at most schedule.max_steps, %d, is possible",
                    json_where(source, "schedule", "warmup_steps"), run->schedule.warmup_steps, run->schedule.max_steps);
    if (run->log.run_dir[0] == '\0')
        return fail(err, EXIT_CONFIG, "%s is empty; name a directory", json_where(source, "log", "run_dir"));
    return true;
}

static inline bool config_from_json(RunConfig* run, cJSON* root, const JsonSource* source, Error* err) {
    char model_path[CONFIG_TEXT] = "";
    memset(run, 0, sizeof *run);
    if (!config_model_file(root, model_path, err)) return false;
    for (int i = 0; i < source->num_overrides; i++)
        if (!config_override(root, source->overrides[i], err)) return false;
    if (!config_defaults(run, root, source, err) || !config_keys(run, root, "", source, err)) return false;
    const cJSON* model = cJSON_GetObjectItemCaseSensitive(root, "model");
    const cJSON* train = cJSON_GetObjectItemCaseSensitive(cJSON_GetObjectItemCaseSensitive(root, "data"), "train");
    if (!cJSON_IsObject(model))
        return fail(err, EXIT_CONFIG, "%s is %s; an object with the keys of a Hugging Face config.json, or the path of "
                    "one, is wanted", json_where(source, "", "model"), model != NULL ? json_show(model) : "missing");
    if (train == NULL)
        return fail(err, EXIT_CONFIG, "%s is missing; it has no default: the token shards to train on",
                    json_where(source, "data", "train"));
    JsonSource model_source = *source;
    if (model_path[0] != '\0') model_source.name = model_path, model_source.size = 0;
    if (!model_config_from_json(&run->model, model, &model_source, "model", model_path[0] != '\0', err)) return false;
    return config_rules(run, source, err);
}

// text (size bytes, with a NUL behind) is changed. name stands for the file in messages.
static inline bool config_parse(RunConfig* run, char* text, size_t size, const char* name, int num_overrides,
                                char** overrides, Error* err) {
    JsonSource source = {name, text, size, num_overrides, overrides};
    cJSON* root = json_parse_object(text, size, name, err);
    bool ok = root != NULL && config_from_json(run, root, &source, err);
    cJSON_Delete(root);
    return ok;
}

static inline bool config_load(RunConfig* run, const char* path, int num_overrides, char** overrides, Error* err) {
    size_t size;
    char* text = read_file(path, JSON_MAX_BYTES, &size, err);
    bool ok = text != NULL && config_parse(run, text, size, path, num_overrides, overrides, err);
    free(text);
    return ok;
}
