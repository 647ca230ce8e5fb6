// The data loader: rows of T + 1 tokens out of memory-mapped shards.
//
// A row is tokens [i * T, i * T + T] of one shard, both ends included: T inputs, and as targets the same
// shifted by one. A shard of n tokens has (n - 1) / T rows; what is left over is dropped and reported.
// Global row g of a run is a pure function of (seed, T, sources): dataloader_row is that function. Any rank
// count, micro-batch size and resume see the same rows; epochs follow each other without end.
//
//   training    weighted mixture of sources (data_order.h), each shuffled anew every epoch
//   validation  the sources one after the other, in order
//
// No token leaves that is not below the model's vocabulary. Limits: see data_order.h and shard.h.
#pragma once
#include "llmc/data_order.h" // defines: permute, Mixture, mixture_build, mixture_locate, MIXTURE_*
#include "llmc/shard.h" // defines: Shard, shard_open, shard_close, shard_copy, shard_token, shard_unchanged
#include "llmc/utils.h" // defines: Error, fail, CHECK, EXIT_*, malloc_check, calloc_check, strdup_check
#include <glob.h>
#include <pthread.h>
#include <signal.h>
#include <xxhash.h>

// One entry of the run config's data section.
typedef struct {
    const char* name;
    const char* glob;
    double weight; // relative to the others; rows, not documents
} DataSource;

typedef struct {
    char* name;
    Shard* shards; // (num_shards), by name in byte order
    int num_shards;
    uint64_t* first_row; // (num_shards + 1): rows before each shard; the last one is rows
    uint64_t rows, tokens, dropped;
} SourceData;

typedef struct {
    SourceData* sources; // (num_sources)
    int num_sources;
    int T;
    uint32_t vocab_size; // every token is below it
    uint64_t seed;
    bool shuffle;
    Mixture* mixture;           // NULL without shuffle
    uint64_t rows, tokens;      // of one pass over all sources
    uint64_t source_bytes;      // of the text behind those tokens; 0: not known for some shard
    uint64_t tokenizer_hash[2]; // 0: not known
    int eot_id;                 // -1: not known
    uint64_t fingerprint;       // equal: the same rows in the same order
} DataLoader;

// Where a row lies.
typedef struct {
    const char* source;
    const Shard* shard;
    uint64_t first_token; // of T + 1
} RowPlace;

// ----------------------------------------------------------------------------
// opening

static inline int compare_paths(const void* a, const void* b) {
    return strcmp(*(char* const*)a, *(char* const*)b);
}

// Rows and totals of a source whose shards are open.
static inline bool source_count_rows(SourceData* s, int T, Error* err) {
    s->first_row = (uint64_t*)calloc_check((size_t)s->num_shards + 1, sizeof *s->first_row);
    for (int i = 0; i < s->num_shards; i++) {
        uint64_t tokens = s->shards[i].header.num_tokens;
        uint64_t rows = tokens > 0 ? (tokens - 1) / (uint64_t)T : 0;
        s->first_row[i + 1] = s->first_row[i] + rows;
        s->tokens += tokens;
        s->dropped += tokens - rows * (uint64_t)T;
    }
    s->rows = s->first_row[s->num_shards];
    if (s->rows == 0)
        return fail(err, EXIT_BAD_DATA,
                    "data source '%s' has no row of %d + 1 tokens in its %d shard(s) of %llu tokens; add "
                    "text or lower the sequence length",
                    s->name, T, s->num_shards, (unsigned long long)s->tokens);
    return true;
}

