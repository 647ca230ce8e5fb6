// Tensors between memory and safetensors files: the weights as Hugging Face names and shapes them, and the
// optimizer's moments under our own names.
//
// Data moves in bounded pieces, so no second copy of the model ever exists, and is hashed on the way. GPT-2's
// matmul weights lie transposed in the file (Hugging Face's Conv1D) and are turned piece by piece.
// Written is fp32; read are fp32, bf16 and fp16.
#pragma once
#include "llmc/bf16.h"        // defines: float_from_bf16
#include "llmc/hashed_file.h" // defines: HashedFile, hashed_create ... hashed_verify, FileRecord
#include "llmc/manifest.h"    // defines: Manifest, manifest_add
#include "llmc/model.h"       // defines: ModelConfig, HfTensor, model_hf_tensors, tensor_table
#include "llmc/safetensors.h" // defines: Safetensors, safetensors_parse, safetensors_header_*

static inline bool tensor_file_name(const char* name) {
    static const char end[] = ".safetensors";
    size_t n = strlen(name), k = sizeof end - 1;
    return n > k && strcmp(name + n - k, end) == 0;
}

// What a piece of a tensor in flight may take.
enum { PIECE_ELEMENTS = 1 << 20 };

// One tensor of a file and its place in memory.
typedef struct {
    HfTensor hf;
    float* memory; // that hf.offset counts in; NULL: only the name and the shape are checked
    bool ranged;   // the file's name for it ends with the range of elements, as "[0:4096]"
    bool optional; // reading: may be missing
    int twin;      // reading: index of another name of the same memory, which must have the same values; -1
    uint64_t covered; // reading: elements found so far
} StoredTensor;

typedef struct {
    StoredTensor* tensors; // in the order of memory
    int count;
    bool partial; // other processes have the rest, and read the files that hold nothing for this one
} StoredTensors;

// The list of a process that has elements [begin, end) of memory: what lies outside has none here.
static inline void stored_keep(StoredTensors* list, size_t begin, size_t end) {
    for (int i = 0; i < list->count; i++) {
        StoredTensor* t = &list->tensors[i];
        bool here = t->hf.offset >= begin && t->hf.offset < end;
        if (here) t->hf.offset -= begin;
        if (!here && t->memory != NULL) t->memory = NULL, list->partial = true;
    }
}

// Only what has memory stays in the list.
static inline void stored_drop_others(StoredTensors* list) {
    int kept = 0;
    for (int i = 0; i < list->count; i++)
        if (list->tensors[i].memory != NULL) list->tensors[kept++] = list->tensors[i];
    list->count = kept;
}

static inline uint64_t stored_elements(const StoredTensor* t) { return (uint64_t)t->hf.rows * t->hf.cols; }

// The name that a file has for elements [first, last) of a tensor.
enum { RANGED_NAME = 160 };
static inline void stored_name(char out[RANGED_NAME], const StoredTensor* t, uint64_t first, uint64_t last) {
    if (t->ranged)
        snprintf(out, RANGED_NAME, "%s[%llu:%llu]", t->hf.name, (unsigned long long)first,
                 (unsigned long long)last);
    else
        snprintf(out, RANGED_NAME, "%s", t->hf.name);
}

// Every weight of the model. With duplicates, a tied head may also be in the file under its own name.
// Caller frees .tensors.
static inline StoredTensors stored_model(const ModelConfig* model, float* params, bool duplicates) {
    StoredTensors list = {NULL, 0, false};
    list.count = model_hf_tensors(model, NULL);
    HfTensor* hf = (HfTensor*)calloc_check((size_t)list.count, sizeof *hf);
    model_hf_tensors(model, hf);
    list.tensors = (StoredTensor*)calloc_check((size_t)list.count + 1, sizeof *list.tensors);
    for (int i = 0; i < list.count; i++) {
        list.tensors[i].hf = hf[i];
        list.tensors[i].memory = params;
        list.tensors[i].twin = -1;
    }
    free(hf);
    if (duplicates && model->tie_word_embeddings) { // the embedding is the first tensor of memory
        StoredTensor* head = &list.tensors[list.count];
        *head = list.tensors[0];
        snprintf(head->hf.name, sizeof head->hf.name, "%s", tensor_table[LMHEAD].gpt2);
        head->optional = true, head->twin = 0;
        list.tensors[0].twin = list.count++;
    }
    return list;
}

