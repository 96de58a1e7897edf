/* The block formats of GGUF files, as ggml-common.h of the ggml library defines them. A row of a matrix is a row of
 * blocks, each of 32 or 256 values:
 *
 *     q4_0  d | codes 16                        q8_0  d | codes 32, signed
 *     q4_1  d | m | codes 16                    q2_k  sub-scales 16 | codes 64 | d | m
 *     q5_0  d | fifth bits 4 | codes 16         q3_k  third bits 32 | codes 64 | sub-scales 12 | d
 *     q5_1  d | m | fifth bits 4 | codes 16     q4_k  d | m | sub-scales 12 | codes 128
 *                                               q5_k  d | m | sub-scales 12 | fifth bits 32 | codes 128
 *     sizes in bytes; d and m are float16       q6_k  codes 128 | upper bits 64 | sub-scales 16 | d
 *
 * This file says where a block has its parts. repack.c moves them to the layout that products read. */
#ifndef BLOCKS_H
#define BLOCKS_H
#include "vectors.h"

#define PART 32 /* values whose codes are read at a time */

enum {
#define NUMBER(FORMAT) FORMAT##_blocks,
    EACH_BLOCK_FORMAT(NUMBER) BLOCK_FORMATS
#undef NUMBER
};

typedef struct {
    long values, bytes; /* values and bytes of a block */
    int bits;           /* of a code as it is repacked */
    int groups;         /* of a block with sub-scales; 0: it has none */
    int scale, minimum; /* their offsets in bytes; minimum -1: there is none */
} block_form;

static const block_form BLOCK_FORMS[BLOCK_FORMATS] = {
    [q4_0_blocks] = {32, 18, 4, 0, 0, -1},      [q4_1_blocks] = {32, 20, 4, 0, 0, 2},
    [q5_0_blocks] = {32, 22, 5, 0, 0, -1},      [q5_1_blocks] = {32, 24, 5, 0, 0, 2},
    [q8_0_blocks] = {32, 34, 8, 0, 0, -1},      [q2_k_blocks] = {256, 84, 4, 16, 80, 82},
    [q3_k_blocks] = {256, 110, 4, 16, 108, -1}, [q4_k_blocks] = {256, 144, 4, 8, 0, 2},
    [q5_k_blocks] = {256, 176, 5, 8, 0, 2},     [q6_k_blocks] = {256, 210, 6, 16, 208, -1},
};

/* The low halves of 16 bytes, then the high halves */
ALWAYS void read_halves(uint8_t *codes, const uint8_t *from) {
    for (int i = 0; i < 16; i++) codes[i] = from[i] & 15;
    for (int i = 0; i < 16; i++) codes[16 + i] = from[i] >> 4;
}

ALWAYS void read_bits(uint8_t *codes, const uint8_t *from, int shift, int mask) {
    for (int i = 0; i < PART; i++) codes[i] = from[i] >> shift & mask;
}

/* Adds bits of a part: `mask` << `shift` of each byte becomes the bits from `place` on */
ALWAYS void add_bits(uint8_t *codes, const uint8_t *from, int shift, int mask, int place) {
    for (int i = 0; i < PART; i++) codes[i] |= (from[i] >> shift & mask) << place;
}

/* Bit `shift` of each of eight bytes, as a byte */
ALWAYS uint32_t bit_of_eight(const uint8_t *from, int shift) {
    uint64_t eight;
    memcpy(&eight, from, sizeof eight);
    return (eight >> shift & 0x0101010101010101) * 0x0102040810204080 >> 56;
}

/* The codes of the values PART * part .. of a block, as numbers from 0 on: signed codes plus the format's zero. Codes
 * of 5 bits come without their fifth bits, which block_fifth_bits returns. */
ALWAYS void block_codes(uint8_t *codes, const int format, const uint8_t *block, int part) {
    switch (format) {
        case q4_0_blocks:
            read_halves(codes, block + 2);
            break;
        case q4_1_blocks:
            read_halves(codes, block + 4);
            break;
        case q5_0_blocks:
            read_halves(codes, block + 6);
            break;
        case q5_1_blocks:
            read_halves(codes, block + 8);
            break;
        case q8_0_blocks:
            for (int i = 0; i < PART; i++) codes[i] = block[2 + i] ^ 0x80;
            break;
        case q2_k_blocks:
            read_bits(codes, block + 16 + PART * (part / 4), 2 * (part % 4), 3);
            break;
        case q3_k_blocks:
            read_bits(codes, block + 32 + PART * (part / 4), 2 * (part % 4), 3);
            add_bits(codes, block, part, 1, 2);
            break;
        case q4_k_blocks:
            read_bits(codes, block + 16 + PART * (part / 2), 4 * (part % 2), 15);
            break;
        case q5_k_blocks:
            read_bits(codes, block + 48 + PART * (part / 2), 4 * (part % 2), 15);
            break;
        case q6_k_blocks:
            read_bits(codes, block + 64 * (part / 4) + PART * (part % 2), part % 4 / 2 * 4, 15);
            add_bits(codes, block + 128 + PART * (part / 4), 2 * (part % 4), 3, 4);
    }
}

/* The fifth bits of these codes: bit i is that of value PART * part + i */
ALWAYS uint32_t block_fifth_bits(const int format, const uint8_t *block, int part) {
    uint32_t bits = 0;
    if (format == q5_0_blocks) memcpy(&bits, block + 2, sizeof bits);
    if (format == q5_1_blocks) memcpy(&bits, block + 4, sizeof bits);
    if (format == q5_k_blocks)
        for (int i = 0; i < 4; i++) bits |= bit_of_eight(block + 16 + 8 * i, part) << 8 * i;
    return bits;
}

/* The sub-scales and sub-minima of a block, a byte each; those of q3_k and q6_k are signed, and have no minima */
ALWAYS void block_sub_scales(uint8_t *scales, uint8_t *minima, const int format, const uint8_t *block) {
    const uint8_t *packed;
    switch (format) {
        case q2_k_blocks:
            for (int g = 0; g < 16; g++) {
                scales[g] = block[g] & 15;
                minima[g] = block[g] >> 4;
            }
            break;
        case q3_k_blocks: /* 4 low bits in 8 bytes, 2 upper bits in 4 */
            packed = block + 96;
            for (int g = 0; g < 16; g++)
                scales[g] = ((packed[g % 8] >> g / 8 * 4 & 15) | (packed[8 + g % 4] >> g / 4 * 2 & 3) << 4) - 32;
            break;
        case q4_k_blocks:
        case q5_k_blocks: /* 6 bits each: whole for the first four groups, split for the others */
            packed = block + 4;
            for (int g = 0; g < 4; g++) {
                scales[g] = packed[g] & 63;
                minima[g] = packed[4 + g] & 63;
                scales[4 + g] = (packed[8 + g] & 15) | (packed[g] >> 6) << 4;
                minima[4 + g] = packed[8 + g] >> 4 | (packed[4 + g] >> 6) << 4;
            }
            break;
        case q6_k_blocks:
            memcpy(scales, block + 192, 16);
    }
}
#endif
