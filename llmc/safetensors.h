// safetensors: Hugging Face's file of named tensors, its header parsed and written here. No I/O.
//
//      0          8                        8+N
//      +----------+------------------------+---------------------------------------------+
//      | N  (u64) | N bytes of JSON, which | tensor data, little-endian, row-major,      |
//      |          | spaces may follow      | one behind the other: no hole, no overlap   |
//      +----------+------------------------+---------------------------------------------+
//
//      {"__metadata__": {"format": "pt"},
//       "model.norm.weight": {"dtype": "F32", "shape": [768], "data_offsets": [0, 3072]}, ...}
//
// Offsets count from 8+N and cover the rest of the file exactly. A header comes from anywhere, so nothing in
// it is believed: N <= 100 MB, sizes multiplied with overflow checks, names unique and printable.
// Source: https://github.com/huggingface/safetensors (README.md "Format").
#pragma once
#include "llmc/utils.h" // defines: Error, fail, checked_mul, String
#include <cjson/cJSON.h>

enum { SAFETENSORS_MAX_HEADER = 100000000, SAFETENSORS_MAX_DIMS = 8 };

typedef struct {
    const char* name;
    unsigned bits; // of one element
} SafetensorsType;

// Every type that a file may hold; what this program computes with is decided by who reads the data.
static const SafetensorsType safetensors_types[] = {
    {"F64", 64},    {"F32", 32},    {"F16", 16},    {"BF16", 16},   {"I64", 64},    {"U64", 64}, {"I32", 32},
    {"U32", 32},    {"I16", 16},    {"U16", 16},    {"I8", 8},      {"U8", 8},      {"BOOL", 8}, {"C64", 64},
    {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4},
};
enum { NUM_SAFETENSORS_TYPES = sizeof safetensors_types / sizeof safetensors_types[0] };

typedef struct {
    const char* name; // inside the header's JSON
    const SafetensorsType* type;
    int num_dims;
    uint64_t dims[SAFETENSORS_MAX_DIMS];
    uint64_t count;      // elements
    uint64_t begin, end; // bytes, from the beginning of the data
} SafetensorsTensor;

typedef struct {
    SafetensorsTensor* tensors; // in the order of their data
    int count;
    uint64_t data_begin; // byte of the file at which the data begins
    cJSON* json;
} Safetensors;

static inline void safetensors_free(Safetensors* s) {
    free(s->tensors);
    cJSON_Delete(s->json);
    s->tensors = NULL, s->json = NULL, s->count = 0;
}

// ----------------------------------------------------------------------------
// reading

// N, from the first 8 bytes of a file of file_size bytes. `where` names the file in errors, here and below.
static inline bool safetensors_header_size(const unsigned char first[8], uint64_t file_size,
                                           const char* where, uint64_t* header_size, Error* err) {
    memcpy(header_size, first, 8);
    if (*header_size < 2 || *header_size > SAFETENSORS_MAX_HEADER)
        return fail(err, EXIT_BAD_DATA, "%s: header of %llu bytes; a safetensors header has 2 to %d", where,
                    (unsigned long long)*header_size, SAFETENSORS_MAX_HEADER);
    if (*header_size > file_size - 8)
        return fail(err, EXIT_BAD_DATA, "%s: header of %llu bytes in a file of %llu", where,
                    (unsigned long long)*header_size, (unsigned long long)file_size);
    return true;
}

// A JSON number that is a whole number a double holds exactly; larger ones do not occur in files that exist.
static inline bool safetensors_integer(const cJSON* item, uint64_t* out) {
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < 9007199254740992.0))
        return false;
    *out = (uint64_t)item->valuedouble;
    return (double)*out == item->valuedouble;
}

// Reads one "name": {"dtype", "shape", "data_offsets"}.
static inline bool safetensors_parse_tensor(SafetensorsTensor* t, const cJSON* item, const char* where,
                                            Error* err) {
    const cJSON* dtype = cJSON_GetObjectItemCaseSensitive(item, "dtype");
    const cJSON* shape = cJSON_GetObjectItemCaseSensitive(item, "shape");
    const cJSON* offsets = cJSON_GetObjectItemCaseSensitive(item, "data_offsets");
    t->name = item->string;
    if (!cJSON_IsString(dtype) || !cJSON_IsArray(shape) || !cJSON_IsArray(offsets) ||
        cJSON_GetArraySize(item) != 3)
        return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s must have dtype, shape and data_offsets alone",
                    where, t->name);
    for (int i = 0; i < NUM_SAFETENSORS_TYPES; i++)
        if (strcmp(dtype->valuestring, safetensors_types[i].name) == 0) t->type = &safetensors_types[i];
    if (t->type == NULL)
        return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s has an unknown dtype", where, t->name);

    t->num_dims = cJSON_GetArraySize(shape);
    if (t->num_dims > SAFETENSORS_MAX_DIMS)
        return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s has %d dimensions; at most %d are accepted", where,
                    t->name, t->num_dims, SAFETENSORS_MAX_DIMS);
    uint64_t bits = t->type->bits, *dim = t->dims;
    t->count = 1;
    const cJSON* number;
    cJSON_ArrayForEach(number, shape) {
        if (!safetensors_integer(number, dim) || !checked_mul(t->count, *dim, &t->count) ||
            !checked_mul(bits, *dim, &bits))
            return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s has an impossible shape", where, t->name);
        dim++;
    }
    if (cJSON_GetArraySize(offsets) != 2 || !safetensors_integer(offsets->child, &t->begin) ||
        !safetensors_integer(offsets->child->next, &t->end) || t->begin > t->end)
        return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s has impossible data_offsets", where, t->name);
    if (bits % 8 != 0 || t->end - t->begin != bits / 8)
        return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s is %llu bytes; its shape and dtype %s need %llu",
                    where, t->name, (unsigned long long)(t->end - t->begin), t->type->name,
                    (unsigned long long)(bits / 8));
    return true;
}

