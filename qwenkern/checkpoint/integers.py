"""Common functions for checkpoints of integer codes: unpack words, check groups and zero points, make the matrix.

    w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])        g: the group of column k

Codes are moved to qwenkern's layout in C (kernels/c/repack_words.c), or in torch if C cannot run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenkern.kernels import Weight
from qwenkern.kernels.c import build
from qwenkern.kernels.c.repack_words import COLUMNS, ROWS, repack_words
from qwenkern.kernels.weights import FORMATS
from qwenkern.kernels.weights.grouped import Grouped
from qwenkern.kernels.weights.tiles import DEPTH, pack
from qwenkern.kernels.weights.tiles import ROWS as TILE_ROWS

from .parts import Stored

AWQ_ROWS = [0, 2, 4, 6, 1, 3, 5, 7]  # bits 4 i to 4 i + 3 of AWQ's words belong to row AWQ_ROWS[i] of eight rows
_SIGNS = -0x7F7F7F80  # 0x80808080 as an int32: the highest bit of each byte
_AWQ_PLACES = [AWQ_ROWS.index(row) for row in range(8)]


@dataclass(frozen=True)
class Words:
    """The codes of a matrix [N, K] in words (int32) in one of the orders of kernels/c/repack_words.py. ``flip``: a mask
    of the bits of a word to flip."""

    words: Tensor
    order: int
    bits: int
    flip: int = 0

    def codes(self) -> Tensor:
        """[N, K or more], uint8, contiguous."""
        values = unpacked(self.words ^ self.flip if self.flip else self.words, self.bits)
        if self.order == COLUMNS:
            return values.unflatten(1, (-1, 32 // self.bits)).permute(1, 0, 2).flatten(1)
        return values if self.order == ROWS else awq_rows(values).T.contiguous()


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def planned(stored: Stored, scales: str, in_order: bool) -> Grouped | None:
    """The weight that a matrix becomes, on the meta device; None if its format does not support it. ``scales``: their
    dtype in the file. ``in_order``: whether column k is in group k // (values of a group)."""
    form = _format(stored)
    group = stored.columns // stored.groups()
    if not in_order or group % DEPTH:
        return None
    try:
        weight = form.allocate(stored.rows, stored.columns, torch.float32, meta, group)
    except ValueError:  # sizes that the format does not support
        return None
    if scales != "F16":
        weight.scales = weight.scales.to(torch.int32)
    return weight


def matrix(
    stored: Stored,
    words: Words,
    scales: Tensor,
    zeros: Tensor,
    dtype: torch.dtype,
    to: Weight | None,
    groups: Tensor | None = None,
) -> Weight | Tensor:
    """Sets ``to``, a weight like the result of ``planned``, to codes, scales and zeros [N, groups]. Returns it, or a
    dense matrix if ``to`` is None. ``groups``: the group of each column; None if they are in order. The caller has
    checked all sizes."""
    scales = (scales if scales.dtype == torch.float16 else scales.float()).contiguous()
    if to is None:
        return _dense(stored, words, scales, zeros, dtype, groups)
    assert isinstance(to, Grouped)
    assert to.zeros is not None
    if build.prepare() is None:
        repack_words(words.words.contiguous(), words.order, to.codes, words.bits, words.flip)
    else:
        to.codes.copy_(pack(words.codes(), words.bits)[0])
    to.scales.copy_(by_tile(scales.view(to.scales.dtype)))
    to.zeros.copy_(by_tile(zeros.to(torch.uint8)))
    return to


def by_tile(of_groups: Tensor) -> Tensor:
    """[N, groups] -> [N / 16, groups, 16]."""
    return of_groups.view(-1, TILE_ROWS, of_groups.shape[1]).transpose(1, 2).contiguous()


def _dense(
    stored: Stored, words: Words, scales: Tensor, zeros: Tensor, dtype: torch.dtype, groups: Tensor | None
) -> Tensor:
    """The dequantised matrix. Every product is exact in float32 if the scales are float16 or bfloat16."""
    if groups is None:
        groups = torch.arange(stored.columns) // (stored.columns // zeros.shape[1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = words.codes()[:, : stored.columns].to(wide)
    return codes.sub_(zeros.to(wide)[:, groups]).mul_(scales.to(wide)[:, groups]).to(dtype)


def _format(stored: Stored) -> type[Grouped]:
    form = FORMATS[f"int{stored.quantization.bits}"]
    assert issubclass(form, Grouped)
    return form


def checked_scales(stored: Stored, part: str, scales: Tensor) -> Tensor:
    """Returns the scales. Raises CheckpointError unless all are finite."""
    if wrong := int((~scales.isfinite()).sum()):
        raise stored.wrong(part, f"has {wrong} values that are NaN or infinite", "finite scales")
    return scales


def checked_groups(stored: Stored, part: str, groups: Tensor) -> Tensor | None:
    """The group of each column [K]; None if they are in order, which some programs write as all zeros. Raises
    CheckpointError for a group out of range."""
    count = stored.groups()
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise stored.wrong(part, f"has groups {low} to {high}", f"0 to {count - 1}")
    if not high or torch.equal(groups.long(), torch.arange(len(groups)) // (len(groups) // count)):
        return None
    return groups.long()


def checked_zeros(stored: Stored, part: str, zeros: Tensor) -> Tensor:
    """Returns the zero points. Raises CheckpointError if one does not fit a byte (only "gptq" with 8 bits can store
    256), or if the configuration says that the codes are symmetric, and they are not."""
    if (low := int(zeros.min())) < 0 or (high := int(zeros.max())) > 255:
        raise stored.wrong(part, f"has the zero point {low if low < 0 else high}", "0 to 255")
    middle = 1 << stored.quantization.bits - 1
    if stored.quantization.symmetric and (wrong := zeros[zeros != middle]).numel():
        raise stored.wrong(
            part, f"has the zero point {int(wrong[0])}, and the configuration says symmetric", f"{middle} throughout"
        )
    return zeros


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes (uint8) in words [R, C] (int32): [R, C * 32 / bits], from the lowest bits of a word to the highest."""
    parts = words.contiguous().view(torch.uint8)
    return parts if bits == 8 else torch.stack((parts & 15, parts >> 4), dim=-1).flatten(1)


def words_of_bytes(signed: Tensor, bits: int) -> Words:
    """The codes of signed values [N, K] (int8) of 4 or 8 bits, as words along the rows. The middle code is 0."""
    columns = signed.shape[1]
    if columns % (32 // bits) or signed.storage_offset() % 4:
        signed = torch.nn.functional.pad(signed, (0, -columns % (32 // bits)))
    parts = signed.contiguous().view(torch.uint8)
    if bits == 8:
        return Words(parts.view(torch.int32), ROWS, bits, flip=_SIGNS)
    parts = (parts & 15) ^ 8
    return Words((parts[:, ::2] | parts[:, 1::2] << 4).view(torch.int32), ROWS, bits)


def awq_rows(values: Tensor) -> Tensor:
    """Sorts codes [R, N], unpacked from AWQ's words, by row."""
    return values.unflatten(1, (-1, 8))[..., _AWQ_PLACES].flatten(1)
