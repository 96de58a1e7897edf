/* Repacks the blocks of GGUF files to tiles of 16 rows and 32 values, without a change of any value. blocks.h defines
 * the blocks, and kernels/weights/grouped.py the tiles.
 *
 *     a row   | block: d, codes of 32 values | block | ...        codes  | tile: word 0 of 16 rows, word 1, ... | tile
 *     16 rows of blocks                                      ──►  scales | 16 rows | 16 rows | ...
 *
 * A task is a row of tiles: 16 rows of blocks. */
#include "blocks.h"
#include "team.h"

#define TILE 16 /* rows of a tile */

/* Writes sixteen bytes as four words to one row of a tile: byte t of word j is byte 4 t + j. */
ALWAYS void store_row(uint32_t *words, const uint8_t *bytes) {
    const uint32_t even = 0x00FF00FF, half = 0xFFFF;
    uint32_t w[4];
    memcpy(w, bytes, sizeof w);
    uint32_t a = (w[0] & even) | (w[1] & even) << 8, b = (w[0] >> 8 & even) | (w[1] & ~even);
    uint32_t c = (w[2] & even) | (w[3] & even) << 8, d = (w[2] >> 8 & even) | (w[3] & ~even);
    words[0 * TILE] = (a & half) | c << 16;
    words[1 * TILE] = (b & half) | d << 16;
    words[2 * TILE] = a >> 16 | (c & ~half);
    words[3 * TILE] = b >> 16 | (d & ~half);
}

/* Moves each of four groups of four bits to the low half of a byte */
ALWAYS uint32_t spread(uint32_t bits) {
    return (bits & 0x000F) | (bits & 0x00F0) << 4 | (bits & 0x0F00) << 8 | (bits & 0xF000) << 12;
}

/* Bits 4 and 5 of each of 16 codes, as 32 bits */
ALWAYS uint32_t upper_bits(const uint8_t *codes) {
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t four;
        memcpy(&four, codes + 4 * i, sizeof four);
        bits |= ((four >> 4 & 0x03030303) * 0x01041040 >> 24) << 8 * i;
    }
    return bits;
}

/* Writes the codes of 32 values of a row to that row of a tile. `fifth` has their fifth bits if `bits` is 5. */
ALWAYS void pack_codes(uint32_t *codes, uint32_t *high, const uint8_t *from, uint32_t fifth, const int bits) {
    if (bits == 8) {
        store_row(codes, from);
        store_row(codes + 4 * TILE, from + 16);
        return;
    }
    uint8_t low[16];
    for (int i = 0; i < 16; i++) low[i] = (from[i] & 15) | from[16 + i] << 4;
    store_row(codes, low);
    if (bits == 5) *high = spread(fifth) | spread(fifth >> 16) << 4;
    if (bits == 6) {
        high[0] = upper_bits(from);
        high[TILE] = upper_bits(from + 16);
    }
}

ALWAYS int is_finite(uint16_t half) { return (half & 0x7C00) != 0x7C00; }

/* One task */
ALWAYS void repack_tiles(const repack_args *args, const int format, long tile_row) {
    const block_form form = BLOCK_FORMS[format];
    const long blocks = args->columns / form.values, tiles = args->columns / PART, parts = form.values / PART;
    const long code_words = form.bits == 8 ? 8 : 4, high_words = form.bits - 4;
    int finite = 1;
    const uint8_t *from = args->blocks + tile_row * TILE * blocks * form.bytes;
    for (long b = 0; b < blocks; b++)
        for (long row = 0; row < TILE; row++) {
            const uint8_t *block = from + (row * blocks + b) * form.bytes;
            const long at = (tile_row * blocks + b) * TILE + row;
            memcpy(args->scales + at, block + form.scale, sizeof *args->scales);
            finite &= is_finite(args->scales[at]);
            if (form.minimum >= 0) {
                memcpy(args->minima + at, block + form.minimum, sizeof *args->minima);
                finite &= is_finite(args->minima[at]);
            }
            if (form.groups) {
                uint8_t scales[16], minima[16];
                block_sub_scales(scales, minima, format, block);
                for (long g = 0; g < form.groups; g++) {
                    long group = ((tile_row * blocks + b) * form.groups + g) * TILE + row;
                    args->sub_scales[group] = scales[g];
                    if (form.minimum >= 0) args->sub_minima[group] = minima[g];
                }
            }
#pragma GCC unroll 8
            for (long part = 0; part < parts; part++) {
                uint8_t codes[PART];
                long tile = tile_row * tiles + b * parts + part;
                block_codes(codes, format, block, part);
                pack_codes(args->codes + tile * code_words * TILE + row, args->high + tile * high_words * TILE + row,
                           codes, block_fifth_bits(format, block, part), form.bits);
            }
        }
    args->finite[tile_row] = finite;
}

void repack(const repack_args *args, worker *me) {
    for (long tile_row = first_task(me, args->rows / TILE); tile_row >= 0; tile_row = next_task(me))
        switch (args->format) {
#define REPACK(FORMAT)                                 \
    case FORMAT##_blocks:                              \
        repack_tiles(args, FORMAT##_blocks, tile_row); \
        break;
            EACH_BLOCK_FORMAT(REPACK)
#undef REPACK
        }
    barrier(me);
}
