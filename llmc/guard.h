// The numbers stay sane: a step whose loss or gradient norm is not finite must not reach the weights.
// The test is on isfinite(), not on a comparison: every comparison with a NaN is false, and so a guard
// written as `norm > limit` lets exactly the worst step through.
#pragma once
#include <math.h>

#include "llmc/checkpoint.h" // defines: TrainState

// Decides whether the step may be applied, and keeps count in the state that checkpoints store.
static inline bool guard_accepts(TrainState* state, double loss, double grad_norm) {
    if (isfinite(loss) && isfinite(grad_norm)) {
        state->consecutive_skipped = 0;
        return true;
    }
    state->skipped_steps++;
    state->consecutive_skipped++;
    return false;
}
