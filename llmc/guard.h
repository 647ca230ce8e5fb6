// The numbers stay sane: which steps are not to be trusted, and what a run does about them. Here is what is decided, as
// pure functions of what every process has, so that all decide alike; the deeds are in guard_actions.h.
//
//     not finite   never reaches the weights and never enters a mean, whatever the policy
//     spike        above mean + sigma deviations of the last `window` values, of the loss or of the gradient norm
//     weights      replicas that should be equal to the bit and are not
//     replay       a step that was computed twice, and not the same
#pragma once
#include "llmc/train_state.h" // defines: TrainState, Detector
#include "llmc/config.h"      // defines: RunConfig, GuardPolicy
#include "llmc/control.h"     // defines: ranks_listed
#include "llmc/program.h"     // defines: StepGuard, StepResult, REPLAY_SAME, guard_passes

// ----------------------------------------------------------------------------
// a number that each step has: its exponential mean and variance, which are those of all values at first

enum { DETECTOR_MIN_VALUES = 8 };

// INFINITY: nothing can be said yet. Values are sums of fp32 numbers, so that no square overflows.
static inline double detector_limit(const Detector* d, double sigma) {
    bool known = sigma > 0 && d->count >= DETECTOR_MIN_VALUES && d->variance > 0;
    return known ? d->mean + sigma * sqrt(d->variance) : INFINITY;
}

// A value above the limit enters as the limit: one spike does not make the detector blind, and a level that stays
// becomes the new one. Weight 1/n of the n-th value, from the window-th on 1/window.
static inline void detector_add(Detector* d, double value, double sigma, int window) {
    if (!isfinite(value)) return; // a mean that has taken in one NaN is a NaN for ever
    double delta = fmin(value, detector_limit(d, sigma)) - d->mean;
    d->count++;
    double weight = d->count < (uint64_t)window ? 1 / (double)d->count : 1 / (double)window;
    d->mean += weight * delta;
    d->variance = (1 - weight) * (d->variance + weight * delta * delta);
}

// ----------------------------------------------------------------------------
// a step

static inline double guard_limit(const Detector* d, const RunConfig* run) {
    return d->count < (uint64_t)run->guard.window ? INFINITY : detector_limit(d, run->guard.sigma);
}

// What the next step must stay below, from those before it: no limit until a window is full.
static inline StepGuard guard_limits(const TrainState* s, const RunConfig* run) {
    StepGuard limits = {guard_limit(&s->loss, run), guard_limit(&s->grad_norm, run), false, false, false};
    return limits;
}

// Weights are compared every so many steps, and before what is saved by the step, so that no fault gets into what a
// rewind goes back to.
static inline bool guard_check_due(uint64_t step, const RunConfig* run) {
    uint64_t every = (uint64_t)run->guard.check_every, save = (uint64_t)run->checkpoint.every;
    uint64_t fast = (uint64_t)run->checkpoint.fast_every;
    return every > 0 &&
           (step % every == 0 || (save > 0 && step % save == 0) || (fast > 0 && step % fast == 0));
}

static inline bool guard_replay_due(uint64_t step, const RunConfig* run) {
    uint64_t every = (uint64_t)run->guard.replay_every;
    return every > 0 && step % every == 0;
}

// What the program that computes the next step is told: a warning lets spikes pass.
static inline StepGuard guard_orders(const TrainState* s, const RunConfig* run) {
    StepGuard orders = guard_limits(s, run);
    if (run->guard.policy == GUARD_WARN) orders.max_loss = orders.max_grad_norm = INFINITY;
    orders.hash_weights = guard_check_due(s->step + 1, run);
    orders.replay = guard_replay_due(s->step + 1, run);
    int every = run->log.layers_every;
    orders.measure_layers = every > 0 && (s->step + 1) % (uint64_t)every == 0;
    return orders;
}

// Keeps count in the state that checkpoints store.
static inline void guard_count(TrainState* state, const RunConfig* run, const StepResult* r) {
    detector_add(&state->loss, r->loss, run->guard.sigma, run->guard.window);
    detector_add(&state->grad_norm, r->grad_norm, run->guard.sigma, run->guard.window);
    state->skipped_steps += !r->applied;
    state->consecutive_skipped = r->applied ? 0 : state->consecutive_skipped + 1;
}

// ----------------------------------------------------------------------------
// ranks that compute, or remember, what they should not

