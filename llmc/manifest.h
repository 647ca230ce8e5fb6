// manifest.json: size and XXH3-128 of every file of a checkpoint, and a hash of itself.
//
//     {
//       "files": {
//         "config.json": {"size": 612, "xxh3_128": "0123456789abcdef0123456789abcdef"},
//         ...
//       },
//       "manifest_xxh3_128": "0123456789abcdef0123456789abcdef"
//     }
//     ^------------------ hashed ----------------^^- digest, and an end that must be exactly "\"\n}\n" -^
//
// The last value is the hash of every byte before it, so no byte of the file can change unseen. It is checked
// before the JSON is looked at, yet the JSON is not trusted: a forger can compute hashes too.
// The manifest is written last and a checkpoint consists of exactly the files it names.
#pragma once
#include "llmc/hashed_file.h" // defines: FileRecord, directory functions, xxhash.h
#include "llmc/safetensors.h" // defines: safetensors_integer, cJSON

enum { MANIFEST_DIGITS = 32, MANIFEST_MAX_BYTES = 16 << 20, MANIFEST_MAX_FILES = 4096 };
static const char manifest_name[] = "manifest.json";
static const char manifest_hash_key[] = "  \"manifest_xxh3_128\": \"";
static const char manifest_end[] = "\"\n}\n";

typedef struct {
    FileRecord* files;
    int count;
} Manifest;

static inline void manifest_free(Manifest* m) {
    free(m->files);
    m->files = NULL, m->count = 0;
}

static inline void manifest_add(Manifest* m, const FileRecord* record) {
    m->files = (FileRecord*)realloc_check(m->files, (size_t)(m->count + 1) * sizeof *m->files);
    m->files[m->count++] = *record;
}

// NULL when the manifest does not name the file
static inline const FileRecord* manifest_find(const Manifest* m, const char* name) {
    for (int i = 0; i < m->count; i++)
        if (strcmp(m->files[i].name, name) == 0) return &m->files[i];
    return NULL;
}

// Letters, digits, '.', '_' and '-', no dot in front: no path, nothing that a shell or a terminal minds.
static inline bool plain_file_name(const char* name) {
    size_t n = strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-");
    return n > 0 && n < sizeof((FileRecord*)0)->name && name[n] == '\0' && name[0] != '.';
}

// ----------------------------------------------------------------------------
// hashes as text: 32 lower-case hexadecimal digits, most significant first, as xxhsum prints them

static inline void hash_to_hex(char out[MANIFEST_DIGITS + 1], XXH128_hash_t hash) {
    snprintf(out, MANIFEST_DIGITS + 1, "%016llx%016llx", (unsigned long long)hash.high64,
             (unsigned long long)hash.low64);
}

static inline bool hash_from_hex(XXH128_hash_t* hash, const char* text, size_t size) {
    uint64_t half[2] = {0, 0};
    if (size != MANIFEST_DIGITS) return false;
    for (size_t i = 0; i < size; i++) {
        const char* digit = (const char*)memchr("0123456789abcdef", text[i], 16);
        if (digit == NULL) return false;
        half[i / 16] = half[i / 16] << 4 | (uint64_t)(digit - "0123456789abcdef");
    }
    hash->high64 = half[0], hash->low64 = half[1];
    return true;
}

// ----------------------------------------------------------------------------
// writing and reading

static inline void manifest_write(const Manifest* m, String* out) {
    char hex[MANIFEST_DIGITS + 1];
    string_append(out, "{\n  \"files\": {\n");
    for (int i = 0; i < m->count; i++) {
        hash_to_hex(hex, m->files[i].hash);
        string_append(out, "    \"%s\": {\"size\": %llu, \"xxh3_128\": \"%s\"}%s\n", m->files[i].name,
                      (unsigned long long)m->files[i].size, hex, i + 1 < m->count ? "," : "");
    }
    string_append(out, "  },\n%s", manifest_hash_key);
    hash_to_hex(hex, XXH3_128bits(out->data, out->size));
    string_append(out, "%s%s", hex, manifest_end);
}

static inline bool manifest_self_hash_ok(const char* text, size_t size) {
    size_t tail = MANIFEST_DIGITS + sizeof manifest_end - 1;
    if (size < tail ||
        memcmp(text + size - (sizeof manifest_end - 1), manifest_end, sizeof manifest_end - 1) != 0)
        return false;
    XXH128_hash_t said;
    return hash_from_hex(&said, text + size - tail, MANIFEST_DIGITS) &&
           XXH128_isEqual(said, XXH3_128bits(text, size - tail));
}

