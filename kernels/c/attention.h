/* Attention of some queries over one block of cached tokens, which decode and prefill share.
 *
 *     q [rows, D] x keys ─► scores [rows, BLOCK] ─► weights: exp(score - maximum) ─► sums [rows, D] += weights x values
 *                                                     each row has its maximum, and its total of the weights
 *
 * keys: panels [PANELS, D / PER, WIDE]; values: rows [BLOCK / PER, D] of operands; both packed by the pages' format
 * (dense_pages.h). With the next block, a row's maximum may grow: what it has summed is then scaled down, as in flash
 * attention (Dao et al. 2022, arXiv:2205.14135).
 *
 * What is computed, over all blocks:
 *
 *     for each token t that the row sees:   weight[t] = exp(scale * sum over d of q[row][d] * k[t][d])
 *     out[row][d] = sum over t of weight[t] * v[t][d]  /  sum over t of weight[t] */
#ifndef ATTENTION_H
#define ATTENTION_H
#include "pages.h"
#include "team.h"

#define ROWS 96          /* query tokens times heads that one thread attends with at a time */
#define MAX_GROUP 16     /* query heads of a key-value head */
#define DECODE_SPLIT 128 /* cached tokens of a sequence that one thread attends to at a time */

typedef struct { /* one block of a head's keys and values */
    operands keys[BLOCK / PER * MAX_HEAD_DIM / LANES], values[BLOCK / PER * MAX_HEAD_DIM / LANES];
} packed_block;

typedef struct {                                                 /* what some rows of queries have seen so far */
    float sums[ROWS][MAX_HEAD_DIM] __attribute__((aligned(64))); /* of exp(score - maximum) v */
    float maxima[ROWS], totals[ROWS];                            /* of the scores; of the exponentials */
} attended;

/* The slots of up to BLOCK tokens of a sequence, from token `start` on */
static void slots_of(long *slots, const int32_t *block_table, long start, long count, long page_size) {
    long page = start / page_size, place = start % page_size;
    for (long i = 0; i < BLOCK && i < count; i++, place++) {
        if (place == page_size) {
            page++;
            place = 0;
        }
        slots[i] = block_table[page] * page_size + place;
    }
}

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

/* `rows` queries q [rows, D] over one packed block; they are rows `start` .. of so_far. Row r sees the first
 * `seen` + r / group tokens of the block. */
static void attend(attended *so_far, long start, const operand *q, const operands *keys, const operands *values,
                   long rows, long seen, long group, long D, float scale) {
    float scores[ROWS][BLOCK] __attribute__((aligned(64)));
    operand weights[ROWS][BLOCK];
    long panels = least(PANELS, ceil_div(seen + (rows - 1) / group, WIDE)), d = 0; /* that any row sees */
    for (long r = 0; r < rows; r += TALL)
        for (long panel = 0; panel < panels; panel++)
            multiply(scores[r] + panel * WIDE, BLOCK, q + r * D, D, keys + panel * (D / PER) * VECTORS, VECTORS,
                     D / PER, least(rows - r, TALL), 0);
    for (long r = 0; r < rows; r++) soften(weights[r], scores[r], so_far, start + r, seen + r / group, D, scale);
    for (; d + WIDE <= D; d += WIDE)
        for (long r = 0; r < rows; r += TALL)
            multiply(so_far->sums[start + r] + d, MAX_HEAD_DIM, weights[r], BLOCK, values + d / LANES, D / LANES,
                     BLOCK / PER, least(rows - r, TALL), 1);
    for (; d < D; d += LANES)
        for (long r = 0; r < rows; r += TALL)
            narrow_multiply(so_far->sums[start + r] + d, MAX_HEAD_DIM, weights[r], BLOCK, values + d / LANES, D / LANES,
                            BLOCK / PER, least(rows - r, TALL), 1);
}
#endif
