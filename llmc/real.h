// The element type of the CPU reference and the arithmetic its loops share: vectors and the exponential.
// REAL is float; tests compile the same source with -DREAL=double and hold its gradients against central
// finite differences. Nothing here is an intrinsic: vectors are GCC's and clang's vector extension, the
// exponential is plain C that both compilers vectorise inside `#pragma omp simd` loops.
#pragma once
#include <math.h>
#include <string.h>
#include "llmc/utils.h" // defines: CHECK, restrict
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_max_threads(void) { return 1; }
static inline int omp_get_thread_num(void) { return 0; }
#endif

#ifdef __clang__ // else every simd loop that an unoptimised build (sanitizers) leaves alone is a warning
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

#ifndef REAL
#define REAL float
#define REAL_IS_FLOAT 1
#endif
typedef REAL real;

// One register, and how many of them a register-tiled loop may count on.
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, VECTOR_REGISTERS = 32 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, VECTOR_REGISTERS = 16 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, VECTOR_REGISTERS = 32 };
#else
enum { VECTOR_BYTES = 16, VECTOR_REGISTERS = 16 };
#endif
enum { LANES = VECTOR_BYTES / (int)sizeof(real) };
typedef real Vec
    __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias)); // any alignment

static inline int round_up_to_lanes(int n) { return (n + LANES - 1) / LANES * LANES; }

// Rows and columns handed to one thread at a time are fixed numbers, never a share of the thread count:
// each sum below is taken in the same order by one thread or by sixty-four.
enum { COLUMN_BLOCK = 128 };

// e^x within 1 ulp (2^-23) for -87.33 <= x <= 88.37; 0 below (no subnormal results), infinity above, NaN
// for NaN. x = n ln 2 + r with |r| <= ln 2 / 2: the Taylor series of e^r to r^7 is off by less than 6e-9.
static inline float exp_float(float x) {
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
    float shifted = x * 1.44269504088896f + shift;
    float n = shifted - shift;
    float r = x - n * 0.693145751953125f; // ln 2 in two parts, the first exact when multiplied by n
    r = r - n * 1.42860682030941723e-6f;
    float series = 1.0f / 5040;
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = 1.0f + (r + r * r * series); // the smallest terms first
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23; // the exponent field of 2^n
    float power;
    memcpy(&power, &bits, sizeof power);
    float y = series * power;
    y = x < -87.33f ? 0.0f : y;
    return x > 88.37f ? INFINITY : y;
}

static inline real exp_real(real x) {
    return sizeof(real) == sizeof(float) ? (real)exp_float((float)x) : (real)exp((double)x);
}

static inline real sqrt_real(real x) {
    return sizeof(real) == sizeof(float) ? (real)sqrtf((float)x) : (real)sqrt((double)x);
}

// 1 / (1 + e^-x), accurate in both tails; tanh(u) = 2 sigmoid(2 u) - 1.
static inline real sigmoid_real(real x) { return 1 / (1 + exp_real(-x)); }

// sums (C) += the column sums of x (N, C): bias gradients
static inline void add_column_sums(real* sums, const real* x, int N, int C) {
#pragma omp parallel for schedule(static)
    for (int first = 0; first < C; first += COLUMN_BLOCK) {
        int width = C - first < COLUMN_BLOCK ? C - first : COLUMN_BLOCK;
        real total[COLUMN_BLOCK] = {0};
        for (int n = 0; n < N; n++) {
            const real* row = x + (size_t)n * (size_t)C + first;
            for (int c = 0; c < width; c++) total[c] += row[c];
        }
        for (int c = 0; c < width; c++) sums[first + c] += total[c];
    }
}
