/* out = x w^T behind an optional add + RMSNorm, before an optional SwiGLU, bias and addend: w [N, K] is read once for
 * all tokens, row by row for few of them, and for many as panels that are packed on the way. */
#include "common.h"
#include "panels.h"

#include <stdatomic.h>
#include <unistd.h>

#define MAX_TOKENS 16 /* that read w row by row */
#define RUN 64        /* rows of w that are summed before anything else is done with them */
#define ROWS 16       /* rows of w whose sums wait for the next part of K */
#define NORMED 4096   /* values of a row that are normalised at a time */

#define TASKS 4         /* for each thread, at least, where there is enough to do */
#define LEAST_TOKENS 96 /* of a task of many tokens: packing then costs little */

/* How many bytes before it is needed w is asked for, as choose.py measured it. 0: the processor sees to it alone. */
EXPORTED long ahead = 0;

/* Few tokens: so many rows of x with so many rows of w at a time. AVX2 has registers for 8 sums; products of pairs are
 * so fast that passing over w less often counts for more than sums of more rows. */
#ifdef PAIRS
#define TOKENS 8
#define ROWS_WITH(COUNT) ((COUNT) > 4 ? 2 : 4)
#else
#define TOKENS 4
#define ROWS_WITH(COUNT) ((COUNT) > 2 && LANES == 8 ? 2 : 4)
#endif

/* What x may take of a core's first cache */
static long l1_bytes(void) {
    static atomic_long known; /* asking can cost microseconds */
    long size = atomic_load_explicit(&known, memory_order_relaxed);
#ifdef _SC_LEVEL1_DCACHE_SIZE
    if (!size) size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    if (size < 1 << 15) size = 1 << 15; /* or unknown */
    atomic_store_explicit(&known, size, memory_order_relaxed);
    return size - (1 << 14);
}

typedef struct { /* a part [K] of some rows of w and of x */
    const bf16 *w;
    const operand *x;
    long w_stride, x_stride, K;
    long early;               /* bytes before it is needed that w is asked for */
    floats (*so_far)[TOKENS]; /* a row: what the parts before have summed, unless this one is the first */
    float *out;               /* [count, RUN]: the sums, if this one is the last */
    int is_first, is_last;
} part;

/* A sum is one chain in each lane, over w's values in the order of operands, whatever is summed beside it */
ALWAYS void dots_of(const int rows, const int count, const part *p) {
    const bf16 *w = p->w;
    const operand *x = p->x;
    long w_stride = p->w_stride, x_stride = p->x_stride, K = p->K, early = p->early;
    floats sums[4][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) sums[r][i] = p->is_first ? (floats){0} : p->so_far[r][i];
    for (long k = 0; k < K; k += LINE) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) __builtin_prefetch((const char *)(w + r * w_stride + k) + early, 0, 2);
#pragma GCC unroll 8
        for (long at = k; at < k + LINE; at += LANES * PER) {
            operands weights[4];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                weights[r] = operands_at(w + r * w_stride, at);
                KEEP(weights[r]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < count; i++) {
                operands token = load_operands(x + i * x_stride + at);
                KEEP(token);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) sums[r][i] = add_products(sums[r][i], weights[r], token);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) KEEP(weights[r]); /* so that no sum takes its register */
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            if (p->is_last) p->out[i * RUN + r] = sum(sums[r][i]);
            else p->so_far[r][i] = sums[r][i];
}
static void dots_1(const part *p) { dots_of(ROWS_WITH(1), 1, p); }
static void dots_2(const part *p) { dots_of(ROWS_WITH(2), 2, p); }
static void dots_3(const part *p) { dots_of(ROWS_WITH(3), 3, p); }
static void dots_4(const part *p) { dots_of(ROWS_WITH(4), 4, p); }
static void row_1(const part *p) { dots_of(1, 1, p); }
static void row_2(const part *p) { dots_of(1, 2, p); }
static void row_3(const part *p) { dots_of(1, 3, p); }
static void row_4(const part *p) { dots_of(1, 4, p); }
#if TOKENS > 4
static void dots_5(const part *p) { dots_of(ROWS_WITH(5), 5, p); }
static void dots_6(const part *p) { dots_of(ROWS_WITH(6), 6, p); }
static void dots_7(const part *p) { dots_of(ROWS_WITH(7), 7, p); }
static void dots_8(const part *p) { dots_of(ROWS_WITH(8), 8, p); }
static void row_5(const part *p) { dots_of(1, 5, p); }
static void row_6(const part *p) { dots_of(1, 6, p); }
static void row_7(const part *p) { dots_of(1, 7, p); }
static void row_8(const part *p) { dots_of(1, 8, p); }
#define MORE(NAME) , NAME##_5, NAME##_6, NAME##_7, NAME##_8
#else
#define MORE(NAME)
#endif
static void (*const DOTS[TOKENS])(const part *) = {dots_1, dots_2, dots_3, dots_4 MORE(dots)};
static void (*const ROW[TOKENS])(const part *) = {row_1, row_2, row_3, row_4 MORE(row)};

