/* x as int8, for products with codes: 32 values become one or two planes with a common factor.
 *
 *     X = 128 * hi + lo,  x ~ factor * X        two planes: finer than bfloat16        |hi| <= 127, |lo| <= 64
 *     X = hi,             x ~ factor * X        one plane, if QWENKERN_CPU_ACTIVATIONS=int8
 *
 * The values have the order of a tile's codes (grouped_weight.h): byte 16 h + 4 c + t of a plane is value
 * 16 h + 4 t + c. */
#ifndef PLANES_H
#define PLANES_H
#include "dots.h"

#define TILE_K 32       /* values of a row in a tile */
#define SMALLEST 1e-30f /* if none of 32 values is larger, they count as zeros: their factor could be subnormal */

typedef struct {
    float factor; /* NaN if a value is not finite, so that every product with these values is NaN */
    int sums[2];  /* of X, over the first 16 values and over the others */
} plane_facts;

/* 16 integers of 8 bits, in the order of a plane */
ALWAYS void store_bytes(int8_t *to, const ints *values) {
#if LANES == 16
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)*values), order));
#elif LANES == 8
    const __m128i order = _mm_setr_epi8(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    __m256i words = _mm256_packs_epi32((__m256i)values[0], (__m256i)values[1]); /* 0 to 3, 8 to 11 | 4 to 7, 12 to 15 */
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(bytes, order));
#else
    int32_t all[16];
    memcpy(all, values, sizeof all);
    for (int i = 0; i < 16; i++) to[i] = (int8_t)all[4 * (i % 4) + i / 4];
#endif
}

/* 16 integers of 16 bits, in the order of a plane, but in each four the third comes before the second */
ALWAYS void store_words(int8_t *to, const ints *values) {
#if LANES == 16
    const __m256i order = _mm256_setr_epi16(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    _mm256_storeu_si256((__m256i *)to, _mm256_permutexvar_epi16(order, _mm512_cvtepi32_epi16((__m512i)*values)));
#elif LANES == 8
    const __m256i by_pairs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    __m256i words = _mm256_packs_epi32((__m256i)values[0], (__m256i)values[1]); /* 0 to 3, 8 to 11 | 4 to 7, 12 to 15 */
    words = _mm256_shuffle_epi8(words, by_pairs); /* 0, 8, 1, 9, ... | 4, 12, 5, 13, ... */
    words = _mm256_permutevar8x32_epi32(words, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)to, words);
#else
    (void)to, (void)values; /* AS_WORDS is 0 */
#endif
}

ALWAYS ints nearest_ints(floats x) { /* ties to even; |x| < 2^22 */ return (ints)(x + 12582912.0f) - 0x4B400000; }

/* The sum of the lanes, and the largest of them */
#if LANES == 16
ALWAYS int sum_ints(ints x) { return _mm512_reduce_add_epi32((__m512i)x); }
ALWAYS int largest_int(ints x) { return _mm512_reduce_max_epi32((__m512i)x); }
#elif LANES == 8
#define REDUCE(NAME, COMBINE)                                                                                \
    ALWAYS int NAME(ints x) {                                                                                \
        __m128i four = COMBINE(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1)); \
        four = COMBINE(four, _mm_shuffle_epi32(four, 0x4E));                                                 \
        return _mm_cvtsi128_si32(COMBINE(four, _mm_shuffle_epi32(four, 0xB1)));                              \
    }
REDUCE(sum_ints, _mm_add_epi32)
REDUCE(largest_int, _mm_max_epi32)
#undef REDUCE
#else
ALWAYS int sum_ints(ints x) { return x[0] + x[1] + x[2] + x[3]; }
ALWAYS int largest_int(ints x) {
    int even = x[0] > x[2] ? x[0] : x[2], odd = x[1] > x[3] ? x[1] : x[3];
    return even > odd ? even : odd;
}
#endif

/* Writes 32 values, X_BYTES bytes, for products with codes of `bits` bits: to[0..31] = hi, and with two planes
 * to[32..63] = lo; if AS_WORDS, X in 16 bits */
ALWAYS plane_facts to_planes(int8_t *to, const int bits, const int planes, const floats *x) {
    const int parts = TILE_K / LANES, half = parts / 2;
    pairs largest_bits = {0};
#pragma GCC unroll 8
    for (int i = 0; i < parts; i++) {
        pairs bits = (pairs)x[i] & 0x7FFFFFFF, is_larger = (pairs)((ints)bits > (ints)largest_bits);
        largest_bits = (is_larger & bits) | (~is_larger & largest_bits);
    }
    const uint32_t top = (uint32_t)largest_int((ints)largest_bits);
    float most;
    memcpy(&most, &top, sizeof most);
    const int is_finite = top < 0x7F800000, is_zero = !is_finite || most < SMALLEST;
    const float inverse = is_zero ? 0 : 127 / most;
    ints his[8], los[8], sums[2] = {{0}, {0}};
#pragma GCC unroll 8
    for (int i = 0; i < parts; i++) {
        floats value = (is_finite ? x[i] : (floats){0}) * inverse;
        his[i] = nearest_ints(value);
        ints both = his[i];
        if (planes == 2) {
            los[i] = nearest_ints((value - __builtin_convertvector(his[i], floats)) * 128);
            both = (his[i] << 7) + los[i];
        }
        sums[i / half] += both;
        if (AS_WORDS(bits, planes)) his[i] = both;
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        if (AS_WORDS(bits, planes)) {
            store_words(to + 32 * h, his + h * half);
            continue;
        }
        store_bytes(to + 16 * h, his + h * half);
        if (planes == 2) store_bytes(to + TILE_K + 16 * h, los + h * half);
    }
    const float unit = most / (planes == 1 ? 127 : 127 * 128);
    return (plane_facts){!is_finite ? NAN : is_zero ? 0 : unit, {sum_ints(sums[0]), sum_ints(sums[1])}};
}
#endif
