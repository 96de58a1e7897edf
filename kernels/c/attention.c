/* Attention over a paged cache, read where it lies: of one query token a sequence, and of many. Both go through the
 * cache in blocks of BLOCK tokens, packed for `multiply`, with the running maximum and sum of flash attention (Dao et
 * al. 2022, arXiv:2205.14135). */
#include "common.h"
#include "panels.h"

#define MAX_HEAD 128
#define SPLIT 128 /* tokens of a sequence that one thread attends to at a time */
#define ROWS 96   /* query tokens times heads that one thread attends with at a time */

/* One block of a head's keys and values: keys [PANELS, D / PER, WIDE], values [BLOCK / PER, D] */
typedef struct {
    operands keys[BLOCK / PER * MAX_HEAD / LANES], values[BLOCK / PER * MAX_HEAD / LANES];
} block;

/* Where the keys and values of up to BLOCK tokens of a sequence lie, from `start` on: the elements before them */
static void places(long *at, const int32_t *table, long start, long count, long page_size, long token_size) {
    long page = start / page_size, offset = start % page_size;
    for (long i = 0; i < BLOCK && i < count; i++, offset++) {
        if (offset == page_size) {
            page++;
            offset = 0;
        }
        at[i] = (table[page] * page_size + offset) * token_size;
    }
}

/* Packs BLOCK cached tokens of one head; tokens from count on, which may hold anything, as 0. Meanwhile asks for the
 * `later` tokens of the next block, which lie at `after`. */
static void pack(operands *keys, operands *values, const bf16 *k, const bf16 *v, const long *at, long count,
                 const long *after, long later, long D) {
    static const bf16 zeros[MAX_HEAD];
    const bf16 *k_rows[BLOCK], *v_rows[BLOCK];
    for (long i = 0; i < BLOCK; i++) {
        k_rows[i] = i < count ? k + at[i] : zeros;
        v_rows[i] = i < count ? v + at[i] : zeros;
    }
    for (long panel = 0; panel < PANELS; panel++)
        pack_transposed(keys + panel * (D / PER) * VECTORS, k_rows + panel * WIDE, D);
    for (long i = 0; i < BLOCK; i += PER) {
        for (long j = i; j < i + PER && j < later; j++)
            for (long d = 0; d < D; d += LINE) {
                __builtin_prefetch(k + after[j] + d, 0, 2);
                __builtin_prefetch(v + after[j] + d, 0, 2);
            }
        for (long d = 0; d < D; d += LANES) {
            operands *to = values + (i / PER * D + d) / LANES;
#ifdef PAIRS
            *to = (pairs)load_wide(v_rows[i] + d) >> 16 | (pairs)load_wide(v_rows[i + 1] + d);
#else
            *to = load_wide(v_rows[i] + d);
#endif
        }
    }
}

