// Hugging Face model directories: what transformers wrote comes in at the right place and goes out the
// same; the variants found in the wild are read; what does not fit is named.
#include "dev/test/tiny_models.h" // defines: tiny_model, Weights, weights_*, temporary_directory, remove_tree
#include "llmc/checkpoint.h"      // defines: checkpoint_load, checkpoint_export, CheckpointData
#include "llmc/model_config.h"    // defines: model_config_load
#include <setjmp.h>
#include <cmocka.h> // last: it has a macro fail()

static char work[TEMPORARY_PATH];

static int setup(void** state) {
    (void)state;
    temporary_directory(work);
    return 0;
}

static int teardown(void** state) {
    (void)state;
    Error err = {0, {0}};
    return remove_tree(work, &err) ? 0 : -1;
}

static void path_in(char out[PATH_MAX], const char* dir, const char* name) {
    Error err = {0, {0}};
    assert_true(path_join(out, dir, name, &err));
}

static void spill(const char* dir, const char* name, const void* data, size_t size) {
    char path[PATH_MAX];
    path_in(path, dir, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    assert_true(fd >= 0 && write_all(fd, data, size) && close(fd) == 0);
}

// ----------------------------------------------------------------------------
// a safetensors file, whole in memory, by other means than the code under test

typedef struct {
    char* bytes;
    Safetensors header;
} WholeFile;

static WholeFile whole_file(const char* dir, const char* name) {
    char path[PATH_MAX];
    size_t size = 0;
    uint64_t n;
    Error err = {0, {0}};
    path_in(path, dir, name);
    WholeFile f = {read_file(path, SIZE_MAX, &size, &err), {NULL, 0, 0, NULL}};
    if (f.bytes == NULL) fail_msg("%s", err.text);
    memcpy(&n, f.bytes, 8);
    char* json = strndup(f.bytes + 8, n);
    if (!safetensors_parse(&f.header, json, n, size - 8 - n, path, &err)) fail_msg("%s", err.text);
    free(json);
    return f;
}

static void whole_file_free(WholeFile* f) {
    free(f->bytes);
    safetensors_free(&f->header);
}

static const float* tensor_of(const WholeFile* f, const char* name, const SafetensorsTensor** tensor) {
    *tensor = NULL;
    for (int i = 0; i < f->header.count; i++) {
        if (strcmp(f->header.tensors[i].name, name) != 0) continue;
        *tensor = &f->header.tensors[i];
        return (const float*)(void*)(f->bytes + f->header.data_begin + f->header.tensors[i].begin);
    }
    fail_msg("no tensor %s", name);
    return NULL;
}

static void assert_same_tensors(const WholeFile* a, const WholeFile* b) {
    assert_int_equal(a->header.count, b->header.count);
    for (int i = 0; i < a->header.count; i++) {
        const SafetensorsTensor *s = &a->header.tensors[i], *t;
        const float* data = tensor_of(b, s->name, &t);
        assert_int_equal(s->num_dims, t->num_dims);
        assert_memory_equal(s->dims, t->dims, sizeof s->dims);
        assert_memory_equal(tensor_of(a, s->name, &s), data, s->end - s->begin);
    }
}

// ----------------------------------------------------------------------------
// the fixtures, written by transformers: loaded, looked at, written again, compared

static const char fixtures[] = "dev/test/fixtures";

static Weights load_fixture(const char* name, char dir[PATH_MAX]) {
    char config[PATH_MAX];
    ModelConfig model;
    Error err = {0, {0}};
    path_in(dir, fixtures, name);
    path_in(config, dir, "config.json");
    if (!model_config_load(&model, config, &err)) fail_msg("%s", err.text);
    Weights w = weights_new(&model);
    CheckpointData d = {&model, w.params, w.m, w.v, {.step = 1}, NULL, NULL, 0, 0, NULL, NULL};
    if (!checkpoint_load(dir, &d, &err)) fail_msg("%s: %s", name, err.text);
    assert_int_equal(d.state.step, 0);
    for (size_t i = 0; i < w.count; i++) assert_true(w.m[i] == 0 && w.v[i] == 0);
    return w;
}

static void test_fixtures_come_back(void** state) {
    (void)state;
    static const char* const names[] = {"gpt2",       "gpt2_untied", "llama_mha", "llama_gqa",
                                        "llama_bias", "mistral",     "qwen2"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char dir[PATH_MAX], out[PATH_MAX], config[PATH_MAX];
        Error err = {0, {0}};
        ModelConfig again;
        Weights w = load_fixture(names[i], dir);
        path_in(out, work, names[i]);
        CheckpointData d = {&w.model, w.params, NULL, NULL, {0}, NULL, NULL, 0, 0, NULL, NULL};
        if (!checkpoint_export(out, &d, &err)) fail_msg("%s", err.text);
        WholeFile a = whole_file(dir, "model.safetensors"), b = whole_file(out, "model.safetensors");
        assert_same_tensors(&a, &b);
        whole_file_free(&a);
        whole_file_free(&b);
        path_in(config, out, "config.json");
        assert_true(model_config_load(&again, config, &err));
        String difference = {NULL, 0, 0};
        if (model_config_difference(&w.model, &again, &difference)) fail_msg("%s", difference.data);
        weights_free(&w);
    }
}

// Element by element, so that an error made both ways cannot hide: memory is (out, in), GPT-2's files (in,
// out).
static void test_gpt2_in_memory(void** state) {
    (void)state;
    char dir[PATH_MAX], name[96];
    Weights w = load_fixture("gpt2", dir);
    WholeFile f = whole_file(dir, "model.safetensors");
    ParameterLayout p = parameter_layout(&w.model);
    static const struct {
        const char* name;
        enum TensorId id;
    } transposed[] = {
        {"attn.c_attn", QKVW}, {"attn.c_proj", ATTPROJW}, {"mlp.c_fc", FCW}, {"mlp.c_proj", FCPROJW}};
    const SafetensorsTensor* t;
    for (int layer = 0; layer < w.model.num_hidden_layers; layer++) {
        for (int k = 0; k < 4; k++) {
            snprintf(name, sizeof name, "transformer.h.%d.%s.weight", layer, transposed[k].name);
            const float* file = tensor_of(&f, name, &t);
            const float* memory = w.params + tensor_offset(&p, transposed[k].id, layer);
            size_t rows = p.rows[transposed[k].id], cols = p.cols[transposed[k].id];
            assert_int_equal(t->dims[0], cols);
            for (size_t r = 0; r < rows; r++)
                for (size_t c = 0; c < cols; c++) assert_true(file[c * rows + r] == memory[r * cols + c]);
        }
        snprintf(name, sizeof name, "transformer.h.%d.mlp.c_fc.bias", layer);
        const float* bias = tensor_of(&f, name, &t);
        assert_memory_equal(bias, w.params + tensor_offset(&p, FCB, layer), p.size[FCB] * 4);
    }
    size_t used = (size_t)w.model.vocab_size * (size_t)w.model.hidden_size;
    const float* embedding = tensor_of(&f, "transformer.wte.weight", &t);
    assert_memory_equal(embedding, w.params + p.offset[WTE], used * 4);
    for (size_t i = used; i < p.size[WTE]; i++) assert_true(w.params[p.offset[WTE] + i] == 0); // padding
    whole_file_free(&f);
    weights_free(&w);
}

static void test_llama_in_memory(void** state) {
    (void)state;
    char dir[PATH_MAX], name[96];
    Weights w = load_fixture("llama_mha", dir);
    WholeFile f = whole_file(dir, "model.safetensors");
    ParameterLayout p = parameter_layout(&w.model);
    const ModelConfig* c = &w.model;
    size_t C = (size_t)c->hidden_size, q = (size_t)(c->num_attention_heads * c->head_dim);
    size_t kv = (size_t)(c->num_key_value_heads * c->head_dim), FF = (size_t)c->intermediate_size;
    const struct {
        const char* name;
        enum TensorId id;
        size_t row, rows, cols;
    } parts[] = {
        {"self_attn.q_proj", QKVW, 0, q, C},       {"self_attn.k_proj", QKVW, q, kv, C},
        {"self_attn.v_proj", QKVW, q + kv, kv, C}, {"self_attn.o_proj", ATTPROJW, 0, C, q},
        {"mlp.gate_proj", FCW, 0, FF, C},          {"mlp.up_proj", FCW, FF, FF, C},
        {"mlp.down_proj", FCPROJW, 0, C, FF},
    };
    const SafetensorsTensor* t;
    for (int layer = 0; layer < c->num_hidden_layers; layer++) {
        for (size_t k = 0; k < sizeof parts / sizeof parts[0]; k++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, parts[k].name);
            const float* file = tensor_of(&f, name, &t);
            const float* memory =
                w.params + tensor_offset(&p, parts[k].id, layer) + parts[k].row * parts[k].cols;
            assert_true(t->dims[0] == parts[k].rows && t->dims[1] == parts[k].cols);
            assert_memory_equal(file, memory, parts[k].rows * parts[k].cols * 4);
        }
    }
    const float* head = tensor_of(&f, "lm_head.weight", &t);
    assert_memory_equal(head, w.params + p.offset[LMHEAD], (size_t)c->vocab_size * C * 4);
    for (size_t i = (size_t)c->vocab_size * C; i < p.size[LMHEAD]; i++)
        assert_true(w.params[p.offset[LMHEAD] + i] == 0);
    whole_file_free(&f);
    weights_free(&w);
}

