/* Attention over a paged cache, read where it lies: of one query token a sequence, and of many. */
#include "common.h"

#define MAX_GROUP 16 /* query heads of a key-value head */
#define MAX_HEAD 128
#define SPLIT 256 /* tokens of a sequence that one thread attends to at a time */
#define ROWS 96 /* query tokens times heads that one thread attends with at a time */

static inline float dot(const bf16 *a, const bf16 *b, long count) {
    floats sums = {0};
    for (long i = 0; i < count; i += STEP) sums = add_products(sums, load_pairs(a + i), load_pairs(b + i));
    return sum(sums);
}

/* What SPLIT tokens of one sequence add for the G query heads of one key-value head: part [G, D + 2] holds the sum of
 * exp(score - maximum) v, the sum of the exponentials, and the maximum */
static void attend(float *part, const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *table, long start, long end,
                   long page_size, long Hkv, long G, long D, float scale) {
    float scores[MAX_GROUP][SPLIT] __attribute__((aligned(64)));
    const bf16 *values[SPLIT];
    for (long token = start; token < end; token++) {
        long at = (table[token / page_size] * page_size + token % page_size) * Hkv * D;
        for (long g = 0; g < G; g++) scores[g][token - start] = dot(q + g * D, k + at, D) * scale;
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

/* One query token a sequence: out and q [S, Hkv G, D], q's sequences of any stride; pages [.., page_size, Hkv, D];
 * parts [S, Hkv, splits, G, D + 2]. A split is SPLIT tokens whatever the batch, so company does not change a bit. */
void decode_attention(const call *c) {
    bf16 *out = c->tensors[0];
    float *parts = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6];
    long S = c->sizes[0], splits = c->sizes[1], page_size = c->sizes[2], Hkv = c->sizes[3], G = c->sizes[4];
    long D = c->sizes[5], q_stride = c->sizes[6], table_stride = c->sizes[7];
#pragma omp for schedule(dynamic)
    for (long task = 0; task < S * Hkv * splits; task++) {
        long split = task / Hkv % splits, head = task % Hkv, s = task / splits / Hkv;
        long start = split * SPLIT, end = start + SPLIT < lengths[s] ? start + SPLIT : lengths[s];
        if (start < end)
            attend(parts + ((s * Hkv + head) * splits + split) * G * (D + 2), q + s * q_stride + head * G * D,
                   k + head * D, v + head * D, tables + s * table_stride, start, end, page_size, Hkv, G, D, c->scalar);
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

#ifdef __AVX512BF16__
/* A block of WIDE cached tokens of one head, packed for `multiply`; tokens from count on, which may hold anything, as 0 */
static void pack_block(pairs *keys, pairs *values, const bf16 *k, const bf16 *v, const int32_t *table, long start,
                       long count, long page_size, long Hkv, long D) {
    static const bf16 zeros[MAX_HEAD];
    const bf16 *k_rows[WIDE], *v_rows[WIDE];
    for (long i = 0; i < WIDE; i++) {
        long token = start + i;
        long at = i < count ? (table[token / page_size] * page_size + token % page_size) * Hkv * D : 0;
        k_rows[i] = i < count ? k + at : zeros;
        v_rows[i] = i < count ? v + at : zeros;
    }
    pack_transposed(keys, k_rows, D);
    for (long i = 0; i < WIDE; i += 2)
        for (long d = 0; d < D; d += LANES)
            values[(i * D / 2 + d) / LANES] =
                (pairs)load_wide(v_rows[i] + d) >> 16 | (pairs)load_wide(v_rows[i + 1] + d);
}

/* `rows` queries q [rows, D] over packed blocks of one head (flash attention: Dao et al. 2022, arXiv:2205.14135). Row r
 * sees the tokens up to position first + r / G; out holds rows [G, D] a token, out_stride apart. */
static void attend_many(bf16 *out, long out_stride, const bf16 *q, const pairs *keys, const pairs *values, long rows,
                        long first, long block_stride, long G, long D, float scale) {
    float scores[ROWS][WIDE] __attribute__((aligned(64))), sums[ROWS][MAX_HEAD] __attribute__((aligned(64)));
    bf16 weights[ROWS][WIDE];
    float maxima[ROWS], totals[ROWS] = {0};
    for (long r = 0; r < rows; r++) {
        maxima[r] = -INFINITY;
        memset(sums[r], 0, sizeof sums[r]);
    }
    long end = first + (rows - 1) / G + 1; /* tokens that the last row sees */
    for (long start = 0; start < end; start += WIDE, keys += block_stride, values += block_stride) {
        for (long r = 0; r < rows; r += TALL)
            multiply(scores[r], WIDE, q + r * D, D, keys, VECTORS, D / 2, rows - r < TALL ? rows - r : TALL, 0);
        for (long r = 0; r < rows; r++) {
            long seen = first + r / G + 1 - start;
            floats highest = {0}, total = {0};
            highest += maxima[r];
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
                store_narrow(weights[r] + i, weight);
                total += weight;
            }
            float old = expf(maxima[r] - maximum);
            maxima[r] = maximum;
            totals[r] = totals[r] * old + sum(total);
            if (old != 1)
                for (long d = 0; d < D; d++) sums[r][d] *= old;
        }
        for (long d = 0; d < D; d += WIDE)
            for (long r = 0; r < rows; r += TALL)
                multiply(sums[r] + d, MAX_HEAD, weights[r], WIDE, values + d / LANES, D / LANES, WIDE / 2,
                         rows - r < TALL ? rows - r : TALL, 1);
    }
    for (long r = 0; r < rows; r++)
        for (long d = 0; d < D; d++) out[r / G * out_stride + r % G * D + d] = narrow(sums[r][d] / totals[r]);
}

/* Causal attention of the rows query_starts[s] .. query_starts[s + 1] of q [T, Hkv G, D], which are the last tokens of
 * sequence s; out is dense; packed holds two blocks [D / 2, WIDE] for every head and WIDE tokens of every sequence */
void prefill_attention(const call *c) {
    bf16 *out = c->tensors[0];
    pairs *packed = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6], *starts = c->tensors[7];
    long S = c->sizes[0], page_size = c->sizes[1], Hkv = c->sizes[2], G = c->sizes[3], D = c->sizes[4];
    long q_stride = c->sizes[5], table_stride = c->sizes[6], block_size = D / 2 * VECTORS;
    pairs *of_sequence = packed;
    for (long s = 0; s < S; s++) {
        long blocks = (lengths[s] + WIDE - 1) / WIDE;
#pragma omp for schedule(static) nowait
        for (long task = 0; task < Hkv * blocks; task++) {
            long head = task / blocks, start = task % blocks * WIDE;
            pairs *keys = of_sequence + task * 2 * block_size;
            pack_block(keys, keys + block_size, k + head * D, v + head * D, tables + s * table_stride, start,
                       lengths[s] - start, page_size, Hkv, D);
        }
        of_sequence += 2 * Hkv * blocks * block_size;
    }
#pragma omp barrier
    for (long s = 0; s < S; s++) {
        long blocks = (lengths[s] + WIDE - 1) / WIDE, count = starts[s + 1] - starts[s], tokens = ROWS / G;
        long parts = (count + tokens - 1) / tokens;
#pragma omp for schedule(dynamic) nowait
        for (long task = 0; task < Hkv * parts; task++) {
            bf16 queries[ROWS * MAX_HEAD];
            long head = task % Hkv, from = task / Hkv * tokens, some = count - from < tokens ? count - from : tokens;
            const bf16 *mine = q + (starts[s] + from) * q_stride + head * G * D;
            for (long i = 0; i < some; i++) memcpy(queries + i * G * D, mine + i * q_stride, G * D * sizeof *q);
            const pairs *keys = packed + head * blocks * 2 * block_size;
            attend_many(out + ((starts[s] + from) * Hkv + head) * G * D, Hkv * G * D, queries, keys,
                        keys + block_size, some * G, lengths[s] - count + from, 2 * block_size, G, D, c->scalar);
        }
        packed += 2 * Hkv * blocks * block_size;
    }
#pragma omp barrier
}
#else
void prefill_attention(const call *c) { (void)c; } /* ops.py does not call it */
#endif
