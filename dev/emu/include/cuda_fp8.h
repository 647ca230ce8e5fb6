// Stands in for CUDA's cuda_fp8.h: e4m3 (no infinities, largest 448) and e5m2 (as IEEE, largest 57344).
#pragma once
#include "cuda_bf16.h" // defines: __nv_bfloat16
#include "cuda_fp16.h" // defines: __half, emu_encode, emu_decode

typedef unsigned char __nv_fp8_storage_t;
typedef unsigned short __nv_fp8x2_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

struct EmuFp8 {
    int exponent_bits, mantissa_bits;
    unsigned largest, overflow, nan; // codes: of the largest number, of what is beyond it, of a NaN
};
static const EmuFp8 emu_fp8[] = {{4, 3, 0x7E, 0x7F, 0x7F}, {5, 2, 0x7B, 0x7C, 0x7F}};

static inline __nv_fp8_storage_t __nv_cvt_double_to_fp8(double x, __nv_saturation_t saturate,
                                                        __nv_fp8_interpretation_t format) {
    const EmuFp8* f = &emu_fp8[format];
    if (x != x) return (__nv_fp8_storage_t)f->nan;
    unsigned code = emu_encode(x, f->exponent_bits, f->mantissa_bits);
    if (code > f->largest) code = saturate == __NV_SATFINITE ? f->largest : f->overflow;
    return (__nv_fp8_storage_t)(code | (signbit(x) ? 0x80u : 0));
}
static inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturate,
                                                       __nv_fp8_interpretation_t format) {
    return __nv_cvt_double_to_fp8((double)x, saturate, format);
}
static inline __nv_fp8_storage_t __nv_cvt_bfloat16raw_to_fp8(__nv_bfloat16_raw x, __nv_saturation_t saturate,
                                                             __nv_fp8_interpretation_t format) {
    return __nv_cvt_float_to_fp8(emu_bf16_to_float(x.x), saturate, format);
}
static inline __nv_fp8_storage_t __nv_cvt_halfraw_to_fp8(__half_raw x, __nv_saturation_t saturate,
                                                         __nv_fp8_interpretation_t format) {
    return __nv_cvt_float_to_fp8(emu_half_to_float(x.x), saturate, format);
}
static inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 v, __nv_saturation_t saturate,
                                                            __nv_fp8_interpretation_t format) {
    unsigned low = __nv_cvt_float_to_fp8(v.x, saturate, format);
    return (__nv_fp8x2_storage_t)(low | (unsigned)__nv_cvt_float_to_fp8(v.y, saturate, format) << 8);
}

static inline float emu_fp8_to_float(__nv_fp8_storage_t x, __nv_fp8_interpretation_t format) {
    const EmuFp8* f = &emu_fp8[format];
    unsigned code = x & 0x7Fu, sign = (unsigned)(x & 0x80) << 24;
    if (code > f->overflow || code == 0x7F) return emu_bits<float>(0x7FFFFFFFu);
    float size = code == f->overflow ? INFINITY : emu_decode(code, f->exponent_bits, f->mantissa_bits);
    return emu_bits<float>(emu_bits<unsigned>(size) | sign);
}
// Every fp8 number is an fp16 number.
static inline __half_raw __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t x, __nv_fp8_interpretation_t format) {
    return __half_raw{emu_half_from_double(emu_fp8_to_float(x, format))};
}

#define EMU_FP8(name, format)                                                                                \
    struct name {                                                                                            \
        __nv_fp8_storage_t __x;                                                                              \
        name() = default;                                                                                    \
        explicit name(float f) : __x(__nv_cvt_float_to_fp8(f, __NV_SATFINITE, format)) {}                    \
        explicit name(double f) : __x(__nv_cvt_double_to_fp8(f, __NV_SATFINITE, format)) {}                  \
        explicit name(__nv_bfloat16 f) : __x(__nv_cvt_float_to_fp8((float)f, __NV_SATFINITE, format)) {}     \
        explicit operator float() const { return emu_fp8_to_float(__x, format); }                            \
    };
EMU_FP8(__nv_fp8_e4m3, __NV_E4M3)
EMU_FP8(__nv_fp8_e5m2, __NV_E5M2)
#undef EMU_FP8