// ----------------------------------------------------------------------------
// variants: the same model as others may store it, and as nobody should

typedef struct {
    const char* name; // of the variant
    int model;        // of tiny_models
    const char* dtype;
    bool bare_names;     // no "transformer." in front
    bool buffers;        // attention masks saved as tensors
    const char* head;    // of a tied model: "same" as the embedding or "other"
    const char* skip;    // a tensor left out
    const char* add;     // a tensor too many
    const char* flat;    // a tensor with one dimension instead of two
    int shards;          // 0: a single file
    bool twice;          // every shard holds everything
    const char* message; // what the error must say; NULL: it loads
} Variant;

static const Variant variants[] = {
    {"as written", 0, "F32", false, false, NULL, NULL, NULL, NULL, 0, false, NULL},
    {"bfloat16", 0, "BF16", false, false, NULL, NULL, NULL, NULL, 0, false, NULL},
    {"bfloat16 llama", 2, "BF16", false, false, NULL, NULL, NULL, NULL, 2, false, NULL},
    {"half", 1, "F16", false, false, NULL, NULL, NULL, NULL, 0, false, NULL},
    {"GPT-2's own file", 0, "F32", true, true, NULL, NULL, NULL, NULL, 0, false, NULL},
    {"with the tied head", 0, "F32", false, false, "same", NULL, NULL, NULL, 0, false, NULL},
    {"with the tied head in another shard", 4, "BF16", false, false, "same", NULL, NULL, NULL, 3, false,
     NULL},
    {"shards", 3, "F32", false, false, NULL, NULL, NULL, NULL, 4, false, NULL},
    {"a head not tied", 0, "F32", false, false, "other", NULL, NULL, NULL, 0, false,
     "differs from the embedding"},
    {"a head not tied, shards", 3, "F32", false, false, "other", NULL, NULL, NULL, 3, false, "differs from"},
    {"a tensor missing", 0, "F32", false, false, NULL, "transformer.h.1.ln_2.weight", NULL, NULL, 0, false,
     "lacks 1 of the model's tensors; transformer.h.1.ln_2.weight"},
    {"no embedding", 2, "F32", false, false, NULL, "model.embed_tokens.weight", NULL, NULL, 2, false,
     "lacks 1"},
    {"a tensor too many", 2, "F32", false, false, NULL, NULL, "model.layers.2.input_layernorm.weight", NULL,
     0, false, "holds tensor model.layers.2.input_layernorm.weight"},
    {"another shape", 2, "F32", false, false, NULL, NULL, NULL, "model.layers.0.mlp.up_proj.weight", 0, false,
     "model.layers.0.mlp.up_proj.weight has shape [240]; this model needs [20, 12]"},
    {"integers", 2, "I32", false, false, NULL, NULL, NULL, NULL, 0, false,
     "weights must be F32, BF16 or F16"},
    {"doubles", 2, "F64", false, false, NULL, NULL, NULL, NULL, 0, false, "weights must be F32, BF16 or F16"},
    {"everything twice", 2, "F32", false, false, NULL, NULL, NULL, NULL, 2, true, "is there twice"},
};

