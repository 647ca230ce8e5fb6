// Training: steps, what is said about them, what is due behind them, checkpoints.
#pragma once
#include "llmc/evaluate.h"      // defines: evaluate, generate
#include "llmc/flops.h"         // defines: flops_per_token
#include "llmc/guard_actions.h" // defines: guard_orders, guard_count, guard_judge, guard_act, guard_rewind
#include "llmc/saves.h"         // defines: save, save_last, copy_what_was_left, take_results, step_requests
#include "llmc/schedule.h"      // defines: learning_rate

// The rate is that of t->seconds_per_step. Where the device's peak is known, the share of it (MFU, counting
// causal attention) says more than the rate does.
static inline void report_step(Trainer* t, const StepResult* r) {
    const RunConfig* run = &t->run;
    flight_phase(PHASE_REPORT, t->state.step); // a reader of what is printed may be slow
    double seconds_per_step = t->seconds_per_step, peak = t->peak_flops;
    double tokens = (double)run->batch.global_batch_size * run->batch.sequence_length;
    double rate = tokens / seconds_per_step;
    double flops = rate * flops_per_token(&run->model, run->batch.sequence_length, FLOPS_CAUSAL);
    double seconds_left = (double)((uint64_t)run->schedule.max_steps - t->state.step) * seconds_per_step;
    char left[24], bpb[16] = "-", speed[32];
    const Style* style = t->telemetry.style;
    snprintf(speed, sizeof speed, peak != 0 ? "MFU %4.1f %%" : "%6.1f GFLOP/s",
             peak != 0 ? 100 * flops / (peak * run->layout.size) : flops / 1e9);
    format_duration(left, seconds_left);
    if (isfinite(t->bits_per_byte)) snprintf(bpb, sizeof bpb, "%.4f", t->bits_per_byte);
    printf("%sstep %6llu/%d%s | loss %s%7.4f%s | val bpb %6s | norm %6.3f | lr %.2e | %7.0f tok/s | %s | "
           "left %s%s%s%s%s\n",
           style->dim, (unsigned long long)t->state.step, run->schedule.max_steps, style->plain, style->bold,
           r->loss, style->plain, bpb, r->grad_norm, r->lr, rate, speed, left, style->alarm,
           r->applied ? "" : " | SKIPPED", style->plain, style->clear);
    console_progress(stdout, style, t->state.step, (uint64_t)run->schedule.max_steps, seconds_left);
    fflush(stdout);
    String line = event_begin("step", t->state.step);
    event_number(&line, "loss", r->loss);
    event_number(&line, "grad_norm", r->grad_norm);
    event_number(&line, "learning_rate", r->lr);
    event_number(&line, "tokens", (double)t->state.tokens);
    event_number(&line, "step_seconds", r->seconds);
    if (r->update_rate > 0) event_number(&line, "update_bytes_per_second", r->update_rate);
    event_rates(&line, run, rate, peak);
    event_number(&line, "skipped_steps", (double)t->state.skipped_steps);
    RankSeconds ranks;
    if (watchdog_ranks(&t->watchdog, &ranks)) {
        event_number(&line, "rank_seconds_min", ranks.min);
        event_number(&line, "rank_seconds_median", ranks.median);
        event_number(&line, "rank_seconds_max", ranks.max);
        event_number(&line, "slowest_rank", ranks.slowest);
    }
    event_times(&line, &t->telemetry);
    event_end(&t->metrics, &line);
    if (r->layers == NULL) return;
    line = event_begin("layers", t->state.step);
    for (int k = 0; k < NUM_LAYER_NORMS; k++)
        event_array(&line, layer_norm_keys[k], &r->layers->of[k], run->model.num_hidden_layers + 2,
                    NUM_LAYER_NORMS);
    event_end(&t->metrics, &line);
}