static inline void stored_add_moment(StoredTensors* list, const ModelConfig* model, enum TensorId id,
                                     int layer, const char* moment, float* memory) {
    ParameterLayout p = parameter_layout(model);
    StoredTensor* t = &list->tensors[list->count++];
    char name[32];
    tensor_name(name, id, layer);
    snprintf(t->hf.name, sizeof t->hf.name, "%s.%s", moment, name);
    t->hf.rows = (tensor_table[id].rows == DIM_VOCAB ? (size_t)model->vocab_size : p.rows[id]) * p.cols[id];
    t->hf.cols = 1;
    t->hf.num_dims = 1;
    t->hf.dims[0] = t->hf.rows, t->hf.dims[1] = 1;
    t->hf.offset = tensor_offset(&p, id, layer);
    t->memory = memory;
    t->ranged = true;
    t->twin = -1;
}

// Both of AdamW's moments of every tensor, flat and in the order of memory, by global name and range:
// "exp_avg.h.3.qkvw[0:49152]". The padding of the vocabulary is not stored: it is zero in every layout.
// Caller frees .tensors.
static inline StoredTensors stored_moments(const ModelConfig* model, float* m, float* v) {
    ParameterLayout p = parameter_layout(model);
    StoredTensors list = {NULL, 0, false};
    list.tensors = (StoredTensor*)calloc_check(2 * NUM_TENSORS * (size_t)(model->num_hidden_layers + 1),
                                               sizeof *list.tensors);
    for (int moment = 0; moment < 2; moment++)
        for (int place = BEFORE_LAYERS; place <= AFTER_LAYERS; place++)
            for (int layer = 0; layer < (place == PER_LAYER ? model->num_hidden_layers : 1); layer++)
                for (int i = 0; i < NUM_TENSORS; i++)
                    if ((int)tensor_table[i].place == place && p.size[i] != 0)
                        stored_add_moment(&list, model, (enum TensorId)i, layer,
                                          moment == 0 ? "exp_avg" : "exp_avg_sq", moment == 0 ? m : v);
    return list;
}

// out[c * out_stride + r] = in[r * in_stride + c], in squares that stay in the cache
static inline void transpose(float* out, size_t out_stride, const float* in, size_t in_stride, size_t rows,
                             size_t cols) {
    enum { SQUARE = 16 };
    for (size_t r0 = 0; r0 < rows; r0 += SQUARE)
        for (size_t c0 = 0; c0 < cols; c0 += SQUARE)
            for (size_t c = c0; c < cols && c < c0 + SQUARE; c++)
                for (size_t r = r0; r < rows && r < r0 + SQUARE; r++)
                    out[c * out_stride + r] = in[r * in_stride + c];
}

// A tensor is moved in pieces of whole file rows where it is transposed (a file row is a column of memory),
// and of any number of elements where it is not.
static inline size_t piece_row(const StoredTensor* t) { return t->hf.transposed ? t->hf.rows : 1; }
static inline size_t piece_rows(const StoredTensor* t) {
    size_t rows = PIECE_ELEMENTS / piece_row(t) / 16 * 16;
    return rows > 16 ? rows : 16;
}

// ----------------------------------------------------------------------------
// writing

static inline bool tensor_write(HashedFile* f, const StoredTensor* t, float* piece, Error* err) {
    size_t row = piece_row(t), total = (size_t)stored_elements(t) / row;
    const float* memory = t->memory + t->hf.offset;
    if (t->hf.absent) memset(piece, 0, piece_rows(t) * row * sizeof(float));
    for (size_t at = 0, n; at < total; at += n) {
        n = total - at < piece_rows(t) ? total - at : piece_rows(t);
        const float* from = t->hf.absent ? piece : memory + at;
        if (t->hf.transposed) transpose(piece, row, memory + at, t->hf.cols, row, n), from = piece;
        if (!hashed_write(f, from, n * row * sizeof(float), err)) return false;
    }
    return true;
}