static uint16_t half_from_float(float x) { // test values are few: search
    for (uint32_t h = 0; h < 0x7C00; h++)
        if (float_from_f16((uint16_t)h) >= fabsf(x)) return (uint16_t)(h | (x < 0 ? 0x8000 : 0));
    return 0x7C00;
}

static void append_value(String* s, const char* dtype, float* x) {
    char zeros[8] = {0};
    uint16_t half = strcmp(dtype, "F16") == 0 ? half_from_float(*x) : bf16_from_float(*x);
    if (strcmp(dtype, "F32") == 0) {
        string_append_bytes(s, x, 4);
    } else if (dtype[0] == 'B' || strcmp(dtype, "F16") == 0) {
        string_append_bytes(s, &half, 2);
        *x = dtype[0] == 'B' ? float_from_bf16(half) : float_from_f16(half); // what a reader must find
    } else {
        string_append_bytes(s, zeros, strcmp(dtype, "F64") == 0 ? 8 : 4);
    }
}

static void append_header(String* s, const Variant* v, const char* name, const HfTensor* t, size_t begin,
                          size_t end) {
    bool flat = v->flat != NULL && strcmp(t->name, v->flat) == 0;
    uint64_t count = t->dims[0] * t->dims[1];
    string_append(s, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", s->size > 9 ? "," : "", name, v->dtype);
    if (flat || t->num_dims == 1)
        string_append(s, "%llu", (unsigned long long)(flat ? count : t->dims[0]));
    else
        string_append(s, "%llu,%llu", (unsigned long long)t->dims[0], (unsigned long long)t->dims[1]);
    string_append(s, "],\"data_offsets\":[%zu,%zu]}", begin, end);
}

// Writes the tensors whose number is `shard` modulo `shards`. The weights become what the type can hold.
static void write_variant_file(const char* dir, const char* file, const Variant* v, Weights* w, int shard,
                               int shards) {
    String header = {NULL, 0, 0}, data = {NULL, 0, 0};
    StoredTensors list = stored_model(&w->model, w->params, v->head != NULL);
    string_append_bytes(&header, "\0\0\0\0\0\0\0\0{", 9);
    if (v->head != NULL) { // in front, where no reader expects it
        StoredTensor last = list.tensors[list.count - 1];
        memmove(list.tensors + 1, list.tensors, (size_t)(list.count - 1) * sizeof last);
        list.tensors[0] = last;
    }
    for (int i = 0; i < list.count; i++) {
        const HfTensor* t = &list.tensors[i].hf;
        if ((!v->twice && i % shards != shard) || (v->skip != NULL && strcmp(v->skip, t->name) == 0))
            continue;
        const char* name =
            v->bare_names && strncmp(t->name, "transformer.", 12) == 0 ? t->name + 12 : t->name;
        size_t begin = data.size;
        for (size_t k = 0; k < t->rows * t->cols; k++) {
            size_t at = t->transposed ? k % t->rows * t->cols + k / t->rows : k;
            float zero = 0, *x = t->absent ? &zero : &w->params[t->offset + at], other = *x + 1;
            bool differs = v->head != NULL && strcmp(v->head, "other") == 0 && i == 0 && k == 5;
            append_value(&data, v->dtype, differs ? &other : x);
        }
        append_header(&header, v, name, t, begin, data.size);
    }
    HfTensor extra = list.tensors[0].hf;
    extra.num_dims = 1, extra.dims[0] = 3, extra.dims[1] = 1;
    for (int k = 0; k < (shard == 0 ? 3 : 0); k++) {
        const char* names[3] = {v->add, v->buffers ? "h.0.attn.bias" : NULL,
                                v->buffers ? "h.0.attn.masked_bias" : NULL};
        if (names[k] == NULL) continue;
        append_header(&header, v, names[k], &extra, data.size, data.size + 12);
        string_append_bytes(&data, "xxxxxxxxxxxx", 12);
    }
    string_append(&header, "}");
    uint64_t n = header.size - 8;
    memcpy(header.data, &n, 8);
    string_append_bytes(&header, data.data, data.size);
    spill(dir, file, header.data, header.size);
    free(header.data);
    free(data.data);
    free(list.tensors);
}

static void write_variant(const char* dir, const Variant* v, Weights* w) {
    String config = {NULL, 0, 0}, index = {NULL, 0, 0};
    assert_int_equal(mkdir(dir, 0777), 0);
    model_config_write_json(&w->model, &config);
    spill(dir, "config.json", config.data, config.size);
    string_append(&index, "{\"metadata\": {}, \"weight_map\": {");
    for (int i = 0; i < (v->shards == 0 ? 1 : v->shards); i++) {
        char name[64];
        snprintf(name, sizeof name, "part-%d.safetensors", i);
        string_append(&index, "%s\"some.tensor.%d\": \"%s\"", i > 0 ? "," : "", i, name);
        write_variant_file(dir, v->shards == 0 ? "model.safetensors" : name, v, w, i,
                           v->shards == 0 ? 1 : v->shards);
    }
    string_append(&index, "}}");
    if (v->shards != 0) spill(dir, "model.safetensors.index.json", index.data, index.size);
    free(config.data);
    free(index.data);
}

static void test_variants(void** state) {
    (void)state;
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        const Variant* v = &variants[i];
        char dir[PATH_MAX], name[32];
        snprintf(name, sizeof name, "variant%zu", i);
        path_in(dir, work, name);
        ModelConfig model = tiny_model(v->model);
        Weights w = weights_new(&model), loaded = weights_new(&model);
        weights_fill(&w, i);
        // Numbers that every type holds, but for rounding.
        for (size_t k = 0; k < w.count; k++)
            if (!(fabsf(w.params[k]) < 1)) w.params[k] = 0.75f;
        zero_vocabulary_padding(&model, w.params, 0, w.count);
        write_variant(dir, v, &w);
        Error err = {0, {0}};
        CheckpointData d = {&model, loaded.params, NULL, NULL, {0}, NULL, NULL, 0, 0, NULL, NULL};
        bool ok = checkpoint_load(dir, &d, &err);
        if (ok != (v->message == NULL) || (!ok && strstr(err.text, v->message) == NULL))
            fail_msg("%s: %s", v->name, ok ? "was accepted" : err.text);
        if (ok && memcmp(loaded.params, w.params, w.count * 4) != 0) fail_msg("%s: other weights", v->name);
        weights_free(&w);
        weights_free(&loaded);
    }
}

