/* Weights whose values are codes, with a scale for each group of 16, 32 or more: the formats of
 * kernels/weights/grouped.py.
 *
 *     w[n][k] = scale * (code - zero) + offset        scale, zero and offset of k's group in row n
 *
 * The matrix is stored in tiles of 16 rows x 32 k. The tiles of the same 16 rows follow each other along k.
 *
 *     codes of up to 6 bits                row 0        row 1        ...  row 15
 *                          word 0     | dword 0, 4 | dword 0, 4 |       |        |   low nibbles: the low four bits of
 *                          word 1     | dword 1, 5 |    ...                          dword j, high ones: of dword j + 4
 *                          word 2, 3
 *     codes of 8 bits: words 0 to 7, word j = dword j
 *     high: the fifth and sixth bits       word 0 (of 6 bits: words 0 and 1)
 *
 *     dword b of a row: byte t is the row's value 16 (b / 4) + 4 t + b % 4, t = 0 to 3
 *
 * The numbers of a group (scales, minima, ...) are also stored for 16 rows together, so a register has those of
 * adjacent rows, in the order of the sums. The formats differ in the facts below, which are constants in every loop. */
#ifndef GROUPED_WEIGHT_H
#define GROUPED_WEIGHT_H
#include "codes.h"
#include "planes.h"
#include "weight_formats.h"

typedef struct {
    int bits;       /* of a code: 4, 5, 6 or 8 */
    int per_tile;   /* groups of a row in a tile: 1, or 2 if a group has 16 values */
    int zero;       /* the same for all groups; -1: each has its own (zeros) */
    int has_minima; /* offset = minima; with sub scales -(minima * sub_minima) */
    int sub_scales; /* 1: scale = scales * sub_scales, with scales for 256 values; 2: sub_scales are signed */
} grouped_kind;

/* clang-format off */
#define GROUPED_KIND(NAME, ...) case NAME##_weight: return (grouped_kind){__VA_ARGS__};
/* clang-format on */
ALWAYS grouped_kind kind_of(const int format) {
    switch (format) { /* bits, per_tile, zero, has_minima, sub_scales */
        GROUPED_KIND(q4_0, 4, 1, 8, 0, 0)
        GROUPED_KIND(q4_1, 4, 1, 0, 1, 0)
        GROUPED_KIND(q5_0, 5, 1, 16, 0, 0)
        GROUPED_KIND(q5_1, 5, 1, 0, 1, 0)
        GROUPED_KIND(q8_0, 8, 1, 128, 0, 0)
        GROUPED_KIND(q4_k, 4, 1, 0, 1, 1)
        GROUPED_KIND(q5_k, 5, 1, 0, 1, 1)
        GROUPED_KIND(q6_k, 6, 2, 32, 0, 2)
        GROUPED_KIND(q2_k, 4, 2, 0, 1, 1)
        GROUPED_KIND(q3_k, 4, 2, 4, 0, 2)
        GROUPED_KIND(int4, 4, 1, -1, 0, 0)
        GROUPED_KIND(int8, 8, 1, -1, 0, 0)
    }
    __builtin_unreachable();
}
#undef GROUPED_KIND

/* The number that is subtracted from codes of 8 bits when they are unpacked */
#define ZERO_OF_BYTES(KIND) (SIGNED_BYTES && (KIND).bits == 8 ? 128 : 0)
#define CODE_WORDS(KIND) ((KIND).bits == 8 ? 8 : 4) /* words of a row in a tile */
#define HIGH_WORDS(KIND) ((KIND).bits == 5 ? 1 : (KIND).bits == 6 ? 2 : 0)

ALWAYS quads load_quads(const uint32_t *from) {
    quads values;
    memcpy(&values, from, sizeof values);
    return values;
}