// *stop: not to its end, as all know of a stop signal.
static inline bool report_evaluation(Trainer* t, bool* stop, Error* err) {
    Evaluation e;
    double start = seconds_now();
    if (!evaluate(t, &e, err)) return false;
    *stop = e.cut;
    if (e.cut) return true;
    t->bits_per_byte = e.bits_per_byte;
    printf("eval %6llu | val loss %.4f | perplexity %.2f", (unsigned long long)t->state.step, e.loss,
           e.perplexity);
    if (isfinite(e.bits_per_byte)) printf(" | %.4f bits per byte", e.bits_per_byte);
    printf(" | %llu tokens in %.1f s%s\n", (unsigned long long)e.tokens, seconds_now() - start,
           t->telemetry.style->clear);
    String line = event_begin("eval", t->state.step);
    event_number(&line, "loss", e.loss);
    event_number(&line, "perplexity", e.perplexity);
    if (isfinite(e.bits_per_byte)) event_number(&line, "bits_per_byte", e.bits_per_byte);
    event_end(&t->metrics, &line);
    return true;
}

static inline bool report_samples(Trainer* t, Error* err) {
    for (int i = 0; i < t->run.sample.num_samples; i++) {
        String text = {NULL, 0, 0};
        flight_phase(PHASE_SAMPLE, t->state.step);
        bool ok = generate(t, i, &text, err);
        if (!ok || stop_requested()) {
            free(text.data);
            return ok;
        }
        printf("---- sample %d at step %llu%s\n", i + 1, (unsigned long long)t->state.step,
               t->telemetry.style->clear);
        print_escaped(stdout, text.data, text.size);
        printf("\n----\n");
        String line = event_begin("sample", t->state.step);
        event_bytes(&line, "text", text.data, text.size);
        event_end(&t->metrics, &line);
        free(text.data);
    }
    return true;
}

// ----------------------------------------------------------------------------
// the loop

// Is `step` one of every, 2 every, ... or the last? every 0 means only the last.
static inline bool is_due(int every, uint64_t step, bool last) {
    return last || (every > 0 && step % (uint64_t)every == 0);
}

// What is to be done between a step and the next.
typedef struct {
    bool report, save, evaluate, sample, rewind;
    bool fast; // a checkpoint that stays in the fast tier
    bool stop; // all know of a stop signal
} Due;

static inline Due due_after_step(const Trainer* t, const StepResult* r) {
    const RunConfig* run = &t->run;
    uint64_t step = t->state.step;
    bool last = step == (uint64_t)run->schedule.max_steps;
    Due due;
    due.report = is_due(run->log.every, step, last) || t->alarm.what != NULL || r->layers != NULL;
    due.save = is_due(run->checkpoint.every, step, last) || (r->requests & REQUEST_SAVE) != 0;
    due.fast = !due.save && is_due(run->checkpoint.fast_every, step, false);
    due.evaluate = t->validation.rows > 0 && is_due(run->eval.every, step, last);
    due.sample = run->sample.every > 0 && is_due(run->sample.every, step, last);
    due.rewind = false;
    due.stop = (r->requests & REQUEST_STOP) != 0;
    return due;
}

// The guard first: what it ends or takes back is not saved. The checkpoint before what reads and may fail, for which a
// stop has no time.
static inline bool after_step(Trainer* t, bool applied, Due* due, Error* err) {
    const RunConfig* run = &t->run;
    unsigned long long step = t->state.step;
    if (t->alarm.what != NULL && !guard_act(t, applied, &due->rewind, err)) return false;
    if (due->rewind) return true;
    if (t->state.consecutive_skipped >= (uint64_t)run->guard.max_skipped_steps) {
        char text[512];
        guard_describe(&t->alarm, text);
        t->agreed = true; // all have counted
        return fail(
            err, EXIT_INTERNAL,
            "training diverged: %d steps in a row were skipped, up to step %llu, in which %s; lower "
            "optimizer.learning_rate or look at the data or the GPUs, and resume from the last checkpoint "
            "(guard.max_skipped_steps is the limit)",
            run->guard.max_skipped_steps, step, text);
    }
    double before = seconds_now();
    if ((due->save || due->fast) && !save(t, due->save, err)) {
        if (step == (uint64_t)run->schedule.max_steps) return false;
        warn_of_no_checkpoint(t, step, err);
        memset(err, 0, sizeof *err);
    }
    if (due->save || due->fast) before = telemetry_spend(&t->telemetry, SPENT_CHECKPOINT, before);
    if (due->evaluate && !due->stop && !report_evaluation(t, &due->stop, err)) return false;
    if (due->evaluate) before = telemetry_spend(&t->telemetry, SPENT_EVAL, before);
    bool ok = !due->sample || due->stop || t->control.rank > 0 || report_samples(t, err);
    if (due->sample) telemetry_spend(&t->telemetry, SPENT_SAMPLE, before);
    return ok;
}