static inline size_t largest_piece(const StoredTensors* list) {
    size_t largest = 0;
    for (int i = 0; i < list->count; i++) {
        size_t piece = piece_rows(&list->tensors[i]) * piece_row(&list->tensors[i]);
        if (piece > largest) largest = piece;
    }
    return largest;
}

// Writes tensors[first, last) as one file.
static inline bool tensors_write(const char* dir, const char* name, const StoredTensors* list, int first,
                                 int last, Manifest* manifest, Error* err) {
    String header = {NULL, 0, 0};
    uint64_t end = 0;
    safetensors_header_begin(&header);
    for (int i = first; i < last; i++) {
        const StoredTensor* t = &list->tensors[i];
        char full[RANGED_NAME];
        stored_name(full, t, 0, stored_elements(t));
        safetensors_header_add(&header, &end, full, t->hf.num_dims, t->hf.dims);
    }
    safetensors_header_finish(&header);
    float* piece = (float*)malloc_check(largest_piece(list) * sizeof(float));
    HashedFile f;
    FileRecord record;
    bool ok = hashed_create(&f, dir, name, err) && hashed_write(&f, header.data, header.size, err);
    for (int i = first; ok && i < last; i++) ok = tensor_write(&f, &list->tensors[i], piece, err);
    ok = ok && hashed_finish(&f, &record, err);
    hashed_close(&f);
    free(piece);
    free(header.data);
    if (ok) manifest_add(manifest, &record);
    return ok;
}

// ----------------------------------------------------------------------------
// reading

// The padding of the vocabulary is in no file; in memory, of which [begin, end) is here, it is zero.
static inline void zero_vocabulary_padding(const ModelConfig* model, float* memory, size_t begin,
                                           size_t end) {
    ParameterLayout p = parameter_layout(model);
    for (int i = 0; i < NUM_TENSORS; i++) {
        if (tensor_table[i].rows != DIM_VOCAB || p.size[i] == 0) continue;
        if (p.offset[i] < begin || p.offset[i] >= end) continue;
        size_t used = (size_t)model->vocab_size * p.cols[i];
        memset(memory + (p.offset[i] - begin) + used, 0, (p.size[i] - used) * sizeof(float));
    }
}

// An open file whose header is parsed; the data comes next.
typedef struct {
    HashedFile file;
    Safetensors header;
} TensorFile;

static inline void tensor_file_close(TensorFile* t) {
    hashed_close(&t->file);
    safetensors_free(&t->header);
}

// expected: the file's line in a manifest, NULL for a file that has none. Close it in either case.
static inline bool tensor_file_open(TensorFile* t, const char* dir, const char* name,
                                    const FileRecord* expected, Error* err) {
    memset(&t->header, 0, sizeof t->header);
    if (!hashed_open(&t->file, dir, name, expected, err)) return false;
    unsigned char first[8];
    uint64_t size;
    if (t->file.file_size < 8)
        return fail(err, EXIT_BAD_DATA, "%s is too short to be a safetensors file", t->file.path);
    if (!hashed_read(&t->file, first, 8, err) ||
        !safetensors_header_size(first, t->file.file_size, t->file.path, &size, err))
        return false;
    char* json = (char*)malloc_check(size + 1);
    json[size] = '\0';
    bool ok = hashed_read(&t->file, json, size, err) &&
              safetensors_parse(&t->header, json, size, t->file.file_size - 8 - size, t->file.path, err);
    free(json);
    return ok;
}

// IEEE half precision: 1 sign, 5 exponent (bias 15), 10 mantissa bits. Every value is exact in fp32.
static inline float float_from_f16(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7FFF) << 13;
    float x;
    memcpy(&x, &bits, sizeof x);
    x *= 0x1p112f; // from bias 15 to bias 127; makes subnormal numbers normal on the way
    memcpy(&bits, &x, sizeof bits);
    if ((h & 0x7C00) == 0x7C00) bits = 0x7F800000 | (uint32_t)(h & 0x03FF) << 13; // infinity, NaN
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline bool readable_type(const SafetensorsType* type) {
    return strcmp(type->name, "F32") == 0 || strcmp(type->name, "BF16") == 0 ||
           strcmp(type->name, "F16") == 0;
}

