"""The base class of weight formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..discovery import register_format

FORMATS: dict[str, type[Weight]] = {}


class Weight:
    """The matrix [N, K] of a linear layer, in some format. The constructor takes the format's tensors, in the order of
    ``names``.

    ``names`` are the names of the tensors as parameters of a layer. The dense format has one tensor, "weight".

    For Triton: ``triton_arguments`` returns the named tuple of tensors and numbers that a kernel gets (a field may not
    be called values, because Triton uses that name). ``triton_numbers`` returns the numbers that a kernel is compiled
    for: None, or for packed formats a named tuple with ``step``, ``has_offset`` and ``has_sub_scales``
    (group_products.py). A kernel takes these @triton.jit functions as constants (FORM is ``triton_numbers``;
    ROWS(args, tile, places, BLOCK_N) returns the rows at these places of a tile):

        triton_load(weight, ROWS, args, tile, start, k_end, FORM, BLOCK_N, BLOCK_K, SLICES, EVEN_K)
            loads BLOCK_K columns of a tile from ``start`` on. Columns from ``k_end`` on count as zero; EVEN_K says
            that there are none.
        triton_load_groups(the same arguments)
            loads the scales, zero points and offsets of these columns' groups. A kernel calls it one tile or block
            earlier.
        triton_operand(x, FORM)
            makes the operand of triton_multiply from tokens x [SLICES, BLOCK_T, BLOCK_K / SLICES], which are zero
            from k_end on.
        triton_multiply(piece, groups, x, acc, FORM)
            adds the product of the loaded values with the operand to acc [SLICES, BLOCK_N, BLOCK_T] float32. The sum
            over SLICES is the result. A token's bits do not depend on the other tokens.
        triton_prefetch(weight, ROWS, args, tile, k_start, k_end, FORM, BLOCK_N, LINES)
            prefetches the first LINES cache lines of each row, or of each tile of rows, into the L2 cache.

    A format may also define ``triton_dequantise``, for many tokens and for the embedding; without it, torch
    dequantises:

        triton_dequantise(weight, rows, start, k_size, FORM, BLOCK_K, EVEN_K)
            returns values [rows, BLOCK_K] of these rows (int64) in float32, from column ``start`` on. Columns from
            ``k_size`` on may have any value; EVEN_K says that there are none.

    Triton's ops refuse a format without these functions, a weight for which ``triton_refuses`` gives a reason, and any
    weight on a CUDA device of a lower compute capability than ``triton_capability`` (major * 10 + minor). ``row_tile``
    is the number of rows that a format keeps together: a kernel's tile begins at a multiple of it.

    For C: kernels/c/weights.py makes the struct of each format. C's ops refuse a format that weights.py does not
    list."""

    __slots__ = ()
    format: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    triton_capability: ClassVar[int] = 0
    row_tile: ClassVar[int] = 1
    triton_load: ClassVar[Callable | None] = None
    triton_load_groups: ClassVar[Callable | None] = None
    triton_operand: ClassVar[Callable | None] = None
    triton_multiply: ClassVar[Callable | None] = None
    triton_prefetch: ClassVar[Callable | None] = None
    triton_dequantise: ClassVar[Callable | None] = None

    def __init_subclass__(cls, is_format: bool = True, **keywords: Any) -> None:
        """``is_format`` is False for a base class of formats."""
        super().__init_subclass__(**keywords)
        if is_format:
            register_format(cls, Weight, FORMATS, REQUIRED, TRITON)

    @classmethod
    def allocate(
        cls, rows: int, columns: int, dtype: torch.dtype, empty: Callable[[tuple[int, ...], torch.dtype], Tensor]
    ) -> Weight:
        """A weight [rows, columns] for x of this dtype, with undefined values. ``empty(shape, dtype)`` allocates a
        tensor."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The format's tensors, in the order of ``names``."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        """The shape [N, K] of the matrix."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantised matrix, which is x's dtype."""
        raise NotImplementedError

    def check(self, op: str, name: str, shape: tuple[int | str, int | str], like: Tensor | None = None) -> None:
        """Raises ValueError or TypeError, which names the op and the argument, unless the tensors form a valid matrix
        of this shape, for x of the dtype of ``like``. A string in the shape stands for any size of at least 1."""
        raise NotImplementedError

    def dequantise(self) -> Tensor:
        """The matrix [N, K] in ``dtype``. The reference multiplies by it."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Weight:
        """The rows from ``start`` to ``stop``, as a view. Raises ValueError if the format cannot be cut there."""
        raise NotImplementedError

    def take(self, ids: Tensor) -> Tensor:
        """The rows that ids [T] select: [T, K] in ``dtype``."""
        raise NotImplementedError

    def copy_(self, matrix: Tensor) -> None:
        """Sets the values to those of a matrix [N, K] of any float dtype."""
        raise NotImplementedError

    def triton_arguments(self) -> tuple[Any, ...]:
        raise NotImplementedError(f"weights of the format {self.format} have no Triton kernels")

    def triton_numbers(self) -> Any:
        return None

    def triton_refuses(self) -> str | None:
        return None

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        """The number of bytes that a kernel reads."""
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
TRITON = (
    "triton_load",
    "triton_load_groups",
    "triton_operand",
    "triton_multiply",
    "triton_prefetch",
    "triton_arguments",
)