// The rows of the next step, for which it waits.
static inline bool load_batch(Trainer* t, Prefetch* prefetch, Error* err) {
    flight_phase(PHASE_DATA, t->state.step + 1);
    double before = seconds_now();
    const int32_t* rows = prefetch_next(prefetch, err);
    t->telemetry.waited += seconds_now() - before;
    if (rows == NULL) return false;
    gpt_load_batch(t->gpt, rows, t->run.batch.global_batch_size / num_replicas(&t->run.layout),
                   t->run.data.document_mask, t->eot_id);
    return true;
}

static inline void start_step(Trainer* t) {
    const TrainState* s = &t->state;
    flight_phase(PHASE_STEP, s->step + 1);
    gpt_start_step(t->gpt, &t->run, learning_rate(&t->run, s->step), s->step - s->skipped_steps,
                   step_requests(t), guard_orders(s, &t->run));
}

static inline StepResult finish_step(Trainer* t) {
    uint64_t rows = (uint64_t)t->run.batch.global_batch_size;
    flight_phase(PHASE_STEP, t->state.step + 1);
    StepGuard limits = guard_limits(&t->state, &t->run);
    StepResult r = gpt_finish_step(t->gpt);
    flight()->steps++;
    r.lr = learning_rate(&t->run, t->state.step);
    t->alarm = guard_judge(&limits, &t->run.layout, &r);
    guard_count(&t->state, &t->run, &r);
    t->state.step++;
    t->state.rows += rows;
    t->state.tokens += rows * (uint64_t)t->run.batch.sequence_length;
    return r;
}

// Steps until the last one, a stop signal, an error or a rewind; one at least: what a rewind leaves out is in no
// checkpoint before. While the device works on a step, the host reports the one before (unless something else was due
// behind that) and loads the next one's batch.
static inline bool run_steps(Trainer* t, Prefetch* prefetch, bool* rewind, Error* err) {
    uint64_t max_steps = (uint64_t)t->run.schedule.max_steps;
    double start = t->save_started = seconds_now();
    bool unreported = false, stop = false, ok = t->state.step >= max_steps || load_batch(t, prefetch, err);
    StepResult r;
    memset(&r, 0, sizeof r);
    for (int done = 1; ok && t->state.step < max_steps && !stop; done++) {
        start_step(t);
        if (unreported) report_step(t, &r);
        take_results(t);
        if (t->state.step + 1 < max_steps) ok = load_batch(t, prefetch, err);
        r = finish_step(t);
        r.seconds = seconds_now() - start; // the wait for data included
        double stall = t->stall_grows ? fmax(0, r.seconds - t->seconds_per_step) : 0;
        t->stall += stall, t->stall_grows = false;
        telemetry_step(&t->telemetry, &r, stall);
        t->seconds_per_step += (done < 20 ? 1.0 / done : 0.05) * (r.seconds - t->seconds_per_step);
        Due due = due_after_step(t, &r);
        bool at_once = !t->program->asynchronous || due.save || due.fast || due.evaluate || due.sample ||
                       t->alarm.what != NULL;
        unreported = due.report && !at_once;
        if (due.report && at_once) report_step(t, &r);
        ok = ok && after_step(t, r.applied, &due, err);
        *rewind = ok && due.rewind;
        stop = due.stop || *rewind || (t->control.size == 1 && stop_requested());
        start = seconds_now();
    }
    if (unreported) report_step(t, &r);
    return ok;
}

static inline bool train_loop(Trainer* t, Error* err) {
    const Layout* l = &t->run.layout;
    bool ok = false, rewind = false;
    if (!copy_what_was_left(t, err)) return false;
    do { // once, and once more after each rewind
        Prefetch prefetch;
        if (rewind) finish_saves_or_warn(t); // it may be the one to go back to
        if (rewind && !guard_rewind(t, err)) return false;
        if (!prefetch_start(&prefetch, &t->train, t->state.rows, t->run.batch.global_batch_size,
                            t->run.batch.micro_batch_size, replica(l), num_replicas(l), PREFETCH_DEPTH, err))
            return false;
        rewind = false;
        ok = run_steps(t, &prefetch, &rewind, err);
        prefetch_stop(&prefetch);
    } while (rewind);
    return save_last(t, ok, err);
}
