"""The base class of page formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..discovery import register_format

FORMATS: dict[str, type[Pages]] = {}


class Pages:
    """The keys and values of one layer, in pages. Token t of a sequence lies in page ``block_table[t // page_size]`` at
    offset ``t % page_size``, and its *slot* is ``page * page_size + offset``. The constructor takes the format's
    tensors, in the order of ``names``. Error messages use these names.

    For Triton: ``triton_arguments`` returns the named tuple that a kernel gets. The @triton.jit functions
    ``triton_load_k`` and ``triton_load_v`` (pages, kv_head, page, token, column, mask) load a tile in q's dtype.
    ``triton_store_k`` and ``triton_store_v`` (pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM)
    store a tile of the first halves of heads, and one of the second halves: ``column`` is that of ``low``. Triton's ops
    refuse a format that lacks them, and on a CUDA device of a lower compute capability than ``triton_capability``
    (major * 10 + minor). A format may do without these:

    - ``triton_prefetch`` (pages, kv_head, page, token, mask, HEAD_DIM) prefetches a tile of keys and one of values into
      the L2 cache.
    - ``triton_scale_k`` and ``triton_scale_v`` (pages, kv_head, page, token, mask), both or neither: the factors
      [tokens] in float32 of the tiles that are loaded. A kernel multiplies scores and softmax weights by them.
    - ``triton_query`` (pages, kv_head, q, column) returns the tile of q, adapted to the stored keys, in q's dtype.
    - ``triton_most_keys`` is the largest number of keys in a tile of prefill attention; to decode more would spill
      registers. (On sm_90 the kernel has other tiles, and no limit.)
    - ``triton_whole_heads`` says that a store gets tiles [heads, D / 2] of whole heads, because a scale depends on all
      values of a head.

    For C: kernels/c/pages.py makes the struct of each format. C's ops refuse a format that pages.py does not list."""

    __slots__ = ()
    format: ClassVar[str]
    names: ClassVar[tuple[str, ...]]
    triton_capability: ClassVar[int] = 0
    triton_load_k: ClassVar[Callable | None] = None
    triton_load_v: ClassVar[Callable | None] = None
    triton_store_k: ClassVar[Callable | None] = None
    triton_store_v: ClassVar[Callable | None] = None
    triton_prefetch: ClassVar[Callable | None] = None
    triton_scale_k: ClassVar[Callable | None] = None
    triton_scale_v: ClassVar[Callable | None] = None
    triton_query: ClassVar[Callable | None] = None
    triton_most_keys: ClassVar[int | None] = None
    triton_whole_heads: ClassVar[bool] = False

    def __init_subclass__(cls, is_format: bool = True, **keywords: Any) -> None:
        """``is_format`` is False for a base class of formats."""
        super().__init_subclass__(**keywords)
        if is_format:
            register_format(cls, Pages, FORMATS, REQUIRED, TRITON)

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Pages:
        """Pages with undefined contents."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The format's tensors, in the order of ``names``."""
        raise NotImplementedError

    @property
    def tensors_by_page(self) -> tuple[Tensor, ...]:
        """The tensors that have a row for each page. They are the first ones of ``tensors``."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(number of pages, tokens a page, key-value heads, head size)."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the keys and values that are stored and loaded, which is q's dtype."""
        raise NotImplementedError

    def check(self, op: str, like: Tensor, head_dim: int | str) -> None:
        """Raises ValueError or TypeError, which names the op, unless the tensors are valid pages for tensors of the
        dtype of ``like``, with heads of this size."""
        raise NotImplementedError

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Writes k and v [T, Hkv, D] into the slots [T]."""
        raise NotImplementedError

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` tokens of one sequence, from the pages of its block table: k and v [Hkv, length, D] in
        ``dtype``."""
        raise NotImplementedError

    def copy_page(self, to: int, source: int) -> None:
        """Copies one page over another."""
        raise NotImplementedError

    def adapt(self, bias: Tensor) -> None:
        """Prepares empty pages for keys with this bias [Hkv, D], which is added before they are rotated. A format may
        do without it."""

    def triton_arguments(self) -> tuple[Any, ...]:
        raise NotImplementedError(f"pages of the format {self.format} have no Triton kernels")

    @classmethod
    def bytes_per_token(cls, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """The bytes of one token's keys and values in one layer, rounded up, without what all tokens share."""
        page, meta = 1024, torch.device("meta")
        two, one = (cls.allocate(count, page, num_kv_heads, head_dim, dtype, meta).nbytes for count in (2, 1))
        return -(-(two - one) // page)

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
    "names",
    "allocate",
    "tensors",
    "tensors_by_page",
    "shape",
    "dtype",
    "check",
    "store",
    "gather",
    "copy_page",
)
TRITON = ("triton_load_k", "triton_load_v", "triton_store_k", "triton_store_v", "triton_arguments")
