/* Attention over a paged cache, read where it lies: of one query token a sequence, and of many. */
#include "common.h"

#define MAX_GROUP 16 /* query heads of a key-value head */
#define MAX_HEAD 128
#define SPLIT 128 /* tokens of a sequence that one thread attends to at a time */
#define ROWS 96 /* query tokens times heads that one thread attends with at a time */

static inline float dot(const bf16 *k, const operand *q, long count) {
    floats sums = {0};
    for (long i = 0; i < count; i += STEP) sums = add_products(sums, load_pairs(k + i), q + i);
    return sum(sums);
}

/* What SPLIT tokens of one sequence add for the G query heads of one key-value head: part [G, D + 2] holds the sum of
 * exp(score - maximum) v, the sum of the exponentials, and the maximum */
static void attend(float *part, const operand *q, const bf16 *k, const bf16 *v, const int32_t *table, long start, long end,
                   long page_size, long Hkv, long G, long D, float scale) {
    float scores[MAX_GROUP][SPLIT] __attribute__((aligned(64)));
    const bf16 *values[SPLIT];
    for (long token = start; token < end; token++) {
        long at = (table[token / page_size] * page_size + token % page_size) * Hkv * D;
        for (long g = 0; g < G; g++) scores[g][token - start] = dot(k + at, q + g * D, D) * scale;
        values[token - start] = v + at;
    }
    long count = end - start, padded = (count + LANES - 1) / LANES * LANES;
    for (long g = 0; g < G; g++, part += D + 2) {
        float maximum = scores[g][0];
        for (long i = 1; i < count; i++) maximum = scores[g][i] > maximum ? scores[g][i] : maximum;
        for (long i = count; i < padded; i++) scores[g][i] = -INFINITY;
        floats total = {0}, sums[MAX_HEAD / LANES] = {0};
        for (long i = 0; i < padded; i += LANES) {
            floats weights = load(scores[g] + i);
            weights = exponential(weights - maximum);
            memcpy(scores[g] + i, &weights, sizeof weights);
            total += weights;
        }
        for (long i = 0; i < count; i++)
            for (long d = 0; d < D / LANES; d++) sums[d] += scores[g][i] * load_wide(values[i] + d * LANES);
        memcpy(part, sums, D * sizeof *part);
        part[D] = sum(total);
        part[D + 1] = maximum;
    }
}

/* Where the keys and values of up to WIDE tokens of a sequence lie, from `start` on: the elements before them */
static void places(long *at, const int32_t *table, long start, long count, long page_size, long token_size) {
    long page = start / page_size, offset = start % page_size;
    for (long i = 0; i < WIDE && i < count; i++, offset++) {
        if (offset == page_size) {
            page++;
            offset = 0;
        }
        at[i] = (table[page] * page_size + offset) * token_size;
    }
}

/* A block of WIDE cached tokens of one head, packed for `multiply`; tokens from count on, which may hold anything, as 0.
 * Meanwhile asks for the `later` tokens of the next block, which lie at `after`. */
static void pack_block(column *keys, column *values, const bf16 *k, const bf16 *v, const long *at, long count,
                       const long *after, long later, long D) {
    static const bf16 zeros[MAX_HEAD];
    const bf16 *k_rows[WIDE], *v_rows[WIDE];
    for (long i = 0; i < WIDE; i++) {
        k_rows[i] = i < count ? k + at[i] : zeros;
        v_rows[i] = i < count ? v + at[i] : zeros;
    }
    pack_transposed(keys, k_rows, D);
    for (long i = 0; i < WIDE; i += PER) {
        for (long j = i; j < i + PER && j < later; j++)
            for (long d = 0; d < D; d += STEP) {
                __builtin_prefetch(k + after[j] + d, 0, 2);
                __builtin_prefetch(v + after[j] + d, 0, 2);
            }
        for (long d = 0; d < D; d += LANES) {
            column *to = values + (i / PER * D + d) / LANES;
#ifdef PAIRS
            *to = (pairs)load_wide(v_rows[i] + d) >> 16 | (pairs)load_wide(v_rows[i + 1] + d);
#else
            *to = load_wide(v_rows[i] + d);
#endif
        }
    }
}

/* What some rows of queries have seen so far (flash attention: Dao et al. 2022, arXiv:2205.14135) */
typedef struct {
    float sums[ROWS][MAX_HEAD] __attribute__((aligned(64))); /* of exp(score - maximum) v */
    float maxima[ROWS], totals[ROWS];                        /* of the exponentials */
} attended;

static void begin(attended *so_far, long rows) {
    for (long r = 0; r < rows; r++) {
        so_far->maxima[r] = -INFINITY;
        so_far->totals[r] = 0;
        memset(so_far->sums[r], 0, sizeof so_far->sums[r]);
    }
}