static inline bool source_open(SourceData* s, const DataSource* config, int T, Error* err) {
    glob_t found;
    memset(&found, 0, sizeof found);
    s->name = strdup_check(config->name);
    if (glob(config->glob, GLOB_BRACE | GLOB_TILDE | GLOB_NOSORT, NULL, &found) != 0 || found.gl_pathc == 0) {
        globfree(&found);
        return fail(err, EXIT_NO_INPUT,
                    "data source '%s': no file matches %s; write token shards with `corpus encode` or "
                    "correct the path",
                    config->name, config->glob);
    }
    qsort(found.gl_pathv, found.gl_pathc, sizeof *found.gl_pathv, compare_paths);
    s->shards = (Shard*)calloc_check(found.gl_pathc, sizeof *s->shards);
    bool ok = true;
    for (size_t i = 0; ok && i < found.gl_pathc; i++) {
        ok = shard_open(&s->shards[i], found.gl_pathv[i], err);
        if (ok) s->num_shards++;
    }
    globfree(&found);
    return ok && source_count_rows(s, T, err);
}

// One model, one tokenizer: its vocabulary covers every shard, and shards that know their end-of-text token
// or their tokenizer agree. *known: the shard that loader->tokenizer_hash is from.
static inline bool dataloader_check_shard(DataLoader* loader, const Shard** known, const Shard* shard,
                                          Error* err) {
    const ShardHeader* h = &shard->header;
    if (h->vocab_size > loader->vocab_size)
        return fail(err, EXIT_BAD_DATA,
                    "token shard %s has a vocabulary of %u, but the model's vocab_size is %u; raise it or "
                    "encode the text again",
                    shard->path, h->vocab_size, loader->vocab_size);
    if (loader->eot_id >= 0 && shard->eot_id >= 0 && shard->eot_id != loader->eot_id)
        return fail(err, EXIT_BAD_DATA,
                    "token shard %s has the end-of-text token %d, the shards before it have %d; encode all "
                    "of them with the same tokenizer",
                    shard->path, shard->eot_id, loader->eot_id);
    if (shard->eot_id >= 0) loader->eot_id = shard->eot_id;
    if (h->tokenizer_hash[0] == 0 && h->tokenizer_hash[1] == 0) return true;
    if (*known != NULL && memcmp(h->tokenizer_hash, loader->tokenizer_hash, sizeof h->tokenizer_hash) != 0)
        return fail(err, EXIT_BAD_DATA,
                    "token shards %s and %s were encoded by different tokenizers (hashes %016llx and "
                    "%016llx); encode both with the same one",
                    (*known)->path, shard->path, (unsigned long long)loader->tokenizer_hash[0],
                    (unsigned long long)h->tokenizer_hash[0]);
    memcpy(loader->tokenizer_hash, h->tokenizer_hash, sizeof h->tokenizer_hash);
    *known = shard;
    return true;
}

// Everything that decides which tokens row g has: sizes, headers (with their hash of the tokens) and, because
// other programs' shards have no such hash, the first and last tokens. Paths and names do not count: data may
// move.
static inline uint64_t dataloader_fingerprint(const DataLoader* loader) {
    const size_t max_probe = 2048;
    uint64_t facts[4] = {(uint64_t)loader->T, loader->seed, loader->shuffle, (uint64_t)loader->num_sources};
    uint64_t hash = XXH3_64bits(facts, sizeof facts);
    for (int k = 0; k < loader->num_sources; k++) {
        const SourceData* s = &loader->sources[k];
        uint64_t of_source[2] = {loader->shuffle ? loader->mixture->quota[k] : 0, (uint64_t)s->num_shards};
        hash = XXH3_64bits_withSeed(of_source, sizeof of_source, hash);
        for (int i = 0; i < s->num_shards; i++) {
            const Shard* shard = &s->shards[i];
            size_t bytes = shard->map_bytes - SHARD_HEADER_BYTES;
            size_t probe = bytes < max_probe ? bytes : max_probe;
            hash = XXH3_64bits_withSeed(&shard->header, sizeof shard->header, hash);
            hash = XXH3_64bits_withSeed(shard->tokens, probe, hash);
            hash = XXH3_64bits_withSeed((const char*)shard->tokens + bytes - probe, probe, hash);
        }
    }
    return hash;
}

