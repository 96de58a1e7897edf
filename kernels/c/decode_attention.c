/* Attention of one query token a sequence over its cached tokens, split over the tokens (flash decoding).
 *
 *                    cached tokens ─────────────────────►
 *     sequence 0     ▒▒▒▒▒▒▒▒│▒▒▒▒▒▒▒▒│▒▒▒▒▒▒▒▒│▒▒▒          a task: DECODE_SPLIT tokens of a sequence, and several
 *     sequence 1     ▒▒▒▒▒▒▒▒│▒▒                             key-value heads with at most ROWS query heads together
 *
 *     part [group, D + 2] of a split and a head:  | sum of exp(score - maximum) v [D] | sum of exp | maximum |
 *
 * A row of out is the sum of its parts, each scaled from its own maximum to the largest one. A split has DECODE_SPLIT
 * tokens for every batch, so attention is batch-invariant. attention.h says what is computed. */
#include "attention.h"

/* The address of a part in scratch [S, Hkv, splits, group, D + 2] */
static float *part_of(const decode_attention_args *args, long sequence, long head, long split) {
    long part = args->group * (args->head_dim + 2);
    return args->scratch + ((sequence * args->num_kv_heads + head) * args->splits + split) * part;
}

/* Attends with the queries of `heads` key-value heads of a sequence, from `head` on, to one split of its tokens */
static void attend_split(const decode_attention_args *args, long sequence, long head, long heads, long split) {
    const long D = args->head_dim, group = args->group, length = args->lengths[sequence];
    const int32_t *block_table = args->block_tables + sequence * args->block_table_stride;
    long start = split * DECODE_SPLIT, end = least(start + DECODE_SPLIT, length);
    operand q[ROWS * MAX_HEAD_DIM];
    packed_block packed;
    attended so_far;
    to_operands(q, args->q + sequence * args->q_stride + head * group * D, heads * group * D);
    begin(&so_far, heads * group);
    for (; start < end; start += BLOCK) {
        long slots[BLOCK], next_slots[BLOCK], left = length - start - BLOCK;
        slots_of(slots, block_table, start, end - start, args->cache.page_size);
        slots_of(next_slots, block_table, start + BLOCK, left, args->cache.page_size);
        for (long i = 0; i < heads; i++) {
            pages_block(packed.keys, packed.values, &args->cache, slots, end - start, next_slots, left, head + i, D);
            attend(&so_far, i * group, q + i * group * D, packed.keys, packed.values, group, end - start, group, D,
                   args->scale);
        }
    }
    for (long i = 0; i < heads; i++)
        for (long g = 0; g < group; g++) {
            float *part = part_of(args, sequence, head + i, split) + g * (D + 2);
            memcpy(part, so_far.sums[i * group + g], D * sizeof *part);
            part[D] = so_far.totals[i * group + g];
            part[D + 1] = so_far.maxima[i * group + g];
        }
}

/* Computes out [D] of one query head from the parts [D + 2] of its splits, which are `stride` floats apart */
static void combine(real *out, const float *parts, long splits, long stride, long D) {
    float maximum = -INFINITY, total = 0, sums[MAX_HEAD_DIM] = {0};
    for (long i = 0; i < splits; i++)
        if (parts[i * stride + D + 1] > maximum) maximum = parts[i * stride + D + 1];
    maximum = base_of(maximum);
    for (long i = 0; i < splits; i++) {
        const float *part = parts + i * stride;
        float weight = expf(part[D + 1] - maximum);
        total += weight * part[D];
        for (long d = 0; d < D; d += LANES) store(sums + d, load(sums + d) + load(part + d) * weight);
    }
    for (long d = 0; d < D; d += LANES) store_reals(out + d, load(sums + d) / total);
}

void decode_attention(const decode_attention_args *args, worker *me) {
    const long S = args->num_sequences, Hkv = args->num_kv_heads, group = args->group, D = args->head_dim;
    long longest = 0; /* the splits of the longest sequence */
    for (long s = 0; s < S; s++)
        if (ceil_div(args->lengths[s], DECODE_SPLIT) > longest) longest = ceil_div(args->lengths[s], DECODE_SPLIT);
    long few = S * longest * Hkv / (TASKS_PER_THREAD * me->num_threads); /* heads of a task that leave enough tasks */
    long together = least(least(Hkv, ROWS / group), few > 1 ? few : 1),
         of_heads = ceil_div(Hkv, together); /* heads of a task; tasks of a split */
    for (long task = first_task(me, S * longest * of_heads); task >= 0; task = next_task(me)) {
        long head = task % of_heads * together, split = task / of_heads % longest, s = task / of_heads / longest;
        if (split * DECODE_SPLIT < args->lengths[s]) attend_split(args, s, head, least(together, Hkv - head), split);
    }
    barrier(me);
    for (long row = first_task(me, S * Hkv * group); row >= 0; row = next_task(me)) {
        long s = row / (Hkv * group), head = row / group % Hkv, splits = ceil_div(args->lengths[s], DECODE_SPLIT);
        const float *parts = part_of(args, s, head, 0) + row % group * (D + 2);
        combine(args->out + row * D, parts, splits, group * (D + 2), D);
    }
    barrier(me);
}
