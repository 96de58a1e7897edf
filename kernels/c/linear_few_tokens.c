/* The product of a linear for up to MAX_FEW_TOKENS tokens. The weight is read from memory once, in the order of memory,
 * which a processor prefetches best. All other data stay in the caches.
 *
 *     weight [N, K]      k ─────────────────────────►       rows [T, K] of x, in parts of K
 *       ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ ┐                                   that fit the L1 cache:
 *       ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ │ 2 or 4 rows at a time,             ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
 *       ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ │ with up to GROUP tokens            ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
 *       ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒ ┘                                    ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒
 *     a task: RUN rows
 *
 * What is computed:
 *
 *     for each row n, for each token t:   sum = 0;  for k:  sum += weight[n][k] * rows[t][k]
 *
 * A sum has LANES partial sums, each added up in the order of k. Its bits do not depend on the other tokens or the
 * number of threads. */
#include "linear.h"

#include <stdatomic.h>
#include <unistd.h>

#define RUN 64       /* rows of the weight in a task */
#define ROW_BLOCK 16 /* rows whose sums are kept between the parts of K */

/* How many tokens and rows have their sums in registers at a time. AVX2 has registers for 8 sums. Products of pairs are
 * fast, so it is better to read the weight fewer times (more tokens) than to have sums of more rows. */
#ifdef PAIRS
#define GROUP 8
#define ROWS_WITH(TOKENS) ((TOKENS) > 4 ? 2 : 4)
#else
#define GROUP 4
#define ROWS_WITH(TOKENS) ((TOKENS) > 2 && LANES == 8 ? 2 : 4)
#endif

/* How many bytes of a core's L1 data cache x may use */
static long l1_bytes(void) {
    static atomic_long known; /* sysconf can take microseconds */
    long size = atomic_load_explicit(&known, memory_order_relaxed);
#ifdef _SC_LEVEL1_DCACHE_SIZE
    if (!size) size = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#endif
    if (size < 1 << 15) size = 1 << 15; /* also if the size is unknown */
    atomic_store_explicit(&known, size, memory_order_relaxed);
    return size - (1 << 14);
}

typedef struct {      /* a part [depth] of K, of some rows of the weight and some tokens */
    weight weight;    /* beginning at the first row and the part's first value */
    const operand *x; /* beginning at the first token and the part's first value */
    long x_stride, depth;
    long distance;         /* bytes in advance that the weight is prefetched */
    floats (*sums)[GROUP]; /* [rows]: the sums of the earlier parts; unused in the first part */
    float *out;            /* [tokens, RUN]: the sums, written in the last part */
    int is_first, is_last;
} part;

/* Adds a part to the sums. format, rows and tokens are constants in every caller, so the loops over them are unrolled
 * and the sums lie in registers. */
ALWAYS void add_part(const int format, const int rows, const int tokens, const part *p) {
    const weight w = p->weight;
    const operand *x = p->x;
    long x_stride = p->x_stride, depth = p->depth, distance = p->distance;
    floats sums[4][GROUP];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sums[r][t] = p->is_first ? (floats){0} : p->sums[r][t];
    for (long k = 0; k < depth; k += LINE) {
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) weight_prefetch(format, &w, r, k, distance);
#pragma GCC unroll 8
        for (long at = k; at < k + LINE; at += LANES * PER) {
            operands weights[4];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                weights[r] = weight_operands(format, &w, r, at);
                KEEP(weights[r]);
            }
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                operands token = load_operands(x + t * x_stride + at);
                KEEP(token);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) sums[r][t] = add_products(sums[r][t], weights[r], token);
            }
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) KEEP(weights[r]); /* keep the weights in registers */
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++)
            if (p->is_last) p->out[t * RUN + r] = sum(sums[r][t]);
            else p->sums[r][t] = sums[r][t];
}

/* A function for each format and number of tokens: one for several rows, one for a single row */
typedef void add_part_of(const part *p);
#define DEFINE(FORMAT, TOKENS)                                                                                       \
    static void dots_##FORMAT##_##TOKENS(const part *p) { add_part(FORMAT##_weight, ROWS_WITH(TOKENS), TOKENS, p); } \
    static void row_##FORMAT##_##TOKENS(const part *p) { add_part(FORMAT##_weight, 1, TOKENS, p); }
