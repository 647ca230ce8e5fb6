// What a run does about checkpoints: begins them, takes their results, and knows what follows.
//
//     state, snapshot -> fast tier -> copy -> run directory     the saver writes, the copier copies, both beside training
//     state, snapshot -> run directory                          without a tier, or where it could not take it
//
// All processes begin the same saves behind the same steps. When each takes a result is its own affair, but what it
// then begins the others begin, too, so a process that fails alone must not.
#pragma once
#include "llmc/stop.h"    // defines: stop_requested
#include "llmc/trainer.h" // defines: Trainer, join_saver, checkpoints_directory, checkpoint_data

// Says that a checkpoint is there. stall: of its seconds, those that training stood still.
static inline void report_save(Trainer* t, const Saver* s, double stall) {
    unsigned long long step = s->data.state.step;
    const char* directory = s->tier != NULL ? s->tier->directory : s->directory;
    printf("save %6llu | %s/step_%08llu in %.1f s%s\n", step, directory, step, s->seconds,
           t->telemetry.style->clear);
    fflush(stdout);
    String line = event_begin("checkpoint", step);
    event_text(&line, "tier", s->tier != NULL ? "fast" : "durable");
    event_text(&line, "directory", directory);
    event_number(&line, "seconds", s->seconds);
    event_number(&line, "stall", stall);
    event_end(&t->metrics, &line);
}

// All processes save together and know why it failed; the first one says it. Who has lost the others would never save
// again.
static inline void warn_of_no_checkpoint(Trainer* t, uint64_t step, const Error* why) {
    if (why->code == EXIT_LOST && t->lost.code == 0) t->lost = *why;
    if (t->control.rank > 0) return;
    fprintf(stderr, "warning: no checkpoint at step %llu: %s\n", (unsigned long long)step, why->text);
}

// A saver that writes the state as it is into the run's directory, from what the host has of it.
static inline bool prepare_saver(Trainer* t, Saver* saver, Control* control, Error* err) {
    saver->gpt = NULL, saver->tier = NULL;
    memset(&saver->part, 0, sizeof saver->part);
    saver->data = checkpoint_data(t);
    saver->data.control = control, saver->data.part = &saver->part;
    saver->keep_last = t->run.checkpoint.keep_last;
    saver->permanent_every = (uint64_t)t->run.checkpoint.permanent_every;
    return checkpoints_directory(t, saver->directory, err) != NULL;
}

// Begins to copy a checkpoint of the fast tier to the run's directory. One at a time: save() waits for the one before.
static inline bool start_copy(Trainer* t, const TrainState* state, Error* err) {
    Saver* copier = &t->copier;
    if (!prepare_saver(t, copier, &t->copy_control, err) ||
        !step_path(copier->part.source, t->tier.directory, state->step, "", err))
        return false;
    t->tried_step = state->step;
    copier->data.state = *state;
    saver_start(copier);
    return true;
}

// Begins to write the state as it is, from a snapshot, into the fast tier or the run's directory.
static inline bool start_write(Trainer* t, bool fast, bool to_durable, Error* err) {
    Saver* saver = &t->saver;
    if (!prepare_saver(t, saver, &t->save_control, err)) return false;
    saver->gpt = t->gpt;
    saver->tier = fast ? &t->tier : NULL;
    saver->copied = t->copier.busy ? t->copier.data.state.step : NO_STEP;
    saver->to_durable = to_durable;
    saver_start(saver);
    return true;
}

// Waits for the copy that is being made, if one is, and says that it is there. False: it is not, err says why.
static inline bool finish_copy(Trainer* t, Error* err) {
    if (!t->copier.busy) return true;
    if (!join_saver(t, &t->copier, err)) return false;
    t->saved_step = t->copier.data.state.step;
    report_save(t, &t->copier, 0);
    return true;
}