/* Rows of w [rows, K] times x [count, K]: out [count, RUN]. In the order in which w lies, which is how a processor best
 * fetches what comes; ROWS of them for all tokens, in parts of K so short that those of x stay in the L1 cache. */
static void dots(float *out, const operand *x, const bf16 *w, long rows, long w_stride, long count, long K) {
    floats so_far[ROWS][TOKENS];
    long turns = parts_of(count, TOKENS);
    for (long block = 0; block < rows; block += ROWS)
        for (long turn = 0; turn < turns; turn++) {
            long token = count * turn / turns, some = count * (turn + 1) / turns - token;
            long length = least(K, l1_bytes() / (some * (long)sizeof *x) / LINE * LINE), together = ROWS_WITH(some);
            long rows_ahead = turns > 1 ? ROWS : 2 * together, row_bytes = w_stride * (long)sizeof *w;
            long early = turns == 1 && length == K ? ahead : ahead ? rows_ahead * row_bytes : 0;
            for (long k = 0; k < K; k += length)
                for (long row = block, end = least(rows, block + ROWS), step; row < end; row += step) {
                    step = end - row < together ? 1 : together;
                    part p = {.w = w + row * w_stride + k,
                              .x = x + token * K + k,
                              .w_stride = w_stride,
                              .x_stride = K,
                              .K = least(length, K - k),
                              .early = row / 4 % turns == turn ? early : 0, /* each row in one of the turns */
                              .so_far = so_far + row - block,
                              .out = out + token * RUN + row,
                              .is_first = k == 0,
                              .is_last = k + length >= K};
                    (step == 1 ? ROW : DOTS)[some - 1](&p);
                }
        }
}

/* What stands behind the product, for `some` of LANES rows of w from `row` on; `up` is null or their sums with up */
static inline void finish(const call *c, floats value, const float *up, long token, long row, long some) {
    const bf16 *bias = c->tensors[8], *addend = c->tensors[9];
    long N = c->sizes[1], addend_stride = c->sizes[6], out_is_float = c->sizes[7], at = token * N + row;
    if (bias) value += load_some(bias + row, some);
    if (up) value = rounded(silu(rounded(value))) * rounded(load(up));
    if (addend) value = rounded(value) + load_some(addend + token * addend_stride + row, some);
    halves near = narrow_floats(value);
    if (out_is_float) store_some((float *)c->tensors[0] + at, &value, some, sizeof(float));
    else store_some((bf16 *)c->tensors[0] + at, &near, some, sizeof(bf16));
}

/* x [T, K] as operands in dense rows, normed */
static const operand *dense_rows(const call *c, worker *me) {
    bf16 *new_residual = c->tensors[1];
    operand *dense = c->tensors[2];
    const bf16 *x = c->tensors[3], *residual = c->tensors[4], *norm_weight = c->tensors[5];
    long T = c->sizes[0], K = c->sizes[2], x_stride = c->sizes[3], residual_stride = c->sizes[4];
    for (long token = first(me, T); token >= 0; token = next(me)) {
        const bf16 *from = x + token * x_stride;
        if (!norm_weight) {
            to_operands(dense + token * K, from, K);
            continue;
        }
        bf16 *sum = new_residual ? new_residual + token * K : 0, normed[NORMED];
        float scale = norm_scale(sum, from, residual ? residual + token * residual_stride : 0, c->scalar, K);
        for (long k = 0; k < K; k += NORMED) {
            long some = least(K - k, NORMED);
            apply_norm(normed, (sum ? sum : from) + k, norm_weight + k, scale, some);
            to_operands(dense + token * K + k, normed, some);
        }
    }
    meet(me);
    return dense;
}

