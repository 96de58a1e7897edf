/* The prologue and the epilogue of a linear layer, which all implementations of the product share.
 *
 *     x ──► RMSNorm ──► rows [T, K] of operands                      prologue:  normed_rows
 *                                          │
 *         weight [N, K], up [N, K] ──► product [T, N]                linear_few_tokens.c, linear_many_tokens.c, or for
 *                                          │                         quantised weights linear_grouped.c
 *                                          │
 *              SwiGLU, + bias, + addend ──► out [T, N]               epilogue:  finish
 *
 * What is computed. Values are rounded where the reference (kernels/linear.py) rounds them, but products stay in float:
 *
 *     for each token t and each row n of weight:
 *         value = sum over k of rows[t][k] * weight[n][k]
 *         out[t][n] = value + bias[n], or silu(value) * (sum over k of rows[t][k] * up[n][k]);  + addend[t][n] */
#ifndef LINEAR_H
#define LINEAR_H
#include "norm.h"
#include "team.h"
#include "weights.h"

#define MAX_FEW_TOKENS 16 /* most tokens for which the weight is read once, row by row */
#define PANEL_DEPTH \
    (PANELS == 1 ? 1024 : 512) /* values of a row that are packed at a time; the panels fit in the L2 cache */
#define NORMED 4096            /* values of a row that are normalised at a time */

ACROSS_FILES void linear_few_tokens(const linear_args *args, worker *me);
ACROSS_FILES void linear_grouped(const linear_args *args, worker *me);
#ifndef FLOAT_ACTIVATIONS
void linear_many_tokens(const linear_args *args, worker *me);
#endif

/* x as rows [T, K] of operands, normalised if there is a norm. The rows lie at the start of scratch. */
static const operand *normed_rows(const linear_args *args, worker *me) {
    operand *rows = (operand *)args->scratch;
    const long K = args->in_features;
    for (long token = first_task(me, args->num_tokens); token >= 0; token = next_task(me)) {
        const real *x = args->x + token * args->x_stride;
        if (!args->norm_weight) {
            to_operands(rows + token * K, x, K);
            continue;
        }
        real normed[NORMED];
        float scale = norm_scale(0, x, 0, args->eps, K);
        for (long k = 0; k < K; k += NORMED) {
            long some = least(K - k, NORMED);
            apply_norm(normed, x + k, args->norm_weight + k, scale, some);
            to_operands(rows + token * K + k, normed, some);
        }
    }
    barrier(me);
    return rows;
}

/* Writes out[token][row .. row + some] from the values of a product; `some` is at most LANES. `up` is null, or has the
 * values of the product with up. */
static inline void finish(const linear_args *args, floats value, const float *up, long token, long row, long some) {
    if (args->bias) value += load_some(args->bias + row, some);
    if (up) value = rounded(silu(rounded(value))) * rounded(load(up));
    if (args->addend) value = rounded(value) + load_some(args->addend + token * args->addend_stride + row, some);
    long at = token * args->out_stride + row;
    if (args->out_is_float) store_some_floats((float *)args->out + at, value, some);
    else store_some((real *)args->out + at, value, some);
}
#endif
