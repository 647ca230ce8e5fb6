// The learning rate as a function of the step: linear warm-up to the peak, then one of four ways down to
// final_lr_fraction of it, which the last step has exactly.
//
//        ______                 cosine    half a cosine
//       /      \__              linear    a straight line
//      /          \___          wsd       flat, then 1 - sqrt over the last decay_fraction (arXiv 2405.18392)
//     /               \         constant  flat to the end
#pragma once
#include <math.h>

#include "llmc/config.h" // defines: RunConfig, ScheduleType

// step counts from 0. In the warm-up it has (step + 1) / (warmup_steps + 1) of the peak: not 0 at first, and
// the peak at step warmup_steps. With warmup_steps == max_steps the run is all warm-up; there is no way down.
static inline double learning_rate(const RunConfig* run, uint64_t step) {
    double peak = run->optimizer.learning_rate, final_lr = peak * run->schedule.final_lr_fraction;
    double warmup = run->schedule.warmup_steps, last = run->schedule.max_steps - 1.0, s = (double)step;
    if (s < warmup) return peak * (s + 1) / (warmup + 1);
    double begin = warmup;
    if (run->schedule.type == SCHEDULE_WSD)
        begin = fmax(warmup, last - floor(run->schedule.decay_fraction * run->schedule.max_steps));
    double progress = s >= last ? 1.0 : s <= begin ? 0.0 : (s - begin) / (last - begin);
    double share = 0; // of the way down; 0 and 1 give peak and final_lr without rounding
    switch (run->schedule.type) {
    case SCHEDULE_COSINE:
        share = 0.5 - 0.5 * cos(M_PI * progress);
        break;
    case SCHEDULE_LINEAR:
        share = progress;
        break;
    case SCHEDULE_WSD:
        share = sqrt(progress);
        break;
    case SCHEDULE_CONSTANT:
        break;
    }
    return (1 - share) * peak + share * final_lr;
}