static inline bool dataloader_add_up(DataLoader* loader, Error* err) {
    const Shard* known = NULL;
    bool bytes_known = true;
    for (int k = 0; k < loader->num_sources; k++) {
        const SourceData* s = &loader->sources[k];
        loader->rows += s->rows;
        loader->tokens += s->tokens;
        for (int i = 0; i < s->num_shards; i++) {
            const Shard* shard = &s->shards[i];
            if (!dataloader_check_shard(loader, &known, shard, err)) return false;
            loader->source_bytes += shard->header.source_bytes;
            bytes_known = bytes_known && shard->header.source_bytes != 0;
            // rows are scattered over the file: reading ahead of them would read what nobody asked for
            if (loader->shuffle) madvise((void*)shard->map, shard->map_bytes, MADV_RANDOM);
        }
    }
    if (!bytes_known) loader->source_bytes = 0;
    return true;
}

static inline void dataloader_close(DataLoader* loader) {
    for (int k = 0; k < loader->num_sources; k++) {
        SourceData* s = &loader->sources[k];
        for (int i = 0; i < s->num_shards; i++) shard_close(&s->shards[i]);
        free(s->shards);
        free(s->first_row);
        free(s->name);
    }
    free(loader->sources);
    free(loader->mixture);
    memset(loader, 0, sizeof *loader);
}

static inline bool dataloader_open_sources(DataLoader* loader, const DataSource* sources, Error* err) {
    const char* names[MIXTURE_MAX_SOURCES];
    double weights[MIXTURE_MAX_SOURCES];
    for (int k = 0; k < loader->num_sources; k++) {
        if (!source_open(&loader->sources[k], &sources[k], loader->T, err)) return false;
        names[k] = sources[k].name;
        weights[k] = sources[k].weight;
    }
    if (loader->shuffle) {
        loader->mixture = (Mixture*)malloc_check(sizeof *loader->mixture);
        if (!mixture_build(loader->mixture, weights, names, loader->num_sources, err)) return false;
    }
    return dataloader_add_up(loader, err);
}

// Opens the shards of every source and checks them against each other and the model. shuffle: training order,
// else validation order, where weights have no meaning. vocab_size is the model's, without padding.
// Close with dataloader_close; nothing is left open on failure.
static inline bool dataloader_open(DataLoader* loader, const DataSource* sources, int num_sources, int T,
                                   uint32_t vocab_size, uint64_t seed, bool shuffle, Error* err) {
    memset(loader, 0, sizeof *loader);
    CHECK(T >= 1 && T < INT_MAX && vocab_size <= INT_MAX);
    if (num_sources < 1 || num_sources > MIXTURE_MAX_SOURCES)
        return fail(err, EXIT_CONFIG, "%d data sources: there must be 1 to %d", num_sources,
                    MIXTURE_MAX_SOURCES);
    loader->sources = (SourceData*)calloc_check((size_t)num_sources, sizeof *loader->sources);
    loader->num_sources = num_sources;
    loader->T = T;
    loader->vocab_size = vocab_size;
    loader->seed = seed;
    loader->shuffle = shuffle;
    loader->eot_id = -1;
    bool ok = dataloader_open_sources(loader, sources, err);
    if (ok)
        loader->fingerprint = dataloader_fingerprint(loader);
    else
        dataloader_close(loader);
    return ok;
}

// What there is, one line for all and one for each source.
static inline void dataloader_describe(const DataLoader* loader, FILE* out) {
    fprintf(out, "data: %llu tokens in %d source(s), %llu rows of %d, fingerprint %016llx\n",
            (unsigned long long)loader->tokens, loader->num_sources, (unsigned long long)loader->rows,
            loader->T, (unsigned long long)loader->fingerprint);
    for (int k = 0; k < loader->num_sources; k++) {
        const SourceData* s = &loader->sources[k];
        double share = loader->shuffle ? (double)loader->mixture->quota[k] / MIXTURE_PERIOD
                                       : (double)s->rows / (double)loader->rows;
        fprintf(out, "  %-16s %6.2f %% of rows, %d shard(s), %llu tokens, %llu rows, %llu tokens left over\n",
                s->name, 100 * share, s->num_shards, (unsigned long long)s->tokens,
                (unsigned long long)s->rows, (unsigned long long)s->dropped);
    }
}