// The same of the checkpoint that is being written; then begins what follows it. What the fast tier took is copied, if
// it is to be in the run's directory; what it could not take is written there at once, from the snapshot.
static inline bool finish_write(Trainer* t, Error* err) {
    Saver* saver = &t->saver;
    uint64_t step = saver->data.state.step;
    Error why = {0, {0}};
    if (!saver->busy) return true;
    bool fast = saver->tier != NULL, ok = join_saver(t, saver, fast ? &why : err);
    if (ok) report_save(t, saver, t->program->asynchronous ? t->stall : saver->seconds);
    if (ok) *(fast ? &t->fast_step : &t->saved_step) = step;
    if (why.code == EXIT_LOST) return fail(err, why.code, "%s", why.text);
    if (!fast) return ok;
    if (!ok && t->control.rank == 0)
        fprintf(stderr, "warning: step %llu is not in checkpoint.fast_dir: %s\n", (unsigned long long)step,
                why.text);
    if (!saver->to_durable) return true;
    if (ok) return start_copy(t, &saver->data.state, err);
    saver->gpt = NULL, saver->tier = NULL, saver->part.alone = false;
    saver_start(saver);
    return true;
}

// Waits for the checkpoint that is being written until nothing of it has to be done but the copy.
static inline bool finish_save(Trainer* t, Error* err) {
    bool ok = true;
    while (ok && t->saver.busy) ok = finish_write(t, err);
    return ok;
}

// A full disk must not end a run that may go on for days: say it, keep training, try again when it is due.
static inline void warn_unless(Trainer* t, bool (*finish)(Trainer*, Error*), const Saver* saver) {
    Error why = {0, {0}};
    uint64_t step = saver->data.state.step;
    if (!finish(t, &why)) warn_of_no_checkpoint(t, step, &why);
}
static inline void finish_saves_or_warn(Trainer* t) {
    warn_unless(t, finish_save, &t->saver);
    warn_unless(t, finish_copy, &t->copier);
}

// Training begins: what was loaded from the fast tier is copied beside it; before that, the permanent checkpoints there
// that a kill kept from being copied, since new ones take their place.
static inline bool copy_what_was_left(Trainer* t, Error* err) {
    const FastTier* tier = &t->tier;
    uint64_t every = (uint64_t)t->run.checkpoint.permanent_every, saved = t->saved_step;
    char directory[PATH_MAX], path[PATH_MAX];
    if (!tier->loaded || checkpoints_directory(t, directory, err) == NULL) return !tier->loaded;
    for (int i = 0; i < tier->num_older && every > 0; i++) {
        uint64_t step = tier->older[i];
        TrainState state;
        Error why = {0, {0}};
        bool there = step_path(path, directory, step, "", err) && access(path, F_OK) == 0;
        if (step % every != 0) continue;
        if (!control_broadcast(&t->control, &there, sizeof there, err)) return false;
        if (there) continue;
        bool read = step_path(path, tier->directory, step, "", &why) && train_state_load(&state, path, &why);
        read = control_agree(&t->control, &why) && read;
        if (!read || !start_copy(t, &state, &why) || !finish_copy(t, &why))
            warn_of_no_checkpoint(t, step, &why);
    }
    t->saved_step = saved;
    return !tier->to_copy || start_copy(t, &t->state, err);
}

// Takes what is there, without waiting.
static inline void take_results(Trainer* t) {
    if (!t->stall_grows && saver_has_result(&t->saver)) warn_unless(t, finish_write, &t->saver);
    if (saver_has_result(&t->copier)) warn_unless(t, finish_copy, &t->copier);
}

// Begins a checkpoint of the state as it is; without a copy of it in memory, training stands still until it is written.
// One at a time: an earlier one is waited for; so is the copy of an earlier one, if this one is to be copied.
static inline bool save(Trainer* t, bool to_durable, Error* err) {
    double begun = seconds_now();
    warn_unless(t, finish_save, &t->saver);
    if (to_durable) warn_unless(t, finish_copy, &t->copier);
    watchdog_joins(&t->watchdog, &t->control);
    flight_phase(PHASE_SAVE, t->state.step);
    if (to_durable) t->tried_step = t->state.step, t->save_started = seconds_now();
    bool there = t->fast_step == t->state.step; // in the fast tier
    bool ok =
        there ? start_copy(t, &t->state, err) : start_write(t, t->tier.directory[0] != '\0', to_durable, err);
    ok = ok && (t->program->asynchronous || finish_save(t, err));
    t->stall = seconds_now() - begun, t->stall_grows = t->program->asynchronous;
    return ok;
}

