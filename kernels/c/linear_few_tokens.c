/* The product of a linear for up to MAX_FEW_TOKENS tokens: the weight streams from memory once, in the order in which
 * it lies, which is how a processor fetches best, and everything else stays in the caches.
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
 * A sum has LANES partial sums, one chain each over k. Neither the other tokens nor the threads change a bit of it. */
#include "linear.h"

#include <stdatomic.h>
#include <unistd.h>

#define RUN 64       /* rows of the weight that a task multiplies before it finishes their values */
#define ROW_BLOCK 16 /* rows whose unfinished sums wait for the next part of K */

/* How many tokens' sums, with how many rows each, the registers hold. AVX2 has registers for 8 sums; products of pairs
 * are so fast that passing over the weight less often counts for more than sums of more rows. */
#ifdef PAIRS
#define GROUP 8
#define ROWS_WITH(TOKENS) ((TOKENS) > 4 ? 2 : 4)
#else
#define GROUP 4
#define ROWS_WITH(TOKENS) ((TOKENS) > 2 && LANES == 8 ? 2 : 4)
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

typedef struct {      /* a part [depth] of K, of some rows of the weight and some tokens */
    weight weight;    /* from the first of the rows on, at the part's first value */
    const operand *x; /* of the first token, likewise */
    long x_stride, depth;
    long distance;         /* bytes before it is needed that the weight is asked for */
    floats (*sums)[GROUP]; /* [rows]: of the parts before this one, unless it is the first */
    float *out;            /* [tokens, RUN]: the sums, if this part is the last */
    int is_first, is_last;
} part;

/* The sums of a part. All three numbers are constants where this is called, so the loops over them are unrolled and the
 * sums lie in registers. */
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
            for (int r = 0; r < rows; r++) KEEP(weights[r]); /* so that no sum takes its register */
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++)
            if (p->is_last) p->out[t * RUN + r] = sum(sums[r][t]);
            else p->sums[r][t] = sums[r][t];
}

/* A function for each format and each number of tokens, of several rows and of one */
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
 * next ones, by GROUP tokens at a time, in parts of K so short that those of x stay in the L1 cache. */
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
                              .distance = row / 4 % groups == group ? of_group : 0, /* each row with one group */
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
    const long run = N < TASKS_PER_THREAD * me->num_threads * RUN ? ROW_BLOCK : RUN; /* short: all threads are busy */
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