// A GPT-2 without biases is written with zeros in their place; others than zeros cannot be read back.
static void test_absent_biases(void** state) {
    (void)state;
    char dir[PATH_MAX];
    Error err = {0, {0}};
    ModelConfig model = tiny_model(1);
    Weights w = weights_new(&model);
    weights_fill(&w, 1);
    path_in(dir, work, "absent");
    CheckpointData d = {&model, w.params, NULL, NULL, {0}, NULL, NULL, 0, 0, NULL, NULL};
    assert_true(checkpoint_export(dir, &d, &err));
    WholeFile f = whole_file(dir, "model.safetensors");
    const SafetensorsTensor* t;
    const float* bias = tensor_of(&f, "transformer.h.0.mlp.c_fc.bias", &t);
    for (uint64_t i = 0; i < t->count; i++) assert_true(bias[i] == 0);
    assert_true(checkpoint_load(dir, &d, &err));
    f.bytes[f.header.data_begin + t->begin + 6] = 1;
    spill(dir, "model.safetensors", f.bytes, f.header.data_begin + f.header.tensors[f.header.count - 1].end);
    assert_false(checkpoint_load(dir, &d, &err));
    assert_non_null(strstr(err.text, "transformer.h.0.mlp.c_fc.bias is not zero"));
    whole_file_free(&f);
    weights_free(&w);
}