#if GROUP == 8
#define EACH_COUNT(DO, FORMAT) \
    DO(FORMAT, 1) DO(FORMAT, 2) DO(FORMAT, 3) DO(FORMAT, 4) DO(FORMAT, 5) DO(FORMAT, 6) DO(FORMAT, 7) DO(FORMAT, 8)
#else
#define EACH_COUNT(DO, FORMAT) DO(FORMAT, 1) DO(FORMAT, 2) DO(FORMAT, 3) DO(FORMAT, 4)
#endif
#define DEFINE_ALL(FORMAT) EACH_COUNT(DEFINE, FORMAT)
EACH_WEIGHT_FORMAT(DEFINE_ALL)

#define DOTS_NAME(FORMAT, TOKENS) dots_##FORMAT##_##TOKENS,
#define ROW_NAME(FORMAT, TOKENS) row_##FORMAT##_##TOKENS,
#define DOTS_NAMES(FORMAT) {EACH_COUNT(DOTS_NAME, FORMAT)},
#define ROW_NAMES(FORMAT) {EACH_COUNT(ROW_NAME, FORMAT)},
static add_part_of *const SEVERAL_ROWS[WEIGHT_FORMATS][GROUP] = {EACH_WEIGHT_FORMAT(DOTS_NAMES)};
static add_part_of *const ONE_ROW[WEIGHT_FORMATS][GROUP] = {EACH_WEIGHT_FORMAT(ROW_NAMES)};

/* out [T, RUN] = x [T, K] times the first `rows` rows of w. ROW_BLOCK rows are multiplied with all tokens before the
 * next ROW_BLOCK rows. GROUP tokens are multiplied at a time, over parts of K so short that x's part stays in the L1
 * cache. */
static void multiply_run(float *out, const operand *x, const weight *w, long rows, long T, long K, long distance) {
    floats sums[ROW_BLOCK][GROUP];
    long groups = ceil_div(T, GROUP);
    for (long block = 0; block < rows; block += ROW_BLOCK)
        for (long group = 0; group < groups; group++) {
            long token = T * group / groups, tokens = T * (group + 1) / groups - token;
            long depth = least(K, l1_bytes() / (tokens * (long)sizeof *x) / LINE * LINE);
            long rows_together = ROWS_WITH(tokens), rows_before = groups > 1 ? ROW_BLOCK : 2 * rows_together;
            long of_group = groups == 1 && depth == K ? distance : distance ? rows_before * w->row_bytes : 0;
            for (long k = 0; k < K; k += depth)
                for (long row = block, end = least(rows, block + ROW_BLOCK), step; row < end; row += step) {
                    step = end - row < rows_together ? 1 : rows_together;
                    part p = {.weight = weight_from((int)w->format, w, row, k),
                              .x = x + token * K + k,
                              .x_stride = K,
                              .depth = least(depth, K - k),
                              .distance = row / 4 % groups == group ? of_group : 0, /* once for each row */
                              .sums = sums + row - block,
                              .out = out + token * RUN + row,
                              .is_first = k == 0,
                              .is_last = k + depth >= K};
                    (step == 1 ? ONE_ROW : SEVERAL_ROWS)[w->format][tokens - 1](&p);
                }
        }
}

void linear_few_tokens(const linear_args *args, worker *me) {
    const operand *x = normed_rows(args, me);
    const long T = args->num_tokens, N = args->out_features, K = args->in_features;
    const int has_up = args->up.values != 0, format = (int)args->weight.format;
    const long run = N < TASKS_PER_THREAD * me->num_threads * RUN ? ROW_BLOCK : RUN; /* short runs keep threads busy */
    for (long task = first_task(me, ceil_div(N, run)); task >= 0; task = next_task(me)) {
        float sums[MAX_FEW_TOKENS][RUN], ups[MAX_FEW_TOKENS][RUN];
        long start = task * run, rows = least(run, N - start);
        weight w = weight_from(format, &args->weight, start, 0);
        multiply_run(sums[0], x, &w, rows, T, K, args->prefetch_distance);
        if (has_up) {
            w = weight_from(format, &args->up, start, 0);
            multiply_run(ups[0], x, &w, rows, T, K, args->prefetch_distance);
        }
        for (long token = 0; token < T; token++)
            for (long i = 0; i < rows; i += LANES)
                finish(args, load(sums[token] + i), has_up ? ups[token] + i : 0, token, start + i,
                       least(rows - i, LANES));
    }
    barrier(me);
}
