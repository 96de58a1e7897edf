/* The cache format `float16`: keys and values in IEEE half precision, whatever the type of activations.
 *
 *     bits of a code     s eeeee mmmmmmmmmm     (-1)^s * 2^(e - 15) * (1 + m / 1024), or 2^-24 * m where e is 0
 *
 * Finite values beyond 65504 are stored as 65504. pages.h lists the functions of a format. */
#ifndef FLOAT16_PAGES_H
#define FLOAT16_PAGES_H
#include "codes.h"

typedef uint16_t float16_code;
enum { float16_largest = 0, float16_channels = 0 };

static inline float float16_decode(uint16_t code) { return half_float(code); }

ALWAYS floats float16_load(const uint16_t *codes) { return half_floats(codes); }

ALWAYS void float16_encode(uint16_t *codes, floats x) {
    pairs size = (pairs)x & 0x7FFFFFFF, too_large = (pairs)(size > 0x477FE000) & (pairs)(size < 0x7F800000);
    halves bits =
        float_to_half((floats)((too_large & (((pairs)x & 0x80000000) | 0x477FE000)) | (~too_large & (pairs)x)));
    memcpy(codes, &bits, sizeof bits);
}
#endif
