/* Causal attention of the last tokens of each sequence over its cached tokens.
 *
 *     1. every block of every head is packed once, because many queries use it:
 *            scratch: sequence 0: head 0: | block 0: keys, values | block 1: keys, values | ...  head 1: ...
 *     2. a task: some query tokens of a sequence (ROWS rows with the heads of a group), over the blocks that they see
 *
 *                        cached tokens ─────────►
 *            task 0      ▒▒▒▒▒▒▒▒▒▚                      ▚ each token sees itself and the tokens before it
 *            task 1      ▒▒▒▒▒▒▒▒▒▒▒▒▚
 *
 * attention.h says what is computed. */
#include "attention.h"

/* Packs one block of one head. Tasks are numbered in the order of the blocks in scratch. */
static void pack_task(const prefill_attention_args *args, operands *packed, long task, long size) {
    const long Hkv = args->num_kv_heads;
    long s = 0, before = 0; /* tasks of the earlier sequences */
    while (task >= before + Hkv * ceil_div(args->lengths[s], BLOCK))
        before += Hkv * ceil_div(args->lengths[s++], BLOCK);
    long blocks = ceil_div(args->lengths[s], BLOCK), head = (task - before) / blocks;
    long start = (task - before) % blocks * BLOCK, count = args->lengths[s] - start;
    operands *keys = packed + task * 2 * size;
    long slots[BLOCK];
    slots_of(slots, args->block_tables + s * args->block_table_stride, start, count, args->cache.page_size);
    pages_block(keys, keys + size, &args->cache, slots, count, slots, 0, head, args->head_dim);
}

/* Attends with `count` query tokens of sequence s, from its query token `from` on, and one key-value head. `keys` is
 * the first packed block of that head. */
static void attend_task(const prefill_attention_args *args, const operands *keys, long s, long head, long from,
                        long count, long size) {
    const long Hkv = args->num_kv_heads, group = args->group, D = args->head_dim;
    long first = args->query_starts[s] + from, queries = args->query_starts[s + 1] - args->query_starts[s];
    long seen = args->lengths[s] - queries + from + 1; /* tokens that the first query sees, itself included */
    operand q[ROWS * MAX_HEAD_DIM];
    attended so_far;
    for (long i = 0; i < count; i++)
        to_operands(q + i * group * D, args->q + (first + i) * args->q_stride + head * group * D, group * D);
    begin(&so_far, count * group);
    for (long start = 0; start < seen + count - 1; start += BLOCK, keys += 2 * size)
        attend(&so_far, 0, q, keys, keys + size, count * group, seen - start, group, D, args->scale);
    for (long r = 0; r < count * group; r++) {
        real *out = args->out + (((first + r / group) * Hkv + head) * group + r % group) * D;
        for (long d = 0; d < D; d += LANES) store_reals(out + d, load(so_far.sums[r] + d) / so_far.totals[r]);
    }
}

void prefill_attention(const prefill_attention_args *args, worker *me) {
    const int32_t *lengths = args->lengths, *query_starts = args->query_starts;
    const long Hkv = args->num_kv_heads, size = BLOCK / PER * args->head_dim / LANES; /* operands of a block's keys */
    const long tokens = ROWS / args->group;                                           /* query tokens of a task */
    operands *packed = (operands *)args->scratch;
    long blocks = 0, tasks = 0;
    for (long s = 0; s < args->num_sequences; s++) {
        blocks += Hkv * ceil_div(lengths[s], BLOCK);
        tasks += Hkv * ceil_div(query_starts[s + 1] - query_starts[s], tokens);
    }
    for (long task = first_task(me, blocks); task >= 0; task = next_task(me)) pack_task(args, packed, task, size);
    barrier(me);
    for (long task = first_task(me, tasks); task >= 0; task = next_task(me)) {
        long s = 0, tasks_before = 0, blocks_before = 0; /* before: of the sequences earlier than s */
        for (;; s++) {
            long of_sequence = Hkv * ceil_div(query_starts[s + 1] - query_starts[s], tokens);
            if (task < tasks_before + of_sequence) break;
            tasks_before += of_sequence;
            blocks_before += Hkv * ceil_div(lengths[s], BLOCK);
        }
        long head = (task - tasks_before) % Hkv, from = (task - tasks_before) / Hkv * tokens;
        long count = least(tokens, query_starts[s + 1] - query_starts[s] - from);
        const operands *keys = packed + (blocks_before + head * ceil_div(lengths[s], BLOCK)) * 2 * size;
        attend_task(args, keys, s, head, from, count, size);
    }
    barrier(me);
}