typedef struct {                                             /* what some rows of queries have seen so far */
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

/* What exponents are taken from. Where all scores are -infinity so far, exponentials of them are 0, and no difference
 * of infinities; a score of infinity makes all that comes of it NaN, as it does in torch. */
static inline float base_of(float maximum) { return maximum == -INFINITY ? 0 : maximum; }

/* One row's scores [BLOCK], of which it sees the first `seen`, become weights; what it has seen before is scaled to the
 * new maximum */
static void soften(operand *weights, float *scores, attended *so_far, long row, long seen, long D, float scale) {
    floats highest = {0}, total = {0};
    highest += so_far->maxima[row];
    for (long i = 0; i < BLOCK; i += LANES) {
        floats score = load(scores + i) * scale;
        if (seen < i + LANES)
            for (long j = seen > i ? seen - i : 0; j < LANES; j++) score[j] = -INFINITY;
        store(scores + i, score);
        highest = larger(score, highest);
    }
    float maximum = largest(highest), base = base_of(maximum);
    for (long i = 0; i < BLOCK; i += LANES) {
        floats weight = exponential(load(scores + i) - base);
#ifdef PAIRS
        store_narrow(weights + i, weight);
#else
        store(weights + i, weight);
#endif
        total += weight;
    }
    float old = expf(so_far->maxima[row] - base);
    so_far->maxima[row] = maximum;
    so_far->totals[row] = so_far->totals[row] * old + sum(total);
    if (old != 1)
        for (long d = 0; d < D; d += LANES) store(so_far->sums[row] + d, load(so_far->sums[row] + d) * old);
}

/* `rows` queries q [rows, D] over one packed block; row r sees the first `first` + r / G of its tokens */
static void attend(attended *so_far, long base, const operand *q, const operands *keys, const operands *values,
                   long rows, long first, long G, long D, float scale) {
    float scores[ROWS][BLOCK] __attribute__((aligned(64)));
    operand weights[ROWS][BLOCK];
    long panels = least(PANELS, parts_of(first + (rows - 1) / G, WIDE)), d = 0; /* that any row sees */
    for (long r = 0; r < rows; r += TALL)
        for (long panel = 0; panel < panels; panel++)
            multiply(scores[r] + panel * WIDE, BLOCK, q + r * D, D, keys + panel * (D / PER) * VECTORS, VECTORS,
                     D / PER, least(rows - r, TALL), 0);
    for (long r = 0; r < rows; r++) soften(weights[r], scores[r], so_far, base + r, first + r / G, D, scale);
    for (; d + WIDE <= D; d += WIDE)
        for (long r = 0; r < rows; r += TALL)
            multiply(so_far->sums[base + r] + d, MAX_HEAD, weights[r], BLOCK, values + d / LANES, D / LANES,
                     BLOCK / PER, least(rows - r, TALL), 1);
    for (; d < D; d += LANES)
        for (long r = 0; r < rows; r += TALL)
            narrow_multiply(so_far->sums[base + r] + d, MAX_HEAD, weights[r], BLOCK, values + d / LANES, D / LANES,
                            BLOCK / PER, least(rows - r, TALL), 1);
}

/* What the tokens start .. end of one sequence add for `heads` key-value heads with G query heads each. A head's part
 * [G, D + 2], `stride` floats apart, holds the sum of exp(score - maximum) v, that of the exponentials, and the
 * maximum. */
static void attend_split(float *parts, long stride, const operand *q, const bf16 *k, const bf16 *v,
                         const int32_t *table, long start, long end, long length, long page_size, long token_size,
                         long heads, long G, long D, float scale) {
    block packed;
    attended so_far;
    begin(&so_far, heads * G);
    for (; start < end; start += BLOCK) {
        long at[BLOCK], after[BLOCK], later = length - start - BLOCK;
        places(at, table, start, end - start, page_size, token_size);
        places(after, table, start + BLOCK, later, page_size, token_size);
        for (long head = 0; head < heads; head++) {
            pack(packed.keys, packed.values, k + head * D, v + head * D, at, end - start, after, later, D);
            attend(&so_far, head * G, q + head * G * D, packed.keys, packed.values, G, end - start, G, D, scale);
        }
    }
    for (long head = 0; head < heads; head++)
        for (long g = 0; g < G; g++) {
            float *part = parts + head * stride + g * (D + 2);
            memcpy(part, so_far.sums[head * G + g], D * sizeof *part);
            part[D] = so_far.totals[head * G + g];
            part[D + 1] = so_far.maxima[head * G + g];
        }
}

/* One query token a sequence: out and q [S, Hkv G, D], q's sequences of any stride; pages [.., page_size, Hkv, D];
 * parts [S, Hkv, splits, G, D + 2]. A split is SPLIT tokens whatever the batch, so that no other sequence changes a
 * bit. */
void decode_attention(const call *c, worker *me) {
    bf16 *out = c->tensors[0];
    float *parts = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6];
    long S = c->sizes[0], splits = c->sizes[1], page_size = c->sizes[2], Hkv = c->sizes[3], G = c->sizes[4];
    long D = c->sizes[5], q_stride = c->sizes[6], table_stride = c->sizes[7];
    long part = G * (D + 2), used = 0; /* splits of the longest sequence */
    for (long s = 0; s < S; s++) used = lengths[s] > used * SPLIT ? parts_of(lengths[s], SPLIT) : used;
    long together = least(Hkv, ROWS / G),
         groups = parts_of(Hkv, together); /* heads of a task, which lie side by side */
    for (long task = first(me, S * used * groups); task >= 0; task = next(me)) {
        long head = task % groups * together, split = task / groups % used, s = task / groups / used;
        long start = split * SPLIT, end = least(start + SPLIT, lengths[s]), heads = least(together, Hkv - head);
        if (start >= end) continue;
        operand query[ROWS * MAX_HEAD];
        to_operands(query, q + s * q_stride + head * G * D, heads * G * D);
        attend_split(parts + ((s * Hkv + head) * splits + split) * part, splits * part, query, k + head * D,
                     v + head * D, tables + s * table_stride, start, end, lengths[s], page_size, Hkv * D, heads, G, D,
                     c->scalar);
    }
    meet(me);
    for (long row = first(me, S * Hkv * G); row >= 0; row = next(me)) {
        long count = parts_of(lengths[row / (Hkv * G)], SPLIT), stride = G * (D + 2);
        const float *of_row = parts + row / G * splits * stride + row % G * (D + 2);
        float maximum = -INFINITY, total = 0, sums[MAX_HEAD] = {0};
        for (long i = 0; i < count; i++)
            if (of_row[i * stride + D + 1] > maximum) maximum = of_row[i * stride + D + 1];
        maximum = base_of(maximum);
        for (long i = 0; i < count; i++) {
            const float *of_split = of_row + i * stride;
            float weight = expf(of_split[D + 1] - maximum);
            total += weight * of_split[D];
            for (long d = 0; d < D; d += LANES) store(sums + d, load(sums + d) + load(of_split + d) * weight);
        }
        for (long d = 0; d < D; d += LANES) store_narrow(out + row * D + d, load(sums + d) / total);
    }
    meet(me);
}

