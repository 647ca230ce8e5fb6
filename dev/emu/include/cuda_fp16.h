// Stands in for CUDA's cuda_fp16.h: the type and its conversions, with the hardware's rounding.
#pragma once
#include <math.h>

#include "cuda_runtime.h" // defines: float2

// |x| in a binary format with `exponent_bits` and `mantissa_bits`, to nearest, ties to even. What overflows
// runs on into the codes beyond the largest finite number, for the caller to see. x is not a NaN.
static inline unsigned emu_encode(double x, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1;
    double size = fabs(x);
    if (size == 0) return 0;
    if (size >= ldexp(1.0, 2 << (exponent_bits - 1))) return 1u << (exponent_bits + mantissa_bits);
    int exponent = ilogb(size) < 1 - bias ? 1 - bias : ilogb(size); // below, numbers are subnormal
    // in units of the last place: the leading 1 of a normal number adds itself to the exponent, as does a
    // carry
    unsigned units = (unsigned)rint(ldexp(size, mantissa_bits - exponent));
    return ((unsigned)(exponent + bias - 1) << mantissa_bits) + units;
}

// The value of a code without its sign, below the codes for infinity and NaN.
static inline float emu_decode(unsigned code, int exponent_bits, int mantissa_bits) {
    int bias = (1 << (exponent_bits - 1)) - 1, exponent = (int)(code >> mantissa_bits);
    unsigned fraction = code & ((1u << mantissa_bits) - 1);
    if (exponent > 0)
        fraction |= 1u << mantissa_bits;
    else
        exponent = 1;
    return ldexpf((float)fraction, exponent - bias - mantissa_bits);
}

struct __half_raw {
    unsigned short x;
};
struct __half {
    unsigned short __x;
    __half() = default;
    __half(float f);
    constexpr __half(__half_raw raw) : __x(raw.x) {}
    operator float() const;
    operator __half_raw() const { return {__x}; }
};
typedef __half half;

struct alignas(4) __half2 {
    __half x, y;
};
typedef __half2 half2;

static inline unsigned short emu_half_from_double(double x) {
    unsigned sign = signbit(x) ? 0x8000u : 0, code = x != x ? 0 : emu_encode(x, 5, 10);
    if (x != x) return 0x7FFF;
    return (unsigned short)(sign | (code < 0x7C00 ? code : 0x7C00));
}
static inline float emu_half_to_float(unsigned short x) {
    unsigned code = x & 0x7FFFu, sign = (unsigned)(x & 0x8000) << 16;
    if (code > 0x7C00) return emu_bits<float>(0x7FFFFFFFu);
    float size = code == 0x7C00 ? INFINITY : emu_decode(code, 5, 10);
    return emu_bits<float>(emu_bits<unsigned>(size) | sign);
}
inline __half::__half(float f) : __x(emu_half_from_double(f)) {}
inline __half::operator float() const { return emu_half_to_float(__x); }

static inline __half __float2half(float x) { return __half(x); }
static inline __half __float2half_rn(float x) { return __half(x); }
static inline __half __double2half(double x) { return __half_raw{emu_half_from_double(x)}; }
static inline float __half2float(__half x) { return x; }
static inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
static inline unsigned short __half_as_ushort(__half x) { return x.__x; }
static inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
static inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
static inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
static inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
