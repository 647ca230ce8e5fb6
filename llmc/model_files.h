// A Hugging Face model directory, written and read: config.json, model.safetensors (or its shards and their
// index), and the small files that transformers, vLLM and others want beside them.
#pragma once
#include "llmc/hashed_file.h"    // defines: HashedFile, hashed_create, hashed_write, hashed_finish
#include "llmc/json.h"           // defines: json_append_string
#include "llmc/layout.h"         // defines: tensor_owner, tensor_begin
#include "llmc/manifest.h"       // defines: Manifest, manifest_add, manifest_find, plain_file_name
#include "llmc/model_config.h"   // defines: model_config_load, model_config_write_json
#include "llmc/stored_tensors.h" // defines: StoredTensors, stored_model, tensors_write, tensors_read

static const char single_model_file[] = "model.safetensors";
static const char model_index_file[] = "model.safetensors.index.json";
#define MAX_SHARD_BYTES 5000000000ull // Hugging Face's own limit for one file
enum { MAX_TOKENIZER_BYTES = 1 << 28 };

// ----------------------------------------------------------------------------
// writing

static inline bool bytes_write(const char* dir, const char* name, const void* data, size_t size,
                               Manifest* manifest, Error* err) {
    HashedFile f;
    FileRecord record;
    bool ok = hashed_create(&f, dir, name, err) && hashed_write(&f, data, size, err) &&
              hashed_finish(&f, &record, err);
    hashed_close(&f);
    if (ok && manifest != NULL) manifest_add(manifest, &record);
    return ok;
}

// Weights that are shared out over processes (layout.h): elements [begin, end) of memory are here.
typedef struct {
    size_t begin, end;
    int rank, size;
    bool alone; // a directory holds this share and no other
} Share;

static inline Share whole_share(const ModelConfig* model) {
    Share all = {0, parameter_layout(model).num_parameters, 0, 1, false};
    return all;
}

// The weights: one file, or shards of at most max_bytes (a larger tensor has one for itself) and their index. Each
// process writes shards of its own, and the first one the index.
static inline bool model_weights_write(const char* dir, const ModelConfig* model, float* params, Share share,
                                       uint64_t max_bytes, Manifest* manifest, Error* err) {
    StoredTensors list = stored_model(model, params, false);
    ParameterLayout layout = parameter_layout(model);
    int* shard_of = (int*)calloc_check((size_t)list.count + 1, sizeof *shard_of); // and one behind the last
    uint64_t total = 0, in_shard = 0;
    int shards = 1, owner = 0;
    for (int i = 0; i < list.count; i++) {
        uint64_t bytes = 4 * stored_elements(&list.tensors[i]);
        int mine = tensor_owner(&layout, tensor_begin(&layout, list.tensors[i].hf.offset), share.size);
        if (in_shard > 0 && (in_shard + bytes > max_bytes || mine != owner)) shards++, in_shard = 0;
        owner = mine;
        shard_of[i] = shards;
        in_shard += bytes, total += bytes;
    }
    String index = {NULL, 0, 0};
    string_append(&index, "{\n  \"metadata\": {\"total_size\": %llu},\n  \"weight_map\": {",
                  (unsigned long long)total);
    bool ok = true;
    stored_keep(&list, share.begin, share.end);
    for (int first = 0, last; ok && first < list.count; first = last) {
        char name[64];
        snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", shard_of[first], shards);
        for (last = first; last < list.count && shard_of[last] == shard_of[first]; last++)
            string_append(&index, "%s\n    \"%s\": \"%s\"", last > 0 ? "," : "", list.tensors[last].hf.name,
                          name);
        if (list.tensors[first].memory == NULL) continue;
        ok = tensors_write(dir, shards == 1 ? single_model_file : name, &list, first, last, manifest, err);
    }
    string_append(&index, "\n  }\n}\n");
    if (ok && shards > 1 && share.rank == 0)
        ok = bytes_write(dir, model_index_file, index.data, index.size, manifest, err);
    free(index.data);
    free(shard_of);
    free(list.tensors);
    return ok;
}

static inline bool generation_config_write(const char* dir, const ModelConfig* model, Manifest* manifest,
                                           Error* err) {
    String s = {NULL, 0, 0};
    string_append(&s, "{\n  \"_from_model_config\": true");
    if (model->bos_token_id >= 0) string_append(&s, ",\n  \"bos_token_id\": %d", model->bos_token_id);
    if (model->eos_token_id >= 0) string_append(&s, ",\n  \"eos_token_id\": %d", model->eos_token_id);
    string_append(&s, "\n}\n");
    bool ok = bytes_write(dir, "generation_config.json", s.data, s.size, manifest, err);
    free(s.data);
    return ok;
}