static void test_written_shards(void** state) {
    (void)state;
    char dir[PATH_MAX], config_path[PATH_MAX];
    Error err = {0, {0}};
    Manifest manifest = {NULL, 0};
    String config = {NULL, 0, 0};
    ModelConfig model = tiny_model(0);
    Weights w = weights_new(&model), loaded = weights_new(&model);
    weights_fill(&w, 3);
    path_in(dir, work, "shards");
    assert_int_equal(mkdir(dir, 0777), 0);
    path_in(config_path, dir, "config.json");
    model_config_write_json(&model, &config);
    spill(dir, "config.json", config.data, config.size);
    enum { LIMIT = 2000 };
    assert_true(model_weights_write(dir, &model, w.params, whole_share(&model), LIMIT, &manifest, &err));
    assert_true(manifest.count > 3);
    for (int i = 0; i + 1 < manifest.count; i++) {
        char name[64];
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", i + 1, manifest.count - 1);
        assert_string_equal(manifest.files[i].name, name);
        WholeFile f = whole_file(dir, name);
        uint64_t bytes = f.header.tensors[f.header.count - 1].end;
        assert_true(f.header.count == 1 || bytes <= LIMIT);
        whole_file_free(&f);
    }
    CheckpointData d = {&model, loaded.params, NULL, NULL, {0}, NULL, NULL, 0, 0, NULL, NULL};
    if (!checkpoint_load(dir, &d, &err)) fail_msg("%s", err.text);
    assert_memory_equal(loaded.params, w.params, w.count * 4);
    manifest_free(&manifest);
    free(config.data);
    weights_free(&w);
    weights_free(&loaded);
}