/* `rows` queries q [rows, D] over one packed block; row r sees the first `first` + r / G of its tokens */
static void attend_block(attended *so_far, long base, const operand *q, const column *keys, const column *values,
                         long rows, long first, long G, long D, float scale) {
    float scores[ROWS][WIDE] __attribute__((aligned(64)));
    operand weights[ROWS][WIDE];
    for (long r = 0; r < rows; r += TALL)
        multiply(scores[r], WIDE, q + r * D, D, keys, VECTORS, D / PER, rows - r < TALL ? rows - r : TALL, 0);
    for (long r = 0; r < rows; r++) {
        long seen = first + r / G;
        floats highest = {0}, total = {0};
        highest += so_far->maxima[base + r];
        for (long i = 0; i < WIDE; i += LANES) {
            floats score = load(scores[r] + i) * scale;
            if (seen < i + LANES)
                for (long j = seen > i ? seen - i : 0; j < LANES; j++) score[j] = -INFINITY;
            memcpy(scores[r] + i, &score, sizeof score);
            pairs higher = (pairs)(score > highest);
            highest = (floats)((higher & (pairs)score) | (~higher & (pairs)highest));
        }
        float maximum = highest[0];
        for (long j = 1; j < LANES; j++) maximum = highest[j] > maximum ? highest[j] : maximum;
        for (long i = 0; i < WIDE; i += LANES) {
            floats weight = exponential(load(scores[r] + i) - maximum);
#ifdef PAIRS
            store_narrow(weights[r] + i, weight);
#else
            memcpy(weights[r] + i, &weight, sizeof weight);
#endif
            total += weight;
        }
        float old = expf(so_far->maxima[base + r] - maximum);
        so_far->maxima[base + r] = maximum;
        so_far->totals[base + r] = so_far->totals[base + r] * old + sum(total);
        if (old != 1)
            for (long d = 0; d < D; d++) so_far->sums[base + r][d] *= old;
    }
    for (long d = 0; d < D; d += WIDE)
        for (long r = 0; r < rows; r += TALL)
            multiply(so_far->sums[base + r] + d, MAX_HEAD, weights[r], WIDE, values + d / LANES, D / LANES, WIDE / PER,
                     rows - r < TALL ? rows - r : TALL, 1);
}

/* The same for a block of tokens at a time, where D is a multiple of WIDE; for all heads, so that the cache is read from
 * one end to the other. parts are `stride` floats apart for each key-value head. */
static void attend_packed(float *parts, long stride, const operand *q, const bf16 *k, const bf16 *v,
                          const int32_t *table, long start, long end, long length, long page_size, long Hkv, long G,
                          long D, float scale) {
    column keys[MAX_HEAD / PER * VECTORS], values[WIDE / PER * MAX_HEAD / LANES];
    attended so_far;
    begin(&so_far, Hkv * G);
    for (; start < end; start += WIDE) {
        long at[WIDE], after[WIDE], later = length - start - WIDE;
        places(at, table, start, end - start, page_size, Hkv * D);
        places(after, table, start + WIDE, later, page_size, Hkv * D);
        for (long head = 0; head < Hkv; head++) {
            pack_block(keys, values, k + head * D, v + head * D, at, end - start, after, later, D);
            attend_block(&so_far, head * G, q + head * G * D, keys, values, G, end - start, G, D, scale);
        }
    }
    for (long head = 0; head < Hkv; head++)
        for (long g = 0; g < G; g++) {
            float *part = parts + head * stride + g * (D + 2);
            memcpy(part, so_far.sums[head * G + g], D * sizeof *part);
            part[D] = so_far.totals[head * G + g];
            part[D + 1] = so_far.maxima[head * G + g];
        }
}

/* One query token a sequence: out and q [S, Hkv G, D], q's sequences of any stride; pages [.., page_size, Hkv, D];
 * parts [S, Hkv, splits, G, D + 2]. A split is SPLIT tokens whatever the batch, so company does not change a bit. */
void decode_attention(const call *c) {
    bf16 *out = c->tensors[0];
    float *parts = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6];
    long S = c->sizes[0], splits = c->sizes[1], page_size = c->sizes[2], Hkv = c->sizes[3], G = c->sizes[4];
    long D = c->sizes[5], q_stride = c->sizes[6], table_stride = c->sizes[7];
    long part = G * (D + 2), packs = 0, used = 0; /* splits of the longest sequence */
    for (long s = 0; s < S; s++)
        if (lengths[s] > used * SPLIT) used = (lengths[s] + SPLIT - 1) / SPLIT;
