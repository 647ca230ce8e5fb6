// Stands in for CUDA's cuda_bf16.h: the type, its conversions with the hardware's rounding, its arithmetic
// (computed in fp32 and rounded once, as a GPU does).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cuda_runtime.h" // defines: float2, __shfl_sync ...

// To nearest, ties to even; a NaN becomes the canonical one, as cvt.rn.bf16.f32 makes it.
static inline unsigned short emu_bf16_from_float(float x) {
    unsigned bits = emu_bits<unsigned>(x);
    if (x != x) return 0x7FFF;
    return (unsigned short)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
static inline float emu_bf16_to_float(unsigned short x) { return emu_bits<float>((unsigned)x << 16); }

struct __nv_bfloat16_raw {
    unsigned short x;
};

struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) : __x(emu_bf16_from_float(f)) {}
    __nv_bfloat16(double f);
    __nv_bfloat16(int i) : __nv_bfloat16((double)i) {}
    constexpr __nv_bfloat16(__nv_bfloat16_raw raw) : __x(raw.x) {}
    operator float() const { return emu_bf16_to_float(__x); }
    operator __nv_bfloat16_raw() const { return {__x}; }
};
typedef __nv_bfloat16 nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __nv_bfloat162 nv_bfloat162;

static inline float __bfloat162float(__nv_bfloat16 x) { return emu_bf16_to_float(x.__x); }
static inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16_raw{x}; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.__x; }
static inline __nv_bfloat16 __short_as_bfloat16(short x) { return __ushort_as_bfloat16((unsigned short)x); }
static inline short __bfloat16_as_short(__nv_bfloat16 x) { return (short)x.__x; }

// Towards zero; down; up. The largest finite number is passed over to infinity only in the direction rounded
// to.
static inline __nv_bfloat16 __float2bfloat16_rz(float x) {
    return __ushort_as_bfloat16(x != x ? 0x7FFF : (unsigned short)(emu_bits<unsigned>(x) >> 16));
}
static inline __nv_bfloat16 emu_bf16_away(float x, bool away) {
    __nv_bfloat16 low = __float2bfloat16_rz(x);
    if (x == x && away && (emu_bits<unsigned>(x) & 0xFFFF) != 0) low.__x++;
    return low;
}
static inline __nv_bfloat16 __float2bfloat16_rd(float x) { return emu_bf16_away(x, signbit(x)); }
static inline __nv_bfloat16 __float2bfloat16_ru(float x) { return emu_bf16_away(x, !signbit(x)); }

// A double is rounded once: first to fp32 with the lost bits remembered in the last one ("to odd"), then to
// bf16.
static inline __nv_bfloat16 __double2bfloat16(double x) {
    float f = (float)x;
    if (x == x && !isinf(f) && (double)f != x) {
        unsigned bits = emu_bits<unsigned>(f);
        if (fabs((double)f) > fabs(x)) bits--;
        f = emu_bits<float>(bits | 1);
    }
    return __nv_bfloat16(f);
}
inline __nv_bfloat16::__nv_bfloat16(double f) : __nv_bfloat16(__double2bfloat16(f)) {}

static inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
static inline __nv_bfloat162 __float2bfloat162_rn(float x) { return {x, x}; }
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {(float)v.x, (float)v.y}; }
static inline float __low2float(__nv_bfloat162 v) { return v.x; }
static inline float __high2float(__nv_bfloat162 v) { return v.y; }
static inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
static inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }

// Arithmetic: the exact sum or product of two bf16 rounded to fp32 and then to bf16 is what __hadd and __hmul
// give (a product is exact in fp32; a sum of two bf16 is rounded to odd through double).
static inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __double2bfloat16((double)(float)a + (double)(float)b);
}
static inline __nv_bfloat16 __hsub(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __double2bfloat16((double)(float)a - (double)(float)b);
}
static inline __nv_bfloat16 __hmul(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __double2bfloat16((double)(float)a * (double)(float)b);
}
static inline __nv_bfloat16 __hdiv(__nv_bfloat16 a, __nv_bfloat16 b) { return (float)a / (float)b; }
static inline __nv_bfloat16 __hneg(__nv_bfloat16 a) { return __ushort_as_bfloat16(a.__x ^ 0x8000); }
static inline __nv_bfloat16 __habs(__nv_bfloat16 a) { return __ushort_as_bfloat16(a.__x & 0x7FFF); }
static inline bool __hisnan(__nv_bfloat16 a) { return (a.__x & 0x7FFF) > 0x7F80; }
static inline __nv_bfloat16 __hmax(__nv_bfloat16 a, __nv_bfloat16 b) { return fmaxf(a, b); }
static inline __nv_bfloat16 __hmin(__nv_bfloat16 a, __nv_bfloat16 b) { return fminf(a, b); }
static inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __double2bfloat16(fma((double)(float)a, (double)(float)b, (double)(float)c));
}
static inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__hadd(a.x, b.x), __hadd(a.y, b.y)};
}
static inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return {__hmul(a.x, b.x), __hmul(a.y, b.y)};
}
static inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
