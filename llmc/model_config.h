// ModelConfig from Hugging Face's config.json (GPT-2's spelling included) and back.
//
// Every key that such a file may hold is in one of these tables: model_keys set a field, ruled_model_keys
// have a function (rope_keys stand in rope_scaling), and other_model_keys must have the value that this
// program computes with, or do not matter to it. In a run config's own model section any other key is an
// error; in somebody else's config.json it is named in a note. Families' defaults: model.h.
#pragma once
#include "llmc/json.h"  // defines: JsonSource, JsonValue, json_*, fail_at, fail_value, nearest_name
#include "llmc/model.h" // defines: ModelConfig, ModelFamily, model_families, model_num_parameters

enum ModelKeyType {
    MODEL_INT,
    MODEL_NUMBER,
    MODEL_BOOL,
    MODEL_TOKEN
}; // TOKEN: an id, null, or a list of ids

typedef struct {
    const char* key;      // Hugging Face's usual name; rows of the same key set several fields
    const char* gpt2;     // its name in a GPT-2 config, which may use both; NULL: only the usual one
    const char* families; // the model types that have it; NULL: all
    enum ModelKeyType type;
    size_t offset;
    double min, max;
    const char* standard; // the default in words; NULL: required
} ModelKey;

// clang-format off
#define AT(field) offsetof(ModelConfig, field)
#define ROPE "llama mistral qwen2"
static const ModelKey model_keys[] = {
    {"vocab_size", NULL, NULL, MODEL_INT, AT(vocab_size), 2, 1 << 24, NULL},
    {"hidden_size", "n_embd", NULL, MODEL_INT, AT(hidden_size), 1, 1 << 17, NULL},
    {"num_hidden_layers", "n_layer", NULL, MODEL_INT, AT(num_hidden_layers), 1, 4096, NULL},
    {"num_attention_heads", "n_head", NULL, MODEL_INT, AT(num_attention_heads), 1, 4096, NULL},
    {"num_key_value_heads", NULL, ROPE, MODEL_INT, AT(num_key_value_heads), 1, 4096, "num_attention_heads"},
    {"head_dim", NULL, ROPE, MODEL_INT, AT(head_dim), 2, 1024, "hidden_size / num_attention_heads"},
    {"intermediate_size", "n_inner", NULL, MODEL_INT, AT(intermediate_size), 1, 1 << 20,
        "gpt2: 4 hidden_size; else required"},
    {"max_position_embeddings", "n_positions", NULL, MODEL_INT, AT(max_position_embeddings), 1, 1 << 24,
        "gpt2: 1024; else 2048"},
    {"layer_norm_epsilon", NULL, "gpt2", MODEL_NUMBER, AT(norm_eps), 1e-12, 1, "1e-5"},
    {"rms_norm_eps", NULL, ROPE, MODEL_NUMBER, AT(norm_eps), 1e-12, 1, "qwen2: 1e-6; else 1e-5"},
    {"rope_theta", NULL, ROPE, MODEL_NUMBER, AT(rope.theta), 1, 1e12, "10000"},
    {"tie_word_embeddings", NULL, NULL, MODEL_BOOL, AT(tie_word_embeddings), 0, 1, "gpt2: true; else false"},
    {"bias", NULL, "gpt2", MODEL_BOOL, AT(attention_bias), 0, 1, "true"},
    {"bias", NULL, "gpt2", MODEL_BOOL, AT(attention_output_bias), 0, 1, "true"},
    {"bias", NULL, "gpt2", MODEL_BOOL, AT(mlp_bias), 0, 1, "true"},
    {"bias", NULL, "gpt2", MODEL_BOOL, AT(norm_bias), 0, 1, "true"},
    {"attention_bias", NULL, "llama", MODEL_BOOL, AT(attention_bias), 0, 1, "false"},
    {"attention_bias", NULL, "llama", MODEL_BOOL, AT(attention_output_bias), 0, 1, "false"},
    {"mlp_bias", NULL, "llama", MODEL_BOOL, AT(mlp_bias), 0, 1, "false"},
    {"initializer_range", NULL, NULL, MODEL_NUMBER, AT(initializer_range), 0, 10, "0.02"},
    {"bos_token_id", NULL, NULL, MODEL_TOKEN, AT(bos_token_id), 0, (1 << 24) - 1, "none"},
    {"eos_token_id", NULL, NULL, MODEL_TOKEN, AT(eos_token_id), 0, (1 << 24) - 1, "none"},
};
#undef AT
enum { NUM_MODEL_KEYS = sizeof model_keys / sizeof model_keys[0] };

