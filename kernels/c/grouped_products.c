/* The inner loop of linears with grouped weights, for any number of tokens.
 *
 *     16 rows of the weight:   tile  tile  tile ...  k ──►
 *                               │ unpacked once, to registers
 *                               ▼
 *     x as planes:             each token's 32 values of the tile's k        sums [tokens, 16 rows]: one row per lane
 *
 * What is computed. The order is the same for any other tokens and any number of threads:
 *
 *     sum = 0;  for each group g of 16 or 32 values:
 *         dot = sum over the group of (code - zero) * X                      exact, in int32
 *         sum += dot * (scale * factor);  sum += offset * (factor * sum of X)                                        */
#include "grouped_products.h"

/* The numbers that the tiles of a span share, for a part of the rows */
typedef struct {
    floats scale, offset, zero;
} span_facts;

ALWAYS span_facts facts_of(const grouped_kind kind, const tile_row *w, long span, const int part) {
    long at = span * TILE_ROWS + part * LANES;
    span_facts facts = {.scale = span_scale(w, span, part)};
    if (kind.has_minima) facts.offset = kind.sub_scales ? -half_floats(w->minima + at) : half_floats(w->minima + at);
    if (kind.zero < 0) facts.zero = byte_floats(w->zeros + at, 0) - (float)ZERO_OF_BYTES(kind);
    return facts;
}

/* The scale and the offset of a group */
ALWAYS span_facts group_facts(const grouped_kind kind, const tile_row *w, long group, const int part,
                              span_facts facts) {
    const long at = group * TILE_ROWS + part * LANES;
    if (kind.sub_scales) facts.scale *= byte_floats(w->sub_scales + at, kind.sub_scales == 2);
    if (kind.sub_scales && kind.has_minima) facts.offset *= byte_floats(w->sub_minima + at, 0);
    return facts;
}

ALWAYS ints first_total(const grouped_kind kind, const group_term *term) {
    ints total = {0};
    return kind.zero > ZERO_OF_BYTES(kind) ? total + term->start : total;
}

/* Adds the sum of a group's products to a token's sum */
ALWAYS floats add_group(const grouped_kind kind, floats sum, ints total, span_facts facts, float factor,
                        const group_term *term) {
    floats product = __builtin_convertvector(total, floats);
    if (kind.zero < 0) product -= facts.zero * term->sum;
    sum += product * (facts.scale * factor);
    return kind.has_minima ? sum + facts.offset * term->sum : sum;
}

/* Adds the products of a part of a tile with all tokens. The codes stay in registers. */
ALWAYS void add_tile(const grouped_kind kind, const int planes, floats *sums, const int part, const tile_row *w,
                     long tile, const span_facts *span, const token_block *x) {
    const int groups = kind.per_tile, count = 8 / groups, bytes = X_BYTES(kind.bits, planes);
    const int8_t *values = x->planes + tile * x->tokens * bytes;
    const float *factors = x->factors + tile * x->tokens;
    const group_term *terms = x->terms + tile * x->tokens * groups;
    quads codes[8];
#pragma GCC unroll 8
    for (int b = 0; b < 8; b++) codes[b] = tile_code(kind, w, tile, part, b);
    span_facts facts[2];
    for (int g = 0; g < groups; g++) facts[g] = group_facts(kind, w, tile * groups + g, part, *span);
    for (long t = 0; t < x->tokens; t++) {
        floats sum = sums[t * PARTS + part];
#pragma GCC unroll 2
        for (int g = 0; g < groups; g++) {
            const group_term *term = terms + t * groups + g;
            running products = {.total = first_total(kind, term)};
#pragma GCC unroll 8
            for (int i = 0; i < count; i++)
                add_code(kind.bits, planes, count, i, &products, codes[4 * g + CODE_AT(count, i)],
                         values + t * bytes + g * X_GROUP(kind.bits, planes));
            sum = add_group(kind, sum, products.total, facts[g], factors[t], term);
        }
        sums[t * PARTS + part] = sum;
    }
}

