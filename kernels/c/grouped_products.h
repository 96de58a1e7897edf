/* Products of tiles of a grouped weight with the planes of some tokens. */
#ifndef GROUPED_PRODUCTS_H
#define GROUPED_PRODUCTS_H
#include "grouped_weight.h"

#define MAX_BLOCK_TOKENS 32 /* tokens that are multiplied with a tile before the next tile is unpacked */

typedef union {    /* the term that a token's values in a group add to their products with codes */
    int32_t start; /* - zero * sum of X, if zero is a constant */
    float sum;     /* factor * sum of X, if there are minima; sum of X, if each group has its own zero */
} group_term;

typedef struct {       /* tokens as planes (planes.h), tile after tile of K */
    int8_t *planes;    /* [K / 32, tokens, X_BYTES] */
    float *factors;    /* [K / 32, tokens] */
    group_term *terms; /* [K / 32, tokens, groups of a tile] */
    long tokens;       /* at most MAX_BLOCK_TOKENS */
} token_block;

/* sums [tokens, 16] = the products of the tokens with the 16 rows of w from `row` on. Weights are prefetched `distance`
 * bytes in advance; 0: no prefetch. */
void grouped_products(float *sums, const weight *w, long row, long K, const token_block *x, long planes, long distance);
#endif
