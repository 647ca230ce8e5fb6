// `corpus encode` behind its options: documents to token shards, split into training and validation.
//
// A document goes to validation when the hash of (seed, its text) falls below the fraction: the choice does
// not depend on the order of files, and copies of a text are never on both sides.
#pragma once
#include "dev/data/pipeline.h"     // defines: Pipeline, pipeline_run, WorkUnit, document_text, is_blank
#include "dev/data/shard_writer.h" // defines: ShardWriter, shard_writer_*, shard_publish, shard_discard
#include "llmc/tokenizer.h"        // defines: Tokenizer, Encoder, encode, Tokens, tokenizer_hash
#include <dirent.h>

enum Split { SPLIT_TRAIN, SPLIT_VAL, NUM_SPLITS };
static const char* const SPLIT_NAMES[NUM_SPLITS] = {"train", "val"};

// The shards of one side: DIR/train_000000.bin, DIR/train_000001.bin, ...
typedef struct {
    ShardWriter writer; // of the last path, while is_open
    bool is_open;
    StringList paths;
    uint64_t documents, tokens, source_bytes;
} ShardSeries;

typedef struct {
    size_t tokens, bytes;
    int split;
} EncodedDocument;

// What a unit of work gives.
typedef struct {
    Tokens tokens; // of its documents, one after the other
    EncodedDocument* documents;
    size_t count, capacity;
} EncodedUnit;

// What a thread needs for itself.
typedef struct {
    Encoder encoder;
    String decoded, scratch;
} EncodeThread;

typedef struct {
    // settings
    const Tokenizer* tokenizer;
    const char* out_dir;
    const char* field;
    double val_fraction;
    uint64_t seed, shard_tokens;
    int token_bytes;
    // state
    TokenizerHash hash;
    EncodeThread* threads;
    ShardSeries series[NUM_SPLITS];
} EncodeJob;

// ----------------------------------------------------------------------------
// working

static inline int split_of(const EncodeJob* job, const char* text, size_t size) {
    double place = (double)(XXH3_64bits_withSeed(text, size, job->seed) >> 11) * 0x1p-53; // [0, 1)
    return place < job->val_fraction ? SPLIT_VAL : SPLIT_TRAIN;
}

static inline void encode_document(EncodeJob* job, EncodeThread* thread, EncodedUnit* unit, const char* text,
                                   size_t size) {
    if (unit->count == unit->capacity) {
        unit->capacity = unit->capacity * 2 + 256;
        unit->documents =
            (EncodedDocument*)realloc_check(unit->documents, unit->capacity * sizeof *unit->documents);
    }
    uint32_t eot = (uint32_t)job->tokenizer->eot_id;
    tokens_append(&unit->tokens, &eot, 1);
    EncodedDocument document = {1 + encode(&thread->encoder, text, size, &unit->tokens), size,
                                split_of(job, text, size)};
    unit->documents[unit->count++] = document;
}

static inline bool encode_unit(void* context, int thread_index, const Batch* batch, WorkUnit* unit,
                               Error* err) {
    EncodeJob* job = (EncodeJob*)context;
    EncodeThread* thread = &job->threads[thread_index];
    EncodedUnit* encoded = (EncodedUnit*)unit->result;
    encoded->tokens.size = encoded->count = 0;
    for (size_t i = unit->first; i < unit->first + unit->count; i++) {
        const char* text;
        size_t size;
        if (!document_text(batch, &batch->documents[i], job->field, &thread->decoded, &thread->scratch, &text,
                           &size, err))
            return false;
        if (!is_blank(text, size)) encode_document(job, thread, encoded, text, size);
    }
    return true;
}

static inline void free_encoded_unit(void* result) {
    EncodedUnit* unit = (EncodedUnit*)result;
    free(unit->tokens.data);
    free(unit->documents);
}

// ----------------------------------------------------------------------------
// emitting

static inline bool series_open_next(EncodeJob* job, int split, Error* err) {
    ShardSeries* series = &job->series[split];
    char name[64], path[PATH_MAX];
    uint64_t hash[2] = {job->hash.low, job->hash.high};
    snprintf(name, sizeof name, "%s_%06zu.bin", SPLIT_NAMES[split], series->paths.count);
    if (!path_join(path, job->out_dir, name, err)) return false;
    if (!shard_writer_open(&series->writer, path, job->token_bytes, job->tokenizer->vocab_size,
                           (int)job->tokenizer->eot_id, hash, err))
        return false;
    string_list_add(&series->paths, path);
    return series->is_open = true;
}

static inline bool series_finish(ShardSeries* series, Error* err) {
    if (!series->is_open) return true;
    series->is_open = false;
    return shard_writer_finish(&series->writer, err);
}

