// ModelConfig from Hugging Face's config.json (GPT-2's spelling included) and back.
//
// Every key that such a file may hold is in one of three tables: those that set a field, those that must have
// the one value that this program computes, and those that do not matter to it. In a run config's own model
// section any other key is an error; in somebody else's config.json it is named in a note.
#pragma once
#include <math.h>

#include "llmc/json.h"  // defines: json_parse_object, json_where, json_show, JsonSource
#include "llmc/model.h" // defines: ModelConfig, ModelFamily, model_families

enum ModelKeyType { MODEL_INT, MODEL_DOUBLE, MODEL_BOOL };

typedef struct {
    const char* key;      // Hugging Face's usual name; rows of the same key set several fields
    const char* gpt2;     // its name in a GPT-2 config, NULL: the same
    const char* families; // the model types that have it; NULL: all
    enum ModelKeyType type;
    size_t offset;
    double min, max;
    bool required;
} ModelKey;

// clang-format off
#define MODEL_FIELD(field) offsetof(ModelConfig, field)
static const ModelKey model_keys[] = {
    {"vocab_size",              NULL,          NULL, MODEL_INT, MODEL_FIELD(vocab_size), 2, 1 << 24, true},
    {"hidden_size",             "n_embd",      NULL, MODEL_INT, MODEL_FIELD(hidden_size), 1, 1 << 17, true},
    {"num_hidden_layers",       "n_layer",     NULL, MODEL_INT, MODEL_FIELD(num_hidden_layers), 1, 4096, true},
    {"num_attention_heads",     "n_head",      NULL, MODEL_INT, MODEL_FIELD(num_attention_heads), 1, 4096, true},
    {"num_key_value_heads",     NULL, "llama mistral qwen2", MODEL_INT, MODEL_FIELD(num_key_value_heads), 1, 4096, false},
    {"head_dim",                NULL, "llama mistral qwen2", MODEL_INT, MODEL_FIELD(head_dim), 1, 1024, false},
    {"intermediate_size",       "n_inner",     NULL, MODEL_INT, MODEL_FIELD(intermediate_size), 1, 1 << 20, false},
    {"max_position_embeddings", "n_positions", NULL, MODEL_INT, MODEL_FIELD(max_position_embeddings), 1, 1 << 24, false},
    {"layer_norm_epsilon",      NULL, "gpt2",  MODEL_DOUBLE, MODEL_FIELD(norm_eps), 0, 1, false},
    {"rms_norm_eps",            NULL, "llama mistral qwen2", MODEL_DOUBLE, MODEL_FIELD(norm_eps), 0, 1, false},
    {"initializer_range",       NULL,          NULL, MODEL_DOUBLE, MODEL_FIELD(initializer_range), 0, 10, false},
    {"rope_theta",              NULL, "llama mistral qwen2", MODEL_DOUBLE, MODEL_FIELD(rope.theta), 1, 1e12, false},
    {"tie_word_embeddings",     NULL,          NULL, MODEL_BOOL, MODEL_FIELD(tie_word_embeddings), 0, 1, false},
    {"bias",                    NULL, "gpt2",  MODEL_BOOL, MODEL_FIELD(attention_bias), 0, 1, false},
    {"bias",                    NULL, "gpt2",  MODEL_BOOL, MODEL_FIELD(attention_output_bias), 0, 1, false},
    {"bias",                    NULL, "gpt2",  MODEL_BOOL, MODEL_FIELD(mlp_bias), 0, 1, false},
    {"bias",                    NULL, "gpt2",  MODEL_BOOL, MODEL_FIELD(norm_bias), 0, 1, false},
    {"attention_bias",          NULL, "llama", MODEL_BOOL, MODEL_FIELD(attention_bias), 0, 1, false},
    {"attention_bias",          NULL, "llama", MODEL_BOOL, MODEL_FIELD(attention_output_bias), 0, 1, false},
    {"mlp_bias",                NULL, "llama", MODEL_BOOL, MODEL_FIELD(mlp_bias), 0, 1, false},
    {"bos_token_id",            NULL,          NULL, MODEL_INT, MODEL_FIELD(bos_token_id), -1, 1 << 24, false},
    {"eos_token_id",            NULL,          NULL, MODEL_INT, MODEL_FIELD(eos_token_id), -1, 1 << 24, false},
};
#undef MODEL_FIELD
enum { NUM_MODEL_KEYS = sizeof model_keys / sizeof model_keys[0] };

