// The small float formats against their definition, and a checksum of every conversion: built by nvcc, which
// runs its own headers on the host, the same checksums must come out. Prints TAP; the checksums follow as
// comments.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static int count, failed;
static void check(bool ok, const char* what) {
    printf("%s %d - %s\n", ok ? "ok" : "not ok", ++count, what);
    failed += !ok;
}

static float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

struct Format {
    const char* name;
    int bits;
    double largest;
    bool infinity, saturates; // saturates: what is too large becomes the largest number
    unsigned (*encode)(float x);
    float (*decode)(unsigned code);
};
static unsigned short half_bits(__half x) { return __half_raw(x).x; }
static __half half_of_bits(unsigned short bits) {
    __half_raw raw;
    raw.x = bits;
    return __half(raw);
}
static float fp8_decode(unsigned code, __nv_fp8_interpretation_t format) {
    return __half2float(
        half_of_bits(__half_raw(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, format)).x));
}

static const Format formats[] = {
    {"bf16", 16, 0x1.FEp127, true, false,
     [](float x) { return (unsigned)__bfloat16_as_ushort(__float2bfloat16_rn(x)); },
     [](unsigned code) { return __bfloat162float(__ushort_as_bfloat16((unsigned short)code)); }},
    {"fp16", 16, 65504, true, false, [](float x) { return (unsigned)half_bits(__float2half_rn(x)); },
     [](unsigned code) { return __half2float(half_of_bits((unsigned short)code)); }},
    {"e4m3, saturating", 8, 448, false, true,
     [](float x) { return (unsigned)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); },
     [](unsigned code) { return fp8_decode(code, __NV_E4M3); }},
    {"e4m3", 8, 448, false, false,
     [](float x) { return (unsigned)__nv_cvt_float_to_fp8(x, __NV_NOSAT, __NV_E4M3); },
     [](unsigned code) { return fp8_decode(code, __NV_E4M3); }},
    {"e5m2, saturating", 8, 57344, true, true,
     [](float x) { return (unsigned)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2); },
     [](unsigned code) { return fp8_decode(code, __NV_E5M2); }},
    {"e5m2", 8, 57344, true, false,
     [](float x) { return (unsigned)__nv_cvt_float_to_fp8(x, __NV_NOSAT, __NV_E5M2); },
     [](unsigned code) { return fp8_decode(code, __NV_E5M2); }},
};

// The code that the definition asks for: of the two numbers around |x| the nearer one, of two equally near
// ones the even code. `values` are those of the positive codes, ascending, then what would be the next one.
static bool is_nearest(const Format* f, const double* values, unsigned n, float x, unsigned code) {
    unsigned sign = 1u << (f->bits - 1), size = code & (sign - 1);
    double a = fabs((double)x);
    if (((code & sign) != 0) != (bool)signbit(x)) return false;
    bool beyond = a > values[n - 1] && (a > (values[n - 1] + values[n]) / 2 ||
                                        (a == (values[n - 1] + values[n]) / 2 && (n - 1) % 2 == 1));
    if (beyond) {
        if (f->saturates) return size == n - 1;
        return f->infinity ? isinf(f->decode(size)) : isnan(f->decode(size));
    }
    if (size >= n) return false;
    double error = fabs(values[size] - a);
    double below = size > 0 ? a - values[size - 1] : INFINITY, above = values[size + 1] - a;
    if (a < values[size]) return error < below || (error == below && size % 2 == 0);
    return a == values[size] || size == n - 1 || error < above || (error == above && size % 2 == 0);
}

static uint64_t mix(uint64_t sum, uint64_t x) { return (sum ^ x) * 0x9E3779B97F4A7C15ull + (sum >> 29); }

// Every code there and back; then all upper halves of a float, each with the lower halves that decide a
// rounding.
static void test_format(const Format* f) {
    static const uint32_t lower[] = {0,      1,      0xFFF,  0x1000, 0x1001, 0x2FFF,
                                     0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
    static double values[1 << 15];
    unsigned codes = 1u << (f->bits - 1), n = 0, back = 0, nearest = 0, tried = 0;
    uint64_t sum = 0;
    char text[96];
    for (; n < codes && (double)f->decode(n) <= f->largest; n++) values[n] = f->decode(n);
    values[n] = 2 * values[n - 1] - values[n - 2];
    for (unsigned code = 0; code < 2 * codes; code++) {
        float x = f->decode(code);
        back +=
            isnan(x) ? isnan(f->decode(f->encode(x))) : f->encode(x) == code || (isinf(x) && f->saturates);
        sum = mix(sum, isnan(x) ? 1 : (uint64_t)(int64_t)llrint(ldexp((double)x, 24)));
    }
    for (uint32_t upper = 0; upper < 65536; upper++)
        for (uint32_t low : lower) {
            float x = float_of(upper << 16 | low);
            unsigned code = f->encode(x);
            tried++;
            nearest += isnan(x) ? isnan(f->decode(code)) : is_nearest(f, values, n, x, code);
            sum = mix(sum, code);
        }
    snprintf(text, sizeof text, "%s: all %u codes come back", f->name, 2 * codes);
    check(back == 2 * codes, text);
    snprintf(text, sizeof text, "%s: %u floats become the nearest number", f->name, tried);
    check(nearest == tried && values[n - 1] == f->largest, text);
    printf("# checksum of %s: %016llx\n", f->name, (unsigned long long)sum);
}

static void test_bf16_functions(void) {
    uint64_t sum = 0;
    unsigned state = 1, rounded_right = 0, tried = 0;
    for (int i = 0; i < 200000; i++) {
        state = state * 1664525u + 1013904223u;
        float x = float_of(state ^ state >> 16), y = float_of(state * 2654435761u);
        if (isnan(x) || isnan(y)) continue;
        __nv_bfloat16 a = __float2bfloat16_rn(x), b = __float2bfloat16_rn(y);
        __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
        unsigned down = __bfloat16_as_ushort(__float2bfloat16_rd(x)),
                 up = __bfloat16_as_ushort(__float2bfloat16_ru(x));
        sum = mix(sum, down), sum = mix(sum, up);
        sum = mix(sum, __bfloat16_as_ushort(__float2bfloat16_rz(x)));
        sum = mix(sum,
                  __bfloat16_as_ushort(__double2bfloat16((double)x * (1 + ldexp((double)(i % 3 - 1), -40)))));
        const __nv_bfloat16 results[] = {__hadd(a, b), __hsub(a, b), __hmul(a, b), __hmax(a, b), __hmin(a, b),
                                         __hneg(a),    __habs(a),    pair.x,       pair.y};
        for (__nv_bfloat16 r : results) sum = mix(sum, __hisnan(r) ? 1u : __bfloat16_as_ushort(r));
        float low = __bfloat162float(__float2bfloat16_rd(x)), high = __bfloat162float(__float2bfloat16_ru(x));
        tried++;
        rounded_right += low <= x && x <= high;
    }
    check(rounded_right == tried, "bf16: rounding down and up encloses");
    printf("# checksum of bf16 functions: %016llx\n", (unsigned long long)sum);
}

int main() {
    for (const Format& f : formats) test_format(&f);
    test_bf16_functions();
    printf("1..%d\n", count);
    return failed > 0;
}