// What stands in rope_scaling, or in transformers 5's rope_parameters: numbers that a scaling needs, and that
// have no business with others. rope_theta is one of model_keys, and may stand here instead.
#define AT(field) offsetof(RopeConfig, field)
static const struct {
    const char* key;
    enum ModelKeyType type;
    size_t offset;
    double min, max;
    bool used_by[3]; // by RopeScaling
    bool required;
} rope_keys[] = {
    {"rope_theta", MODEL_NUMBER, AT(theta), 1, 1e12, {true, true, true}, false},
    {"factor", MODEL_NUMBER, AT(factor), 1, 1e6, {false, true, true}, true},
    {"low_freq_factor", MODEL_NUMBER, AT(low_freq_factor), 1e-6, 1e6, {false, false, true}, true},
    {"high_freq_factor", MODEL_NUMBER, AT(high_freq_factor), 1e-6, 1e6, {false, false, true}, true},
    {"original_max_position_embeddings", MODEL_INT, AT(original_max_position_embeddings), 1, 1 << 24,
        {false, false, true}, true},
};
#undef AT
enum { NUM_ROPE_KEYS = sizeof rope_keys / sizeof rope_keys[0] };
static const char* const rope_scaling_names[] = {"default", "linear", "llama3"}; // by RopeScaling

// Keys that would change what is computed if they had another value than this one; NULL: they never do.
// There is no dropout, as recent models do without: it must be 0 in a run config, and does not matter in a
// config.json, whose model was trained elsewhere.
static const struct {
    const char *key, *value;
    const char* dropout_of; // model types that have this dropout
} other_model_keys[] = {
    {"add_cross_attention", "false", NULL}, {"is_encoder_decoder", "false", NULL},
    {"partial_rotary_factor", "1", NULL}, {"pretraining_tp", "1", NULL},
    {"quantization_config", "null", NULL},
    {"reorder_and_upcast_attn", "false", NULL}, {"scale_attn_by_inverse_layer_idx", "false", NULL},
    {"scale_attn_weights", "true", NULL}, {"use_sliding_window", "false", NULL},
    {"attention_dropout", "0", ROPE}, {"attn_pdrop", "0", "gpt2"}, {"embd_pdrop", "0", "gpt2"},
    {"resid_pdrop", "0", "gpt2"},
    {"_name_or_path", NULL, NULL}, {"architectures", NULL, NULL}, {"dtype", NULL, NULL},
    {"gradient_checkpointing", NULL, NULL}, {"max_window_layers", NULL, NULL}, {"model_type", NULL, NULL},
    {"n_ctx", NULL, NULL}, {"output_past", NULL, NULL}, {"pad_token_id", NULL, NULL},
    {"summary_activation", NULL, NULL}, {"summary_first_dropout", NULL, NULL},
    {"summary_proj_to_labels", NULL, NULL}, {"summary_type", NULL, NULL}, {"summary_use_proj", NULL, NULL},
    {"task_specific_params", NULL, NULL}, {"torch_dtype", NULL, NULL}, {"transformers_version", NULL, NULL},
    {"use_cache", NULL, NULL},
};
enum { NUM_OTHER_MODEL_KEYS = sizeof other_model_keys / sizeof other_model_keys[0] };
// clang-format on

