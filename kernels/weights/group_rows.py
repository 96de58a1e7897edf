"""Triton function that dequantises rows in the layout of grouped.py: for the embedding, and for many tokens, whose
products the library computes.

A row has four or eight words in a tile. Each word is shifted by the place of each of its codes. 2 ** 23 + code is exact
in float32 and has the code in its lowest bits, so a mask makes a float of it."""

from __future__ import annotations

from ..language import masked_or
from ..triton_if_any import tl, triton
from .group_products import floats

MAGIC = tl.constexpr(0x4B000000)  # the bits of 2 ** 23


@triton.jit
def dequantise(weight, rows, start, k_size, FORM: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """Values [rows, BLOCK_K] of these rows (int64) in float32, from column ``start`` on."""
    STEP: tl.constexpr = min(FORM.step, BLOCK_K)  # consecutive values, aligned to STEP, are of one group
    shape: tl.constexpr = [rows.shape[0], BLOCK_K // STEP, STEP]
    k = start + tl.arange(0, BLOCK_K // STEP)[None, :] * STEP
    of_group = (rows // 16 * (weight.groups * 16) + rows % 16)[:, None] + k // FORM.group * 16
    of_scale = of_group
    if weight.sub_scales is not None:
        of_scale = (rows // 16 * (weight.tiles // 8 * 16) + rows % 16)[:, None] + k // 256 * 16
    mask = None if EVEN_K else tl.broadcast_to(k < k_size, [rows.shape[0], BLOCK_K // STEP])
    scale = floats(tl.load(weight.scales + of_scale, mask=mask, other=None if EVEN_K else 0))
    if weight.sub_scales is not None:
        scale *= tl.load(weight.sub_scales + of_group, mask=mask, other=None if EVEN_K else 0).to(tl.float32)
    codes = tl.reshape(_codes(weight, rows, start, k_size, FORM, BLOCK_K, EVEN_K), shape)
    if weight.zeros is not None:
        zeros = tl.load(weight.zeros + of_group, mask=mask, other=None if EVEN_K else 0).to(tl.float32)
        values = codes - (8388608.0 + zeros)[:, :, None]
    else:
        values = codes - (8388608.0 + FORM.zero)
    values *= scale[:, :, None]
    if weight.minima is not None:
        offset = floats(tl.load(weight.minima + of_scale, mask=mask, other=None if EVEN_K else 0))
        if weight.sub_minima is not None:
            offset *= -tl.load(weight.sub_minima + of_group, mask=mask, other=None if EVEN_K else 0).to(tl.float32)
        values += offset[:, :, None]
    return tl.reshape(values, [rows.shape[0], BLOCK_K])


@triton.jit
def _codes(weight, rows, start, k_size, FORM: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """2 ** 23 + code of BLOCK_K values of each row, in their order, in any shape."""
    BLOCK_R: tl.constexpr = rows.shape[0]
    TILES: tl.constexpr = BLOCK_K // 32
    byte = tl.arange(0, 4)[None, None, None, :, None] * 8
    word = tl.arange(0, 4)[None, None, None, None, :]
    half = tl.arange(0, 2)[None, None, :, None, None]
    magic = tl.full([BLOCK_R, TILES, 2, 4, 4], MAGIC, tl.int32)
    if FORM.bits == 8:
        words = _words(weight.codes, weight.tiles, rows, start, k_size, 8, BLOCK_K, EVEN_K)
        codes = masked_or(tl.reshape(words, [BLOCK_R, TILES, 2, 1, 4]) >> byte, 0xFF, magic)
    else:
        words = _words(weight.codes, weight.tiles, rows, start, k_size, 4, BLOCK_K, EVEN_K)
        codes = masked_or(tl.reshape(words, [BLOCK_R, TILES, 1, 1, 4]) >> (byte + 4 * half), 0xF, magic)
    if FORM.bits == 5:
        bits = _words(weight.high, weight.tiles, rows, start, k_size, 1, BLOCK_K, EVEN_K)
        bits = tl.reshape(bits, [BLOCK_R, TILES, 1, 1, 1]) >> (byte + 4 * half + word)
        codes = masked_or(bits << 4, 0x10, codes)
    if FORM.bits == 6:
        bits = _words(weight.high, weight.tiles, rows, start, k_size, 2, BLOCK_K, EVEN_K)
        bits = tl.reshape(bits, [BLOCK_R, TILES, 2, 1, 1]) >> (byte + 2 * word)
        codes = masked_or(bits << 4, 0x30, codes)
    return codes.to(tl.float32, bitcast=True)


@triton.jit
def _words(ptr, tiles, rows, start, k_size, WORDS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """The words [rows, BLOCK_K / 32 * WORDS] of one tensor."""
    word = start // 32 * WORDS + tl.arange(0, BLOCK_K // 32 * WORDS)[None, :]
    at = (rows // 16 * (tiles * (WORDS * 16)) + rows % 16)[:, None] + word * 16
    mask = None if EVEN_K else tl.broadcast_to(word < k_size // 32 * WORDS, [rows.shape[0], BLOCK_K // 32 * WORDS])
    return tl.load(ptr + at, mask=mask, other=None if EVEN_K else 0)
