// A thread that writes checkpoints beside training: one at a time, each from a snapshot of the state, or a copy of what
// is in the fast tier (data.part: only files are read then).
//
//     training   step N | snapshot begins | step N + 1 ...      | result taken
//     thread              waits for it, writes, syncs, renames  |
//
// The thread reads the host's state of the model and nothing else of it; the next snapshot, which would
// overwrite that, begins when the thread is done. It inherits blocked signals: a stop reaches the loop.
#pragma once
#include "llmc/fast_tier.h" // defines: CheckpointData, checkpoint_save, FastTier, fast_save
#include "llmc/program.h"   // defines: GPT, gpt_snapshot, gpt_snapshot_wait

#include <pthread.h>

typedef struct {
    GPT* gpt;             // the snapshot of which is to be made first; NULL: there is one, or none is needed
    CheckpointData data;  // its state, as it was at saver_start
    CheckpointPart part;  // what data.part points to
    const FastTier* tier; // where it is written; NULL: into directory
    uint64_t copied;      // tier: the step that stays, because it is being copied
    bool to_durable;      // tier: it is to be in directory, too
    char directory[PATH_MAX];
    int keep_last;
    uint64_t permanent_every;
    bool busy; // started, result not taken yet
    bool has_thread;
    pthread_t thread;
    bool finished; // atomic; what follows may be read once it is set
    double started, seconds;
    Error err; // why there is no checkpoint; code 0: there is one
} Saver;

static inline void* saver_main(void* argument) {
    Saver* s = (Saver*)argument;
    if (s->gpt != NULL) gpt_snapshot_wait(s->gpt);
    if (s->tier != NULL)
        fast_save(s->tier, &s->data, &s->part, s->copied, &s->err);
    else
        checkpoint_save(s->directory, &s->data, s->keep_last, s->permanent_every, &s->err);
    s->seconds = seconds_now() - s->started;
    __atomic_store_n(&s->finished, true, __ATOMIC_RELEASE);
    return NULL;
}

// All that is above `busy` is set, and the result of the save before is taken.
// Where no thread can be had the save is made at once.
static inline void saver_start(Saver* s) {
    CHECK(!s->busy);
    s->busy = true, s->finished = false;
    s->started = seconds_now();
    memset(&s->err, 0, sizeof s->err);
    if (s->gpt != NULL) gpt_snapshot(s->gpt);
    s->has_thread = pthread_create(&s->thread, NULL, saver_main, s) == 0;
    if (!s->has_thread) saver_main(s);
}

// Is there a result that saver_finish would not have to wait for?
static inline bool saver_has_result(const Saver* s) {
    return s->busy && __atomic_load_n(&s->finished, __ATOMIC_ACQUIRE);
}

// Waits for the save under way. False: it failed, err says why.
static inline bool saver_finish(Saver* s, Error* err) {
    CHECK(s->busy);
    if (s->has_thread) pthread_join(s->thread, NULL);
    s->busy = false;
    if (s->err.code == 0) return true;
    return fail(err, s->err.code, "%s", s->err.text);
}
