// The learning rate as a function of the step: linear warm-up, then one of four shapes down to
// final_lr_fraction of the peak, which the last step reaches exactly.
//
//        ______                 cosine    half a cosine
//       /      \__              linear    a straight line
//      /          \___          wsd       flat, then 1 - sqrt over the last decay_fraction (arXiv 2405.18392)
//     /               \         constant  flat
#pragma once
#include <math.h>

#include "llmc/config.h" // defines: RunConfig, ScheduleType

// step counts from 0
static inline double learning_rate(const RunConfig* run, uint64_t step) {
    double peak = run->optimizer.learning_rate, final_lr = peak * run->schedule.final_lr_fraction;
    double warmup = run->schedule.warmup_steps, last = run->schedule.max_steps - 1.0, s = (double)step;
    if (s < warmup) return peak * (s + 1) / (warmup + 1);
    double begin = warmup;
    if (run->schedule.type == SCHEDULE_WSD) {
        double decay = floor(run->schedule.decay_fraction * run->schedule.max_steps);
        begin = fmax(warmup, last - decay);
    }
    double progress = last > begin ? fmin(fmax((s - begin) / (last - begin), 0.0), 1.0) : 1.0;
    switch (run->schedule.type) {
    case SCHEDULE_COSINE: return final_lr + 0.5 * (1 + cos(M_PI * progress)) * (peak - final_lr);
    case SCHEDULE_LINEAR: return peak + progress * (final_lr - peak);
    case SCHEDULE_WSD: return peak + sqrt(progress) * (final_lr - peak);
    case SCHEDULE_CONSTANT: return peak;
    }
    return peak;
}
