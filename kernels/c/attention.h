/* Attention of some queries over one block of cached tokens. Decode and prefill share these functions.
 *
 *     q [rows, D] x keys ─► scores [rows, BLOCK] ─► weights: exp(score - maximum) ─► sums [rows, D] += weights x values
 *                                                     each row has its own maximum, and the sum of its weights
 *
 * keys are panels [PANELS, D / PER, WIDE]. values are rows [BLOCK / PER, D] of operands. The pages' format packs both
 * (dense_pages.h). A later block may have a larger maximum of a row. The row's sums are then scaled down, as in
 * FlashAttention (Dao et al. 2022, arXiv:2205.14135).
 *
 * What is computed, over all blocks:
 *
 *     for each token t that the row sees:   weight[t] = exp(scale * sum over d of q[row][d] * k[t][d])
 *     out[row][d] = sum over t of weight[t] * v[t][d]  /  sum over t of weight[t] */
#ifndef ATTENTION_H
#define ATTENTION_H
#include "pages.h"
#include "team.h"

#define ROWS 96          /* most rows (query tokens times heads) of a task */
#define MAX_GROUP 16     /* most query heads of a key-value head */
#define DECODE_SPLIT 128 /* cached tokens of a task of decode_attention */

typedef struct { /* one block of a head's keys and values */
    operands keys[BLOCK / PER * MAX_HEAD_DIM / LANES], values[BLOCK / PER * MAX_HEAD_DIM / LANES];
} packed_block;

typedef struct { /* the online softmax of some rows, over the blocks so far */
    float sums[ROWS][MAX_HEAD_DIM] __attribute__((aligned(64))); /* sum of exp(score - maximum) v */
    float maxima[ROWS], totals[ROWS];                            /* maximum of the scores; sum of the exponentials */
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

/* The number that is subtracted from scores before exp. If all scores so far are -infinity, the number is 0: then the
 * exponentials are 0, and no infinities are subtracted. A score of +infinity makes the row NaN, as in torch. */
static inline float base_of(float maximum) { return maximum == -INFINITY ? 0 : maximum; }

/* The first `seen` scores; the others become -infinity */
ALWAYS floats masked(floats scores, long seen) {
    static const float lanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    pairs hidden = (pairs)(load(lanes) >= (float)seen);
    return (floats)((hidden & 0xFF800000) | (~hidden & (pairs)scores));
}

/* Turns `columns` scores of a row into weights. The row sees the first `seen` of them. Its sums so far are scaled to
 * the new maximum. */
static void soften(operand *weights, float *scores, attended *so_far, long row, long columns, long seen, long D,
                   float scale) {
    floats highest = {0}, total = {0};
    highest += so_far->maxima[row];
    for (long i = 0; i < columns; i += LANES) {
        floats score = load(scores + i) * scale;
        if (seen < i + LANES) score = masked(score, seen - i);
        store(scores + i, score);
        highest = larger(score, highest);
    }
    float maximum = largest(highest), base = base_of(maximum);
    for (long i = 0; i < columns; i += LANES) {
        floats weight = exponential(load(scores + i) - base);
#ifdef PAIRS
        store_reals(weights + i, weight);
#else
        store(weights + i, weight);
#endif
        total += weight;
    }
    float old = so_far->maxima[row] == base ? 1 : expf(so_far->maxima[row] - base);
    so_far->maxima[row] = maximum;
    so_far->totals[row] = so_far->totals[row] * old + sum(total);
    if (old != 1)
        for (long d = 0; d < D; d += LANES) store(so_far->sums[row] + d, load(so_far->sums[row] + d) * old);
}

/* Attends with `rows` queries q [rows, D] to one packed block. The queries are rows `start` .. of so_far. Row r sees
 * the first `seen` + r / group tokens of the block. Tokens that no row sees are not read. */
static void attend(attended *so_far, long start, const operand *q, const operands *keys, const operands *values,
                   long rows, long seen, long group, long D, float scale) {
    float scores[ROWS][BLOCK] __attribute__((aligned(64)));
    operand weights[ROWS][BLOCK];
    const long most = least(BLOCK, seen + (rows - 1) / group); /* tokens that some row sees */
    const long columns = ceil_div(most, LANES) * LANES, steps = ceil_div(most, PER);
    for (long r = 0; r < rows; r += TALL) {
        long column = 0;
        for (; column + WIDE <= columns; column += WIDE)
            multiply(scores[r] + column, BLOCK, q + r * D, D, keys + column * (D / PER) / LANES, VECTORS, D / PER,
                     least(rows - r, TALL), 0);
        const operands *panel = keys + column * (D / PER) / LANES;
        for (; column < columns; column += LANES, panel++)
            narrow_multiply(scores[r] + column, BLOCK, q + r * D, D, panel, VECTORS, D / PER, least(rows - r, TALL), 0);
    }
    for (long r = 0; r < rows; r++)
        soften(weights[r], scores[r], so_far, start + r, columns, seen + r / group, D, scale);
    long d = 0;
    for (; d + WIDE <= D; d += WIDE)
        for (long r = 0; r < rows; r += TALL)
            multiply(so_far->sums[start + r] + d, MAX_HEAD_DIM, weights[r], BLOCK, values + d / LANES, D / LANES, steps,
                     least(rows - r, TALL), 1);
    for (; d < D; d += LANES)
        for (long r = 0; r < rows; r += TALL)
            narrow_multiply(so_far->sums[start + r] + d, MAX_HEAD_DIM, weights[r], BLOCK, values + d / LANES, D / LANES,
                            steps, least(rows - r, TALL), 1);
}
#endif
