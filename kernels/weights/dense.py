"""The dense format: one tensor of bfloat16, float16, float32 or float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor
from ..language import block_of, dot, prefetch
from ..triton_if_any import tl, triton
from .base import Weight


class DenseArguments(NamedTuple):
    data: Any  # [N, K]
    stride: Any  # elements between rows


@triton.jit
def _load(
    weight, ROWS: tl.constexpr, args, tile, start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    rows = ROWS(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)[None, :, None]
    k = start + block_of(BLOCK_K, SLICES)
    mask = None if EVEN_K else k < k_end
    return tl.load(weight.data + rows * weight.stride + k, mask=mask, other=None if EVEN_K else 0.0)


@triton.jit
def _load_groups(
    weight, ROWS: tl.constexpr, args, tile, start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SLICES: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    return 0


@triton.jit
def _operand(x, FORM: tl.constexpr):
    return tl.permute(x, [0, 2, 1])


@triton.jit
def _multiply(piece, groups, x, acc, FORM: tl.constexpr):
    return dot(piece, x, acc)


@triton.jit
def _prefetch(
    weight, ROWS: tl.constexpr, args, tile, k_start, k_end, FORM: tl.constexpr, BLOCK_N: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    if LINES > 0:
        line: tl.constexpr = 1024 // weight.data.dtype.element_ty.primitive_bitwidth  # elements
        rows = ROWS(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)
        k = k_start + tl.arange(0, LINES)[None, :] * line
        prefetch(weight.data + rows[:, None] * weight.stride + k, (rows[:, None] >= 0) & (k < k_end))


class Dense(Weight):
    """One tensor [N, K]. Its rows may have any stride."""

    format = "dense"
    names = ("weight",)
    triton_load = _load
    triton_load_groups = _load_groups
    triton_operand = _operand
    triton_multiply = _multiply
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
