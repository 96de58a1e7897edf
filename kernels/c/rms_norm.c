/* The residual sum and its RMSNorm. A task is one row. norm.h says what is computed. */
#include "norm.h"
#include "team.h"

void add_rms_norm(const add_rms_norm_args *args, worker *me) {
    const long K = args->row_size;
    for (long token = first_task(me, args->num_tokens); token >= 0; token = next_task(me)) {
        const real *x = args->x + token * args->x_stride;
        const real *residual = args->residual ? args->residual + token * args->residual_stride : 0;
        real *sum = residual ? args->new_residual + token * K : 0;
        float scale = norm_scale(sum, x, residual, args->eps, K);
        apply_norm(args->out + token * K, sum ? sum : x, args->norm_weight, scale, K);
    }
    barrier(me);
}