// ----------------------------------------------------------------------------
// reading

// Row `row` of a source, in file order: a binary search over its shards.
static inline RowPlace source_row(const SourceData* s, uint64_t row, int T) {
    int low = 0, high = s->num_shards;
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (s->first_row[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    RowPlace place = {s->name, &s->shards[low], (row - s->first_row[low]) * (uint64_t)T};
    return place;
}

// Where global row g lies; the same time for any g.
static inline RowPlace dataloader_locate(const DataLoader* loader, uint64_t g) {
    uint64_t index = g % loader->rows;
    int k = 0;
    if (loader->shuffle) {
        k = mixture_locate(loader->mixture, g, &index);
        uint64_t rows = loader->sources[k].rows, epoch = index / rows;
        // the key of this source's shuffle in this epoch: 16 bits and 40 bits
        index = permute(index % rows, rows, loader->seed, (uint64_t)k << 40 | (epoch & 0xFFFFFFFFFFull));
    } else {
        while (index >= loader->sources[k].rows) index -= loader->sources[k++].rows;
    }
    return source_row(&loader->sources[k], index, loader->T);
}

// Starts the reading of a row's pages all at once, where page faults would read them one after another: from
// disk 95 instead of 700 us a row, from the page cache 3 us more (bench_dataloader, T = 8192, 32-bit tokens).
static inline void row_read_ahead(const RowPlace* place, int T) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), size = (uintptr_t)place->shard->token_bytes;
    uintptr_t begin = (uintptr_t)place->shard->tokens + place->first_token * size;
    uintptr_t end = begin + ((uintptr_t)T + 1) * size;
    begin -= begin % page;
    madvise((void*)begin, end - begin, MADV_WILLNEED);
}

// Global row g: tokens (T + 1), inputs tokens[0, T), targets tokens[1, T + 1). Pure and safe to call from any
// thread. Fails on a token outside the model's vocabulary, which it names, and on a shard that changed.
static inline bool dataloader_row(const DataLoader* loader, uint64_t g, int32_t* tokens, Error* err) {
    RowPlace place = dataloader_locate(loader, g);
    if (!shard_unchanged(place.shard, err)) return false;
    if (loader->shuffle) row_read_ahead(&place, loader->T);
    size_t n = (size_t)loader->T + 1;
    if (shard_copy(tokens, place.shard, place.first_token, n) < loader->vocab_size) return true;
    uint64_t bad = place.first_token;
    while (shard_token(place.shard, bad) < loader->vocab_size) bad++;
    return fail(err, EXIT_BAD_DATA,
                "%s: token %llu is %u, outside the model's vocabulary of %u; the shard is damaged or was "
                "made with another tokenizer (see `corpus verify`)",
                place.shard->path, (unsigned long long)bad, shard_token(place.shard, bad),
                loader->vocab_size);
}

// doc_start (T): for each position of a row the first position of its document, for document masking. A
// document starts at its end-of-text token; the one that was running when the row began starts at 0.
static inline void document_starts(int32_t* doc_start, const int32_t* tokens, int T, int eot_id) {
    int32_t start = 0;
    for (int t = 0; t < T; t++) {
        if (tokens[t] == eot_id) start = t;
        doc_start[t] = start;
    }
}

// ----------------------------------------------------------------------------
// prefetching: a thread that has the next batches ready
//
//   a global batch has global_rows rows, from first_row on; its micro-batches go to ranks in turn:
//
//     | micro-batch 0: rank 0 | micro-batch 1: rank 1 | micro-batch 2: rank 0 | micro-batch 3: rank 1 | ...

typedef struct {
    const DataLoader* loader;
    uint64_t first_row;
    int global_rows, micro_rows, rank, ranks;
    int rows, depth; // rows: of this rank in a batch
    int32_t* slots;  // (depth, rows, T + 1): batch b lies in slot b % depth
    // under the mutex:
    uint64_t filled, released; // batches ready so far, batches that the consumer is done with
    bool holding;              // the consumer still reads batch `released`
    bool stop;
    Error err; // what ended the thread
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t thread;
} Prefetch;

