"""What checkpoints of integer codes share: the unpacking of words, the order of groups, and the matrix that they make.

w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])        g: the group of column k
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwenkern.kernels import Weight
from qwenkern.kernels.weights import FORMATS, Dense
from qwenkern.kernels.weights.grouped import DEPTH, Grouped

from .parts import Stored


def meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def planned(stored: Stored, scales: str, in_order: bool) -> Weight | None:
    """The weight that a matrix becomes, on the meta device; None if its format cannot have it. ``scales`` is their
    dtype in the file, ``in_order`` whether column k is in group k // (values of a group)."""
    form = _format(stored)
    group = stored.columns // stored.groups()
    if not in_order or group % DEPTH:
        return None
    try:
        weight = form.allocate(stored.rows, stored.columns, torch.float32, meta, group)
    except ValueError:  # sizes that the format does not have
        return None
    if scales != "F16":
        weight.scales = weight.scales.to(torch.int32)
    return weight


def matrix(
    stored: Stored, codes: Tensor, scales: Tensor, zeros: Tensor, dtype: torch.dtype, groups: Tensor | None = None
) -> Weight:
    """The matrix of codes [N, K] (uint8), scales and zeros [N, groups]: a dense one where its format cannot have it.
    ``groups`` is the group of each column, unless they are in order. The caller has checked all sizes."""
    form = _format(stored)
    scales = scales if scales.dtype == torch.float16 else scales.float()
    group = stored.columns // zeros.shape[1]
    if groups is None and group % DEPTH == 0:
        try:
            return form.from_codes(codes, dtype, scales=scales.contiguous(), zeros=zeros)
        except ValueError:  # sizes that the format does not have
            pass
    if groups is None:
        groups = torch.arange(stored.columns) // group
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dense = codes.to(wide).sub_(zeros.to(wide)[:, groups]).mul_(scales.to(wide)[:, groups])
    return Dense(dense.to(dtype))


def _format(stored: Stored) -> type[Grouped]:
    form = FORMATS[f"int{stored.quantization.bits}"]
    assert issubclass(form, Grouped)
    return form


def checked_scales(stored: Stored, part: str, scales: Tensor) -> Tensor:
    """Raises CheckpointError unless all of them are finite."""
    if wrong := int((~scales.isfinite()).sum()):
        raise stored.wrong(part, f"has {wrong} values that are NaN or infinite", "finite scales")
    return scales


def checked_groups(stored: Stored, part: str, groups: Tensor) -> Tensor | None:
    """The group of each column [K]; None if they are in order, which some writers say by all zeros. Raises
    CheckpointError for a group that there is not."""
    count = stored.groups()
    low, high = int(groups.min()), int(groups.max())
    if low < 0 or high >= count:
        raise stored.wrong(part, f"has groups {low} to {high}", f"0 to {count - 1}")
    if not high or torch.equal(groups.long(), torch.arange(len(groups)) // (len(groups) // count)):
        return None
    return groups.long()


def checked_zeros(stored: Stored, part: str, zeros: Tensor) -> Tensor:
    """Raises CheckpointError if one does not fit a byte (only 8 bits of the storage "gptq" can have 256), or if the
    configuration says that the codes are symmetric, and they are not."""
    if (low := int(zeros.min())) < 0 or (high := int(zeros.max())) > 255:
        raise stored.wrong(part, f"has the zero point {low if low < 0 else high}", "0 to 255")
    middle = 1 << stored.quantization.bits - 1
    if stored.quantization.symmetric and (wrong := zeros[zeros != middle]).numel():
        raise stored.wrong(
            part, f"has the zero point {int(wrong[0])}, and the configuration says symmetric", f"{middle} throughout"
        )
    return zeros


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes (uint8) in words [...] (int32): [..., 32 / bits], that of the lowest bits first."""
    parts = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return parts if bits == 8 else torch.stack((parts & 15, parts >> 4), dim=-1).flatten(-2)
