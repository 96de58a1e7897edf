/* Repacks the codes of GPTQ, AWQ and compressed-tensors to tiles of 16 rows and 32 values (kernels/weights/grouped.py),
 * without a change of any code. A task is a row of tiles.
 *
 * A word of GPTQ and compressed-tensors has consecutive codes of a row, the first in the lowest bits. A word of AWQ has
 * codes of eight rows. */
#include "team.h"
#include "vectors.h"

#define TILE 16 /* rows of a tile */

/* Writes four words of eight codes, 32 values of a row, to that row of a tile. The codes at bits 4 j and 4 (j + 4) of a
 * word are values j and j + 4 of its eight, which are neighbours in word j of the tile. */
ALWAYS void four_bits(uint32_t *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const uint32_t pair = 0x000F000F, half = 0xFFFF;
    for (int j = 0; j < 4; j++) {
        const uint32_t p = a >> 4 * j & pair, q = b >> 4 * j & pair, r = c >> 4 * j & pair, s = d >> 4 * j & pair;
        const uint32_t low = ((p | p >> 8) & half) | (q | q >> 8) << 16;
        const uint32_t high = ((r | r >> 8) & half) | (s | s >> 8) << 16;
        to[j * TILE] = low | high << 4;
    }
}

/* Writes four words of four codes, 16 values of a row. Byte t of word j of the tile is byte j of word t. */
ALWAYS void eight_bits(uint32_t *to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    for (int j = 0; j < 4; j++)
        to[j * TILE] =
            (a >> 8 * j & 255) | (b >> 8 * j & 255) << 8 | (c >> 8 * j & 255) << 16 | (d >> 8 * j & 255) << 24;
}

/* Repacks a row of tiles. `across` is the distance in words to the same word of the next row, `along` to the row's next
 * word. */
ALWAYS void along_rows(const repack_words_args *args, long tile_row, const int bits, const long across,
                       const long along) {
    const long tiles = args->columns / 32;
    const uint32_t flip = args->flip;
    for (long tile = 0; tile < tiles; tile++) {
        uint32_t *to = args->codes + (tile_row * tiles + tile) * bits * TILE;
        const uint32_t *from = args->words + tile_row * TILE * across + tile * bits * along;
        for (long row = 0; row < TILE; row++)
            for (int part = 0; part < bits / 4; part++) {
                const uint32_t *w = from + row * across + 4 * part * along;
                const uint32_t a = w[0] ^ flip, b = w[along] ^ flip, c = w[2 * along] ^ flip, d = w[3 * along] ^ flip;
                if (bits == 4) four_bits(to + row, a, b, c, d);
                else eight_bits(to + 4 * part * TILE + row, a, b, c, d);
            }
    }
}

/* The lowest bit of each row's code in the word of its eight rows */
static const uint32_t awq_shift[TILE] = {0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28};

ALWAYS void awq(const repack_words_args *args, long tile_row) {
    const long tiles = args->columns / 32, along = args->rows / 8;
    const uint32_t flip = args->flip;
    for (long tile = 0; tile < tiles; tile++) {
        uint32_t *to = args->codes + (tile_row * tiles + tile) * 4 * TILE;
        const uint32_t *from = args->words + tile * 32 * along + tile_row * TILE / 8;
        for (int j = 0; j < 4; j++)
            for (int row = 0; row < TILE; row++) {
                uint32_t word = 0;
                for (int t = 0; t < 4; t++) {
                    const uint32_t *low = from + (4 * t + j) * along + row / 8, *high = low + 16 * along;
                    word |= ((*low ^ flip) >> awq_shift[row] & 15) << 8 * t;
                    word |= ((*high ^ flip) >> awq_shift[row] & 15) << (8 * t + 4);
                }
                to[j * TILE + row] = word;
            }
    }
}

void repack_words(const repack_words_args *args, worker *me) {
    const long words = args->columns * args->bits / 32;
    for (long tile_row = first_task(me, args->rows / TILE); tile_row >= 0; tile_row = next_task(me)) {
        const int bits = args->bits == 8 ? 8 : 4;
        if (args->order == 2) awq(args, tile_row);
        else if (args->order == 1 && bits == 4) along_rows(args, tile_row, 4, 1, args->rows);
        else if (args->order == 1) along_rows(args, tile_row, 8, 1, args->rows);
        else if (bits == 4) along_rows(args, tile_row, 4, words, 1);
        else along_rows(args, tile_row, 8, words, 1);
    }
    barrier(me);
}
