/* The operands of products. An `operands` is a register; each lane holds one float, or a pair of bfloat16.
 *
 *     a row of bf16             | 0 1 2 3 ... STEP-1 | ...
 *     operands, without PAIRS   | 0 2 4 ... | 1 3 5 ... |      widened to float: even places of a STEP, then odd ones
 *     operands, with PAIRS      | 0 1 | 2 3 | ...              in the order of the row
 *     of a row of float         | 0 1 2 ... |                  in the order of the row
 *
 * targets.py sets PAIRS if the processor multiplies pairs of bfloat16 and adds both products to a float. Both factors
 * of a product have the same order, so each value meets its counterpart. */
#ifndef OPERANDS_H
#define OPERANDS_H
#include "vectors.h"

#define LINE 32 /* the length of a multiplied row is a multiple of it; 32 bf16 are a cache line */

#ifdef PAIRS
typedef bf16 operand;
typedef pairs operands;
#define PER 2 /* values of a row in each lane */
#else
typedef float operand;
typedef floats operands;
#define PER 1
#endif

ALWAYS operands load_operands(const operand *from) {
    operands values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* The operands at index `at` of a row */
ALWAYS operands operands_at(const real *row, long at) {
#if defined(PAIRS) || defined(FLOAT_ACTIVATIONS)
    return load_operands(row + at);
#else
    pairs both = load_pairs(row + at / STEP * STEP);
    return at % STEP ? high(both) : low(both);
#endif
}

/* sums + a b; with PAIRS both products of each lane are added */
ALWAYS floats add_products(floats sums, operands a, operands b) {
#if !defined(PAIRS)
    return sums + a * b;
#elif defined(__x86_64__)
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    return (floats)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
}

/* Converts a row [K] to operands; K is a multiple of STEP */
ALWAYS void to_operands(operand *to, const real *from, long K) {
#if defined(PAIRS) || defined(FLOAT_ACTIVATIONS)
    memcpy(to, from, K * sizeof *from);
#else
    for (long k = 0; k < K; k += STEP) {
        pairs both = load_pairs(from + k);
        store(to + k, low(both));
        store(to + k + LANES, high(both));
    }
#endif
}

/* Takes values of two vectors, by their indices in both */
#ifdef __clang__
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else /* gcc has __builtin_shufflevector from version 12 on */
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (pairs){__VA_ARGS__})
#endif

/* Transposes LANES x LANES values of 32 bits: first 2 x 2 blocks, then 4 x 4, then quarters of a vector */
ALWAYS void transpose(pairs *square) {
#if LANES == 16
    __m512i *a = (__m512i *)square, b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xDD);
        }
    for (int i = 0; i < 8; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
        a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD);
    }
#elif LANES == 8
    __m256i *a = (__m256i *)square, b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        __m256i first = a[i], second = a[i + 4];
        a[i] = _mm256_permute2x128_si256(first, second, 0x20);
        a[i + 4] = _mm256_permute2x128_si256(first, second, 0x31);
    }
#else
    pairs b[] = {SHUFFLE(square[0], square[1], 0, 4, 2, 6), SHUFFLE(square[0], square[1], 1, 5, 3, 7),
                 SHUFFLE(square[2], square[3], 0, 4, 2, 6), SHUFFLE(square[2], square[3], 1, 5, 3, 7)};
    for (int i = 0; i < 2; i++) {
        square[i] = SHUFFLE(b[i], b[i + 2], 0, 1, 4, 5);
        square[i + 2] = SHUFFLE(b[i], b[i + 2], 2, 3, 6, 7);
    }
#endif
}
#endif
