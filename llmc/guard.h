// The numbers stay sane: a step whose loss or gradient norm is not finite must not reach the weights.
// The test is on isfinite(), not on a comparison: every comparison with a NaN is false, and so a guard
// written as `norm > limit` lets exactly the worst step through.
#pragma once
#include <math.h>

#include "llmc/checkpoint.h" // defines: TrainState

// May the step be applied? The program that computes it asks, on the GPU in a kernel of the same formula.
static inline bool guard_accepts(double loss, double grad_norm) {
    return isfinite(loss) && isfinite(grad_norm);
}

// Keeps count in the state that checkpoints store.
static inline void guard_count(TrainState* state, bool applied) {
    state->skipped_steps += !applied;
    state->consecutive_skipped = applied ? 0 : state->consecutive_skipped + 1;
}