// What the readers below share: where they read and where it goes.
typedef struct {
    ModelConfig* model;
    const JsonSource* source;
    const char* path; // of the object: "model" in a run config, "" in a config.json of its own
    const cJSON* object;
    String* notes; // what is ignored in a config.json; NULL in a run config, where nothing is
    Error* err;
} ModelReader;

static inline JsonValue model_value(const ModelReader* r, const char* key) {
    return json_member(r->source, r->path, r->object, key);
}

static inline void add_note(String* notes, const JsonValue* v, const char* what) {
    string_append(notes, "note: ");
    json_append_where(notes, v);
    string_append(notes, "%s\n", what);
}

static inline bool family_has_key(const ModelFamily* family, const ModelKey* k) {
    return k->families == NULL || strstr(k->families, family->model_type) != NULL;
}

// ----------------------------------------------------------------------------
// keys that set fields

// The first of a list of tokens, which instruction-tuned models have as eos_token_id; a run config gives one.
static inline bool first_token(ModelReader* r, JsonValue* v) {
    if (r->notes == NULL) return fail_value(r->err, v, "one token is wanted");
    add_note(r->notes, v, ": only the first token of the list is used");
    v->item = v->item->child;
    return true;
}

// Stores a value in the field at base + offset.
static inline bool read_field(void* base, size_t offset, enum ModelKeyType type, double min, double max,
                              const JsonValue* v, Error* err) {
    void* field = (char*)base + offset;
    double value = 0;
    if (type == MODEL_BOOL) return json_read_bool((bool*)field, v, err);
    if (!json_read_number(&value, v, type != MODEL_NUMBER, min, max, err)) return false;
    if (type == MODEL_NUMBER)
        *(double*)field = value;
    else
        *(int*)field = (int)value;
    return true;
}

// Walks the table; null means the default, as in Python.
static inline bool read_model_keys(ModelReader* r) {
    const ModelFamily* family = r->model->family;
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        const ModelKey* k = &model_keys[i];
        if (!family_has_key(family, k)) continue;
        JsonValue v = model_value(r, k->key);
        if (family->conv1d && k->gpt2 != NULL) {
            JsonValue gpt2 = model_value(r, k->gpt2);
            if (v.item != NULL && gpt2.item != NULL)
                return fail_at(r->err, &v, " and %s are two names of one thing; give one", k->gpt2);
            if (gpt2.item != NULL) v = gpt2;
        }
        if (cJSON_IsNull(v.item)) v.item = NULL;
        if (k->type == MODEL_TOKEN && cJSON_IsArray(v.item) && !first_token(r, &v)) return false;
        if (v.item != NULL && !read_field(r->model, k->offset, k->type, k->min, k->max, &v, r->err))
            return false;
        if (v.item == NULL && k->standard == NULL)
            return fail_at(r->err, &v, " is missing; a %s model has no default for it", family->model_type);
    }
    return true;
}

// ----------------------------------------------------------------------------
// keys with rules of their own

// The numbers of a scaling, and nothing else.
static inline bool read_rope_keys(ModelReader* r, const JsonValue* v, enum RopeScaling scaling) {
    for (int i = 0; i < NUM_ROPE_KEYS; i++) {
        JsonValue number = json_member(r->source, v->path, v->item, rope_keys[i].key);
        if (!rope_keys[i].used_by[scaling] || (number.item == NULL && !rope_keys[i].required)) continue;
        if (!read_field(&r->model->rope, rope_keys[i].offset, rope_keys[i].type, rope_keys[i].min,
                        rope_keys[i].max, &number, r->err))
            return false;
    }
    for (const cJSON* item = v->item->child; item != NULL; item = item->next) {
        bool known = strcmp(item->string, "rope_type") == 0 || strcmp(item->string, "type") == 0;
        for (int i = 0; i < NUM_ROPE_KEYS; i++)
            known = known || (rope_keys[i].used_by[scaling] && strcmp(item->string, rope_keys[i].key) == 0);
        JsonValue member = json_member(r->source, v->path, v->item, item->string);
        if (!known)
            return fail_at(r->err, &member, ": not a key of rope_type %s", rope_scaling_names[scaling]);
    }
    return true;
}

