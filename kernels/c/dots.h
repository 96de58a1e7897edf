/* Integer products of a tile of codes with x: the instructions of each kind of processor. This file knows no format.
 *
 *     codes   `quads`: a row a lane, with four codes of the row in its bytes       | row 0 | row 1 | ...
 *     x       the same four values for all rows, broadcast: int8 (a plane) in 32 bits, or where AS_WORDS int16 in 64 bits
 *
 * So there is no shuffle, and no sum across lanes.
 *
 *     instruction            products of        which sums are exact
 *     dpbusd (VNNI)          uint8 x int8       four in 32 bits
 *     sdot (NEON)            int8 x int8        four in 32 bits
 *     maddubs (AVX2)         uint8 x int8       two in 16 bits: 8 times with codes of 4 bits, 4 of 5, 2 of 6, not of 8
 *     madd (AVX2)            int16 x int16      two in 32 bits: the fastest with codes of 8 bits, and of 6 in two planes
 */
#ifndef DOTS_H
#define DOTS_H
#include "vectors.h"

typedef int32_t ints __attribute__((vector_size(4 * LANES)));   /* a row a lane */
typedef uint32_t quads __attribute__((vector_size(4 * LANES))); /* four codes of a row in each lane */

#if LANES == 16
typedef __m512i whole; /* a register, as the processor's functions take it */
#define X86(NAME) _mm512_##NAME
#elif LANES == 8
typedef __m256i whole;
#define X86(NAME) _mm256_##NAME
#endif

#if defined(__AVX512VNNI__) && LANES == 16
#define DPBUSD _mm512_dpbusd_epi32
#elif defined(__AVXVNNI__) && LANES == 8
#define DPBUSD _mm256_dpbusd_avx_epi32
#elif defined(__AVX512BW__) || LANES == 8
#define HAS_MADD
#elif defined(__ARM_FEATURE_DOTPROD)
#define HAS_SDOT
#endif

#ifdef HAS_SDOT
#define SIGNED_BYTES 1 /* codes of 8 bits come as int8, 128 less */
#else
#define SIGNED_BYTES 0
#endif

/* Whether x comes as int16 for codes of so many bits */
#ifdef HAS_MADD
#define AS_WORDS(BITS, PLANES) ((BITS) == 8 || ((BITS) == 6 && (PLANES) == 2))
#else
#define AS_WORDS(BITS, PLANES) 0
#endif
#define X_BYTES(BITS, PLANES) (AS_WORDS(BITS, PLANES) ? 64 : 32 * (PLANES)) /* of a token's values of a tile */
#define X_GROUP(BITS, PLANES) (AS_WORDS(BITS, PLANES) ? 32 : 16)            /* from the first 16 values to the others */

#ifdef X86
ALWAYS whole four_of(const int8_t *x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return X86(set1_epi32)(four);
}
#endif

/* start + for each row the products of its codes with x, over b < count and t < 4: code(b, t) * X(4 b + t)
 *
 *     planes == 2:  X(i) = 128 * hi[i] + lo[i],  hi = x,  lo = x + 32        |hi| <= 127, |lo| <= 64
 *     planes == 1:  X(i) = hi[i]
 *     AS_WORDS:      x is int16, X of t = 0, 2, 1, 3 of b = 0, then of b = 1, ...
 *
 * Codes are unsigned and have `bits` bits (see SIGNED_BYTES). bits, planes and count are constants in every caller. */
#if defined(DPBUSD)
ALWAYS ints dots(const int bits, const int planes, const int count, ints start, const quads *codes, const int8_t *x) {
    (void)bits;
    whole low = (whole)start, high = (whole)(ints){0};
#pragma GCC unroll 8
    for (int b = 0; b < count; b++) {
        if (planes == 2) high = DPBUSD(high, (whole)codes[b], four_of(x + 4 * b));
        low = DPBUSD(low, (whole)codes[b], four_of(x + 32 * (planes - 1) + 4 * b));
    }
    return planes == 1 ? (ints)low : (ints)low + ((ints)high << 7);
}
#elif defined(HAS_MADD)
typedef int16_t words __attribute__((vector_size(4 * LANES))); /* two of each row */

ALWAYS ints add_words(words sums, const int times) {
    return (ints)X86(madd_epi16)((whole)sums, X86(set1_epi16)((short)times));
}

ALWAYS ints wide_dots(const int count, ints start, const quads *codes, const int8_t *x) {
    ints other = {0};
#pragma GCC unroll 8
    for (int b = 0; b < count; b++) {
        whole even = (whole)(codes[b] & 0x00FF00FF), odd = X86(srli_epi16)((whole)codes[b], 8);
        start += (ints)X86(madd_epi16)(even, four_of(x + 8 * b));
        KEEP(start); /* added now: else the products of all b are in registers at once */
        other += (ints)X86(madd_epi16)(odd, four_of(x + 8 * b + 4));
        KEEP(other);
    }
    return start + other;
}

ALWAYS ints dots(const int bits, const int planes, const int count, ints start, const quads *codes, const int8_t *x) {
    if (AS_WORDS(bits, planes)) return wide_dots(count, start, codes, x);
    const int fit = bits == 4 ? 8 : bits == 5 ? 4 : 2; /* products that 16 bits can add */
#pragma GCC unroll 4
    for (int from = 0; from < count; from += fit) {
        words high = {0}, low = {0};
#pragma GCC unroll 8
        for (int b = from; b < from + fit && b < count; b++) {
            words product = (words)X86(maddubs_epi16)((whole)codes[b], four_of(x + 4 * b));
            high = b == from ? product : high + product;
            KEEP(high);
            if (planes == 1) continue;
            product = (words)X86(maddubs_epi16)((whole)codes[b], four_of(x + 32 + 4 * b));
            low = b == from ? product : low + product;
            KEEP(low);
        }
        start += add_words(high, planes == 1 ? 1 : 128);
        if (planes == 2) start += add_words(low, 1);
    }
    return start;
}
#elif defined(HAS_SDOT)
ALWAYS int32x4_t four_sdots(int32x4_t sums, const quads *codes, int8x16_t x) {
    sums = vdotq_laneq_s32(sums, (int8x16_t)codes[0], x, 0);
    sums = vdotq_laneq_s32(sums, (int8x16_t)codes[1], x, 1);
    sums = vdotq_laneq_s32(sums, (int8x16_t)codes[2], x, 2);
    return vdotq_laneq_s32(sums, (int8x16_t)codes[3], x, 3);
}

ALWAYS ints dots(const int bits, const int planes, const int count, ints start, const quads *codes, const int8_t *x) {
    (void)bits;
    int32x4_t low = (int32x4_t)start, high = vdupq_n_s32(0);
#pragma GCC unroll 2
    for (int b = 0; b < count; b += 4) {
        if (planes == 2) high = four_sdots(high, codes + b, vld1q_s8(x + 4 * b));
        low = four_sdots(low, codes + b, vld1q_s8(x + 32 * (planes - 1) + 4 * b));
    }
    return planes == 1 ? (ints)low : (ints)vaddq_s32(low, vshlq_n_s32(high, 7));
}
#else
ALWAYS ints dots(const int bits, const int planes, const int count, ints start, const quads *codes, const int8_t *x) {
    (void)bits;
    for (int b = 0; b < count; b++)
        for (int t = 0; t < 4; t++) {
            int32_t value = planes == 1 ? x[4 * b + t] : 128 * x[4 * b + t] + x[32 + 4 * b + t];
            start += (ints)(codes[b] >> 8 * t & 255) * value;
        }
    return start;
}
#endif
#endif
