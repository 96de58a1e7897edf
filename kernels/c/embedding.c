/* Rows of a table, copied: out[token] = table[ids[token]]. */
#include "team.h"

#include <string.h>

void embedding(const embedding_args *args, worker *me) {
    for (long token = first_task(me, args->num_tokens); token >= 0; token = next_task(me))
        memcpy(args->out + token * args->row_size, args->table + args->ids[token] * args->table_stride,
               args->row_size * sizeof *args->out);
    barrier(me);
}
