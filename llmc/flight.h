// The flight recorder: what this process did last. There is one in a process, as in an aircraft: the program notes its
// phases (train_loop.h) and all communication (comm.cuh) in it, and the watchdog reads it when somebody waits too long.
//
//     records   | step 17 | all-gather, layer 0 | all-gather, layer 1 | ... | data | step 17 |     a ring
//
// One thread writes. The watchdog reads beside it, and what it reads of the newest records may be half-written: it does
// so when nothing moves any more.
#pragma once
#include "llmc/layout.h" // defines: Layout, layout_at, replica
#include "llmc/utils.h"  // defines: seconds_now

// The groups of ranks that communicate:
//     world   everybody: the step's sums, checkpoints
//     tp      ranks that share every matmul            kv      those of them with the same key/value head
//     dp      ranks with the same weights              cp      those of them with the same rows of the batch
//     tied    first and last stage: the embedding's matrix
//     links   from a stage to the next and back, each with a communicator of its own, since operations of one
//             communicator wait for each other: even stages' links, odd ones', and the one around
enum Axis {
    AXIS_WORLD,
    AXIS_TP,
    AXIS_DP,
    AXIS_KV,
    AXIS_CP,
    AXIS_TIED,
    AXIS_FORWARD, // links of even stages, of odd ones, around
    AXIS_BACKWARD = AXIS_FORWARD + 3,
    AXIS_STATE =
        AXIS_BACKWARD + 3, // everybody, in pairs: weights and moments on their way to and from checkpoints
    NUM_AXES,
    AXIS_COMPUTE =
        NUM_AXES // nobody: a pass of the schedule, so that it is seen when the device does not get on
};
static const char* const axis_names[NUM_AXES + 1] = {"world",
                                                     "tensor parallel",
                                                     "data parallel",
                                                     "key/value heads",
                                                     "context parallel",
                                                     "tied embedding",
                                                     "pipeline forward",
                                                     "pipeline forward",
                                                     "pipeline forward",
                                                     "pipeline backward",
                                                     "pipeline backward",
                                                     "pipeline backward",
                                                     "state",
                                                     "compute"};

// Ranks of the same colour communicate along an axis, in the order of the key. replicas: ranks with the same key/value
// head.
static inline int axis_color(const Layout* l, int axis, int replicas, int* key) {
    int stage = l->dp + l->dp_size * l->pp, column = l->tp + l->tp_size * l->dp;
    bool tied = l->pp == 0 || l->pp == l->pp_size - 1;
    *key = axis == AXIS_TP || axis == AXIS_KV ? l->tp
           : axis == AXIS_DP                  ? l->dp
           : axis == AXIS_CP                  ? l->cp
                                              : l->pp;
    switch (axis) {
    case AXIS_WORLD:
        *key = l->rank;
        return 0;
    case AXIS_TP:
        return stage;
    case AXIS_DP:
        return l->tp + l->tp_size * l->pp;
    case AXIS_KV:
        return stage * l->tp_size + l->tp / replicas;
    case AXIS_CP:
        return l->tp + l->tp_size * (replica(l) + num_replicas(l) * l->pp);
    case AXIS_TIED:
        return tied ? column : l->size + l->rank;
    case AXIS_STATE:
        *key = l->rank;
        return 0;
    default:
        return column;
    }
}

enum Phase {
    PHASE_START,
    PHASE_DATA,
    PHASE_STEP,
    PHASE_SAVE,
    PHASE_EVAL,
    PHASE_SAMPLE,
    PHASE_REPORT,
    NUM_PHASES
};
static const char* const phase_names[NUM_PHASES] = {"starting",   "loading data", "computing", "saving",
                                                    "evaluating", "sampling",     "reporting"};
// Takes about as long each time. A save that is waited for may have ended before, or not yet begun to write.
static const bool phase_is_regular[NUM_PHASES] = {false, true, true, false, true, false, false};

enum {
    FLIGHT_RECORDS =
        32768, // the host may be two steps ahead of the device: of 32 layers with 16 micro-batches, all of them
};
typedef struct {
    const char* what; // a phase, or an operation
    int axis, layer;  // of an operation; axis -1: a phase
    int peer;         // of a message: rank in the group; else -1
    size_t bytes;     // of a rank's part
    uint64_t step;    // optimizer steps done, and the one under way
    uint64_t number;  // among the operations of its axis in this process, from 1 on
    double time;      // seconds_now
} FlightRecord;

typedef struct {
    FlightRecord records[FLIGHT_RECORDS]; // newest at (count - 1) % FLIGHT_RECORDS
    uint64_t count, issued[NUM_AXES + 1]; // records; operations of each axis
    int layer;                            // that the program is at
    int phase;
    uint64_t step, phases; // phases: how many have begun
    uint64_t steps;        // that have ended: the first one's beginning says nothing of how long steps take
    double
        patience; // seconds that who finds another process gone leaves the watchdog, which knows why; 0: there is none
    double since; // when this one has
    double
        own_seconds; // of a step: this process's own work, without waiting for others at its end; 0: not known
    double longest[NUM_PHASES]; // seconds that a phase took, the older the less it counts; 0: it never ended
} Flight;

// How far the device is with an operation.
enum OperationProgress { OPERATION_ISSUED, OPERATION_BEGUN, OPERATION_ENDED };

static inline Flight* flight(void) {
    static Flight recorder;
    return &recorder;
}

// Of a phase (axis -1), or of an operation that begins; peer: of a message, rank in the group, else -1. Returns the
// record's index.
static inline int flight_record(int axis, const char* what, size_t bytes, int peer) {
    Flight* f = flight();
    int i = (int)(f->count % FLIGHT_RECORDS);
    FlightRecord record = {
        what, axis, f->layer, peer, bytes, f->step, axis < 0 ? 0 : ++f->issued[axis], seconds_now()};
    f->records[i] = record;
    __atomic_store_n(&f->count, f->count + 1, __ATOMIC_RELEASE);
    return i;
}

// A step's own work took so long on this process's device; the mean of the last ones is kept.
static inline void flight_own_work(double seconds) {
    Flight* f = flight();
    f->own_seconds = f->own_seconds == 0 ? seconds : 0.9 * f->own_seconds + 0.1 * seconds;
}

// A phase begins, and the one before ends. step: the one that is computed, from 1 on.
static inline void flight_phase(enum Phase phase, uint64_t step) {
    Flight* f = flight();
    double now = seconds_now(), *longest = &f->longest[f->phase];
    bool learns = f->phases > 0 && (f->phase != PHASE_STEP || f->steps > 0);
    if (learns) *longest = now - f->since > 0.9 * *longest ? now - f->since : 0.9 * *longest;
    f->phase = phase, f->step = step, f->since = now;
    flight_record(-1, phase_names[phase], 0, -1);
    __atomic_store_n(&f->phases, f->phases + 1, __ATOMIC_RELEASE);
}