// Keys that would change what is computed: only the value named here is what this program does.
static const struct { const char *key, *value; } fixed_model_keys[] = {
    {"scale_attn_weights", "true"}, {"scale_attn_by_inverse_layer_idx", "false"}, {"add_cross_attention", "false"},
    {"use_sliding_window", "false"}, {"is_encoder_decoder", "false"}, {"quantization_config", "null"},
};
enum { NUM_FIXED_MODEL_KEYS = sizeof fixed_model_keys / sizeof fixed_model_keys[0] };

// Keys that change nothing here. Dropout belongs to them: this program trains without, as recent models are.
static const char* const harmless_model_keys[] = {
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "dtype", "embd_pdrop", "gradient_checkpointing",
    "layer_types", "max_window_layers", "model_type", "n_ctx", "output_past", "pad_token_id", "pretraining_tp",
    "reorder_and_upcast_attn", "resid_pdrop", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
    "summary_type", "summary_use_proj", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
};
enum { NUM_HARMLESS_MODEL_KEYS = sizeof harmless_model_keys / sizeof harmless_model_keys[0] };
// clang-format on

static inline bool model_key_is(const ModelKey* k, const ModelFamily* family, const char* key) {
    if (k->families != NULL && strstr(k->families, family->model_type) == NULL) return false;
    return strcmp(key, k->key) == 0 || (k->gpt2 != NULL && family->conv1d && strcmp(key, k->gpt2) == 0);
}

static inline bool is_harmless_model_key(const char* key) {
    for (int i = 0; i < NUM_HARMLESS_MODEL_KEYS; i++)
        if (strcmp(key, harmless_model_keys[i]) == 0) return true;
    return false;
}

// Stores one value; the type and the range are the table's.
static inline bool model_key_set(ModelConfig* c, const ModelKey* k, const cJSON* item, const char* where, Error* err) {
    char* field = (char*)c + k->offset;
    if (k->type == MODEL_BOOL) {
        if (!cJSON_IsBool(item)) return fail(err, EXIT_CONFIG, "%s is %s; true or false is wanted", where, json_show(item));
        *(bool*)field = cJSON_IsTrue(item) != 0;
        return true;
    }
    double value = cJSON_IsNumber(item) ? item->valuedouble : NAN;
    bool whole = k->type == MODEL_DOUBLE || value == floor(value);
    if (!(value >= k->min && value <= k->max) || !whole)
        return fail(err, EXIT_CONFIG, "%s is %s; %s from %.15g to %.15g is wanted", where, json_show(item),
                    k->type == MODEL_INT ? "a whole number" : "a number", k->min, k->max);
    if (k->type == MODEL_INT) *(int*)field = (int)value;
    else *(double*)field = value;
    return true;
}

static inline bool rope_number(double* out, const cJSON* object, const char* key, double min, const char* where,
                               Error* err) {
    const cJSON* item = cJSON_GetObjectItemCaseSensitive(object, key);
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= min) || !(item->valuedouble <= 1e12))
        return fail(err, EXIT_CONFIG, "%s: %s is %s; a number of at least %.15g is wanted", where, key,
                    item != NULL ? json_show(item) : "missing", min);
    *out = item->valuedouble;
    return true;
}

