/* out = x w^T behind an optional add + RMSNorm, before an optional SwiGLU, bias and addend: w [N, K] is read once for all
 * tokens, row by row for few of them, and for many as panels of WIDE rows that are transposed on the way. */
#include "common.h"

#include <unistd.h>

#define BLOCK 16

/* What x may take of a core's first cache */
static long l1_bytes(void) {
    static long size; /* asking can cost microseconds */
#ifdef _SC_LEVEL1_DCACHE_SIZE
    if (!size) size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    if (size < 1 << 14) size = 1 << 15;
    return size - (1 << 14);
}

/* How many bytes before it is needed w is asked for, as build.py measured it. 0: the processor sees to it alone. */
long ahead = 0;

/* A part [K] of one row of w times that of COUNT rows of x. A sum is two sums of LANES values that alternate; they go
 * on from so_far [COUNT, 2] unless this part is the first, and end in out [COUNT, RUN] if it is the last. */
#define DEFINE_DOTS(COUNT)                                                                                       \
    static void dots_##COUNT(float *out, floats *so_far, const operand *x, long x_stride, const bf16 *w, long K, \
                             long early, int is_first, int is_last) {                                            \
        floats sums[COUNT][2] = {0};                                                                             \
        if (!is_first) memcpy(sums, so_far, sizeof sums);                                                        \
        for (long k = 0; k < K; k += 2 * STEP)                                                                   \
            for (int half = 0; half < 2 && k + half * STEP < K; half++) {                                        \
                long at = k + half * STEP;                                                                       \
                __builtin_prefetch((const char *)(w + at) + early, 0, 2);                                        \
                pairs weights = load_pairs(w + at);                                                              \
                for (int i = 0; i < COUNT; i++)                                                                  \
                    sums[i][half] = add_products(sums[i][half], weights, x + i * x_stride + at);                 \
            }                                                                                                    \
        if (!is_last) memcpy(so_far, sums, sizeof sums);                                                         \
        else                                                                                                     \
            for (int i = 0; i < COUNT; i++) out[i * RUN] = sum(sums[i][0] + sums[i][1]);                         \
    }
DEFINE_DOTS(8)
DEFINE_DOTS(4)
DEFINE_DOTS(2)
DEFINE_DOTS(1)

/* Rows of w [rows, K] times x [count, K]: out [count, RUN]. Row by row, which is how a processor best fetches ahead; in
 * parts of K so short that those of x stay in the L1 cache, and of BLOCK rows, whose sums then wait in the L2 cache. */
static void dots(float *out, const operand *x, const bf16 *w, long rows, long w_stride, long count, long K) {
    long part = l1_bytes() / (count * (long)sizeof *x) / (2 * STEP) * (2 * STEP);
    if (part > K || part == 0) part = K;
    floats so_far[BLOCK][MAX_TOKENS][2];
    for (long block = 0; block < rows; block += BLOCK)
        for (long k = 0; k < K; k += part) {
            long some = K - k < part ? K - k : part;
            for (long row = block; row < rows && row < block + BLOCK; row++) {
                const bf16 *from = w + row * w_stride + k;
                long early = part == K ? ahead : ahead ? 2 * w_stride * (long)sizeof *w : 0; /* two rows further on */
#define DOTS(COUNT)                                                                                        \
    for (; i + COUNT <= count; i += COUNT, early = 0)                                                      \
    dots_##COUNT(out + i * RUN + row, so_far[row - block][i], x + i * K + k, K, from, some, early, k == 0, \
                 k + some == K)
                long i = 0;
                DOTS(8);
                DOTS(4);
                DOTS(2);
                DOTS(1);
            }
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

/* x [T, K] as operands in dense rows, normed */
static const operand *dense_rows(const call *c) {
    bf16 *new_residual = c->tensors[1];
    operand *dense = c->tensors[2];
    const bf16 *x = c->tensors[3], *residual = c->tensors[4], *norm_weight = c->tensors[5];
    long T = c->sizes[0], K = c->sizes[2], x_stride = c->sizes[3], residual_stride = c->sizes[4];
#pragma omp for
    for (long token = 0; token < T; token++) {
        const bf16 *from = x + token * x_stride;
        bf16 normed[norm_weight ? K : 1];
        if (norm_weight) {
            normalise(normed, new_residual ? new_residual + token * K : 0, from,
                      residual ? residual + token * residual_stride : 0, norm_weight, c->scalar, K);
            from = normed;
        }
        to_operands(dense + token * K, from, K);
    }
    return dense;
}

/* T up to MAX_TOKENS and K a multiple of 32. May be null: residual and new_residual, norm_weight, up, bias, addend.
 * x, residual, addend, w and up have rows of any stride; out [T, N], new_residual [T, K] are dense; rows is [T, K]. */
void few_tokens(const call *c) {
    const bf16 *w = c->tensors[6], *up = c->tensors[7];
    const operand *rows = dense_rows(c);
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

/* A panel of w [.., K]: rows n .. n + WIDE of w, or half of them of w and half of up; beyond N the last row again */
static void pack_panel(column *panel, const bf16 *w, const bf16 *up, long n, long N, long K, long stride) {
    const bf16 *rows[WIDE];
    long mine = up ? WIDE / 2 : WIDE;
    for (long i = 0; i < WIDE; i++) {
        long row = n + i % mine < N ? n + i % mine : N - 1;
        rows[i] = (i < mine ? w : up) + row * stride;
    }
    pack_transposed(panel, rows, K);
}

/* As few_tokens, for any T; rows is followed by sums [T, WIDE] and a panel [CHUNK, WIDE] of every thread */
void many_tokens(const call *c) {
    const bf16 *w = c->tensors[6], *up = c->tensors[7];
    const operand *rows = dense_rows(c);
    long T = c->sizes[0], N = c->sizes[1], K = c->sizes[2], w_stride = c->sizes[5], width = up ? WIDE / 2 : WIDE;
    float *sums = (float *)c->tensors[2] + T * K + omp_get_thread_num() * (T + CHUNK) * WIDE;
    column *panel = (column *)(sums + T * WIDE);
#pragma omp for schedule(dynamic)
    for (long n = 0; n < N; n += width) {
        for (long k = 0; k < K; k += CHUNK) {
            long some = K - k < CHUNK ? K - k : CHUNK;
            pack_panel(panel, w + k, up ? up + k : 0, n, N, some, w_stride);
            for (long first = 0; first < T; first += TALL)
                multiply(sums + first * WIDE, WIDE, rows + first * K + k, K, panel, VECTORS, some / PER,
                         T - first < TALL ? T - first : TALL, k > 0);
        }
        long count = N - n < width ? N - n : width;
        for (long token = 0; token < T; token++)
            for (long i = 0; i < count; i += LANES)
                finish(c, load(sums + token * WIDE + i), up ? sums + token * WIDE + WIDE / 2 + i : 0, token, n + i,
                       count - i < LANES ? count - i : LANES);
    }
}
