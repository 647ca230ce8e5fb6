// Which row comes when: the order of the training data as two pure functions of the global row index, so that
// a resume is one integer and the order does not know how many ranks there are.
//
//   mixture_locate  global row g           -> (source, index within the source's own endless sequence)
//   permute         index within one epoch -> row, a keyed permutation without a table
//
// Both take the same time for any index: seeking is calling. Limits: 256 sources, shares in steps of 2^-16.
#pragma once
#include "llmc/utils.h" // defines: Error, fail, CHECK, EXIT_CONFIG
#include "llmc/rand.h"  // defines: random_bits, RANDOM_DATA

// ----------------------------------------------------------------------------
// shuffling one epoch

// Position i of n under the permutation that (seed, which) names; which is below 2^56. A Feistel network
// permutes [0, 4^h), the smallest such range that covers n; walking its cycle until it lands below n makes
// that a permutation of [0, n), after fewer than four rounds on average.
// Sources: Luby & Rackoff 1988; Black & Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
static inline uint64_t permute(uint64_t i, uint64_t n, uint64_t seed, uint64_t which) {
    enum { ROUNDS = 6 };
    CHECK(i < n);
    int half = 1; // bits of each half of the index
    while (half < 32 && (uint64_t)1 << (2 * half) < n) half++;
    uint64_t mask = ((uint64_t)1 << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 0; round < ROUNDS; round++) {
            uint64_t mixed = left ^ (random_bits(seed, RANDOM_DATA, which, round << 32 | right).x[0] & mask);
            left = right;
            right = mixed;
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

// ----------------------------------------------------------------------------
// mixing sources: one fixed pattern of 65536 rows, repeated for ever

enum { MIXTURE_PERIOD = 1 << 16, MIXTURE_MAX_SOURCES = 256 };

typedef struct {
    int num_sources;
    uint32_t quota[MIXTURE_MAX_SOURCES]; // rows of each source in a period; their sum is the period
    uint8_t source[MIXTURE_PERIOD];      // whose row is at this position
    uint16_t nth[MIXTURE_PERIOD];        // how many rows of the same source come before it in the period
} Mixture;

// quota = weights scaled to the period and rounded so that they add up to it (largest remainders, the lower
// source where they tie).
static inline void mixture_quotas(Mixture* m, const double* weights) {
    double sum = 0, remainder[MIXTURE_MAX_SOURCES];
    uint32_t given = 0;
    for (int k = 0; k < m->num_sources; k++) sum += weights[k];
    for (int k = 0; k < m->num_sources; k++) {
        double exact = weights[k] / sum * MIXTURE_PERIOD;
        m->quota[k] = (uint32_t)exact;
        remainder[k] = exact - m->quota[k];
        given += m->quota[k];
    }
    while (given < MIXTURE_PERIOD) {
        int best = 0;
        for (int k = 1; k < m->num_sources; k++)
            if (remainder[k] > remainder[best]) best = k;
        m->quota[best]++;
        remainder[best] -= 1;
        given++;
    }
}

// The position by which row number `nth` of a source must have come, for its count not to fall behind by one.
static inline uint64_t mixture_deadline(uint32_t quota, uint64_t nth) {
    return ((nth + 1) * MIXTURE_PERIOD + quota - 1) / quota - 1;
}

// Fills the pattern by earliest deadline first among the sources that are not ahead of their share: after any
// number of rows, each source's count is within one of its exact share (Steiner & Yeomans, "Level Schedules
// for Mixed-Model, Just-in-Time Processes", 1993; the greedy largest deficit does not guarantee that).
static inline bool mixture_build(Mixture* m, const double* weights, const char* const* names, int num_sources,
                                 Error* err) {
    uint64_t deadline[MIXTURE_MAX_SOURCES];
    uint32_t count[MIXTURE_MAX_SOURCES] = {0};
    CHECK(num_sources >= 1 && num_sources <= MIXTURE_MAX_SOURCES);
    m->num_sources = num_sources;
    for (int k = 0; k < num_sources; k++)
        if (!(weights[k] > 0 && weights[k] <= 1e18))
            return fail(err, EXIT_CONFIG,
                        "data source '%s': weight %g must be a positive number (at most 1e18)", names[k],
                        weights[k]);
    mixture_quotas(m, weights);
    for (int k = 0; k < num_sources; k++) {
        if (m->quota[k] == 0)
            return fail(err, EXIT_CONFIG,
                        "data source '%s': weight %g is less than one row in %d of the mixture; raise it or "
                        "remove the source",
                        names[k], weights[k], MIXTURE_PERIOD);
        deadline[k] = mixture_deadline(m->quota[k], 0);
    }
    for (uint64_t i = 0; i < MIXTURE_PERIOD; i++) {
        int best = -1;
        for (int k = 0; k < num_sources; k++) {
            bool released = (uint64_t)count[k] * MIXTURE_PERIOD < (i + 1) * m->quota[k];
            if (released && (best < 0 || deadline[k] < deadline[best])) best = k;
        }
        CHECK(best >= 0 && i <= deadline[best]);
        m->source[i] = (uint8_t)best;
        m->nth[i] = (uint16_t)count[best]++;
        deadline[best] = mixture_deadline(m->quota[best], count[best]);
    }
    return true;
}

// The source of global row g, and how many rows of that source come before it.
static inline int mixture_locate(const Mixture* m, uint64_t g, uint64_t* index) {
    uint64_t position = g % MIXTURE_PERIOD;
    int k = m->source[position];
    *index = g / MIXTURE_PERIOD * m->quota[k] + m->nth[position];
    return k;
}
