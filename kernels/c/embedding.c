/* Rows of a table: out[token] = table[ids[token]]. Quantised rows are dequantised. */
#include "team.h"
#include "weights.h"

#define SOME 256 /* values of a quantised row that a task has */

ALWAYS void dequantised(const int format, real *out, const weight *table, long row, long k, long end, long K) {
    weight known = *table;
    known.format = format;
    for (; k < end; k++) out[k] = to_real(grouped_value(&known, row, k, K));
}

void embedding(const embedding_args *args, worker *me) {
    const long K = args->row_size, format = args->table.format;
    const long size = format == dense_weight ? K : SOME, parts = ceil_div(K, size);
    for (long task = first_task(me, args->num_tokens * parts); task >= 0; task = next_task(me)) {
        const long token = task / parts, k = task % parts * size, end = least(K, k + size), row = args->ids[token];
        real *out = args->out + token * K;
        switch (format) {
            case dense_weight:
                memcpy(out, (const char *)args->table.values + row * args->table.row_bytes, K * sizeof *out);
#define CASE(FORMAT)      \
    break;                \
    case FORMAT##_weight: \
        dequantised(FORMAT##_weight, out, &args->table, row, k, end, K);
                EACH_GROUPED_FORMAT(CASE)
#undef CASE
        }
    }
    barrier(me);
}