/* T up to MAX_TOKENS and K a multiple of LINE. May be null: residual and new_residual, norm_weight, up, bias, addend.
 * x, residual, addend, w and up have rows of any stride; out [T, N], new_residual [T, K] are dense; rows is [T, K]. */
void few_tokens(const call *c, worker *me) {
    const bf16 *w = c->tensors[6], *up = c->tensors[7];
    const operand *rows = dense_rows(c, me);
    long T = c->sizes[0], N = c->sizes[1], K = c->sizes[2], w_stride = c->sizes[5];
    long run = N < TASKS * me->threads * RUN ? ROWS : RUN; /* long ones where that keeps every thread busy */
    for (long task = first(me, parts_of(N, run)); task >= 0; task = next(me)) {
        float sums[MAX_TOKENS][RUN], ups[MAX_TOKENS][RUN];
        long start = task * run, count = least(run, N - start);
        dots(sums[0], rows, w + start * w_stride, count, w_stride, T, K);
        if (up) dots(ups[0], rows, up + start * w_stride, count, w_stride, T, K);
        for (long token = 0; token < T; token++)
            for (long i = 0; i < count; i += LANES)
                finish(c, load(sums[token] + i), up ? ups[token] + i : 0, token, start + i, least(count - i, LANES));
    }
    meet(me);
}

/* BLOCK rows of w from n on, or half of them of w and half of up, as panels; beyond N the last row again */
static void pack_block(operands *panels, const bf16 *w, const bf16 *up, long n, long N, long K, long stride) {
    long mine = up ? BLOCK / 2 : BLOCK;
    for (long panel = 0; panel < PANELS; panel++) {
        const bf16 *rows[WIDE];
        for (long i = 0; i < WIDE; i++) {
            long at = panel * WIDE + i;
            rows[i] = (at < mine ? w : up) + least(n + at % mine, N - 1) * stride;
        }
        pack_transposed(panels + panel * (K / PER) * VECTORS, rows, K);
    }
}

/* As few_tokens, for any T. A task is BLOCK rows of w and a part of the tokens: all of them where that keeps every
 * thread busy, since each part packs w anew. rows is followed by sums [T, BLOCK] and panels [CHUNK, BLOCK] of every
 * thread. */
void many_tokens(const call *c, worker *me) {
    const bf16 *w = c->tensors[6], *up = c->tensors[7];
    const operand *rows = dense_rows(c, me);
    long T = c->sizes[0], N = c->sizes[1], K = c->sizes[2], w_stride = c->sizes[5], width = up ? BLOCK / 2 : BLOCK;
    float *sums = (float *)c->tensors[2] + T * K + me->index * (T + CHUNK) * BLOCK;
    operands *panels = (operands *)(sums + T * BLOCK);
    long blocks = parts_of(N, width), wanted = parts_of(TASKS * me->threads, blocks);
    long tokens = parts_of(T, least(wanted, parts_of(T, LEAST_TOKENS))); /* of a task */
    long length = parts_of(parts_of(K, parts_of(K, CHUNK)), LINE) * LINE, turns = parts_of(T, tokens);
    for (long task = first(me, blocks * turns); task >= 0; task = next(me)) {
        long n = task / turns * width, start = task % turns * tokens, count = least(tokens, T - start);
        for (long k = 0; k < K; k += length) {
            long some = least(length, K - k);
            pack_block(panels, w + k, up ? up + k : 0, n, N, some, w_stride);
            for (long token = 0; token < count; token += TALL)
                for (long panel = 0; panel < PANELS; panel++)
                    multiply(sums + token * BLOCK + panel * WIDE, BLOCK, rows + (start + token) * K + k, K,
                             panels + panel * (some / PER) * VECTORS, VECTORS, some / PER, least(count - token, TALL),
                             k > 0);
        }
        long columns = least(width, N - n);
        for (long token = 0; token < count; token++)
            for (long i = 0; i < columns; i += LANES)
                finish(c, load(sums + token * BLOCK + i), up ? sums + token * BLOCK + BLOCK / 2 + i : 0, start + token,
                       n + i, least(columns - i, LANES));
    }
    meet(me);
}
