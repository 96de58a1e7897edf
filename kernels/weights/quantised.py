"""The base class of quantised formats. grouped.py has the formats of integer codes, fp8.py that of e4m3 codes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from .base import Weight

CHUNK = 1 << 22  # values that are converted at a time
Own = TypeVar("Own", bound="Quantised")


class Quantised(Weight, is_format=False):
    """One index of the first dimension of ``codes`` and of the format's other tensors stands for ``row_tile`` rows of
    the matrix. The last tensor, ``like``, is empty. Its dtype is that of the matrix."""

    __slots__ = ()
    codes: Tensor
    like: Tensor

    def __init__(self, *tensors: Tensor) -> None:
        for name, tensor in zip(self.names, tensors, strict=True):
            setattr(self, name, tensor)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple([getattr(self, name) for name in self.names])

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def __len__(self) -> int:
        return self.row_tile * len(self.codes)

    def check_dtype(self, op: str, name: str, like: Tensor | None) -> None:
        """Raises TypeError, which names the op and the argument, unless the matrix has the dtype of ``like``."""
        if like is not None and self.like.dtype != like.dtype:
            wanted, found = (str(each.dtype).removeprefix("torch.") for each in (like, self.like))
            raise TypeError(f"{op}: {name} must be {wanted}, and is {found}")

    def dequantise(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        step = self.row_tile * max(1, CHUNK // (self.row_tile * out.shape[1]))
        for start in range(0, len(out), step):
            out[start : start + step] = self.rows(start, start + step)._matrix()
        return out

    def rows(self: Own, start: int, stop: int) -> Own:
        tile = self.row_tile
        if start % tile or stop % tile:
            raise ValueError(f"{self.format}: rows {start} to {stop}; expected multiples of {tile}")
        return type(self)(*[each[start // tile : stop // tile] for each in self.tensors[:-1]], self.like)

    def _matrix(self) -> Tensor:
        """The values [N, K] in ``dtype``, computed all at once."""
        raise NotImplementedError
