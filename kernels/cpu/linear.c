/* out = x w^T behind an optional add + RMSNorm, before an optional SwiGLU, bias and addend: w [N, K] is read once for all
 * tokens, row by row for few of them, and for many as panels of WIDE rows that are transposed on the way. */
#include "common.h"

#define L1_VALUES 8192 /* of x, half of a cache of 32 KiB */

/* ROWS rows of w times COUNT rows of x, out[token][row]: a sum is two sums of 32 values each that alternate */
#define DEFINE_DOTS(ROWS, COUNT)                                                                                 \
    static void dots_##ROWS##_##COUNT(float *out, const bf16 *x, const bf16 *w, long w_stride, long K) {         \
        floats sums[2][COUNT][ROWS] = {0};                                                                       \
        for (long k = 0; k < K; k += 2 * STEP)                                                                   \
            for (int half = 0; half < 2 && k + half * STEP < K; half++) {                                        \
                pairs weights[ROWS];                                                                             \
                for (int row = 0; row < ROWS; row++) weights[row] = load_pairs(w + row * w_stride + k + half * STEP); \
                for (int i = 0; i < COUNT; i++) {                                                                \
                    pairs values = load_pairs(x + i * K + k + half * STEP);                                      \
                    for (int row = 0; row < ROWS; row++)                                                         \
                        sums[half][i][row] = add_products(sums[half][i][row], weights[row], values);             \
                }                                                                                                \
            }                                                                                                    \
        for (int i = 0; i < COUNT; i++)                                                                          \
            for (int row = 0; row < ROWS; row++) out[i * RUN + row] = sum(sums[0][i][row] + sums[1][i][row]);  \
    }
DEFINE_DOTS(4, 2)
DEFINE_DOTS(4, 1)
DEFINE_DOTS(1, 8)
DEFINE_DOTS(1, 2)
DEFINE_DOTS(1, 1)

/* Rows of w [rows, K] times x [count, K]: out [count, RUN]. Rows side by side use what is loaded of x more often, and
 * halve what the processor fetches ahead where they are short: that pays once x does not fit the L1 cache. */
static void dots(float *out, const bf16 *x, const bf16 *w, long rows, long w_stride, long count, long K) {
    long row = 0, i = 0;
    if (count * K > L1_VALUES)
        for (; row + 4 <= rows; row += 4, w += 4 * w_stride, out += 4) {
            for (i = 0; i + 2 <= count; i += 2) dots_4_2(out + i * RUN, x + i * K, w, w_stride, K);
            if (i < count) dots_4_1(out + i * RUN, x + i * K, w, w_stride, K);
        }
    for (; row < rows; row++, w += w_stride, out++) {
        for (i = 0; i + 8 <= count; i += 8) dots_1_8(out + i * RUN, x + i * K, w, w_stride, K);
        for (; i + 2 <= count; i += 2) dots_1_2(out + i * RUN, x + i * K, w, w_stride, K);
        for (; i < count; i++) dots_1_1(out + i * RUN, x + i * K, w, w_stride, K);
    }
}

/* What stands behind the product, for `some` of LANES rows of w from `row` on; `up` is null or their sums with up */
static inline void finish(const call *c, floats value, const float *up, long token, long row, long some) {
    const bf16 *bias = c->tensors[8], *addend = c->tensors[9];
    long N = c->sizes[1], addend_stride = c->sizes[6], out_is_float = c->sizes[7], at = token * N + row;
    if (bias) value += load_some(bias + row, some);
    if (up) value = rounded_floats(silu(rounded_floats(value))) * rounded_floats(load(up));
    if (addend) value = rounded_floats(value) + load_some(addend + token * addend_stride + row, some);
    halves near = narrow_floats(value);
    if (out_is_float) store_some((float *)c->tensors[0] + at, &value, some, sizeof(float));
    else store_some((bf16 *)c->tensors[0] + at, &near, some, sizeof(bf16));
}