static inline bool read_rope(ModelReader* r, const JsonValue* v) {
    RopeConfig* rope = &r->model->rope;
    if (cJSON_IsNull(v->item)) return true;
    if (!cJSON_IsObject(v->item)) return fail_value(r->err, v, "an object or null is wanted");
    JsonValue type = json_member(r->source, v->path, v->item, "rope_type");
    if (type.item == NULL) type = json_member(r->source, v->path, v->item, "type"); // its name before 2024
    const char* name = type.item != NULL ? cJSON_GetStringValue(type.item) : rope_scaling_names[0];
    int scaling = ROPE_SCALING_LLAMA3;
    while (scaling >= 0 && (name == NULL || strcmp(name, rope_scaling_names[scaling]) != 0)) scaling--;
    if (scaling < 0) return fail_value(r->err, &type, "default, linear or llama3 is wanted");
    JsonValue theta = model_value(r, "rope_theta"),
              other_theta = json_member(r->source, v->path, v->item, "rope_theta");
    if (theta.item != NULL && other_theta.item != NULL && !cJSON_Compare(theta.item, other_theta.item, true))
        return fail_value(r->err, &theta, "%s has another value: give one of them", other_theta.path);
    if (rope->scaling != ROPE_SCALING_NONE)
        return fail_at(r->err, v, ": rope_scaling and rope_parameters are two names of one thing; give one");
    rope->scaling = scaling;
    if (!read_rope_keys(r, v, (enum RopeScaling)scaling)) return false;
    if (scaling == ROPE_SCALING_LLAMA3 && rope->high_freq_factor <= rope->low_freq_factor)
        return fail_at(r->err, v, ": high_freq_factor %g must be above low_freq_factor %g",
                       rope->high_freq_factor, rope->low_freq_factor);
    return true;
}

static inline bool read_activation(ModelReader* r, const JsonValue* v) {
    const ModelFamily* family = r->model->family;
    const char* name = cJSON_GetStringValue(v->item);
    bool gelu = family->activation == ACTIVATION_GELU_TANH; // two of transformers' names for one function
    if (name != NULL && strcmp(name, family->hidden_act) == 0) return true;
    if (name != NULL && gelu && strcmp(name, "gelu_pytorch_tanh") == 0) return true;
    return fail_value(r->err, v, "a %s model has \"%s\"", family->model_type, family->hidden_act);
}

// Attention here sees the whole sequence, which is the same as long as no sequence outgrows the window. A
// config.json is taken for a model of shorter sequences; in a run config the user decides.
static inline bool read_sliding_window(ModelReader* r, const JsonValue* v) {
    double window = 0;
    int* positions = &r->model->max_position_embeddings;
    if (cJSON_IsNull(v->item) || strcmp(r->model->family->model_type, "qwen2") == 0)
        return true; // use_sliding_window
    if (!json_read_number(&window, v, true, 1, 1 << 24, r->err)) return false;
    if (window >= *positions) return true;
    if (r->notes == NULL || json_is_overridden(r->source, "model.max_position_embeddings"))
        return fail_value(r->err, v,
                          "attention here has no window: set it to null, or max_position_embeddings to it");
    *positions = (int)window;
    add_note(r->notes, v,
             ": attention here has no window; max_position_embeddings is taken to be no more than it");
    return true;
}

static inline bool read_layer_types(ModelReader* r, const JsonValue* v) {
    for (const cJSON* item = v->item->child; item != NULL; item = item->next)
        if (!cJSON_IsString(item) || strcmp(item->valuestring, "full_attention") != 0)
            return fail_value(r->err, v, "only full_attention is implemented");
    return true;
}

