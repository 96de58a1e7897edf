/* The cache format `int8`: whole numbers from -127 to 127, times the scale of a token's head. Those of keys are also
 * multiplied by the channel, a power of two. pages.h says what the functions of a format are. */
#ifndef INT8_PAGES_H
#define INT8_PAGES_H
#include "codes.h"

typedef int8_t int8_code;
enum { int8_largest = 127, int8_channels = 1 };

static inline float int8_decode(int8_t code) { return code; }

ALWAYS floats int8_load(const int8_t *codes) { return byte_floats((const uint8_t *)codes, 1); }

ALWAYS void int8_encode(int8_t *codes, floats x) {
    KEEP(x);                               /* a product: it is rounded before the sum is */
    pairs near = (pairs)(x + 12582912.0f); /* 1.5 * 2^23: the integer nearest is in the low bits */
    bytes low = __builtin_convertvector(near, bytes);
    memcpy(codes, &low, sizeof low);
}
#endif
