/* RMSNorm of one row, in two passes: the first sums the squares, the second multiplies.
 *
 *     sum    = residual + x, rounded to bfloat16                        (or x, without a residual)
 *     scale  = 1 / sqrt(mean of sum^2 + eps)
 *     normed = (sum * scale, rounded to bfloat16) * norm_weight, rounded */
#ifndef NORM_H
#define NORM_H
#include "vectors.h"

#define NORM_MULTIPLE 16 /* a row's length is a multiple of it, and therefore of LANES */

/* The scale of a row [K]. Writes the sum to new_residual, unless that is null. */
static inline float norm_scale(bf16 *new_residual, const bf16 *x, const bf16 *residual, float eps, long K) {
    floats squares = {0};
    for (long k = 0; k < K; k += LANES) {
        floats wide = load_wide(x + k);
        if (residual) wide = rounded(load_wide(residual + k) + wide);
        if (new_residual) store_narrow(new_residual + k, wide);
        squares += wide * wide;
    }
    return 1.0f / sqrtf(sum(squares) / K + eps);
}

/* Normalises a part [K] of a row */
static inline void apply_norm(bf16 *normed, const bf16 *row, const bf16 *norm_weight, float scale, long K) {
    for (long k = 0; k < K; k += LANES)
        store_narrow(normed + k, rounded(load_wide(row + k) * scale) * load_wide(norm_weight + k));
}
#endif