// tokenizer.json as it is, and the tokenizer_config.json that tells transformers which of its classes reads
// it and which of its added tokens begin and end a text.
static inline bool tokenizer_files_write(const char* dir, const ModelConfig* model, const char* path,
                                         Manifest* manifest, Error* err) {
    const int ids[2] = {model->bos_token_id, model->eos_token_id};
    static const char* const roles[2] = {"bos_token", "eos_token"};
    size_t size;
    char* text = read_file(path, MAX_TOKENIZER_BYTES, &size, err);
    if (text == NULL) return false;
    cJSON* json = cJSON_Parse(text);
    String s = {NULL, 0, 0};
    string_append(&s, "{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"model_max_length\": %d",
                  model->max_position_embeddings);
    const cJSON* token;
    cJSON_ArrayForEach(token, cJSON_GetObjectItemCaseSensitive(json, "added_tokens")) {
        const cJSON* id = cJSON_GetObjectItemCaseSensitive(token, "id");
        const cJSON* content = cJSON_GetObjectItemCaseSensitive(token, "content");
        if (!cJSON_IsNumber(id) || !cJSON_IsString(content)) continue;
        for (int i = 0; i < 2; i++) {
            if (id->valuedouble != ids[i]) continue;
            string_append(&s, ",\n  \"%s\": ", roles[i]);
            json_append_string(&s, content->valuestring);
        }
    }
    string_append(&s, "\n}\n");
    bool ok = cJSON_IsObject(json) || fail(err, EXIT_BAD_DATA, "%s is not a JSON object", path);
    ok = ok && bytes_write(dir, "tokenizer.json", text, size, manifest, err) &&
         bytes_write(dir, "tokenizer_config.json", s.data, s.size, manifest, err);
    cJSON_Delete(json);
    free(s.data);
    free(text);
    return ok;
}

// What makes a directory a Hugging Face model, besides the weights: config.json, generation_config.json and, unless
// tokenizer_path is NULL or "", the tokenizer. A record of every file is added to the manifest.
static inline bool model_files_write(const char* dir, const ModelConfig* model, const char* tokenizer_path,
                                     Manifest* manifest, Error* err) {
    String config = {NULL, 0, 0};
    model_config_write_json(model, &config);
    bool ok = bytes_write(dir, "config.json", config.data, config.size, manifest, err) &&
              generation_config_write(dir, model, manifest, err);
    free(config.data);
    if (ok && tokenizer_path != NULL && tokenizer_path[0] != '\0')
        ok = tokenizer_files_write(dir, model, tokenizer_path, manifest, err);
    return ok;
}

// ----------------------------------------------------------------------------
// reading

// The names of the files that an index of shards speaks of. On failure nothing is left to free.
static inline bool model_index_parse(Manifest* files, const char* text, const char* where, Error* err) {
    cJSON* json = cJSON_ParseWithOpts(text, NULL, 1);
    const cJSON* map = cJSON_GetObjectItemCaseSensitive(json, "weight_map");
    const cJSON* item;
    bool ok = cJSON_IsObject(map) || fail(err, EXIT_BAD_DATA, "%s has no weight_map", where);
    cJSON_ArrayForEach(item, map) {
        FileRecord record;
        memset(&record, 0, sizeof record);
        ok = ok && ((cJSON_IsString(item) && plain_file_name(item->valuestring) &&
                     files->count < MANIFEST_MAX_FILES) ||
                    fail(err, EXIT_BAD_DATA, "%s: weight_map names something that is not a plain file name",
                         where));
        if (!ok || manifest_find(files, item->valuestring) != NULL) continue;
        memcpy(record.name, item->valuestring, strlen(item->valuestring));
        manifest_add(files, &record);
    }
    cJSON_Delete(json);
    if (!ok) manifest_free(files);
    return ok;
}

