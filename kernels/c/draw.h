/* The tokens of a row of logits: their weights, the intervals of weights, and the order of the tokens. */
#ifndef DRAW_H
#define DRAW_H
#include "vectors.h"

#define DRAW_RUN 128   /* logits whose largest is found first; a multiple of LANES */
#define INTERVALS 2048 /* at least 40 log(2) units of -log(weight): a smaller weight is 0 */
#define INTERVALS_PER_UNIT 64
#define WEIGHTLESS 28.0f /* more than 40 log(2): the weight is 0 */

typedef struct {
    const float *logits; /* [vocabulary] */
    float *maxima;       /* [ceil(vocabulary / DRAW_RUN)]: the largest logit of each run */
    long vocabulary;
    float largest, temperature, min_p;
} drawn_row;

typedef struct { /* of some tokens */
    int64_t count, weight;
} token_sum;

typedef struct { /* of many sets of tokens, one beside the other */
    int64_t counts[INTERVALS], weights[INTERVALS];
} token_sums;

typedef struct { /* where a sum ends: at a token of this logit */
    float logit;
    int64_t weight;   /* of one token of this logit */
    token_sum before; /* of the tokens with larger logits */
} sum_end;

/* The DRAW_RUN logits from `start` on. Those behind the end are -infinity, of weight 0; they are in `padded`. */
static const float *logits_from(const drawn_row *row, long start, float *padded) {
    const long count = row->vocabulary - start;
    if (count >= DRAW_RUN) return row->logits + start;
    for (long i = 0; i < DRAW_RUN; i++) padded[i] = i < count ? row->logits[start + i] : -INFINITY;
    return padded;
}

/* -log(weight). Subtracting the largest before the division avoids overflow. */
ALWAYS floats distances_of(const drawn_row *row, floats logits) {
    return larger((row->largest - logits) / row->temperature, (floats){0});
}

/* The weights, before they are rounded down. Their last units differ from torch's: exponential is within 2 units of
 * 2^-24 of exp. */
ALWAYS floats weights_of(floats distances) { return exponential(-distances) * 0x1p40f; }

ALWAYS ints intervals_of(floats distances) {
    floats last = (floats){0} + (INTERVALS - 1);
    return __builtin_convertvector(-larger(-distances * INTERVALS_PER_UNIT, -last), ints);
}

/* Whole numbers in the order of the tokens: the largest logit has the smallest key. -0 and 0 have the same one. */
ALWAYS pairs keys_of(floats logits) {
    pairs bits = (pairs)(logits + 0.0f);
    return bits ^ (~(pairs)((ints)bits >> 31) & 0x7FFFFFFF);
}

static long key_of(float logit) { return keys_of((floats){0} + logit)[0]; }

static float logit_of(long key) {
    uint32_t bits = key >> 31 ? key : key ^ 0x7FFFFFFF;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

static int64_t weight_of_one(const drawn_row *row, float logit) {
    return weights_of(distances_of(row, (floats){0} + logit))[0];
}
#endif