static inline int32_t* prefetch_slot(const Prefetch* p, uint64_t batch) {
    size_t batch_tokens = (size_t)p->rows * ((size_t)p->loader->T + 1);
    return p->slots + batch % (uint64_t)p->depth * batch_tokens;
}

static inline bool prefetch_fill(const Prefetch* p, uint64_t batch, Error* err) {
    uint64_t first = p->first_row + batch * (uint64_t)p->global_rows;
    int32_t* tokens = prefetch_slot(p, batch);
    for (int r = 0; r < p->rows; r++) {
        int micro_batch = r / p->micro_rows * p->ranks + p->rank;
        uint64_t row = first + (uint64_t)(micro_batch * p->micro_rows + r % p->micro_rows);
        if (!dataloader_row(p->loader, row, tokens + (size_t)r * ((size_t)p->loader->T + 1), err))
            return false;
    }
    return true;
}

static inline void* prefetch_main(void* argument) {
    Prefetch* p = (Prefetch*)argument;
    Error err = {0, {0}};
    pthread_mutex_lock(&p->mutex);
    while (!p->stop && p->err.code == 0) {
        if (p->filled - p->released == (uint64_t)p->depth) {
            pthread_cond_wait(&p->changed, &p->mutex);
            continue;
        }
        pthread_mutex_unlock(&p->mutex);
        bool ok = prefetch_fill(p, p->filled, &err); // only this thread writes filled
        pthread_mutex_lock(&p->mutex);
        if (ok)
            p->filled++;
        else
            p->err = err;
        pthread_cond_broadcast(&p->changed);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

// Starts the thread; the loader must outlive it. global_rows: a multiple of micro_rows * ranks. depth: batches kept
// ready. End with prefetch_stop.
static inline bool prefetch_start(Prefetch* p, const DataLoader* loader, uint64_t first_row, int global_rows,
                                  int micro_rows, int rank, int ranks, int depth, Error* err) {
    CHECK(depth >= 1 && micro_rows >= 1 && ranks >= 1 && global_rows % (micro_rows * ranks) == 0);
    int rows = global_rows / ranks;
    memset(p, 0, sizeof *p);
    p->loader = loader;
    p->first_row = first_row, p->global_rows = global_rows, p->micro_rows = micro_rows;
    p->rank = rank, p->ranks = ranks;
    p->rows = rows, p->depth = depth;
    p->slots =
        (int32_t*)calloc_check((size_t)depth * (size_t)rows, ((size_t)loader->T + 1) * sizeof *p->slots);
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->changed, NULL);
    sigset_t all, before; // signals are for the main thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&p->thread, NULL, prefetch_main, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed == 0) return true;
    free(p->slots);
    return fail(err, EXIT_OS, "cannot start the data loader's thread: %s", strerror(failed));
}

// The next batch (rows, T + 1), valid until the next call; NULL and the thread's error when there is none.
static inline const int32_t* prefetch_next(Prefetch* p, Error* err) {
    pthread_mutex_lock(&p->mutex);
    if (p->holding) p->released++;
    p->holding = false;
    pthread_cond_broadcast(&p->changed);
    while (p->filled == p->released && p->err.code == 0) pthread_cond_wait(&p->changed, &p->mutex);
    if (p->filled > p->released)
        p->holding = true;
    else if (err->code == 0)
        *err = p->err;
    const int32_t* batch = p->holding ? prefetch_slot(p, p->released) : NULL;
    pthread_mutex_unlock(&p->mutex);
    return batch;
}

static inline void prefetch_stop(Prefetch* p) {
    pthread_mutex_lock(&p->mutex);
    p->stop = true;
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
    pthread_join(p->thread, NULL);
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->changed);
    free(p->slots);
    memset(p, 0, sizeof *p);
}
