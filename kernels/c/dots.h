/* Integer products of a tile of codes with x, by the instructions of each kind of processor. This file knows no format.
 *
 *     codes   `quads`: each lane has four codes of a row in its bytes              | row 0 | row 1 | ...
 *     x       the same four values for all rows, broadcast: int8 (a plane) in 32 bits, or if AS_WORDS int16 in 64 bits
 *
 * So there is no shuffle, and no sum across lanes.
 *
 *     instruction            products of        which sums are exact
 *     dpbusd (VNNI)          uint8 x int8       four in 32 bits
 *     sdot (NEON)            int8 x int8        four in 32 bits
 *     maddubs (AVX2)         uint8 x int8       two in 16 bits: these add 8 of 4-bit codes, 4 of 5, 2 of 6, none of 8
 *     madd (AVX2)            int16 x int16      two in 32 bits: fastest for codes of 8 bits, and of 6 in two planes
 */
#ifndef DOTS_H
#define DOTS_H
#include "vectors.h"

#define TILE_ROWS 16
#define PARTS (TILE_ROWS / LANES) /* registers of 16 rows */

typedef int32_t ints __attribute__((vector_size(4 * LANES)));   /* one row per lane */
typedef int16_t words __attribute__((vector_size(4 * LANES)));  /* two of each row */
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
#define SIGNED_BYTES 1 /* codes of 8 bits are int8: the code minus 128 */
#else
#define SIGNED_BYTES 0
#endif

/* Whether x is int16 for codes of BITS bits */
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

/* The sums of two adjacent words, times a number */
ALWAYS ints add_words(words sums, const int times) {
    return (ints)X86(madd_epi16)((whole)sums, X86(set1_epi16)((short)times));
}
#endif

#ifdef HAS_SDOT
ALWAYS ints add_sdots(ints sums, quads code, const int8_t *x, const int b) {
    int8x16_t four = vld1q_s8(x + b / 4 * 16);
    switch (b % 4) { /* the instruction needs the number as a constant */
        case 0:
            return (ints)vdotq_laneq_s32((int32x4_t)sums, (int8x16_t)code, four, 0);
        case 1:
            return (ints)vdotq_laneq_s32((int32x4_t)sums, (int8x16_t)code, four, 1);
        case 2:
            return (ints)vdotq_laneq_s32((int32x4_t)sums, (int8x16_t)code, four, 2);
        default:
            return (ints)vdotq_laneq_s32((int32x4_t)sums, (int8x16_t)code, four, 3);
    }
}
#endif

/* The I-th of a group's COUNT dwords to be added. Two dwords that share a word of nibbles (grouped_weight.h) follow
 * each other. */
#define CODE_AT(COUNT, I) ((COUNT) == 8 ? (I) % 2 * 4 + (I) / 2 : (I))

/* The sum of the products of a group of values, during the summation */
typedef struct {
    ints total;        /* the sum so far; it starts with a number from the caller */
    ints high;         /* VNNI, sdot: products with hi; AS_WORDS: products of odd bytes */
    words highs, lows; /* maddubs: products with hi, and with lo */
} running;

/* Adds the products of four codes of each row with x: code(t) * X(4 b + t), where b = CODE_AT(count, i)
 *
 *     planes == 2:  X(i) = 128 * hi[i] + lo[i],  hi = x,  lo = x + 32        |hi| <= 127, |lo| <= 64
 *     planes == 1:  X(i) = hi[i]
 *     AS_WORDS:      x is int16, X of t = 0, 2, 1, 3 of b = 0, then of b = 1, ...
 *
 * After i = 0, 1, ... count - 1 the total is complete. Codes are unsigned and have `bits` bits (see SIGNED_BYTES).
 * bits, planes, count and i are constants in every caller. x is loaded for each part of the rows, so that compilers
 * keep it in a register only between adjacent uses. */
ALWAYS void add_code(const int bits, const int planes, const int count, const int i, running *sum, quads code,
                     const int8_t *x) {
    const int b = CODE_AT(count, i), is_last = i + 1 == count;
#if defined(DPBUSD)
    (void)bits;
    if (planes == 2) sum->high = (ints)DPBUSD(i ? (whole)sum->high : (whole)(ints){0}, (whole)code, four_of(x + 4 * b));
    sum->total = (ints)DPBUSD((whole)sum->total, (whole)code, four_of(x + 32 * (planes - 1) + 4 * b));
    if (planes == 2 && is_last) sum->total += sum->high << 7;
#elif defined(HAS_SDOT)
    (void)bits;
    if (planes == 2) sum->high = add_sdots(i ? sum->high : (ints){0}, code, x, b);
    sum->total = add_sdots(sum->total, code, x + 32 * (planes - 1), b);
    if (planes == 2 && is_last) sum->total += sum->high << 7;
#elif defined(HAS_MADD)
    if (AS_WORDS(bits, planes)) {
        sum->total += (ints)X86(madd_epi16)((whole)(code & 0x00FF00FF), four_of(x + 8 * b));
        KEEP(sum->total); /* add now: otherwise the compiler holds the products of all b in registers at once */
        ints odd = (ints)X86(madd_epi16)(X86(srli_epi16)((whole)code, 8), four_of(x + 8 * b + 4));
        sum->high = i ? sum->high + odd : odd;
        KEEP(sum->high);
        if (is_last) sum->total += sum->high;
        return;
    }
    const int fit = bits == 4 ? 8 : bits == 5 ? 4 : 2; /* products that 16 bits can add */
    words products = (words)X86(maddubs_epi16)((whole)code, four_of(x + 4 * b));
    sum->highs = i % fit ? sum->highs + products : products;
    KEEP(sum->highs);
    if (planes == 2) {
        products = (words)X86(maddubs_epi16)((whole)code, four_of(x + 32 + 4 * b));
        sum->lows = i % fit ? sum->lows + products : products;
        KEEP(sum->lows);
    }
    if ((i + 1) % fit && !is_last) return;
    sum->total += add_words(sum->highs, planes == 1 ? 1 : 128);
    if (planes == 2) sum->total += add_words(sum->lows, 1);
#else
    (void)bits, (void)is_last;
    for (int t = 0; t < 4; t++) {
        int32_t value = planes == 1 ? x[4 * b + t] : 128 * x[4 * b + t] + x[32 + 4 * b + t];
        sum->total += (ints)(code >> 8 * t & 255) * value;
    }
#endif
}
#endif
