/* x as int8, for products with codes: 32 values become one or two planes with a common factor.
 *
 *     X = 128 * hi + lo,  x ~ factor * X        two planes: finer than bfloat16        |hi| <= 127, |lo| <= 64
 *     X = hi,             x ~ factor * X        one plane, where QWENKERN_CPU_ACTIVATIONS=int8
 *
 * The values have the order of a tile's codes (grouped_weight.h): byte 16 h + 4 c + t of a plane is value 16 h + 4 t + c. */
#ifndef PLANES_H
#define PLANES_H
#include "dots.h"

#define TILE_K 32       /* values of a row in a tile */
#define SMALLEST 1e-30f /* 32 values of which none is larger count as zeros: their factor could be subnormal */

typedef struct {
    float factor; /* NaN where a value is not finite, so that every product with them is NaN */
    int sums[2];  /* of X, over the first 16 values and over the others */
} plane_facts;

/* 16 integers of 8 bits, in the order of a plane */
ALWAYS void store_bytes(int8_t *to, const ints *values) {
#if LANES == 16
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)*values), order));
#else
    int32_t all[16];
    memcpy(all, values, sizeof all);
    for (int i = 0; i < 16; i++) to[i] = (int8_t)all[4 * (i % 4) + i / 4];
#endif
}

ALWAYS ints nearest_ints(floats x) { /* ties to even; |x| < 2^22 */ return (ints)(x + 12582912.0f) - 0x4B400000; }

ALWAYS int sum_ints(ints x) {
    int total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* Writes the planes of 32 values: to[0..31] = hi, and with two planes to[32..63] = lo */
ALWAYS plane_facts to_planes(int8_t *to, const int planes, const floats *x) {
    const int parts = TILE_K / LANES, half = parts / 2;
    pairs largest_bits = {0};
#pragma GCC unroll 8
    for (int i = 0; i < parts; i++) {
        pairs bits = (pairs)x[i] & 0x7FFFFFFF, is_larger = (pairs)((ints)bits > (ints)largest_bits);
        largest_bits = (is_larger & bits) | (~is_larger & largest_bits);
    }
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = largest_bits[i] > bits ? largest_bits[i] : bits;
    float most;
    memcpy(&most, &bits, sizeof most);
    const int is_finite = bits < 0x7F800000, is_zero = !is_finite || most < SMALLEST;
    const float inverse = is_zero ? 0 : 127 / most;
    ints his[8], los[8], sums[2] = {{0}, {0}};
#pragma GCC unroll 8
    for (int i = 0; i < parts; i++) {
        floats value = (is_finite ? x[i] : (floats){0}) * inverse;
        his[i] = nearest_ints(value);
        sums[i / half] += his[i];
        if (planes == 1) continue;
        los[i] = nearest_ints((value - __builtin_convertvector(his[i], floats)) * 128);
        sums[i / half] += his[i] * 127 + los[i];
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        store_bytes(to + 16 * h, his + h * half);
        if (planes == 2) store_bytes(to + TILE_K + 16 * h, los + h * half);
    }
    const float unit = most / (planes == 1 ? 127 : 127 * 128);
    return (plane_facts){!is_finite ? NAN : is_zero ? 0 : unit, {sum_ints(sums[0]), sum_ints(sums[1])}};
}
#endif