// rope_scaling, or transformers 5's rope_parameters, which holds rope_theta too
static inline bool rope_from_json(RopeConfig* rope, const cJSON* object, const char* where, Error* err) {
    if (cJSON_IsNull(object)) return true;
    if (!cJSON_IsObject(object)) return fail(err, EXIT_CONFIG, "%s is %s; an object or null is wanted", where, json_show(object));
    const cJSON* type = cJSON_GetObjectItemCaseSensitive(object, "rope_type");
    if (type == NULL) type = cJSON_GetObjectItemCaseSensitive(object, "type");
    const char* name = type != NULL ? cJSON_GetStringValue(type) : "default";
    if (cJSON_GetObjectItemCaseSensitive(object, "rope_theta") != NULL &&
        !rope_number(&rope->theta, object, "rope_theta", 1, where, err))
        return false;
    if (name != NULL && strcmp(name, "default") == 0) return true;
    bool linear = name != NULL && strcmp(name, "linear") == 0, llama3 = name != NULL && strcmp(name, "llama3") == 0;
    if (!linear && !llama3)
        return fail(err, EXIT_CONFIG, "%s: rope_type is %s; default, linear and llama3 are known", where, json_show(type));
    rope->scaling = linear ? ROPE_SCALING_LINEAR : ROPE_SCALING_LLAMA3;
    if (!rope_number(&rope->factor, object, "factor", 1, where, err)) return false;
    if (linear) return true;
    double original;
    if (!rope_number(&rope->low_freq_factor, object, "low_freq_factor", 1e-6, where, err) ||
        !rope_number(&rope->high_freq_factor, object, "high_freq_factor", 1e-6, where, err) ||
        !rope_number(&original, object, "original_max_position_embeddings", 1, where, err))
        return false;
    if (rope->high_freq_factor <= rope->low_freq_factor || original > 1 << 24 || original != floor(original))
        return fail(err, EXIT_CONFIG, "%s: high_freq_factor must exceed low_freq_factor, and "
                    "original_max_position_embeddings be a whole number up to 2^24", where);
    rope->original_max_position_embeddings = (int)original;
    return true;
}

// A key that no table row of this family sets: fixed, harmless, or not known.
static inline bool model_other_key(ModelConfig* c, const cJSON* item, const JsonSource* source, const char* section,
                                   bool external, Error* err) {
    const char* key = item->string;
    const char* where = json_where(source, section, key);
    if (strcmp(key, "rope_scaling") == 0 || strcmp(key, "rope_parameters") == 0) {
        if (c->family->position == POSITION_ROPE) return rope_from_json(&c->rope, item, where, err);
    } else if (strcmp(key, "hidden_act") == 0 || strcmp(key, "activation_function") == 0) {
        const char* act = cJSON_GetStringValue(item);
        bool tanh_too = c->family->activation == ACTIVATION_GELU_TANH && act != NULL && strcmp(act, "gelu_pytorch_tanh") == 0;
        if (act != NULL && (tanh_too || strcmp(act, c->family->hidden_act) == 0)) return true;
        return fail(err, EXIT_CONFIG, "%s is %s; a %s model has \"%s\"", where, json_show(item), c->family->model_type,
                    c->family->hidden_act);
    } else if (strcmp(key, "sliding_window") == 0) {
        // harmless where it is switched off, or not shorter than any sequence the model can see
        if (!cJSON_IsNumber(item) || strcmp(c->family->model_type, "qwen2") == 0) return true;
        if (item->valuedouble >= c->max_position_embeddings) return true;
        return fail(err, EXIT_CONFIG, "%s is %s, shorter than max_position_embeddings %d; attention here sees the whole "
                    "sequence: set it to null, or max_position_embeddings to the window", where, json_show(item),
                    c->max_position_embeddings);
    }
    for (int i = 0; i < NUM_FIXED_MODEL_KEYS; i++) {
        if (strcmp(key, fixed_model_keys[i].key) != 0) continue;
        if (cJSON_IsNull(item) || strcmp(json_show(item), fixed_model_keys[i].value) == 0) return true;
        return fail(err, EXIT_CONFIG, "%s is %s; only %s is implemented", where, json_show(item), fixed_model_keys[i].value);
    }
    if (is_harmless_model_key(key)) return true;
    if (external) {
        fprintf(stderr, "note: %s: not known here, and ignored\n", where);
        return true;
    }
    const char* best = "model_type";
    for (int i = 0; i < NUM_MODEL_KEYS; i++)
        if (model_key_is(&model_keys[i], c->family, model_keys[i].key) &&
            edit_distance(key, model_keys[i].key) < edit_distance(key, best))
            best = model_keys[i].key;
    return fail(err, EXIT_CONFIG, "%s: unknown key for a %s model; did you mean %s?", where, c->family->model_type, best);
}