// ----------------------------------------------------------------------------
// indexes, other files, export

static void test_bad_indexes(void** state) {
    (void)state;
    static const char* const bad[] = {
        "",
        "{",
        "[]",
        "{}",
        "{\"weight_map\": []}",
        "{\"weight_map\": {\"a\": 1}}",
        "{\"weight_map\": {\"a\": \"../b\"}}",
        "{\"weight_map\": {\"a\": \"/etc/passwd\"}}",
        "{\"weight_map\": {\"a\": \"\"}}",
        "{\"weight_map\": {}} x",
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        Error err = {0, {0}};
        Manifest files = {NULL, 0};
        if (model_index_parse(&files, bad[i], "index", &err)) fail_msg("accepted: %s", bad[i]);
        assert_int_equal(err.code, EXIT_BAD_DATA);
    }
}

static void test_not_a_model(void** state) {
    (void)state;
    char dir[PATH_MAX];
    ModelConfig model = tiny_model(0);
    Weights w = weights_new(&model);
    CheckpointData d = {&model, w.params, NULL, NULL, {0}, NULL, NULL, 0, 0, NULL, NULL};
    Error none = {0, {0}}, pickle = {0, {0}};
    path_in(dir, work, "nothing");
    assert_false(checkpoint_load(dir, &d, &none));
    assert_int_equal(none.code, EXIT_NO_INPUT);
    assert_int_equal(mkdir(dir, 0777), 0);
    String config = {NULL, 0, 0};
    model_config_write_json(&model, &config);
    spill(dir, "config.json", config.data, config.size);
    spill(dir, "pytorch_model.bin", "pickle", 6);
    assert_false(checkpoint_load(dir, &d, &pickle));
    assert_non_null(strstr(pickle.text, "must be saved as safetensors"));
    free(config.data);
    weights_free(&w);
}

