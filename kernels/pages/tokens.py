"""The base class of all formats here: one tensor of keys and one of values, with a row for each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_device, check_tensor
from .base import Pages


class TokenPages(Pages, is_format=False):
    """``k`` and ``v`` [num_pages, page_size, Hkv, D], then any other tensors. ``code`` is the dtype of k and v, or None
    in the dense format, which has q's dtype. In the other formats the last tensor has q's dtype. This tensor is empty
    and called ``like``, unless it has another use."""

    __slots__ = ()
    code: ClassVar[torch.dtype | None] = None
    by_token: ClassVar[int] = 2  # the tensors that begin with [num_pages, page_size]; they come first
    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> TokenPages:
        shape = num_pages, page_size, num_kv_heads, head_dim
        k, v = (torch.empty(shape, dtype=cls.code or dtype, device=device) for _ in range(2))
        return cls(k, v, *cls._others(shape, dtype, device))  # type: ignore[call-arg] # those of names

    @classmethod
    def _others(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors after k and v [shape]."""
        return (torch.empty(0, dtype=dtype, device=device),)

    @property
    def tensors_by_page(self) -> tuple[Tensor, ...]:
        return self.tensors[: self.by_token]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        num_pages, page_size, num_kv_heads, head_dim = self.k.shape
        return num_pages, page_size, num_kv_heads, head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[-1].dtype

    def check(self, op: str, like: Tensor, head_dim: int | str) -> None:
        shape, codes = ("pages", "page size", "Hkv", head_dim), (self.code or like.dtype,)
        check_tensor(op, self.names[0], self.k, shape, dtypes=codes, dense=True)
        check_tensor(op, self.names[1], self.v, tuple(self.k.shape), dtypes=codes, dense=True)
        self._check_others(op, like)
        check_device(op, **dict(zip(self.names, self.tensors, strict=True)))

    def _check_others(self, op: str, like: Tensor) -> None:
        check_tensor(op, self.names[-1], self.tensors[-1], (0,), like=like)

    def copy_page(self, to: int, source: int) -> None:
        for tensor in self.tensors_by_page:
            tensor[to] = tensor[source]

    def _write(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        """Writes rows [T, ...] into the slots of each tensor."""
        for tensor, its in zip(self.tensors, rows, strict=False):
            tensor.view(-1, *tensor.shape[2:])[slots] = its

    def _rows(self, block_table: Tensor, length: int) -> list[Tensor]:
        """The first ``length`` tokens of a sequence in each tensor that has them: [Hkv, length, ...]."""
        pages = block_table[: -(-length // self.page_size)].long()
        return [each[pages].flatten(0, 1)[:length].transpose(0, 1) for each in self.tensors[: self.by_token]]