/* Causal attention of the rows query_starts[s] .. query_starts[s + 1] of q [T, Hkv G, D], which are the last tokens of
 * sequence s; out is dense; packed holds the keys and values of every sequence, block by block: [Hkv, blocks, 2, BLOCK,
 * D] operands */
void prefill_attention(const call *c, worker *me) {
    bf16 *out = c->tensors[0];
    operands *packed = c->tensors[1];
    const bf16 *q = c->tensors[2], *k = c->tensors[3], *v = c->tensors[4];
    const int32_t *tables = c->tensors[5], *lengths = c->tensors[6], *starts = c->tensors[7];
    long S = c->sizes[0], page_size = c->sizes[1], Hkv = c->sizes[2], G = c->sizes[3], D = c->sizes[4];
    long q_stride = c->sizes[5], table_stride = c->sizes[6], size = BLOCK / PER * D / LANES;
    long blocks = 0, parts = 0, tokens = ROWS / G; /* of a part */
    for (long s = 0; s < S; s++) {
        blocks += parts_of(lengths[s], BLOCK);
        parts += parts_of(starts[s + 1] - starts[s], tokens);
    }
    for (long task = first(me, Hkv * blocks); task >= 0; task = next(me)) {
        long s = 0, before = 0;
        while (task >= before + Hkv * parts_of(lengths[s], BLOCK)) before += Hkv * parts_of(lengths[s++], BLOCK);
        long mine = parts_of(lengths[s], BLOCK), head = (task - before) / mine, start = (task - before) % mine * BLOCK;
        operands *keys = packed + task * 2 * size;
        long at[BLOCK];
        places(at, tables + s * table_stride, start, lengths[s] - start, page_size, Hkv * D);
        pack(keys, keys + size, k + head * D, v + head * D, at, lengths[s] - start, at, 0, D);
    }
    meet(me);
    for (long task = first(me, Hkv * parts); task >= 0; task = next(me)) {
        long s = 0, before = 0, of_sequence = 0; /* blocks of the sequences before */
        for (;; s++) {
            long more = Hkv * parts_of(starts[s + 1] - starts[s], tokens);
            if (task < before + more) break;
            before += more;
            of_sequence += Hkv * parts_of(lengths[s], BLOCK);
        }
        long head = (task - before) % Hkv, from = (task - before) / Hkv * tokens, count = starts[s + 1] - starts[s];
        long some = least(tokens, count - from),
             seen = lengths[s] - count + from + 1; /* by the first, itself included */
        const bf16 *mine = q + (starts[s] + from) * q_stride + head * G * D;
        operand queries[ROWS * MAX_HEAD];
        for (long i = 0; i < some; i++) to_operands(queries + i * G * D, mine + i * q_stride, G * D);
        const operands *keys = packed + (of_sequence + head * parts_of(lengths[s], BLOCK)) * 2 * size;
        attended so_far;
        begin(&so_far, some * G);
        for (long start = 0; start < seen + some - 1; start += BLOCK, keys += 2 * size)
            attend(&so_far, 0, queries, keys, keys + size, some * G, seen - start, G, D, c->scalar);
        for (long r = 0; r < some * G; r++) {
            bf16 *to = out + (((starts[s] + from + r / G) * Hkv + head) * G + r % G) * D;
            for (long d = 0; d < D; d += LANES) store_narrow(to + d, load(so_far.sums[r] + d) / so_far.totals[r]);
        }
    }
    meet(me);
}
