// bfloat16: the upper half of a float, rounded to nearest, ties to even.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// A NaN stays a NaN (made quiet); a value beyond the largest bfloat16 becomes infinite, as IEEE 754 rounds.
static inline uint16_t bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? (bits >> 16) | 0x40 : rounded);
}

static inline float float_from_bf16(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