/* x [T, K] as dense rows: normed, or copied unless they are dense already */
static const bf16 *dense_rows(const call *c) {
    bf16 *new_residual = c->tensors[1], *dense = c->tensors[2];
    const bf16 *x = c->tensors[3], *residual = c->tensors[4], *norm_weight = c->tensors[5];
    long T = c->sizes[0], K = c->sizes[2], x_stride = c->sizes[3], residual_stride = c->sizes[4];
    if (!norm_weight && x_stride == K) return x;
#pragma omp for
    for (long token = 0; token < T; token++)
        if (norm_weight)
            normalise(dense + token * K, new_residual ? new_residual + token * K : 0, x + token * x_stride,
                      residual ? residual + token * residual_stride : 0, norm_weight, c->scalar, K);
        else memcpy(dense + token * K, x + token * x_stride, K * sizeof *x);
    return dense;
}

/* T up to MAX_TOKENS and K a multiple of 32. May be null: residual and new_residual, norm_weight, up, bias, addend.
 * x, residual, addend, w and up have rows of any stride; out [T, N], new_residual [T, K], rows [T, K] are dense.
 * Without a norm, rows is for x made dense. */
void few_tokens(const call *c) {
    const bf16 *w = c->tensors[6], *up = c->tensors[7], *rows = dense_rows(c);
    long T = c->sizes[0], N = c->sizes[1], K = c->sizes[2], w_stride = c->sizes[5];
    long run = up ? RUN : LANES; /* two weights are read in turns: long ones, for what the processor fetches ahead */
#pragma omp for schedule(static)
    for (long first = 0; first < N; first += run) {
        float sums[MAX_TOKENS][RUN], ups[MAX_TOKENS][RUN];
        long count = N - first < run ? N - first : run;
        dots(sums[0], rows, w + first * w_stride, count, w_stride, T, K);
        if (up) dots(ups[0], rows, up + first * w_stride, count, w_stride, T, K);
        for (long token = 0; token < T; token++)
            for (long i = 0; i < count; i += LANES)
                finish(c, load(sums[token] + i), up ? ups[token] + i : 0, token, first + i,
                       count - i < LANES ? count - i : LANES);
    }
}

#ifdef __AVX512BF16__
/* A panel of w: rows n .. n + WIDE of w, or half of them of w and half of up; beyond N the last row again */
static void pack_panel(pairs *panel, const bf16 *w, const bf16 *up, long n, long N, long K, long stride) {
    const bf16 *rows[WIDE];
    long mine = up ? WIDE / 2 : WIDE;
    for (long i = 0; i < WIDE; i++) {
        long row = n + i % mine < N ? n + i % mine : N - 1;
        rows[i] = (i < mine ? w : up) + row * stride;
    }
    pack_transposed(panel, rows, K);
}

/* As few_tokens, for any T; dense is followed by a panel [K / 2, WIDE] of every thread */
void many_tokens(const call *c) {
    const bf16 *w = c->tensors[6], *up = c->tensors[7], *rows = dense_rows(c);
    long T = c->sizes[0], N = c->sizes[1], K = c->sizes[2], w_stride = c->sizes[5], width = up ? WIDE / 2 : WIDE;
    pairs *panel = (pairs *)((bf16 *)c->tensors[2] + T * K) + omp_get_thread_num() * K / 2 * VECTORS;
#pragma omp for schedule(dynamic)
    for (long n = 0; n < N; n += width) {
        pack_panel(panel, w, up, n, N, K, w_stride);
        long count = N - n < width ? N - n : width;
        for (long first = 0; first < T; first += TALL) {
            float sums[TALL][WIDE] __attribute__((aligned(64)));
            long tall = T - first < TALL ? T - first : TALL;
            multiply(sums[0], WIDE, rows + first * K, K, panel, VECTORS, K / 2, tall, 0);
            for (long i = 0; i < tall; i++)
                for (long j = 0; j < count; j += LANES)
                    finish(c, load(sums[i] + j), up ? sums[i] + WIDE / 2 + j : 0, first + i, n + j,
                           count - j < LANES ? count - j : LANES);
        }
    }
}
#else
void many_tokens(const call *c) { (void)c; } /* ops.py does not call it */
#endif
