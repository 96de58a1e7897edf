/* The cache format `int8`: integers from -127 to 127, times the scale of a token's head. The integers of keys are also
 * multiplied by the factor of their channel, a power of two. pages.h lists the functions of a format. */
#ifndef INT8_PAGES_H
#define INT8_PAGES_H
#include "codes.h"

typedef int8_t int8_code;
enum { int8_largest = 127, int8_channels = 1 };

static inline float int8_decode(int8_t code) { return code; }

ALWAYS floats int8_load(const int8_t *codes) { return byte_floats((const uint8_t *)codes, 1); }

ALWAYS void int8_encode(int8_t *codes, floats x) {
    KEEP(x);                               /* x is a product: round it before the sum below */
    pairs near = (pairs)(x + 12582912.0f); /* 1.5 * 2^23: the nearest integer is in the low bits */
    bytes low = __builtin_convertvector(near, bytes);
    memcpy(codes, &low, sizeof low);
}
#endif
