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
static inline float norm_scale(real *new_residual, const real *x, const real *residual, float eps, long K) {
    floats squares = {0};
    for (long k = 0; k < K; k += LANES) {
        floats wide = load_reals(x + k);
        if (residual) wide = rounded(load_reals(residual + k) + wide);
        if (new_residual) store_reals(new_residual + k, wide);
        squares += wide * wide;
    }
    return 1.0f / sqrtf(sum(squares) / K + eps);
}

/* Normalises a part [K] of a row */
static inline void apply_norm(real *normed, const real *row, const real *norm_weight, float scale, long K) {
    for (long k = 0; k < K; k += LANES)
        store_reals(normed + k, rounded(load_reals(row + k) * scale) * load_reals(norm_weight + k));
}
#endif