static const struct {
    const char *key, *families;
    bool (*read)(ModelReader*, const JsonValue*);
} ruled_model_keys[] = {
    {"hidden_act", NULL, read_activation},   {"activation_function", "gpt2", read_activation},
    {"rope_scaling", ROPE, read_rope},       {"rope_parameters", ROPE, read_rope},
    {"layer_types", ROPE, read_layer_types}, {"sliding_window", "mistral qwen2", read_sliding_window},
};
enum { NUM_RULED_MODEL_KEYS = sizeof ruled_model_keys / sizeof ruled_model_keys[0] };

static inline bool read_ruled_keys(ModelReader* r) {
    for (int i = 0; i < NUM_RULED_MODEL_KEYS; i++) {
        const char* families = ruled_model_keys[i].families;
        JsonValue v = model_value(r, ruled_model_keys[i].key);
        if (families != NULL && strstr(families, r->model->family->model_type) == NULL) continue;
        if (v.item != NULL && !ruled_model_keys[i].read(r, &v)) return false;
    }
    return true;
}

// ----------------------------------------------------------------------------
// all other keys

// The other spelling of a key that GPT-2 names differently; NULL: there is none.
static inline const char* model_key_alias(const char* key) {
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        if (model_keys[i].gpt2 == NULL) continue;
        if (strcmp(key, model_keys[i].key) == 0) return model_keys[i].gpt2;
        if (strcmp(key, model_keys[i].gpt2) == 0) return model_keys[i].key;
    }
    return NULL;
}

// Is it a key of this family, in any table? Otherwise *nearest becomes the most similar one that is.
static inline bool model_key_known(const ModelFamily* family, const char* key, const char** nearest) {
    *nearest = "model_type";
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        if (!family_has_key(family, &model_keys[i])) continue;
        nearest_name(key, model_keys[i].key, nearest);
        if (family->conv1d && model_keys[i].gpt2 != NULL) nearest_name(key, model_keys[i].gpt2, nearest);
    }
    for (int i = 0; i < NUM_RULED_MODEL_KEYS; i++) {
        const char* families = ruled_model_keys[i].families;
        if (families == NULL || strstr(families, family->model_type) != NULL)
            nearest_name(key, ruled_model_keys[i].key, nearest);
    }
    return strcmp(key, *nearest) == 0;
}

// unknown: names of the keys that are passed over, ", " between them
static inline bool read_other_key(ModelReader* r, const JsonValue* v, String* unknown) {
    const char *key = v->item->string, *nearest;
    bool strict = r->notes == NULL || json_is_overridden(r->source, v->path);
    for (int i = 0; i < NUM_OTHER_MODEL_KEYS; i++) {
        const char* value = other_model_keys[i].value;
        if (strcmp(key, other_model_keys[i].key) != 0) continue;
        if (value == NULL || cJSON_IsNull(v->item) || (other_model_keys[i].dropout_of != NULL && !strict))
            return true;
        cJSON* wanted = cJSON_Parse(value);
        bool equal = cJSON_Compare(v->item, wanted, true);
        cJSON_Delete(wanted);
        return equal || fail_value(r->err, v, "only %s is implemented", value);
    }
    if (model_key_known(r->model->family, key, &nearest)) return true;
    if (strict)
        return fail_at(r->err, v, ": unknown key for a %s model; did you mean %s?",
                       r->model->family->model_type,
                       model_key_alias(key) != NULL ? model_key_alias(key) : nearest);
    string_append(unknown, "%s%s", unknown->size != 0 ? ", " : "", json_path_in_text(v));
    return true;
}

static inline bool read_other_keys(ModelReader* r) {
    String unknown = {NULL, 0, 0};
    bool ok = true;
    for (const cJSON* item = r->object->child; item != NULL && ok; item = item->next) {
        JsonValue v = model_value(r, item->string);
        ok = read_other_key(r, &v, &unknown);
    }
    if (ok && unknown.size != 0)
        string_append(r->notes, "note: %s: unknown keys, ignored: %s\n", r->source->name, unknown.data);
    free(unknown.data);
    return ok;
}