#ifdef __AVX512F__ /* where a block is packed with few instructions */
    packs = D % WIDE == 0 && Hkv * G <= ROWS;
#endif
    long together = packs ? Hkv : 1; /* heads of a task */
#pragma omp for schedule(guided)
    for (long task = 0; task < S * used * Hkv / together; task++) {
        long head = packs ? 0 : task % Hkv, split = task * together / Hkv % used, s = task * together / Hkv / used;
        long start = split * SPLIT, end = start + SPLIT < lengths[s] ? start + SPLIT : lengths[s];
        if (start >= end) continue;
        float *mine = parts + ((s * Hkv + head) * splits + split) * part;
        const int32_t *table = tables + s * table_stride;
        operand query[together * G * D];
        to_operands(query, q + s * q_stride + head * G * D, together * G * D);
        if (packs)
            attend_packed(mine, splits * part, query, k, v, table, start, end, lengths[s], page_size, Hkv, G, D,
                          c->scalar);
        else attend(mine, query, k + head * D, v + head * D, table, start, end, page_size, Hkv, G, D, c->scalar);
    }
#pragma omp for
    for (long row = 0; row < S * Hkv * G; row++) {
        long count = (lengths[row / (Hkv * G)] + SPLIT - 1) / SPLIT, stride = G * (D + 2);
        const float *first = parts + row / G * splits * stride + row % G * (D + 2);
        float maximum = -INFINITY, total = 0, sums[MAX_HEAD] = {0};
        for (long i = 0; i < count; i++)
            if (first[i * stride + D + 1] > maximum) maximum = first[i * stride + D + 1];
        for (long i = 0; i < count; i++) {
            const float *part = first + i * stride;
            float weight = expf(part[D + 1] - maximum);
            total += weight * part[D];
            for (long d = 0; d < D; d++) sums[d] += weight * part[d];
        }
        for (long d = 0; d < D; d++) out[row * D + d] = narrow(sums[d] / total);
    }
}

/* Causal attention of the rows query_starts[s] .. query_starts[s + 1] of q [T, Hkv G, D], which are the last tokens of
 * sequence s; out is dense; packed holds two blocks [D / PER, WIDE] for every head and WIDE tokens of every sequence */
void prefill_attention(const call *c) {
    bf16 *out = c->tensors[0];
    column *packed = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6], *starts = c->tensors[7];
    long S = c->sizes[0], page_size = c->sizes[1], Hkv = c->sizes[2], G = c->sizes[3], D = c->sizes[4];
    long q_stride = c->sizes[5], table_stride = c->sizes[6], block_size = D / PER * VECTORS;
    column *of_sequence = packed;
    for (long s = 0; s < S; s++) {
        long blocks = (lengths[s] + WIDE - 1) / WIDE;
#pragma omp for schedule(static) nowait
        for (long task = 0; task < Hkv * blocks; task++) {
            long head = task / blocks, start = task % blocks * WIDE;
            column *keys = of_sequence + task * 2 * block_size;
            long at[WIDE];
            places(at, tables + s * table_stride, start, lengths[s] - start, page_size, Hkv * D);
            pack_block(keys, keys + block_size, k + head * D, v + head * D, at, lengths[s] - start, at, 0, D);
        }
        of_sequence += 2 * Hkv * blocks * block_size;
    }
#pragma omp barrier
    for (long s = 0; s < S; s++) {
        long blocks = (lengths[s] + WIDE - 1) / WIDE, count = starts[s + 1] - starts[s], tokens = ROWS / G;
        long parts = (count + tokens - 1) / tokens;
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < Hkv * parts; task++) {
            operand queries[ROWS * MAX_HEAD];
            long head = task % Hkv, from = task / Hkv * tokens, some = count - from < tokens ? count - from : tokens;
            const bf16 *mine = q + (starts[s] + from) * q_stride + head * G * D;
            for (long i = 0; i < some; i++) to_operands(queries + i * G * D, mine + i * q_stride, G * D);
            const column *keys = packed + head * blocks * 2 * block_size;
            attended so_far;
            begin(&so_far, some * G);
            long seen = lengths[s] - count + from + 1; /* by the first of them, itself included */
            for (long start = 0; start < seen + some - 1; start += WIDE, keys += 2 * block_size)
                attend_block(&so_far, 0, queries, keys, keys + block_size, some * G, seen - start, G, D, c->scalar);
            for (long r = 0; r < some * G; r++) {
                bf16 *to = out + (((starts[s] + from + r / G) * Hkv + head) * G + r % G) * D;
                for (long d = 0; d < D; d++) to[d] = narrow(so_far.sums[r][d] / so_far.totals[r]);
            }
        }
        packed += 2 * Hkv * blocks * block_size;
    }
#pragma omp barrier
}