// A shard ends with the document that fills it: documents are never cut.
static inline bool emit_unit(void* context, const WorkUnit* unit, Error* err) {
    EncodeJob* job = (EncodeJob*)context;
    const EncodedUnit* encoded = (const EncodedUnit*)unit->result;
    const uint32_t* tokens = encoded->tokens.data;
    for (size_t i = 0; i < encoded->count; i++) {
        const EncodedDocument* document = &encoded->documents[i];
        ShardSeries* series = &job->series[document->split];
        if (!series->is_open && !series_open_next(job, document->split, err)) return false;
        if (!shard_writer_tokens(&series->writer, tokens, document->tokens, err)) return false;
        shard_writer_end_document(&series->writer, document->bytes);
        tokens += document->tokens;
        series->documents++;
        series->tokens += document->tokens;
        series->source_bytes += document->bytes;
        if (series->writer.header.num_tokens >= job->shard_tokens && !series_finish(series, err))
            return false;
    }
    return true;
}

// ----------------------------------------------------------------------------
// the whole

// train_NNNNNN or val_NNNNNN, .bin or .idx
static inline bool is_shard_name(const char* name) {
    const char* rest = strncmp(name, "train_", 6) == 0 ? name + 6
                       : strncmp(name, "val_", 4) == 0 ? name + 4
                                                       : "";
    return strspn(rest, "0123456789") == 6 &&
           (strcmp(rest + 6, ".bin") == 0 || strcmp(rest + 6, ".idx") == 0);
}

// Shards and indexes of either side that lie in the folder. No glob: the folder's own name may look like one.
static inline bool find_shards(const char* dir, StringList* found, Error* err) {
    char path[PATH_MAX];
    bool ok = true;
    DIR* folder = opendir(dir);
    if (folder == NULL)
        return errno == ENOENT || fail(err, EXIT_CANNOT_WRITE, "cannot open %s: %s", dir, strerror(errno));
    for (const struct dirent* entry; ok && (entry = readdir(folder)) != NULL;) {
        if (!is_shard_name(entry->d_name)) continue;
        ok = path_join(path, dir, entry->d_name, err);
        if (ok) string_list_add(found, path);
    }
    closedir(folder);
    return ok;
}

// Puts the finished shards in the place of what was there.
static inline bool publish_all(EncodeJob* job, Error* err) {
    StringList old = {NULL, 0, 0};
    if (!find_shards(job->out_dir, &old, err)) return false;
    for (size_t i = 0; i < old.count; i++) unlink(old.items[i]);
    string_list_free(&old);
    for (int split = 0; split < NUM_SPLITS; split++)
        for (size_t i = 0; i < job->series[split].paths.count; i++)
            if (!shard_publish(job->series[split].paths.items[i], err)) return false;
    return true;
}

static inline bool check_split(const EncodeJob* job, Error* err) {
    uint64_t train = job->series[SPLIT_TRAIN].documents, val = job->series[SPLIT_VAL].documents;
    if (train + val == 0)
        return fail(err, EXIT_BAD_DATA, "the input has no document: nothing but white space in it");
    if (train == 0 || (val == 0 && job->val_fraction > 0))
        return fail(err, EXIT_BAD_DATA,
                    "none of %llu document(s) fell to %s with --val-fraction %g: cut the text into more "
                    "documents (--document-separator), change the fraction (0: no validation) or the --seed",
                    (unsigned long long)(train + val), train == 0 ? "training" : "validation",
                    job->val_fraction);
    return true;
}

// Encodes everything the pipeline's reader gives into shards in job->out_dir, which must exist. Nothing has
// its final name before everything is written; nothing of this run is left behind after a failure.
static inline bool encode_all(EncodeJob* job, Pipeline* pipeline, Error* err) {
    job->hash = tokenizer_hash(job->tokenizer);
    job->threads = (EncodeThread*)calloc_check((size_t)pipeline->threads, sizeof *job->threads);
    for (int i = 0; i < pipeline->threads; i++) encoder_init(&job->threads[i].encoder, job->tokenizer);
    pipeline->context = job;
    pipeline->work = encode_unit;
    pipeline->emit = emit_unit;
    pipeline->free_result = free_encoded_unit;
    pipeline->result_bytes = sizeof(EncodedUnit);

    bool ok = pipeline_run(pipeline, err);
    for (int split = 0; split < NUM_SPLITS; split++) ok = ok && series_finish(&job->series[split], err);
    ok = ok && check_split(job, err) && publish_all(job, err);

    for (int i = 0; i < pipeline->threads; i++) {
        encoder_free(&job->threads[i].encoder);
        free(job->threads[i].decoded.data);
        free(job->threads[i].scratch.data);
    }
    free(job->threads);
    for (int split = 0; split < NUM_SPLITS; split++) {
        ShardSeries* series = &job->series[split];
        if (series->is_open) shard_writer_free(&series->writer);
        for (size_t i = 0; i < series->paths.count; i++) shard_discard(series->paths.items[i]);
    }
    return ok;
}
