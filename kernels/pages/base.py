"""What a format of cache pages must say of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..discovery import register_format

FORMATS: dict[str, type[Pages]] = {}


class Pages:
    """Keys and values of one layer, in pages: token t of a sequence lies in page ``block_table[t // page_size]`` at
    offset ``t % page_size``, and its *slot* is ``page * page_size + offset``. The constructor takes the tensors, in the
    order of ``names``, which are those of error messages.

    Triton: ``triton_arguments`` are what a kernel gets of the pages, a named tuple. The @triton.jit functions
    ``triton_load_k`` and ``triton_load_v`` (pages, kv_head, page, token, column, mask) load a tile in the dtype of q;
    ``triton_store_k`` and ``triton_store_v`` (pages, slot, kv_head, num_kv_heads, column, value, mask, HEAD_DIM) write
    one. A format without them is refused by Triton's ops.

    C: kernels/c/pages.py has the struct of each format; one that is not there is refused by C's ops."""

    __slots__ = ()
    format: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    triton_load_k: ClassVar[Callable | None] = None
    triton_load_v: ClassVar[Callable | None] = None
    triton_store_k: ClassVar[Callable | None] = None
    triton_store_v: ClassVar[Callable | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        register_format(cls, Pages, FORMATS, REQUIRED, TRITON)

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Pages:
        """Pages whose contents are undefined."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, in the order of ``names``."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(pages, page size, key-value heads, head size)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values that go in and come out, which is that of q."""
        raise NotImplementedError

    def check(self, op: str, like: Tensor, head_dim: int | str) -> None:
        """Raises ValueError or TypeError, which name the op, unless the tensors are pages for x of the dtype of
        ``like``, with heads of this size."""
        raise NotImplementedError

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes k and v [T, Hkv, D] into the slots [T]."""
        raise NotImplementedError

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` tokens of one sequence: k and v [Hkv, length, D] in their dtype."""
        raise NotImplementedError

    def copy_page(self, to: int, source: int) -> None:
        """Copies one page over another."""
        raise NotImplementedError

    def triton_arguments(self) -> tuple[Any, ...]:
        raise NotImplementedError(f"pages of the format {self.format} have no Triton kernels")

    @classmethod
    def bytes_per_token(cls, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Of the keys and values of one layer, rounded up."""
        page = 1024
        return -(-cls.allocate(1, page, num_kv_heads, head_dim, dtype, torch.device("meta")).nbytes // page)

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def page_size(self) -> int:
        return self.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.shape[2]

    @property
    def head_dim(self) -> int:
        return self.shape[3]


REQUIRED = (
    "allocate",
    "tensors",
    "shape",
    "dtype",
    "check",
    "store",
    "gather",
    "copy_page",
)
TRITON = ("triton_load_k", "triton_load_v", "triton_store_k", "triton_store_v", "triton_arguments")