/* The same for one token and all parts of a tile. Codes are unpacked just before the product, and x is loaded once. */
ALWAYS void add_tile_once(const grouped_kind kind, const int planes, floats *sums, const tile_row *w, long tile,
                          const span_facts *span, const token_block *x) {
    const int groups = kind.per_tile, count = 8 / groups;
    const int8_t *values = x->planes + tile * X_BYTES(kind.bits, planes);
#pragma GCC unroll 2
    for (int g = 0; g < groups; g++) {
        const group_term *term = x->terms + tile * groups + g;
        running products[PARTS];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) products[part].total = first_total(kind, term);
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++)
                add_code(kind.bits, planes, count, i, &products[part],
                         tile_code(kind, w, tile, part, 4 * g + CODE_AT(count, i)),
                         values + g * X_GROUP(kind.bits, planes));
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++)
            sums[part] = add_group(kind, sums[part], products[part].total,
                                   group_facts(kind, w, tile * groups + g, part, span[part]), x->factors[tile], term);
    }
}

ALWAYS void multiply(const int format, const int planes, const int fixed, float *out, const tile_row *w,
                     const token_block *x, long distance) {
    const grouped_kind kind = kind_of(format);
    floats few[4 * PARTS], many[MAX_BLOCK_TOKENS * PARTS], *sums = fixed ? few : many;
    const long tokens = fixed ? fixed : x->tokens;
#pragma GCC unroll 16
    for (long i = 0; i < tokens * PARTS; i++) sums[i] = (floats){0};
    const long span_tiles = kind.sub_scales ? 8 : kind.zero < 0 ? w->span : 1;
    for (long tile = 0, span = 0; tile < w->tiles; span++) {
        span_facts facts[PARTS];
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) facts[part] = facts_of(kind, w, span, part);
        for (long end = tile + span_tiles; tile < end; tile++) {
            if (distance) {
                const char *codes = (const char *)(w->codes + tile * CODE_WORDS(kind) * TILE_ROWS);
                const char *high = (const char *)(w->high + tile * HIGH_WORDS(kind) * TILE_ROWS);
#pragma GCC unroll 8
                for (int i = 0; i < CODE_WORDS(kind); i++) __builtin_prefetch(codes + distance + 64 * i, 0, 3);
#pragma GCC unroll 2
                for (int i = 0; i < HIGH_WORDS(kind); i++)
                    __builtin_prefetch(high + distance * HIGH_WORDS(kind) / CODE_WORDS(kind) + 64 * i, 0, 3);
            }
            if (fixed) add_tile_once(kind, planes, sums, w, tile, facts, x);
            else
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++) add_tile(kind, planes, sums, part, w, tile, &facts[part], x);
        }
    }
#pragma GCC unroll 16
    for (long i = 0; i < tokens * PARTS; i++) store(out + i * LANES, sums[i]);
}

/* A function for each format, for one plane and two, and for one token and any number of them */
typedef void multiply_of(float *out, const tile_row *w, const token_block *x, long distance);
#define DEFINE(FORMAT, PLANES, FIXED)                                                                       \
    static void multiply_##FORMAT##_##PLANES##_##FIXED(float *out, const tile_row *w, const token_block *x, \
                                                       long distance) {                                     \
        multiply(FORMAT##_weight, PLANES, FIXED, out, w, x, distance);                                      \
    }
#define DEFINE_ALL(FORMAT) DEFINE(FORMAT, 1, 0) DEFINE(FORMAT, 1, 1) DEFINE(FORMAT, 2, 0) DEFINE(FORMAT, 2, 1)
EACH_GROUPED_FORMAT(DEFINE_ALL)

#define NAMES(FORMAT) \
    {{multiply_##FORMAT##_1_0, multiply_##FORMAT##_1_1}, {multiply_##FORMAT##_2_0, multiply_##FORMAT##_2_1}},
static multiply_of *const MULTIPLY[][2][2] = {EACH_GROUPED_FORMAT(NAMES)};

void grouped_products(float *sums, const weight *w, long row, long K, const token_block *x, long planes,
                      long distance) {
    tile_row rows = {0};
    switch (w->format) {
#define ROW(FORMAT)                                     \
    case FORMAT##_weight:                               \
        rows = tile_row_of(FORMAT##_weight, w, row, K); \
        break;
        EACH_GROUPED_FORMAT(ROW)
#undef ROW
    }
    MULTIPLY[w->format - WEIGHT_FORMATS][planes - 1][x->tokens == 1](sums, &rows, x, distance);
}