static void test_export(void** state) {
    (void)state;
    char dir[PATH_MAX], path[PATH_MAX], tokenizer[PATH_MAX];
    Error err = {0, {0}};
    ModelConfig model = tiny_model(3);
    Weights w = weights_new(&model);
    weights_fill(&w, 1);
    static const char text[] =
        "{\"version\": \"1.0\", \"added_tokens\": [{\"id\": 0, \"content\": \"<|begin\\\"|>\"},"
        "{\"id\": 1, \"content\": \"<|endoftext|>\"}, {\"id\": 2}]}";
    spill(work, "t.json", text, strlen(text));
    path_in(tokenizer, work, "t.json");
    snprintf(dir, sizeof dir, "%s/new/and/deep///", work);
    CheckpointData d = {&model, w.params, w.m, w.v, {0}, "{}", tokenizer, 0, 0, NULL, NULL};
    if (!checkpoint_export(dir, &d, &err)) fail_msg("%s", err.text);
    static const struct {
        const char *name, *text;
    } files[] = {
        {"tokenizer.json", text},
        {"tokenizer_config.json",
         "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"model_max_length\": 16,\n"
         "  \"bos_token\": \"<|begin\\\"|>\",\n  \"eos_token\": \"<|endoftext|>\"\n}\n"},
        {"generation_config.json",
         "{\n  \"_from_model_config\": true,\n  \"bos_token_id\": 0,\n  \"eos_token_id\": 1\n}\n"},
    };
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        size_t size = 0;
        path_in(path, dir, files[i].name);
        char* got = read_file(path, SIZE_MAX, &size, &err);
        assert_non_null(got);
        assert_string_equal(got, files[i].text);
        free(got);
    }
    // A model directory and nothing else, and nothing beside it.
    static const char* const others[] = {"state.json", "manifest.json", "run_config.json",
                                         "optim-00001-of-00001.safetensors"};
    for (int i = 0; i < 4; i++) {
        path_in(path, dir, others[i]);
        assert_int_equal(access(path, F_OK), -1);
    }
    struct dirent** names;
    path_in(path, work, "new/and");
    assert_int_equal(scandir(path, &names, NULL, alphasort), 3); // ., .., deep
    for (int i = 0; i < 3; i++) free(names[i]);
    free(names);
    // Not over what is there; and a failure leaves nothing.
    assert_false(checkpoint_export(dir, &d, &err));
    assert_non_null(strstr(err.text, "is there already"));
    Error not_json = {0, {0}};
    spill(work, "t.json", "[", 1);
    path_in(path, work, "failed");
    assert_false(checkpoint_export(path, &d, &not_json));
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(scandir(work, &names, NULL, alphasort), 4); // ., .., new, t.json
    for (int i = 0; i < 4; i++) free(names[i]);
    free(names);
    weights_free(&w);
}

// Standard deviations as the table says, residual projections smaller by sqrt(2 L); norms begin at one, biases at
// zero; no two layers and no two tensors begin alike.
static void test_initial_weights(void** state) {
    (void)state;
    ModelConfig c;
    memset(&c, 0, sizeof c);
    c.family = &model_families[0];
    c.vocab_size = c.hidden_size = 128, c.num_hidden_layers = 8, c.initializer_range = 0.02;
    c.num_attention_heads = c.num_key_value_heads = 2, c.head_dim = 64;
    c.intermediate_size = 128, c.max_position_embeddings = 128;
    c.attention_bias = c.attention_output_bias = c.mlp_bias = c.norm_bias = true;
    enum { MOST = 3 * 128 * 128 };
    static float w[MOST], other[MOST];
    ParameterLayout p = parameter_layout(&c);
    for (int id = 0; id < NUM_TENSORS; id++) {
        size_t n = p.size[id];
        init_tensor(w, &c, (enum TensorId)id, 0, 1);
        double squares = 0, expected = tensor_table[id].init == INIT_ONE ? 1 : 0;
        for (size_t i = 0; i < n; i++) squares += (double)w[i] * (double)w[i];
        if (tensor_table[id].init == INIT_NORMAL) expected = 0.02;
        if (tensor_table[id].init == INIT_RESIDUAL) expected = 0.02 / 4; // sqrt(2 * 8)
        if (n != 0 && fabs(sqrt(squares / (double)n) - expected) > 0.03 * expected)
            fail_msg("%s: %g instead of %g", tensor_table[id].name, sqrt(squares / (double)n), expected);
    }
    init_tensor(w, &c, FCPROJW, 0, 1);
    init_tensor(other, &c, FCPROJW, 1, 1);
    assert_memory_not_equal(w, other, 128 * 128 * sizeof(float));
    init_tensor(other, &c, ATTPROJW, 0, 1);
    assert_memory_not_equal(w, other, 128 * 128 * sizeof(float));
}

#define IN_WORK(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        IN_WORK(test_fixtures_come_back),
        cmocka_unit_test(test_gpt2_in_memory),
        cmocka_unit_test(test_llama_in_memory),
        IN_WORK(test_variants),
        IN_WORK(test_absent_biases),
        IN_WORK(test_written_shards),
        cmocka_unit_test(test_bad_indexes),
        IN_WORK(test_not_a_model),
        IN_WORK(test_export),
        cmocka_unit_test(test_initial_weights),
    };
    return cmocka_run_group_tests_name("model_files", tests, NULL, NULL);
}