// Data-parallel ranks whose weights' hashes (of all ranks of the layout) differ from what most of their group have;
// where there is no majority, all of the group. Their names into `names`. False: there are none.
static inline bool guard_deviating(const Layout* l, const uint64_t* hashes, char names[256]) {
    bool any = false;
    bool* deviates = (bool*)calloc_check((size_t)l->size, sizeof *deviates);
    for (int i = 0; i < l->tp_size * l->pp_size; i++) {
        int tp = i % l->tp_size, pp = i / l->tp_size, most = 0;
        uint64_t usual = 0;
        for (int a = 0; a < l->dp_size; a++) {
            int same = 0;
            for (int b = 0; b < l->dp_size; b++)
                same += hashes[layout_rank(l, tp, b, pp)] == hashes[layout_rank(l, tp, a, pp)];
            if (same > most) most = same, usual = hashes[layout_rank(l, tp, a, pp)];
        }
        for (int a = 0; a < l->dp_size && most < l->dp_size; a++) {
            int rank = layout_rank(l, tp, a, pp);
            deviates[rank] = 2 * most <= l->dp_size || hashes[rank] != usual;
            any = any || deviates[rank];
        }
    }
    ranks_listed(deviates, l->size, names);
    free(deviates);
    return any;
}

// Of ranks that computed a step twice: those whose first deviation (StepResult) is the first of all, since the others'
// may come from it. Their names into `names`. False: there are none.
static inline bool guard_replay_deviating(const Layout* l, const uint64_t* first, char names[256]) {
    uint64_t least = REPLAY_SAME;
    bool* deviates = (bool*)calloc_check((size_t)l->size, sizeof *deviates);
    for (int r = 0; r < l->size; r++) least = first[r] < least ? first[r] : least;
    for (int r = 0; r < l->size; r++) deviates[r] = least != REPLAY_SAME && first[r] == least;
    ranks_listed(deviates, l->size, names);
    free(deviates);
    return least != REPLAY_SAME;
}

// ----------------------------------------------------------------------------
// the verdict

// What is wrong with ranks, while the data may be good.
typedef struct {
    const char *what, *says, *remedy;
    bool stays; // there is no step to leave out that heals it
} RankFault;
static const RankFault weights_fault = {"weights", "the weights of data-parallel replicas differ",
                                        "look at that GPU's memory, and start again from the last checkpoint",
                                        true};
static const RankFault replay_fault = {
    "replay", "the step was computed twice and is not the same",
    "that GPU computes wrongly: leave its node out, and resume from the last checkpoint", false};

typedef struct {
    const char* what;       // loss, grad_norm, weights or replay; NULL: nothing is wrong
    double value, limit;    // of loss and grad_norm
    const RankFault* fault; // of weights and replay; else NULL
    char ranks[256];        // that have it
} Alarm;

// What is wrong with a step that was computed under these limits.
static inline Alarm guard_judge(const StepGuard* limits, const Layout* layout, const StepResult* r) {
    Alarm alarm = {NULL, 0, 0, NULL, ""};
    // first what causes the others
    if (r->hashes != NULL && guard_deviating(layout, r->hashes, alarm.ranks))
        alarm.fault = &weights_fault;
    else if (r->replay != NULL && guard_replay_deviating(layout, r->replay, alarm.ranks))
        alarm.fault = &replay_fault;
    if (alarm.fault != NULL)
        alarm.what = alarm.fault->what;
    else if (!guard_passes(r->loss, limits->max_loss))
        alarm.what = "loss", alarm.value = r->loss, alarm.limit = limits->max_loss;
    else if (!guard_passes(r->grad_norm, limits->max_grad_norm))
        alarm.what = "grad_norm", alarm.value = r->grad_norm, alarm.limit = limits->max_grad_norm;
    return alarm;
}

// "loss 12.3 is above its limit, 4.5", for people.
static inline void guard_describe(const Alarm* a, char text[512]) {
    if (a->fault != NULL)
        snprintf(text, 512, "%s: rank %s", a->fault->says, a->ranks);
    else if (!isfinite(a->value))
        snprintf(text, 512, "%s is not finite", a->what);
    else
        snprintf(text, 512, "%s %.4g is above its limit, %.4g", a->what, a->value, a->limit);
}

// The row that the next step begins with after a rewind. `place`: that of the checkpoint; `reached`: behind the batch
// that was bad. At least what led to it is skipped.
static inline uint64_t guard_rows_after_rewind(uint64_t place, uint64_t reached, const RunConfig* run) {
    uint64_t skip = (uint64_t)run->guard.rewind_skip * (uint64_t)run->batch.global_batch_size;
    return place + skip > reached ? place + skip : reached;
}
