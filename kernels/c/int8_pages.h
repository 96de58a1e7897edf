/* The cache format `int8`: whole numbers from -127 to 127, times the scale of a token's head. Those of keys are also
 * multiplied by the channel, a power of two. pages.h says what the functions of a format are. */
#ifndef INT8_PAGES_H
#define INT8_PAGES_H
#include "vectors.h"

typedef int8_t int8_code;
enum { int8_largest = 127, int8_channels = 1 };

static inline float int8_decode(int8_t code) { return code; }

ALWAYS floats int8_load(const int8_t *codes) {
#if LANES == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)codes)));
#elif LANES == 8
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)codes)));
#else
    floats values;
    for (int i = 0; i < LANES; i++) values[i] = codes[i];
    return values;
#endif
}

ALWAYS void int8_encode(int8_t *codes, floats x) {
    KEEP(x); /* a product: it is rounded before the sum is */
    pairs near = (pairs)(x + 12582912.0f); /* 1.5 * 2^23: the integer nearest is in the low bits */
    bytes low = __builtin_convertvector(near, bytes);
    memcpy(codes, &low, sizeof low);
}
#endif
