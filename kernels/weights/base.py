"""What a format of weights must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..discovery import register_format

FORMATS: dict[str, type[Weight]] = {}


class Weight:
    """The matrix [N, K] of a linear layer. Its constructor takes its tensors, in the order of ``names``.

    ``names`` are those of the tensors in a module, for a layer's parameters; the dense format's is "weight" alone.

    Triton: ``triton_arguments`` are what a kernel gets of a weight, a named tuple of tensors and numbers (no field may
    be called values, which is Triton's). ``triton_load(weight, rows, k, mask, other)`` loads a tile in the dtype of x,
    ``triton_prefetch(weight, rows, k_start, k_end, LINES)`` asks for the first cache lines of each row, and
    ``triton_skip(weight, rows)`` is the weight without its first rows. They are @triton.jit functions, which a kernel
    takes as constants. A format without them is refused by Triton's ops.

    C: kernels/c/weights.py has the struct of each format; one that is not there is refused by C's ops."""

    __slots__ = ()
    format: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    triton_load: ClassVar[Callable | None] = None
    triton_prefetch: ClassVar[Callable | None] = None
    triton_skip: ClassVar[Callable | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        register_format(cls, Weight, FORMATS, REQUIRED, TRITON)

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> Weight:
        """A matrix [rows, columns] for x of this dtype, its values undefined. ``empty`` gives a tensor of a shape and a
        dtype."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order of ``names``."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """[N, K], of the matrix that it stands for."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix that it stands for, which is that of x."""
        raise NotImplementedError

    def check(self, op: str, name: str, shape: tuple[int | str, int | str], like: Tensor | None = None) -> None:
        """Raises ValueError or TypeError, which name the op and the argument, unless the tensors make a matrix of this
        shape, for x of the dtype of ``like``. A word in the shape stands for any size of at least 1."""
        raise NotImplementedError

    def dequantise(self) -> Tensor:
        """The matrix [N, K] in its dtype: what the reference multiplies by."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Weight:
        """Its rows from ``start`` to ``stop``, in the same memory. Raises ValueError where the format cannot."""
        raise NotImplementedError

    def take(self, ids: Tensor) -> Tensor:
        """Its rows of these numbers [T], in its dtype: [T, K]."""
        raise NotImplementedError

    def copy_(self, matrix: Tensor) -> None:
        """Takes the values of a matrix [N, K] of any float dtype."""
        raise NotImplementedError

    def triton_arguments(self) -> tuple[Any, ...]:
        raise NotImplementedError(f"weights of the format {self.format} have no Triton kernels")

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """Bytes that a kernel reads."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __len__(self) -> int:
        return self.shape[0]


REQUIRED = (
    "names",
    "allocate",
    "tensors",
    "shape",
    "dtype",
    "check",
    "dequantise",
    "rows",
    "take",
    "copy_",
)
TRITON = ("triton_load", "triton_prefetch", "triton_skip", "triton_arguments")
