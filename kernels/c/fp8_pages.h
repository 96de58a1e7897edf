/* The cache format `fp8`: e4m3 numbers, times the scale of a token's head.
 *
 *     bits of a code     s eeee mmm     (-1)^s * 2^(e - 7) * (1 + m / 8), or 2^-9 * m where e is 0
 *
 * NaN has a code, which is never stored. pages.h lists the functions of a format. */
#ifndef FP8_PAGES_H
#define FP8_PAGES_H
#include "codes.h"

typedef uint8_t fp8_code;
enum { fp8_largest = 448, fp8_channels = 0 };

static inline float fp8_decode(uint8_t code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return code >> 7 ? -size : size;
}

/* By way of float16, whose exponent has one bit more and a bias that is larger by 8 */
ALWAYS floats fp8_load(const uint8_t *codes) {
    bytes values;
    memcpy(&values, codes, sizeof values);
    halves wide = __builtin_convertvector(values, halves);
    return half_to_float((wide & 0x80) << 8 | (wide & 0x7F) << 7) * 256;
}

/* Rounds to nearest, ties to even */
ALWAYS void fp8_encode(uint8_t *codes, floats x) {
    pairs size = (pairs)x & 0x7FFFFFFF, sign = (pairs)x >> 24 & 0x80, is_small = (pairs)(size < 0x3C800000); /* 2^-6 */
    pairs small = (pairs)((floats)size + 16384.0f) & 15; /* floats from 16384 on have the spacing 2^-9 */
    pairs large = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3);
    bytes near = __builtin_convertvector(((is_small & small) | (~is_small & large)) | sign, bytes);
    memcpy(codes, &near, sizeof near);
}
#endif
