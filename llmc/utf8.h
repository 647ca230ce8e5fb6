// UTF-8: which bytes are text.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// The length of the well-formed sequence at p < end, 0 if there is none (Unicode 15, table 3-7).
static inline size_t utf8_sequence(const uint8_t* p, const uint8_t* end) {
    uint8_t c = p[0];
    if (c < 0x80) return 1;
    size_t n = c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
    if (n == 0 || (size_t)(end - p) < n) return 0;
    uint8_t low = 0x80, high = 0xBF;
    if (c == 0xE0) low = 0xA0;  // below: two bytes would do
    if (c == 0xED) high = 0x9F; // above: surrogates
    if (c == 0xF0) low = 0x90;  // below: three bytes would do
    if (c == 0xF4) high = 0x8F; // above: more than U+10FFFF
    if (p[1] < low || p[1] > high) return 0;
    for (size_t i = 2; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    return n;
}

// The first byte from p on that no well-formed sequence holds.
static inline const uint8_t* utf8_skip(const uint8_t* p, const uint8_t* end) {
    for (;;) {
        for (; end - p >= 32; p += 32) {
            uint64_t x[4];
            memcpy(x, p, 32);
            if (((x[0] | x[1] | x[2] | x[3]) & 0x8080808080808080u) != 0) break;
        }
        for (int i = 0; i < 32; i++) {
            size_t n = p < end ? utf8_sequence(p, end) : 0;
            if (n == 0) return p;
            p += n;
        }
    }
}