static inline bool model_family_from_json(ModelConfig* c, const cJSON* object, const JsonSource* source,
                                          const char* section, Error* err) {
    const cJSON* item = cJSON_GetObjectItemCaseSensitive(object, "model_type");
    const char* name = cJSON_GetStringValue(item);
    for (int i = 0; name != NULL && i < NUM_MODEL_FAMILIES; i++)
        if (strcmp(name, model_families[i].model_type) == 0) c->family = &model_families[i];
    if (c->family != NULL) return true;
    return fail(err, EXIT_CONFIG, "%s is %s; \"gpt2\", \"llama\", \"mistral\" and \"qwen2\" are known",
                json_where(source, section, "model_type"), item != NULL ? json_show(item) : "missing");
}

// What one field says about another, and defaults that depend on other fields.
static inline bool model_config_complete(ModelConfig* c, const JsonSource* source, const char* section, Error* err) {
    if (c->num_key_value_heads == 0) c->num_key_value_heads = c->num_attention_heads;
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return fail(err, EXIT_CONFIG, "%s is %d; it must divide num_attention_heads %d",
                    json_where(source, section, "num_key_value_heads"), c->num_key_value_heads, c->num_attention_heads);
    if (c->head_dim == 0 && c->hidden_size % c->num_attention_heads != 0)
        return fail(err, EXIT_CONFIG, "%s is %d; it must be a multiple of num_attention_heads %d%s",
                    json_where(source, section, "hidden_size"), c->hidden_size, c->num_attention_heads,
                    c->family->conv1d ? "" : ", or head_dim be given");
    if (c->head_dim == 0) c->head_dim = c->hidden_size / c->num_attention_heads;
    if (c->family->position == POSITION_ROPE && c->head_dim % 2 != 0)
        return fail(err, EXIT_CONFIG, "%s is %d; rotary positions turn pairs, so it must be even",
                    json_where(source, section, "head_dim"), c->head_dim);
    if (c->intermediate_size == 0 && !c->family->conv1d)
        return fail(err, EXIT_CONFIG, "%s is missing; a %s model has no default for it",
                    json_where(source, section, "intermediate_size"), c->family->model_type);
    if (c->intermediate_size == 0) c->intermediate_size = 4 * c->hidden_size;
    const int ids[2] = {c->bos_token_id, c->eos_token_id};
    for (int i = 0; i < 2; i++)
        if (ids[i] >= c->vocab_size)
            return fail(err, EXIT_CONFIG, "%s is %d; it must be below vocab_size %d",
                        json_where(source, section, i == 0 ? "bos_token_id" : "eos_token_id"), ids[i], c->vocab_size);
    return true;
}