// ----------------------------------------------------------------------------
// the whole

static inline bool read_family(ModelReader* r) {
    JsonValue v = model_value(r, "model_type");
    const char* name = cJSON_GetStringValue(v.item);
    String known = {NULL, 0, 0};
    for (int i = 0; i < NUM_MODEL_FAMILIES && r->model->family == NULL; i++) {
        if (name != NULL && strcmp(name, model_families[i].model_type) == 0)
            r->model->family = &model_families[i];
        string_append(&known, "%s%s",
                      i == 0                       ? ""
                      : i + 1 < NUM_MODEL_FAMILIES ? ", "
                                                   : " or ",
                      model_families[i].model_type);
    }
    if (r->model->family == NULL) fail_value(r->err, &v, "%s is wanted", known.data);
    free(known.data);
    return r->model->family != NULL;
}

static inline void set_family_defaults(ModelConfig* c) {
    const ModelFamily* family = c->family;
    c->max_position_embeddings = family->position == POSITION_LEARNED ? 1024 : 2048;
    c->norm_eps = family->norm_eps, c->initializer_range = family->initializer_range;
    c->attention_bias = family->qkv_bias;
    c->attention_output_bias = c->mlp_bias = c->norm_bias = family->bias;
    c->tie_word_embeddings = family->tie_word_embeddings;
    c->rope.theta = 10000.0;
    c->bos_token_id = c->eos_token_id = -1;
}

// Defaults that depend on other fields, and what one field says about another.
static inline bool complete_model(ModelReader* r) {
    ModelConfig* c = r->model;
    JsonValue kv_heads = model_value(r, "num_key_value_heads"), hidden = model_value(r, "hidden_size");
    JsonValue head_dim = model_value(r, "head_dim"), feed_forward = model_value(r, "intermediate_size");
    JsonValue tokens[2] = {model_value(r, "bos_token_id"), model_value(r, "eos_token_id")};
    const int ids[2] = {c->bos_token_id, c->eos_token_id};
    if (hidden.item == NULL) hidden = model_value(r, "n_embd");
    if (c->num_key_value_heads == 0) c->num_key_value_heads = c->num_attention_heads;
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return fail_value(r->err, &kv_heads, "it must divide num_attention_heads, %d",
                          c->num_attention_heads);
    if (c->head_dim == 0 && c->hidden_size % c->num_attention_heads != 0)
        return fail_value(r->err, &hidden, "it must be a multiple of num_attention_heads, %d%s",
                          c->num_attention_heads, c->family->conv1d ? "" : ", or head_dim be given");
    if (c->head_dim == 0) c->head_dim = c->hidden_size / c->num_attention_heads;
    if (c->family->position == POSITION_ROPE && c->head_dim % 2 != 0)
        return fail_at(r->err, head_dim.item != NULL ? &head_dim : &hidden,
                       " makes heads of %d; rotary positions turn pairs, so that must be even", c->head_dim);
    if (c->intermediate_size == 0 && !c->family->conv1d)
        return fail_at(r->err, &feed_forward, " is missing; a %s model has no default for it",
                       c->family->model_type);
    if (c->intermediate_size == 0) c->intermediate_size = 4 * c->hidden_size;
    for (int i = 0; i < 2; i++)
        if (ids[i] >= c->vocab_size)
            return fail_value(r->err, &tokens[i], "it must be below vocab_size, %d", c->vocab_size);
    if (model_num_parameters(c) > (uint64_t)1 << 40)
        return fail_at(r->err, &hidden, ": the model has %.3g parameters; at most 2^40 are possible",
                       (double)model_num_parameters(c));
    return true;
}