static inline bool manifest_collect(Manifest* m, const cJSON* files, const char* where, Error* err) {
    int count = cJSON_GetArraySize(files);
    if (!cJSON_IsObject(files) || count < 1 || count > MANIFEST_MAX_FILES)
        return fail(err, EXIT_BAD_DATA, "%s: \"files\" must name 1 to %d files", where, MANIFEST_MAX_FILES);
    m->files = (FileRecord*)calloc_check((size_t)count, sizeof *m->files);
    const cJSON* item;
    cJSON_ArrayForEach(item, files) {
        FileRecord* record = &m->files[m->count];
        const cJSON* hex = cJSON_GetObjectItemCaseSensitive(item, "xxh3_128");
        if (!plain_file_name(item->string) || strcmp(item->string, manifest_name) == 0 ||
            manifest_find(m, item->string) != NULL)
            return fail(err, EXIT_BAD_DATA, "%s: entry %d is not a plain file name, or named twice", where,
                        m->count);
        memcpy(record->name, item->string, strlen(item->string));
        if (!safetensors_integer(cJSON_GetObjectItemCaseSensitive(item, "size"), &record->size) ||
            !cJSON_IsString(hex) || !hash_from_hex(&record->hash, hex->valuestring, strlen(hex->valuestring)))
            return fail(err, EXIT_BAD_DATA, "%s: %s needs a size and a hash of %d digits", where,
                        record->name, MANIFEST_DIGITS);
        m->count++;
    }
    return true;
}

// text: size bytes with a NUL behind them. On failure nothing is left to free.
static inline bool manifest_parse(Manifest* m, const char* text, size_t size, const char* where, Error* err) {
    m->files = NULL, m->count = 0;
    CHECK(text[size] == '\0');
    if (!manifest_self_hash_ok(text, size))
        return fail(err, EXIT_BAD_DATA, "%s is damaged: it does not have the hash that it ends with", where);
    cJSON* json = strlen(text) == size ? cJSON_ParseWithOpts(text, NULL, 1) : NULL;
    bool ok = cJSON_IsObject(json)
                  ? manifest_collect(m, cJSON_GetObjectItemCaseSensitive(json, "files"), where, err)
                  : fail(err, EXIT_BAD_DATA, "%s is not a JSON object", where);
    cJSON_Delete(json);
    if (!ok) manifest_free(m);
    return ok;
}

static inline bool manifest_load(Manifest* m, const char* dir, Error* err) {
    char path[PATH_MAX];
    size_t size;
    m->files = NULL, m->count = 0;
    if (!path_join(path, dir, manifest_name, err)) return false;
    if (access(path, F_OK) != 0 && errno == ENOENT) // what is not there at all is not damaged
        return access(dir, F_OK) != 0 ? fail(err, EXIT_NO_INPUT, "%s is not there", dir)
                                      : fail(err, EXIT_BAD_DATA, "%s has no %s", dir, manifest_name);
    char* text = read_file(path, MANIFEST_MAX_BYTES, &size, err);
    bool ok = text != NULL && manifest_parse(m, text, size, path, err);
    free(text);
    return ok;
}

// The directory holds what the manifest names, the manifest, and nothing else. (That each named file is there
// is found out when it is opened.)
static inline bool manifest_check_directory(const Manifest* m, const char* path, Error* err) {
    DIR* dir = opendir(path);
    if (dir == NULL)
        return fail(err, code_of_open(errno), "cannot open directory %s: %s", path, strerror(errno));
    bool ok = true;
    struct dirent* entry;
    while (ok && (errno = 0, entry = readdir(dir)) != NULL) {
        const char* name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || strcmp(name, manifest_name) == 0) continue;
        if (manifest_find(m, name) == NULL)
            ok =
                fail(err, EXIT_BAD_DATA, "%s holds a file that its manifest does not name (%s): move it away",
                     path, plain_file_name(name) ? name : "with an odd name");
    }
    if (ok && errno != 0) ok = fail(err, EXIT_IO, "cannot list %s: %s", path, strerror(errno));
    closedir(dir);
    return ok;
}