// Seconds between two saves, by what the last one cost and by the clock; INFINITY: steps alone count. With a loss of
// W / 2 at each failure and the cost of a save every W, W = sqrt(2 cost / failures) loses the least (Young, Commun. ACM
// 17, 1974). A save waits for the one before, so its writing is a lower bound (INFINITY: it is not over). Until a cost is
// known it is a second.
static inline double save_interval(const RunConfig* run, double stall, double writing) {
    double seconds = run->checkpoint.minutes > 0 ? 60 * run->checkpoint.minutes : INFINITY;
    double failures = run->checkpoint.failures_per_day / 86400, cost = stall > 0 ? stall : 1;
    if (failures > 0) seconds = fmin(seconds, fmax(writing, sqrt(2 * cost / failures)));
    return seconds;
}

// Of the last write, INFINITY while it is under way; but one that hangs the next save is to wait for, under the
// watchdog's eyes.
static inline double time_of_writing(const Trainer* t, const Saver* s) {
    double patience = t->run.parallel.hang_seconds_max > 0 ? t->run.parallel.hang_seconds_max : 3600;
    if (!s->busy) return s->seconds;
    return seconds_now() - s->started < patience ? INFINITY : 0;
}

// What this process asks of all of them behind the step that begins. The first one has the clock. Where saves have failed
// for good all stop together, to be started again.
static inline int step_requests(const Trainer* t) {
    double writing = time_of_writing(t, &t->saver) + time_of_writing(t, &t->copier);
    double interval = save_interval(&t->run, t->stall, writing);
    bool save = t->control.rank == 0 && seconds_now() - t->save_started >= interval;
    return (stop_requested() || t->lost.code != 0 ? REQUEST_STOP : 0) | (save ? REQUEST_SAVE : 0);
}

// The checkpoint of the run's end. Where a disk of the fast tier does not give back what it took, memory still has it.
static inline bool save_at_end(Trainer* t, Error* err) {
    Error why = {0, {0}};
    bool busy = t->saver.busy || t->copier.busy;
    if ((busy || save(t, true, &why)) && finish_save(t, &why) && finish_copy(t, &why)) return true;
    if (t->fast_step != t->state.step || why.code == EXIT_LOST) return fail(err, why.code, "%s", why.text);
    if (t->control.rank == 0)
        fprintf(stderr, "warning: step %llu cannot be copied from checkpoint.fast_dir: %s\n",
                (unsigned long long)t->state.step, why.text);
    return start_write(t, false, true, err) && finish_save(t, err);
}

// Whatever ended the run (ok: nothing that failed), what it has learnt is kept; but not what diverged. What failed here
// alone did not on the others: nothing is begun that they would have to join.
static inline bool save_last(Trainer* t, bool ok, Error* err) {
    bool diverged = err->code == EXIT_INTERNAL, tried = t->tried_step == t->state.step;
    bool several = t->control.size > 1;
    Error why = {0, {0}};
    if (!ok && several && !t->agreed) return false;
    if (diverged || !tried || (!ok && several)) finish_saves_or_warn(t); // an earlier step's
    if (diverged || t->saved_step == t->state.step) return ok;
    if (!ok && (several || (tried && !t->saver.busy && !t->copier.busy)))
        return false; // what has failed is this
    if (save_at_end(t, &why)) return ok;
    t->agreed = ok && why.code != EXIT_LOST;
    if (ok && !t->agreed)
        fail(err, why.code,
             "no more checkpoints can be written: %.800s. Run again to go on from the newest one",
             t->lost.code != 0 ? t->lost.text : why.text);
    else if (ok)
        *err = why;
    else
        warn_of_no_checkpoint(t, t->state.step, &why);
    return false;
}
