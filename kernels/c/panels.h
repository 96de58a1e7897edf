/* Products of many rows: out [rows, columns] = a [rows, K] times b, with b packed as panels.
 *
 * A panel is [K / PER, WIDE]. The values of WIDE columns that are multiplied by the same value of a (with PAIRS: by the
 * same PER values) are adjacent, so one value of a is multiplied by whole registers:
 *
 *                        panel of b        k │ [ WIDE columns ]
 *                                            ▼ [ WIDE columns ]
 *     a: TALL rows of  k ──────►    out [TALL, WIDE]: TALL x VECTORS registers of sums, over all k of the panel
 *
 * What is computed:
 *
 *     for each row i and column j:   out[i][j] = (adds ? out[i][j] : 0) + sum over k of a[i][k] * b[k][j] */
#ifndef PANELS_H
#define PANELS_H
#include "operands.h"

/* Sizes that fit the registers: 16 registers with AVX2, 32 elsewhere */
#define TALL 6
#if LANES == 8 && defined(__x86_64__)
#define VECTORS 2
#else
#define VECTORS 4
#endif
#define WIDE (VECTORS * LANES)
#define BLOCK 64 /* columns that are packed at a time */
#define PANELS (BLOCK / WIDE)

/* Writes LANES rows of STEP activations as columns of a panel, in the order of operands. The columns are VECTORS
 * operands apart. */
ALWAYS void pack_square(operands *to, pairs *square) {
    transpose(square);
    for (int i = 0; i < LANES; i++) {
#if defined(PAIRS) || defined(FLOAT_ACTIVATIONS)
        to[i * VECTORS] = (operands)square[i];
#else
        to[i * VECTORS] = low(square[i]);
        to[(LANES + i) * VECTORS] = high(square[i]);
#endif
    }
}

/* Packs WIDE rows [K] as a panel, in the order of operands; K is a multiple of STEP */
ALWAYS void pack_transposed(operands *panel, const real *const *rows, long K) {
    for (int vector = 0; vector < VECTORS; vector++)
        for (long k = 0; k < K; k += STEP) {
            pairs square[LANES];
            for (int i = 0; i < LANES; i++) square[i] = load_pairs(rows[vector * LANES + i] + k);
            pack_square(panel + k / PER * VECTORS + vector, square);
        }
}

/* Adds to sums the next PER values of a row of a times their columns */
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

/* out [rows, vectors] = a [rows, PER steps] times b, whose rows are b_stride vectors apart; with adds += */
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
            KEEP(columns[j]); /* load once, not again for every row */
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

/* multiply_rows for any number of rows up to TALL. A sum is added in the order of a's columns, and does not depend on
 * the other rows. */
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

/* The same for columns of one vector */
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
