/* Products of many rows: out [rows, BLOCK] = a [rows, K] times b, where b lies in panels.
 *
 * A panel is [K / PER, WIDE]: the values of WIDE columns that meet one (or PER) of a's values lie side by side, so that
 * one value of a is multiplied with a whole register of them:
 *
 *               panel of b:  k  ──► [ WIDE columns ]     TALL x VECTORS sums stay in registers while
 *      a: TALL rows of k ──────► out [TALL, WIDE]        k goes through the panel
 *
 * PAIRS, which targets.py sets where the processor has such products, multiplies pairs of bfloat16 as the processor
 * does; without it they are widened to float32 first. */
#ifndef PANELS_H
#define PANELS_H
#include "vectors.h"

/* What fits the registers: 16 of them with AVX2, 32 elsewhere */
#define TALL 6
#if LANES == 8 && defined(__x86_64__)
#define VECTORS 2
#else
#define VECTORS 4
#endif
#define WIDE (VECTORS * LANES)
#define BLOCK 64 /* columns that are packed at a time */
#define PANELS (BLOCK / WIDE)
#define CHUNK (PANELS == 1 ? 1024 : 512) /* of K: what is packed of it stays in the L2 cache */

/* What is multiplied: `operands` fill a register. Rows are multiplied in an order of their own: of each STEP of bf16
 * first those with an even place, which lie in the low halves of pairs, then the others. Pairs are multiplied as they
 * are. */
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

/* What stands at place `at` of a row of bf16 in the order of operands */
ALWAYS operands operands_at(const bf16 *row, long at) {
#ifdef PAIRS
    return load_pairs(row + at);
#else
    pairs both = load_pairs(row + at / STEP * STEP);
    return at % STEP ? high(both) : low(both);
#endif
}

/* sums + a b, of pairs both products */
ALWAYS floats add_products(floats sums, operands a, operands b) {
#if !defined(PAIRS)
    return sums + a * b;
#elif defined(__x86_64__)
    return (floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    return (floats)vbfdotq_f32((float32x4_t)sums, (bfloat16x8_t)a, (bfloat16x8_t)b);
#endif
}

/* A row [K] of bf16 as operands; K a multiple of STEP */
ALWAYS void to_operands(operand *to, const bf16 *from, long K) {
#ifdef PAIRS
    memcpy(to, from, K * sizeof *from);
#else
    for (long k = 0; k < K; k += STEP) {
        pairs both = load_pairs(from + k);
        store(to + k, low(both));
        store(to + k + LANES, high(both));
    }
#endif
}

/* Four values of two vectors, by their places in both */
#ifdef __clang__
#define SHUFFLE(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else /* gcc has the function above from version 12 on */
#define SHUFFLE(A, B, ...) __builtin_shuffle(A, B, (pairs){__VA_ARGS__})
#endif

/* LANES x LANES of 32 bits: 2 x 2, 4 x 4, then quarters of a vector */
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

/* WIDE rows [K] of bf16 as a panel, in the order of operands; K a multiple of STEP */
ALWAYS void pack_transposed(operands *panel, const bf16 *const *rows, long K) {
    for (int vector = 0; vector < VECTORS; vector++)
        for (long k = 0; k < K; k += STEP) {
            operands *to = panel + k / PER * VECTORS + vector;
            pairs square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load_pairs(rows[vector * LANES + i] + k);
            transpose(square);
            for (int i = 0; i < LANES; i++) {
#ifdef PAIRS
                to[i * VECTORS] = square[i];
#else
                to[i * VECTORS] = low(square[i]);
                to[(LANES + i) * VECTORS] = high(square[i]);
#endif
            }
        }
}

/* sums + a's next PER values times their columns */
ALWAYS void add_row(const int vectors, floats *sums, const operand *a, const operands *columns) {
#ifdef PAIRS
    uint32_t both;
    memcpy(&both, a, sizeof both);
    pairs row = both - (pairs){0};
    for (int j = 0; j < vectors; j++) sums[j] = add_products(sums[j], row, columns[j]);
#else
    for (int j = 0; j < vectors; j++) sums[j] += *a * columns[j];
#endif
}

/* out [rows, vectors] = (adds: +=) a [rows, PER steps] times b, whose rows are b_stride vectors apart */
ALWAYS void multiply_rows(const int rows, const int vectors, float *out, long out_stride, const operand *a,
                          long a_stride, const operands *b, long b_stride, long steps, int adds) {
    floats sums[TALL][VECTORS];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) sums[i][j] = adds ? load(out + i * out_stride + j * LANES) : (floats){0};
    for (long k = 0; k < steps; k++) {
        operands columns[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) {
            columns[j] = b[k * b_stride + j];
            KEEP(columns[j]); /* loaded once, not again for every row */
        }
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) add_row(vectors, sums[i], a + i * a_stride + PER * k, columns);
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) store(out + i * out_stride + j * LANES, sums[i][j]);
}

#define DEFINE_MULTIPLY(NAME, ROWS, COLUMNS)                                                                 \
    __attribute__((noinline)) static void NAME(float *out, long out_stride, const operand *a, long a_stride, \
                                               const operands *b, long b_stride, long steps, int adds) {     \
        multiply_rows(ROWS, COLUMNS, out, out_stride, a, a_stride, b, b_stride, steps, adds);                \
    }
DEFINE_MULTIPLY(multiply_6, 6, VECTORS)
DEFINE_MULTIPLY(multiply_2, 2, VECTORS)
DEFINE_MULTIPLY(multiply_1, 1, VECTORS)
DEFINE_MULTIPLY(narrow_multiply_6, 6, 1)
DEFINE_MULTIPLY(narrow_multiply_1, 1, 1)

/* The same for any number of rows up to TALL. A sum is one chain over a's columns, whatever the rows beside it. */
static inline void multiply(float *out, long out_stride, const operand *a, long a_stride, const operands *b,
                            long b_stride, long steps, long rows, int adds) {
    if (rows == TALL) {
        multiply_6(out, out_stride, a, a_stride, b, b_stride, steps, adds);
        return;
    }
    for (; rows >= 2; rows -= 2, out += 2 * out_stride, a += 2 * a_stride)
        multiply_2(out, out_stride, a, a_stride, b, b_stride, steps, adds);
    if (rows) multiply_1(out, out_stride, a, a_stride, b, b_stride, steps, adds);
}

/* The same with columns of one vector */
static inline void narrow_multiply(float *out, long out_stride, const operand *a, long a_stride, const operands *b,
                                   long b_stride, long steps, long rows, int adds) {
    if (rows == TALL) {
        narrow_multiply_6(out, out_stride, a, a_stride, b, b_stride, steps, adds);
        return;
    }
    for (; rows; rows--, out += out_stride, a += a_stride)
        narrow_multiply_1(out, out_stride, a, a_stride, b, b_stride, steps, adds);
}
#endif