// The files with the weights in a directory that has no manifest. Caller frees, also after a failure.
static inline bool model_weight_files(Manifest* files, const char* dir, Error* err) {
    char path[PATH_MAX];
    files->files = NULL, files->count = 0;
    if (!path_join(path, dir, single_model_file, err)) return false;
    if (access(path, F_OK) == 0) {
        FileRecord record;
        memset(&record, 0, sizeof record);
        memcpy(record.name, single_model_file, sizeof single_model_file);
        manifest_add(files, &record);
        return true;
    }
    if (!path_join(path, dir, model_index_file, err)) return false;
    if (access(path, F_OK) != 0)
        return fail(err, EXIT_NO_INPUT,
                    "%s holds neither %s nor %s: weights in other formats (pytorch_model.bin) "
                    "must be saved as safetensors first",
                    dir, single_model_file, model_index_file);
    size_t size;
    char* text = read_file(path, MANIFEST_MAX_BYTES, &size, err);
    bool ok = text != NULL && model_index_parse(files, text, path, err);
    free(text);
    return ok;
}

// Reads the weights of the directory into params (this process's share of them), or only checks them where params is
// NULL. With a manifest, exactly its model*.safetensors files are read and their hashes checked.
static inline bool model_weights_read(const char* dir, const ModelConfig* model, float* params, Share share,
                                      const Manifest* manifest, Error* err) {
    Manifest found = {NULL, 0};
    if (manifest == NULL && !model_weight_files(&found, dir, err)) return false;
    const Manifest* files = manifest != NULL ? manifest : &found;
    StoredTensors list = stored_model(model, params, !share.alone);
    stored_keep(&list, share.begin, share.end);
    if (share.alone) stored_drop_others(&list);
    bool ok = true;
    for (int i = 0; ok && i < files->count; i++) {
        const FileRecord* file = &files->files[i];
        bool weights =
            manifest == NULL || (strncmp(file->name, "model", 5) == 0 && tensor_file_name(file->name));
        if (weights) ok = tensors_read(dir, file->name, manifest != NULL ? file : NULL, &list, err);
    }
    ok = ok && stored_complete(&list, dir, err);
    if (ok && params != NULL) zero_vocabulary_padding(model, params, share.begin, share.end);
    free(list.tensors);
    manifest_free(&found);
    return ok;
}

// ----------------------------------------------------------------------------
// configurations

// The first key of config.json, other than those that change neither a weight nor an activation, in which two
// models differ, with both values; false when they are the same. Caller frees.
static inline bool model_config_difference(const ModelConfig* a, const ModelConfig* b, String* difference) {
    static const char* const no_matter[] = {"initializer_range", "bos_token_id", "eos_token_id"};
    String text[2] = {{NULL, 0, 0}, {NULL, 0, 0}};
    model_config_write_json(a, &text[0]);
    model_config_write_json(b, &text[1]);
    cJSON* json[2] = {cJSON_Parse(text[0].data), cJSON_Parse(text[1].data)};
    for (int side = 0; side < 2 && difference->size == 0; side++) {
        const cJSON* item;
        cJSON_ArrayForEach(item, json[side]) {
            const cJSON* other = cJSON_GetObjectItemCaseSensitive(json[1 - side], item->string);
            bool matters = true;
            for (size_t i = 0; i < sizeof no_matter / sizeof no_matter[0]; i++)
                if (strcmp(item->string, no_matter[i]) == 0) matters = false;
            if (!matters || cJSON_Compare(item, other, 1)) continue;
            char* here = cJSON_PrintUnformatted(item);
            char* there = other != NULL ? cJSON_PrintUnformatted(other) : NULL;
            string_append(difference, "%s is %s and %s", item->string,
                          side == 0       ? here
                          : there != NULL ? there
                                          : "absent",
                          side == 1       ? here
                          : there != NULL ? there
                                          : "absent");
            cJSON_free(here);
            cJSON_free(there);
            break;
        }
    }
    for (int side = 0; side < 2; side++) {
        cJSON_Delete(json[side]);
        free(text[side].data);
    }
    return difference->size != 0;
}

// The directory's config.json describes this model; otherwise EXIT_CONFIG: nothing is wrong with the files.
static inline bool model_config_check(const char* dir, const ModelConfig* model, Error* err) {
    char path[PATH_MAX];
    ModelConfig stored;
    if (!path_join(path, dir, "config.json", err) || !model_config_load(&stored, path, err)) return false;
    String difference = {NULL, 0, 0};
    bool ok = !model_config_difference(&stored, model, &difference) ||
              fail(err, EXIT_CONFIG, "%s is another model than the run config's: %s there and here", path,
                   difference.data);
    free(difference.data);
    return ok;
}
