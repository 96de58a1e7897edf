"""Packs codes into the words of grouped.py's tiles, and unpacks them, in torch.

The intermediate layout is bytes [tile row, tile, half, j, row, t]: value k = 16 half + 4 t + j of a tile."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 16  # rows of a tile
DEPTH = 32  # values of k of a tile


def pack(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes [N, K] (uint8) as ``codes`` and ``high``."""
    rows, columns = codes.shape
    # [tile row, row, tile, half, t, j] -> [tile row, tile, half, j, row, t]
    parts = codes.view(rows // ROWS, ROWS, columns // DEPTH, 2, 4, 4).permute(0, 2, 3, 5, 1, 4)
    if bits == 8:
        return _words(parts.flatten(2, 3)), None
    low = parts & 15
    packed = _words(low[:, :, 0] | low[:, :, 1] << 4)
    if bits == 4:
        return packed, None
    upper = parts >> 4  # [tile row, tile, half, j, row, t]
    j = torch.arange(4, dtype=torch.uint8, device=codes.device).view(4, 1, 1)
    if bits == 6:
        return packed, _words((upper << 2 * j).sum(3, dtype=torch.uint8))
    bit = 4 * torch.arange(2, dtype=torch.uint8, device=codes.device).view(2, 1, 1, 1) + j
    return packed, _words((upper << bit).sum((2, 3), dtype=torch.uint8).unsqueeze(2))


def unpack(codes: Tensor, high: Tensor | None) -> Tensor:
    """The codes [N, K] that ``codes`` and ``high`` hold. Their tiles may have any number of rows."""
    parts = _parts(codes, high)
    tile_rows, tiles, _, _, rows, _ = parts.shape
    return parts.permute(0, 4, 1, 2, 5, 3).reshape(tile_rows * rows, tiles * DEPTH)


def _parts(codes: Tensor, high: Tensor | None) -> Tensor:
    parts = _bytes(codes)
    if codes.shape[2] == 8:
        return parts.unflatten(2, (2, 4))
    values = torch.stack((parts & 15, parts >> 4), dim=2)
    if high is None:
        return values
    upper = _bytes(high)
    j = torch.arange(4, dtype=torch.uint8, device=codes.device).view(4, 1, 1)
    if high.shape[2] == 2:
        return values | (upper.unsqueeze(3) >> 2 * j & 3) << 4
    bit = 4 * torch.arange(2, dtype=torch.uint8, device=codes.device).view(2, 1, 1, 1) + j
    return values | (upper.unsqueeze(2) >> bit & 1) << 4


def _bytes(words: Tensor) -> Tensor:
    """[..., row] int32 -> [..., row, t] uint8."""
    return words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))


def _words(parts: Tensor) -> Tensor:
    """[..., row, t] uint8 -> [..., row] int32."""
    return parts.contiguous().view(torch.int32).squeeze(-1)