/* One value of a matrix whose rows have K values. This function defines what the faster functions below read. */
static inline float grouped_value(const weight *w, long row, long k, long K) {
    const grouped_kind kind = kind_of((int)w->format);
    const long tile = row / TILE_ROWS * (K / TILE_K) + k / TILE_K, lane = row % TILE_ROWS;
    const int place = k % TILE_K, b = place / 16 * 4 + place % 4, shift = 8 * (place % 16 / 4); /* dword and byte */
    const uint32_t *codes = (const uint32_t *)w->values + tile * CODE_WORDS(kind) * TILE_ROWS + lane;
    const uint32_t *high = (const uint32_t *)w->high + tile * HIGH_WORDS(kind) * TILE_ROWS + lane;
    int code =
        kind.bits == 8 ? codes[b * TILE_ROWS] >> shift & 255 : codes[b % 4 * TILE_ROWS] >> (shift + b / 4 * 4) & 15;
    if (kind.bits == 5) code |= (high[0] >> (shift + b) & 1) << 4;
    if (kind.bits == 6) code |= (high[b / 4 * TILE_ROWS] >> (shift + b % 4 * 2) & 3) << 4;

    const long values = kind.sub_scales ? 256 : w->group; /* values that share an entry of scales */
    const long of_scales = (row / TILE_ROWS * (K / values) + k / values) * TILE_ROWS + lane;
    const long of_group = (tile * kind.per_tile + place * kind.per_tile / TILE_K) * TILE_ROWS + lane;
    float scale, offset = 0, zero = kind.zero;
    if (w->scales_are_floats) memcpy(&scale, (const float *)w->scales + of_scales, sizeof scale);
    else scale = half_float(((const uint16_t *)w->scales)[of_scales]);
    if (kind.zero < 0) zero = ((const uint8_t *)w->zeros)[of_scales];
    if (kind.has_minima) offset = half_float(((const uint16_t *)w->minima)[of_scales]);
    if (kind.sub_scales == 1) scale *= ((const uint8_t *)w->sub_scales)[of_group];
    if (kind.sub_scales == 2) scale *= ((const int8_t *)w->sub_scales)[of_group];
    if (kind.sub_scales && kind.has_minima) offset *= -(float)((const uint8_t *)w->sub_minima)[of_group];
    return scale * ((float)code - zero) + offset;
}

/* The tiles of 16 rows, from the first */
typedef struct {
    const uint32_t *codes, *high;
    const void *scales;
    const uint16_t *minima;
    const uint8_t *sub_scales, *sub_minima, *zeros;
    long tiles;      /* of a row: K / 32 */
    long span;       /* tiles that share an entry of scales */
    long are_floats; /* 1: scales are floats; 0: they have 16 bits */
} tile_row;

ALWAYS tile_row tile_row_of(const int format, const weight *w, long row, long K) {
    const grouped_kind kind = kind_of(format);
    const long tiles = K / TILE_K, span = kind.sub_scales ? 8 : w->group / TILE_K;
    const long tile = row / TILE_ROWS * tiles, place = tile / span * TILE_ROWS;
    const long group = tile * kind.per_tile * TILE_ROWS;
    return (tile_row){
        .codes = (const uint32_t *)w->values + tile * CODE_WORDS(kind) * TILE_ROWS,
        .high = (const uint32_t *)w->high + tile * HIGH_WORDS(kind) * TILE_ROWS,
        .scales = (const char *)w->scales + place * (w->scales_are_floats ? 4 : 2),
        .minima = (const uint16_t *)w->minima + place,
        .sub_scales = (const uint8_t *)w->sub_scales + group,
        .sub_minima = (const uint8_t *)w->sub_minima + group,
        .zeros = (const uint8_t *)w->zeros + place,
        .tiles = tiles,
        .span = span,
        .are_floats = w->scales_are_floats,
    };
}

/* The codes of dword b of a part of a tile */
ALWAYS quads tile_code(const grouped_kind kind, const tile_row *w, long tile, const int part, const int b) {
    const uint32_t *from = w->codes + tile * CODE_WORDS(kind) * TILE_ROWS + part * LANES;
    if (kind.bits == 8) return load_quads(from + b * TILE_ROWS) ^ (ZERO_OF_BYTES(kind) ? 0x80808080 : 0);
    quads code = load_quads(from + b % 4 * TILE_ROWS) >> (b < 4 ? 0 : 4) & 0x0F0F0F0F;
    if (kind.bits == 4) return code;
    const int words = HIGH_WORDS(kind), shift = kind.bits == 5 ? 4 - b : 4 - 2 * (b % 4);
    quads high = load_quads(w->high + (tile * words + (words == 2 ? b / 4 : 0)) * TILE_ROWS + part * LANES);
    high = shift > 0 ? high << (shift > 0 ? shift : 0) : high >> (shift < 0 ? -shift : 0);
    return code | (high & (kind.bits == 5 ? 0x10101010 : 0x30303030));
}

ALWAYS floats span_scale(const tile_row *w, long span, const int part) {
    long at = span * TILE_ROWS + part * LANES;
    return w->are_floats ? load((const float *)w->scales + at) : half_floats((const uint16_t *)w->scales + at);
}
#endif
