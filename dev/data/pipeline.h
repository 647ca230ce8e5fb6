// Documents through all cores and out again in the order in which they came in.
//
//             reading            working, in units of whole documents       emitting
//   batch i+1 ------->  batch i  ===================================> ...  batch i-1 ------->
//             1 thread           the others, in the end all                1 thread
//
// What a unit's work gives depends on its documents alone and units are emitted in order, so the output is
// the same for any number of threads. Memory: three batches of text and what becomes of them.
#pragma once
#include "dev/data/read_text.h" // defines: TextReader, reader_next, reader_close, Batch, batch_free
#include "llmc/utils.h"         // defines: Error, CHECK, calloc_check, seconds_now
#include <omp.h>

typedef struct {
    size_t first, count; // documents of the batch
    void* result;        // (result_bytes) of the pipeline, zeroed at first and then reused
    Error err;
} WorkUnit;

typedef struct {
    Batch batch;
    WorkUnit* units;
    size_t num_units, capacity; // units beyond num_units keep their results' memory for later batches
} WorkBatch;

typedef struct {
    TextReader reader;
    size_t unit_bytes, result_bytes;
    void* context;
    // Fills unit->result from its documents; `thread` is below `threads`.
    bool (*work)(void* context, int thread, const Batch* batch, WorkUnit* unit, Error* err);
    // Takes the result, one unit after the other; NULL: there is nothing to do.
    bool (*emit)(void* context, const WorkUnit* unit, Error* err);
    void (*free_result)(void* result); // NULL: nothing in it to free
    int threads;
    uint64_t documents, bytes; // what went through, as it lay in the files
} Pipeline;

// Cuts a batch into units of consecutive documents, each of about unit_bytes.
static inline void cut_units(const Pipeline* p, WorkBatch* w) {
    size_t bytes = p->unit_bytes;
    w->num_units = 0;
    for (size_t i = 0; i < w->batch.count; i++) {
        if (bytes >= p->unit_bytes) {
            if (w->num_units == w->capacity) {
                size_t more = w->capacity + 64;
                w->units = (WorkUnit*)realloc_check(w->units, (w->capacity + more) * sizeof *w->units);
                memset(w->units + w->capacity, 0, more * sizeof *w->units);
                w->capacity += more;
            }
            WorkUnit* unit = &w->units[w->num_units++];
            unit->first = i, unit->count = 0;
            if (unit->result == NULL) unit->result = calloc_check(1, p->result_bytes);
            bytes = 0;
        }
        w->units[w->num_units - 1].count++;
        bytes += w->batch.documents[i].size;
    }
}

static inline void work_batch_free(const Pipeline* p, WorkBatch* w) {
    for (size_t i = 0; i < w->capacity; i++) {
        if (w->units[i].result != NULL && p->free_result != NULL) p->free_result(w->units[i].result);
        free(w->units[i].result);
    }
    free(w->units);
    batch_free(&w->batch);
}

static inline bool emit_batch(Pipeline* p, const WorkBatch* w, Error* err) {
    for (size_t i = 0; i < w->num_units; i++) {
        const WorkUnit* unit = &w->units[i];
        if (unit->err.code != 0) *err = unit->err;
        if (unit->err.code != 0 || (p->emit != NULL && !p->emit(p->context, unit, err))) return false;
    }
    return true;
}

static inline void show_progress(const Pipeline* p, double started) {
    if (!isatty(STDERR_FILENO)) return;
    double megabytes = (double)p->bytes * 1e-6, seconds = seconds_now() - started;
    fprintf(stderr, "\r%10.1f MB, %llu documents, %.1f MB/s ", megabytes, (unsigned long long)p->documents,
            megabytes / seconds);
}

// The next batch; none after the end of the input or an error.
static inline void read_ahead(Pipeline* p, Batch* batch, Error* err) {
    if (err->code != 0 || !reader_next(&p->reader, batch, err)) batch->count = 0;
}

// Runs everything the reader gives through work and emit. The error is the first one in input order.
static inline bool pipeline_run(Pipeline* p, Error* err) {
    WorkBatch ring[3];
    Error read_error = {0, {0}}, emit_error = {0, {0}};
    double started = seconds_now();
    memset(ring, 0, sizeof ring);
    WorkBatch *previous = &ring[0], *current = &ring[1], *next = &ring[2];
    read_ahead(p, &current->batch, &read_error);
    while (emit_error.code == 0 && (current->batch.count > 0 || previous->num_units > 0)) {
        cut_units(p, current);
#pragma omp parallel num_threads(p->threads)
        {
#pragma omp single nowait
            emit_batch(p, previous, &emit_error);
#pragma omp single nowait
            read_ahead(p, &next->batch, &read_error);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < current->num_units; i++) {
                WorkUnit* unit = &current->units[i];
                memset(&unit->err, 0, sizeof unit->err);
                p->work(p->context, omp_get_thread_num(), &current->batch, unit, &unit->err);
            }
        }
        for (size_t i = 0; i < current->batch.count; i++) p->bytes += current->batch.documents[i].size;
        p->documents += current->batch.count;
        show_progress(p, started);
        WorkBatch* done = previous;
        previous = current, current = next, next = done;
    }
    if (isatty(STDERR_FILENO)) fputs("\r\033[K", stderr);
    for (int i = 0; i < 3; i++) work_batch_free(p, &ring[i]);
    reader_close(&p->reader);
    const Error* first = emit_error.code != 0 ? &emit_error : &read_error;
    if (first->code != 0) *err = *first;
    return first->code == 0;
}