// n values of a readable type as fp32: raw itself, or out[n].
static inline const float* floats_from(const SafetensorsType* type, float* out, const void* raw, size_t n) {
    const uint16_t* half = (const uint16_t*)raw;
    if (strcmp(type->name, "F32") == 0) return (const float*)raw;
    if (strcmp(type->name, "BF16") == 0)
        for (size_t i = 0; i < n; i++) out[i] = float_from_bf16(half[i]);
    else
        for (size_t i = 0; i < n; i++) out[i] = float_from_f16(half[i]);
    return out;
}

// Buffers, not weights, that older versions of transformers saved along with the model.
static inline bool known_buffer(const char* name) {
    static const char* const ends[] = {".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"};
    for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
        size_t n = strlen(name), k = strlen(ends[i]);
        if (n >= k && strcmp(name + n - k, ends[i]) == 0) return true;
    }
    return false;
}

// The tensor that a file calls by this name, NULL if there is none. Files are mostly in the order of
// memory, so the search begins behind the last one found. GPT-2's own files lack the "transformer." in
// front.
static inline StoredTensor* stored_find(const StoredTensors* list, const char* name, int* last) {
    static const char prefix[] = "transformer.";
    size_t size = strcspn(name, "[");
    for (int k = 1; k <= list->count; k++) {
        int i = (*last + k) % list->count;
        const char* own = list->tensors[i].hf.name;
        bool prefixed = strncmp(own, prefix, sizeof prefix - 1) == 0;
        const char* bare = prefixed ? own + sizeof prefix - 1 : own;
        if ((strncmp(own, name, size) == 0 && own[size] == '\0') ||
            (strncmp(bare, name, size) == 0 && bare[size] == '\0')) {
            *last = i;
            return &list->tensors[i];
        }
    }
    return NULL;
}

static inline void shape_text(char out[96], const uint64_t* dims, int num_dims) {
    int n = snprintf(out, 96, "[");
    for (int i = 0; i < num_dims && n < 70; i++)
        n += snprintf(out + n, 96 - (size_t)n, "%s%llu", i > 0 ? ", " : "", (unsigned long long)dims[i]);
    snprintf(out + n, 96 - (size_t)n, "]");
}

// Whether what a file holds is what this place in memory wants next: name and range, shape, type.
static inline bool stored_accepts(const StoredTensor* t, const SafetensorsTensor* in, const char* path,
                                  Error* err) {
    char name[RANGED_NAME], have[96], need[96];
    stored_name(name, t, t->covered, t->covered + in->count);
    bool shape_ok = in->num_dims == t->hf.num_dims;
    for (int i = 0; shape_ok && !t->ranged && i < in->num_dims; i++) shape_ok = in->dims[i] == t->hf.dims[i];
    if (!shape_ok) {
        shape_text(have, in->dims, in->num_dims);
        shape_text(need, t->hf.dims, t->hf.num_dims);
        return fail(err, EXIT_BAD_DATA, "%s: tensor %s has shape %s; this model needs %s", path, in->name,
                    have, need);
    }
    if (in->count > stored_elements(t) - t->covered)
        return fail(err, EXIT_BAD_DATA, "%s: tensor %s is there twice, or too long", path, in->name);
    if (t->ranged && strcmp(name, in->name) != 0)
        return fail(err, EXIT_BAD_DATA, "%s: found tensor %s where %s should follow", path, in->name, name);
    if (!readable_type(in->type))
        return fail(err, EXIT_BAD_DATA, "%s: tensor %s is %s; weights must be F32, BF16 or F16", path,
                    in->name, in->type->name);
    return true;
}

static inline bool all_zero(const float* x, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (x[i] != 0.0f) return false;
    return true;
}

