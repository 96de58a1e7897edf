/* The product of a linear for many tokens. BLOCK rows of the weight are packed as panels and multiplied with all tokens
 * of a task, before the next rows are packed.
 *
 *     weight [N, K]                 panels [PANEL_DEPTH, BLOCK]           rows [T, K] of x
 *       BLOCK rows ▒▒▒▒▒▒▒▒   ──►      ▒ │ k                                tokens of the task, TALL at a time
 *                  k ──►               ▒ ▼        in the L2 cache             ▒▒▒▒▒▒▒▒ k ──►
 *                                                       │
 *                                      sums [T, BLOCK] += rows x panels, one part of K after the other
 *
 * With `up`, half of a block's rows come from the weight and half from up, so a task has both values of an output.
 *
 * What is computed:
 *
 *     for each row n, for each token t:   sum = 0;  for k:  sum += weight[n][k] * rows[t][k] */
#include "linear.h"

#define LEAST_TOKENS 96 /* least tokens of a task, so that packing costs little compared with the products */

/* Packs BLOCK rows from n on (or half of them from w and half from up), K values from k on, as panels. Rows beyond N
 * repeat the last row. */
static void pack_rows(operands *panels, const linear_args *args, long n, long k, long K) {
    const int has_up = args->up.values != 0, format = (int)args->weight.format;
    const long of_weight = has_up ? BLOCK / 2 : BLOCK, last = args->out_features - 1;
    for (long panel = 0; panel < PANELS; panel++) {
        weight rows[WIDE];
        for (long i = 0; i < WIDE; i++) {
            long column = panel * WIDE + i;
            const weight *from = column < of_weight ? &args->weight : &args->up;
            rows[i] = weight_from(format, from, least(n + column % of_weight, last), k);
        }
        weight_panel(format, panels + panel * (K / PER) * VECTORS, rows, K);
    }
}

/* scratch holds the rows [T, K] of x, and then for each thread sums [T, BLOCK] and panels [PANEL_DEPTH, BLOCK].
 *
 * A task is BLOCK rows of the weight and a part of the tokens. If there are enough tasks, a task has all tokens,
 * because the rows are packed again for each part of the tokens. */
void linear_many_tokens(const linear_args *args, worker *me) {
    const operand *x = normed_rows(args, me);
    const long T = args->num_tokens, N = args->out_features, K = args->in_features;
    const int has_up = args->up.values != 0;
    const long width = has_up ? BLOCK / 2 : BLOCK; /* outputs of a block */
    float *sums = args->scratch + T * K + me->index * (T + PANEL_DEPTH) * BLOCK;
    operands *panels = (operands *)(sums + T * BLOCK);
    long blocks = ceil_div(N, width), wanted_parts = ceil_div(TASKS_PER_THREAD * me->num_threads, blocks);
    long tokens = ceil_div(T, least(wanted_parts, ceil_div(T, LEAST_TOKENS))), parts = ceil_div(T, tokens);
    long depth = ceil_div(ceil_div(K, ceil_div(K, PANEL_DEPTH)), LINE) * LINE;
    for (long task = first_task(me, blocks * parts); task >= 0; task = next_task(me)) {
        long n = task / parts * width, start = task % parts * tokens, count = least(tokens, T - start);
        for (long k = 0; k < K; k += depth) {
            long some = least(depth, K - k);
            pack_rows(panels, args, n, k, some);
            for (long token = 0; token < count; token += TALL)
                for (long panel = 0; panel < PANELS; panel++)
                    multiply(sums + token * BLOCK + panel * WIDE, BLOCK, x + (start + token) * K + k, K,
                             panels + panel * (some / PER) * VECTORS, VECTORS, some / PER, least(count - token, TALL),
                             k > 0);
        }
        long columns = least(width, N - n);
        for (long token = 0; token < count; token++)
            for (long i = 0; i < columns; i += LANES)
                finish(args, load(sums + token * BLOCK + i), has_up ? sums + token * BLOCK + BLOCK / 2 + i : 0,
                       start + token, n + i, least(columns - i, LANES));
    }
    barrier(me);
}