static inline int safetensors_by_name(const void* a, const void* b) {
    return strcmp(((const SafetensorsTensor*)a)->name, ((const SafetensorsTensor*)b)->name);
}

static inline int safetensors_by_place(const void* a, const void* b) {
    const SafetensorsTensor *s = (const SafetensorsTensor*)a, *t = (const SafetensorsTensor*)b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    if (s->end != t->end) return s->end < t->end ? -1 : 1;
    return strcmp(s->name, t->name); // empty tensors share a place
}

static inline bool safetensors_metadata_ok(const cJSON* item) {
    if (!cJSON_IsObject(item)) return false;
    const cJSON* value;
    cJSON_ArrayForEach(value, item) if (!cJSON_IsString(value)) return false;
    return true;
}

static inline bool printable_ascii(const char* s) {
    for (; *s != '\0'; s++)
        if (*s < 0x20 || *s > 0x7E) return false;
    return true;
}

// The tensors of a parsed header, then the rules that hold between them.
static inline bool safetensors_collect(Safetensors* s, uint64_t data_bytes, const char* where, Error* err) {
    int items = cJSON_GetArraySize(s->json), metadata = 0;
    s->tensors = (SafetensorsTensor*)calloc_check((size_t)items, sizeof *s->tensors);
    const cJSON* item;
    cJSON_ArrayForEach(item, s->json) {
        if (!printable_ascii(item->string))
            return fail(err, EXIT_BAD_DATA, "%s: the name of tensor %d is not printable ASCII", where,
                        s->count);
        if (strcmp(item->string, "__metadata__") == 0) {
            if (++metadata > 1 || !safetensors_metadata_ok(item))
                return fail(err, EXIT_BAD_DATA, "%s: __metadata__ must be one object of strings", where);
        } else if (!safetensors_parse_tensor(&s->tensors[s->count++], item, where, err)) {
            return false;
        }
    }
    size_t count = (size_t)s->count;
    qsort(s->tensors, count, sizeof *s->tensors, safetensors_by_name);
    for (size_t i = 1; i < count; i++)
        if (strcmp(s->tensors[i - 1].name, s->tensors[i].name) == 0)
            return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s is listed twice", where, s->tensors[i].name);
    qsort(s->tensors, count, sizeof *s->tensors, safetensors_by_place);
    uint64_t end = 0;
    for (size_t i = 0; i < count; i++) {
        if (s->tensors[i].begin != end)
            return fail(err, EXIT_BAD_DATA, "%s: tensor %.100s begins at %llu; the one before ends at %llu",
                        where, s->tensors[i].name, (unsigned long long)s->tensors[i].begin,
                        (unsigned long long)end);
        end = s->tensors[i].end;
    }
    if (end != data_bytes)
        return fail(err, EXIT_BAD_DATA, "%s has %llu bytes of data; its header describes %llu", where,
                    (unsigned long long)data_bytes, (unsigned long long)end);
    return true;
}

// Parses the header: size bytes of JSON with a NUL behind them, and data_bytes in the file behind that.
// On success the caller frees; on failure nothing is left to free.
static inline bool safetensors_parse(Safetensors* s, const char* json, uint64_t size, uint64_t data_bytes,
                                     const char* where, Error* err) {
    memset(s, 0, sizeof *s);
    s->data_begin = 8 + size;
    CHECK(json[size] == '\0');
    // A NUL inside would end the JSON early; the specification wants the first byte to be '{'.
    if (json[0] == '{' && strlen(json) == size) s->json = cJSON_ParseWithOpts(json, NULL, 1);
    bool ok = cJSON_IsObject(s->json)
                  ? safetensors_collect(s, data_bytes, where, err)
                  : fail(err, EXIT_BAD_DATA, "%s: the header is not a JSON object", where);
    if (!ok) safetensors_free(s);
    return ok;
}

// ----------------------------------------------------------------------------
// writing: begin, add every tensor in the order of its data, finish

static inline void safetensors_header_begin(String* s) {
    string_append_bytes(s, "\0\0\0\0\0\0\0\0", 8);
    // Older transformers refuse a file that does not say which framework wrote it.
    string_append(s, "{\"__metadata__\":{\"format\":\"pt\"}");
}

// *end: bytes of data so far. The name needs no escaping: it comes from the tensor table.
static inline void safetensors_header_add(String* s, uint64_t* end, const char* name, int num_dims,
                                          const uint64_t* dims) {
    uint64_t count = 1;
    string_append(s, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", name);
    for (int i = 0; i < num_dims; i++) {
        string_append(s, "%s%llu", i > 0 ? "," : "", (unsigned long long)dims[i]);
        count *= dims[i];
    }
    string_append(s, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)*end,
                  (unsigned long long)(*end + 4 * count));
    *end += 4 * count;
}

// Pads with spaces to a multiple of 8, so that a reader which maps the file finds its floats aligned.
static inline void safetensors_header_finish(String* s) {
    string_append(s, "}");
    while (s->size % 8 != 0) string_append(s, " ");
    uint64_t header_size = s->size - 8;
    memcpy(s->data, &header_size, 8);
}