// The data of one tensor, next in the file, to its place. `other` has filled the same memory before: compare.
static inline bool tensor_read(HashedFile* f, const SafetensorsTensor* in, const StoredTensor* t, bool other,
                               Error* err) {
    size_t row = piece_row(t), total = (size_t)in->count / row, width = in->type->bits / 8;
    float* memory = t->memory + t->hf.offset + t->covered;
    bool direct = width == 4 && !t->hf.transposed && !t->hf.absent && !other;
    if (direct) return hashed_read(f, memory, in->count * width, err);
    char* raw = (char*)malloc_check(piece_rows(t) * row * (width + sizeof(float)));
    float* converted = (float*)(void*)(raw + piece_rows(t) * row * width);
    bool ok = true;
    for (size_t at = 0, n; ok && at < total; at += n) {
        n = total - at < piece_rows(t) ? total - at : piece_rows(t);
        ok = hashed_read(f, raw, n * row * width, err);
        if (!ok) break;
        const float* values = floats_from(in->type, converted, raw, n * row);
        if (t->hf.absent)
            ok = all_zero(values, n * row) ||
                 fail(err, EXIT_BAD_DATA, "%s: tensor %s is not zero, and this model has no such bias",
                      f->path, in->name);
        else if (other)
            ok = memcmp(memory + at, values, n * sizeof(float)) == 0 ||
                 fail(err, EXIT_BAD_DATA, "%s: tensor %s differs from the embedding it is tied to", f->path,
                      in->name);
        else if (t->hf.transposed)
            transpose(memory + at, t->hf.cols, values, row, n, row);
        else
            memcpy(memory + at, values, n * sizeof(float));
    }
    free(raw);
    return ok;
}

// Whether a file holds anything for this process. What it holds for others counts as found.
static inline bool stored_wants(StoredTensors* list, const Safetensors* header) {
    bool wanted = !list->partial;
    for (int i = 0, last = -1; !wanted && i < header->count; i++) {
        const StoredTensor* place = stored_find(list, header->tensors[i].name, &last);
        wanted = place == NULL || place->memory != NULL;
    }
    for (int i = 0, last = -1; !wanted && i < header->count; i++)
        stored_find(list, header->tensors[i].name, &last)->covered += header->tensors[i].count;
    return wanted;
}

// One file, from front to back: every tensor in it to its place, then the hash of it all.
static inline bool tensors_read(const char* dir, const char* name, const FileRecord* expected,
                                StoredTensors* list, Error* err) {
    char* scratch = (char*)malloc_check(HASH_PIECE);
    TensorFile t;
    bool ok = tensor_file_open(&t, dir, name, expected, err), wanted = ok && stored_wants(list, &t.header);
    for (int i = 0, last = -1; wanted && ok && i < t.header.count; i++) {
        const SafetensorsTensor* in = &t.header.tensors[i];
        StoredTensor* place = stored_find(list, in->name, &last);
        if (place == NULL && !known_buffer(in->name))
            ok = fail(err, EXIT_BAD_DATA, "%s holds tensor %s, which this model does not have", t.file.path,
                      in->name);
        if (place != NULL) ok = stored_accepts(place, in, t.file.path, err);
        if (!ok) break;
        if (place == NULL || place->memory == NULL)
            ok = hashed_skip(&t.file, in->end - in->begin, scratch, err);
        else
            ok = tensor_read(&t.file, in, place, place->twin >= 0 && list->tensors[place->twin].covered > 0,
                             err);
        if (place != NULL) place->covered += in->count;
    }
    ok = ok && (!wanted || hashed_verify(&t.file, err));
    tensor_file_close(&t);
    free(scratch);
    return ok;
}

static inline bool stored_complete(const StoredTensors* list, const char* dir, Error* err) {
    const char* first = NULL;
    int missing = 0;
    for (int i = 0; i < list->count; i++) {
        const StoredTensor* t = &list->tensors[i];
        if (t->covered == stored_elements(t) || (t->optional && t->covered == 0)) continue;
        if (missing++ == 0) first = t->hf.name;
    }
    return missing == 0 || fail(err, EXIT_BAD_DATA, "%s lacks %d of the model's tensors; %s is the first",
                                dir, missing, first);
}
