// How numbers are kept in 16 bits: bf16 rounded stochastically, and an fp32 number in two halves.
//
//     fp32 bits    | sign, exponent, 7 bits of mantissa | 16 bits of mantissa |
//     two halves   | bf16, rounded to nearest           | the rest, signed    |    bits = (bf16 << 16) + rest
//
// The upper half is what the model computes with, the two together are the master weight, exactly: an fp32
// master that costs 2 bytes a parameter beside the bf16 weights instead of 4.
#pragma once
#include <stdint.h>
#include <string.h>

#include "llmc/rand.h" // defines: HOST_DEVICE

HOST_DEVICE static inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

HOST_DEVICE static inline float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// high: bits of x in bf16, to nearest, ties away from zero; low: what is left. Exact for every finite x.
HOST_DEVICE static inline void split_float(uint16_t* high, int16_t* low, float x) {
    uint32_t bits = bits_of_float(x);
    *high = (uint16_t)((bits + 0x8000u) >> 16);
    *low = (int16_t)(uint16_t)bits;
}

HOST_DEVICE static inline float join_float(uint16_t high, int16_t low) {
    return float_of_bits(((uint32_t)high << 16) + (uint32_t)(int32_t)low);
}

// Bits of one of the two bf16 numbers around x, each as likely as x is near it: the mean is x. random: 16
// bits. Infinities and NaNs stay what they are.
HOST_DEVICE static inline uint16_t bf16_stochastic(float x, uint32_t random) {
    uint32_t bits = bits_of_float(x);
    if ((bits & 0x7F800000u) == 0x7F800000u)
        return (uint16_t)((bits >> 16) | ((bits & 0xFFFFu) != 0 ? 0x40u : 0));
    return (uint16_t)((bits + (random & 0xFFFFu)) >> 16);
}
