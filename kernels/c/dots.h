/* Integer products of a tile of codes with x: the instructions of each kind of processor. This file knows no format.
 *
 *     codes   `quads`: a row a lane, with four codes of the row in its bytes       | row 0 | row 1 | ...
 *     x       int8, the same four for all rows: one value of 32 bits, broadcast    | x[4 b .. 4 b + 3] in every lane
 *
 * So there is no shuffle, and no sum across lanes. */
#ifndef DOTS_H
#define DOTS_H
#include "vectors.h"

typedef int32_t ints __attribute__((vector_size(4 * LANES)));   /* a row a lane */
typedef uint32_t quads __attribute__((vector_size(4 * LANES))); /* four codes of a row in each lane */

#define SIGNED_BYTES 0 /* 1: codes of 8 bits come as int8, 128 less */

/* start + for each row the products of its codes with x, over b < count and t < 4: code(b, t) * X(4 b + t)
 *
 *     planes == 2:  X(i) = 128 * hi[i] + lo[i],  hi = x,  lo = x + 32        |hi| <= 127, |lo| <= 64
 *     planes == 1:  X(i) = hi[i]
 *
 * Codes are unsigned and have `bits` bits (see SIGNED_BYTES). bits, planes and count are constants in every caller. */
ALWAYS ints dots(const int bits, const int planes, const int count, ints start, const quads *codes, const int8_t *x) {
#if defined(__AVX512VNNI__)
    (void)bits;
    __m512i low = (__m512i)start, high = _mm512_setzero_si512();
    int32_t four;
#pragma GCC unroll 8
    for (int b = 0; b < count; b++) {
        memcpy(&four, x + 4 * b, sizeof four);
        if (planes == 1) {
            low = _mm512_dpbusd_epi32(low, (__m512i)codes[b], _mm512_set1_epi32(four));
            continue;
        }
        high = _mm512_dpbusd_epi32(high, (__m512i)codes[b], _mm512_set1_epi32(four));
        memcpy(&four, x + 32 + 4 * b, sizeof four);
        low = _mm512_dpbusd_epi32(low, (__m512i)codes[b], _mm512_set1_epi32(four));
    }
    return planes == 1 ? (ints)low : (ints)low + ((ints)high << 7);
#else
    (void)bits;
    for (int b = 0; b < count; b++)
        for (int t = 0; t < 4; t++) {
            int32_t value = planes == 1 ? x[4 * b + t] : 128 * x[4 * b + t] + x[32 + 4 * b + t];
            start += (ints)(codes[b] >> 8 * t & 255) * value;
        }
    return start;
#endif
}
#endif
