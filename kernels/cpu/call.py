"""One call of a C function, as C sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

OPS = ("embedding", "rope_and_cache", "few_tokens", "many_tokens", "decode_attention", "prefill_attention")


class Call(ctypes.Structure):
    """As `call` in common.h."""

    _fields_ = (
        ("op", ctypes.c_long),
        ("tensors", ctypes.c_void_p * 10),
        ("sizes", ctypes.c_long * 8),
        ("scalar", ctypes.c_double),
    )

    @classmethod
    def of(cls, op: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], scalar: float = 0.0) -> Call:
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return cls(OPS.index(op), (ctypes.c_void_p * 10)(*pointers), (ctypes.c_long * 8)(*sizes), scalar)