// Fills c from an object with config.json's keys, which stands at path: "model" in a run config, "" in a file
// of its own. notes: lines about what is ignored in somebody else's file; NULL: nothing may be.
static inline bool model_config_from_json(ModelConfig* c, const cJSON* object, const JsonSource* source,
                                          const char* path, String* notes, Error* err) {
    memset(c, 0, sizeof *c);
    ModelReader r = {c, source, path, object, notes, err};
    if (!read_family(&r)) return false;
    set_family_defaults(c);
    return read_other_keys(&r) && read_model_keys(&r) && read_ruled_keys(&r) && complete_model(&r);
}

// A config.json of its own, as it stands in every Hugging Face model directory.
static inline bool model_config_load(ModelConfig* c, const char* path, Error* err) {
    size_t size;
    char* text = read_file(path, JSON_MAX_BYTES, &size, err);
    if (text == NULL) return false;
    JsonSource source = {path, text, size, "", 0, NULL};
    String notes = {NULL, 0, 0};
    cJSON* json = json_parse_object(text, &source, err);
    bool ok = json != NULL && model_config_from_json(c, json, &source, "", &notes, err);
    if (ok && notes.size != 0) fputs(notes.data, stderr);
    cJSON_Delete(json);
    free(notes.data);
    free(text);
    return ok;
}

// ----------------------------------------------------------------------------
// writing

static inline void append_field(String* out, const void* base, size_t offset, enum ModelKeyType type) {
    const void* field = (const char*)base + offset;
    if (type == MODEL_BOOL)
        string_append(out, "%s", *(const bool*)field ? "true" : "false");
    else if (type == MODEL_NUMBER)
        json_append_number(out, *(const double*)field);
    else if (type == MODEL_TOKEN && *(const int*)field < 0)
        string_append(out, "null");
    else
        string_append(out, "%d", *(const int*)field);
}

static inline void append_rope(String* out, const RopeConfig* rope) {
    string_append(out, ",\n  \"rope_scaling\": {\"rope_type\": \"%s\"", rope_scaling_names[rope->scaling]);
    for (int i = 0; i < NUM_ROPE_KEYS; i++) {
        if (!rope_keys[i].used_by[rope->scaling] || !rope_keys[i].required) continue;
        string_append(out, ", \"%s\": ", rope_keys[i].key);
        append_field(out, rope, rope_keys[i].offset, rope_keys[i].type);
    }
    string_append(out, "}");
}

// The config.json that transformers opens; model_config_from_json reads the same struct back.
static inline void model_config_write_json(const ModelConfig* c, String* out) {
    const ModelFamily* family = c->family;
    string_append(out, "{\n  \"architectures\": [\"%s\"],\n  \"model_type\": \"%s\"", family->architecture,
                  family->model_type);
    string_append(out, ",\n  \"torch_dtype\": \"float32\",\n  \"%s\": \"%s\"",
                  family->conv1d ? "activation_function" : "hidden_act", family->hidden_act);
    for (int i = 0; i < NUM_MODEL_KEYS; i++) {
        const ModelKey* k = &model_keys[i];
        bool again = i > 0 && strcmp(k->key, model_keys[i - 1].key) == 0;
        if (!family_has_key(family, k) || again) continue;
        string_append(out, ",\n  \"%s\": ", k->gpt2 != NULL && family->conv1d ? k->gpt2 : k->key);
        append_field(out, c, k->offset, k->type);
    }
    for (int i = 0; i < NUM_OTHER_MODEL_KEYS; i++) { // transformers' GPT-2 has dropout unless told otherwise
        const char* families = other_model_keys[i].dropout_of;
        if (families != NULL && strstr(families, family->model_type) != NULL)
            string_append(out, ",\n  \"%s\": 0.0", other_model_keys[i].key);
    }
    if (strcmp(family->model_type, "mistral") == 0) string_append(out, ",\n  \"sliding_window\": null");
    if (c->rope.scaling != ROPE_SCALING_NONE) append_rope(out, &c->rope);
    string_append(out, "\n}\n");
}