// Fills c from an object with config.json's keys. section: "model" inside a run config, "" in a file of its own,
// which may have keys we do not know (external).
static inline bool model_config_from_json(ModelConfig* c, const cJSON* object, const JsonSource* source,
                                          const char* section, bool external, Error* err) {
    memset(c, 0, sizeof *c);
    const char* twice = json_duplicate(object);
    if (twice != NULL) return fail(err, EXIT_CONFIG, "%s stands twice", json_where_nth(source, section, twice, 2));
    if (!model_family_from_json(c, object, source, section, err)) return false;
    const ModelFamily* family = c->family;
    c->max_position_embeddings = family->conv1d ? 1024 : 2048; // transformers' defaults, like those of the families
    c->norm_eps = family->norm_eps, c->initializer_range = family->initializer_range;
    c->attention_bias = family->qkv_bias;
    c->attention_output_bias = c->mlp_bias = c->norm_bias = family->bias;
    c->tie_word_embeddings = family->tie_word_embeddings;
    c->rope.theta = 10000.0;
    c->bos_token_id = c->eos_token_id = -1;
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        const ModelKey* k = &model_keys[i];
        const cJSON* found = NULL;
        for (const cJSON* item = object->child; item != NULL; item = item->next)
            if (model_key_is(k, family, item->string) && !cJSON_IsNull(item)) found = item;
        if (found != NULL && !model_key_set(c, k, found, json_where(source, section, found->string), err)) return false;
        if (found == NULL && k->required)
            return fail(err, EXIT_CONFIG, "%s is missing; it has no default", json_where(source, section, k->key));
    }
    for (const cJSON* item = object->child; item != NULL; item = item->next) {
        bool known = false;
        for (int i = 0; i < NUM_MODEL_KEYS; i++) known = known || model_key_is(&model_keys[i], family, item->string);
        if (!known && !model_other_key(c, item, source, section, external, err)) return false;
    }
    return model_config_complete(c, source, section, err);
}

// A config.json of its own, as it stands in every Hugging Face model directory.
static inline bool model_config_load(ModelConfig* c, const char* path, Error* err) {
    size_t size;
    char* text = read_file(path, JSON_MAX_BYTES, &size, err);
    if (text == NULL) return false;
    JsonSource source = {path, text, size, 0, NULL};
    cJSON* json = json_parse_object(text, size, path, err);
    bool ok = json != NULL && model_config_from_json(c, json, &source, "", true, err);
    cJSON_Delete(json);
    free(text);
    return ok;
}

// The config.json that transformers opens; model_config_from_json reads the same struct back.
static inline void model_config_write_json(const ModelConfig* c, String* out) {
    const ModelFamily* family = c->family;
    string_append(out, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\",\n  \"torch_dtype\": \"float32\"",
                  family->architecture, family->model_type);
    string_append(out, ",\n  \"%s\": \"%s\"", family->conv1d ? "activation_function" : "hidden_act", family->hidden_act);
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        const ModelKey* k = &model_keys[i];
        const char* field = (const char*)c + k->offset;
        if (!model_key_is(k, family, k->key) || (i > 0 && strcmp(k->key, model_keys[i - 1].key) == 0)) continue;
        string_append(out, ",\n  \"%s\": ", k->gpt2 != NULL && family->conv1d ? k->gpt2 : k->key);
        if (k->type == MODEL_BOOL) string_append(out, "%s", *(const bool*)field ? "true" : "false");
        else if (k->type == MODEL_DOUBLE) json_append_number(out, *(const double*)field);
        else if (*(const int*)field == -1) string_append(out, "null");
        else string_append(out, "%d", *(const int*)field);
    }
    const char* dropouts = family->conv1d ? ",\n  \"attn_pdrop\": 0.0,\n  \"embd_pdrop\": 0.0,\n  \"resid_pdrop\": 0.0"
                                          : ",\n  \"attention_dropout\": 0.0";
    string_append(out, "%s", dropouts);
    if (strcmp(family->model_type, "mistral") == 0) string_append(out, ",\n  \"sliding_window\": null");
    if (c->rope.scaling != ROPE_SCALING_NONE) {
        string_append(out, ",\n  \"rope_scaling\": {\"rope_type\": \"%s\", \"factor\": ",
                      c->rope.scaling == ROPE_SCALING_LINEAR ? "linear" : "llama3");
        json_append_number(out, c->rope.factor);
        if (c->rope.scaling == ROPE_SCALING_LLAMA3) {
            string_append(out, ", \"low_freq_factor\": ");
            json_append_number(out, c->rope.low_freq_factor);
            string_append(out, ", \"high_freq_factor\": ");
            json_append_number(out, c->rope.high_freq_factor);
            string_append(out, ", \"original_max_position_embeddings\": %d", c->rope.original_max_position_embeddings);
        }
        string_append(out, "}");
    }
    string_append(out, "\n}\n");
}
