"""The dense format: one tensor of bfloat16, float16, float32 or float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor
from ..language import prefetch
from ..triton_if_any import tl, triton
from .base import Weight


class DenseArguments(NamedTuple):
    data: Any  # [N, K]
    stride: Any  # elements between rows


@triton.jit
def _load(weight, rows, k, mask, other):
    return tl.load(weight.data + rows * weight.stride + k, mask=mask, other=other)


@triton.jit
def _prefetch(weight, rows, k_start, k_end, LINES: tl.constexpr):
    if LINES > 0:
        line: tl.constexpr = 1024 // weight.data.dtype.element_ty.primitive_bitwidth  # elements
        k = k_start + tl.arange(0, LINES)[None, :] * line
        prefetch(weight.data + rows[:, None] * weight.stride + k, (rows[:, None] >= 0) & (k < k_end))


class Dense(Weight):
    """One tensor [N, K]. Its rows may have any stride."""

    format = "dense"
    names = ("weight",)
    triton_load = _load
    triton_prefetch = _prefetch
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> Dense:
        return cls(empty((rows, columns), dtype))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def __len__(self) -> int:
        return len(self.tensor)

    def check(self, op: str, name: str, shape: tuple[int | str, int | str], like: Tensor | None = None) -> None:
        check_tensor(op, name, self.tensor, shape, like=like)

    def dequantise(self) -> Tensor:
        return self.tensor

    def rows(self, start: int, stop: int) -> Dense:
        return Dense(self.tensor[start:stop])

    def take(self, ids: Tensor) -> Tensor:
        return self.tensor[ids]

    def copy_(self, matrix: Tensor) -> None:
        self.tensor.copy_(matrix)

    def triton_arguments(self) -> DenseArguments:
        return DenseArguments(self.tensor, self.tensor.stride(0))
