// A sum of doubles that does not depend on their order: numbers are added as integers, so that the same bits come
// out however they were shared out over threads, blocks and ranks.
//
//     a double is m * 2^(p - 1074), m whole and below 2^53; it goes into three neighbours of an array of bins:
//
//     bin    0           1           2    ...    65     |  66
//     has    2^-1074 *   2^-1042 *   2^-1010 *          |  how many infinities and NaNs there were
//
// A bin takes at least 2^30 numbers before it overflows. Source of the idea: Kulisch's long accumulator.
#pragma once
#include "llmc/rand.h" // defines: HOST_DEVICE

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { EXACT_BINS = 67, EXACT_NOT_FINITE = EXACT_BINS - 1 };

typedef struct {
    long long bin[EXACT_BINS];
} ExactSum;

// One step's sums, in one piece, which all ranks add to each other's.
typedef struct {
    ExactSum loss, norm_squared;
    long long requests;  // ranks that ask for a stop, in the low half, and for a checkpoint, in the high one
    long long deviating; // ranks on which the step, computed twice, was not the same (replay.cuh)
} StepSums;

static HOST_DEVICE inline void exact_add(ExactSum* sum, double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int exponent = (int)(bits >> 52 & 0x7FF);
    uint64_t m = bits & 0xFFFFFFFFFFFFFull;
    if (exponent == 0x7FF) {
        sum->bin[EXACT_NOT_FINITE]++;
        return;
    }
    if (exponent > 0) m |= 1ull << 52, exponent--;
    int bin = exponent / 32, shift = exponent % 32;
    uint64_t low = (m & 0xFFFFFFFFu) << shift, high = (m >> 32) << shift; // each below 2^64: no bit is lost
    long long piece[3] = {(long long)(low & 0xFFFFFFFFu), (long long)((low >> 32) + (high & 0xFFFFFFFFu)),
                          (long long)(high >> 32)};
    for (int i = 0; i < 3; i++) sum->bin[bin + i] += (bits >> 63) != 0 ? -piece[i] : piece[i];
}

// The sum, rounded in a fixed way: within 2^-52 of it. NaN where something was not finite.
static HOST_DEVICE inline double exact_value(const ExactSum* sum) {
    long long bin[EXACT_BINS - 1], carry = 0, sign = 1;
    if (sum->bin[EXACT_NOT_FINITE] != 0) return NAN;
    for (int attempt = 0; attempt < 2; attempt++) {
        carry = 0;
        for (int i = 0; i < EXACT_BINS - 1; i++) {
            long long x = sign * sum->bin[i] + carry;
            carry = x >> 32; // rounds down, so that what stays is not negative
            bin[i] = x - carry * 4294967296ll;
        }
        if (carry >= 0) break;
        sign = -1;
    }
    double value = (double)carry;
    int used = carry != 0, i = EXACT_BINS - 2;
    for (; i >= 0 && used < 4; i--) {
        value = value * 4294967296.0 + (double)bin[i];
        used += used > 0 || bin[i] != 0;
    }
    return (double)sign * ldexp(value, 32 * (i + 1) - 1074);
}
