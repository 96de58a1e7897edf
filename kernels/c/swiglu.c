/* SwiGLU of two tensors: out = silu(gate) * up. silu is rounded to bfloat16 before the product.
 *
 *     for each value i:   out[i] = round(gate[i] / (1 + exp(-gate[i]))) * up[i]
 *
 * A task is RUN_OF_ROW values of a row, so a single long row keeps several threads busy. */
#include "team.h"
#include "vectors.h"

#define RUN_OF_ROW 2048

void silu_mul(const silu_mul_args *args, worker *me) {
    const long parts = ceil_div(args->row_size, RUN_OF_ROW);
    for (long task = first_task(me, args->num_tokens * parts); task >= 0; task = next_task(me)) {
        long token = task / parts, i = task % parts * RUN_OF_ROW, end = least(i + RUN_OF_ROW, args->row_size);
        real *out = args->out + token * args->row_size;
        const real *gate = args->gate + token * args->gate_stride, *up = args->up + token * args->up_stride;
        for (; i + LANES <= end; i += LANES)
            store_reals(out + i, rounded(silu(load_reals(gate + i))) * load_reals(up + i));
        if (i < end) {
            floats last = rounded(silu(load_some(gate + i, end - i))) * load_some(up + i, end - i);
            store_some(out + i, last, end - i);
        }
    }
    barrier(me);
}
