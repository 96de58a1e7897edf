"""One call of a C function, as C sees it."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence

from torch import Tensor

OPS = (
    *("embedding", "rope_and_cache", "few_tokens", "many_tokens", "decode_attention", "prefill_attention"),
    *("apply_rope", "add_rms_norm", "silu_mul"),
)


_NUMBER = {name: number for number, name in enumerate(OPS)}
_TENSORS, _SIZES = 10, 8  # at most


class Call(ctypes.Structure):
    """As `call` in common.h."""

    _fields_ = (
        ("op", ctypes.c_long),
        ("tensors", ctypes.c_void_p * _TENSORS),
        ("sizes", ctypes.c_long * _SIZES),
        ("scalar", ctypes.c_double),
    )

    @classmethod
    def of(cls, op: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], scalar: float = 0.0) -> Call:
        pointers = [0 if tensor is None else tensor.data_ptr() or _no_address(op, tensor) for tensor in tensors]
        layout = _layout(len(pointers), len(sizes))  # packed at once: arrays of ctypes cost as much as a small op
        return cls.from_buffer_copy(layout.pack(_NUMBER[op], *pointers, *sizes, scalar))


def _no_address(op: str, tensor: Tensor) -> int:
    """Of an empty tensor; others must have one. Raises TypeError."""
    if tensor.numel():
        raise TypeError(
            f"{op}: a tensor of shape {list(tensor.shape)} has no memory; expected one whose values lie in memory "
            "(its storage was freed, or it stands for other tensors or for zeros that nobody wrote)"
        )
    return 0


@functools.cache
def _layout(tensors: int, sizes: int) -> struct.Struct:
    """A call's bytes; what it has fewer of than there is room for is zero."""
    missing = (_TENSORS - tensors) * struct.calcsize("P"), (_SIZES - sizes) * struct.calcsize("l")
    return struct.Struct(f"@l{tensors}P{missing[0]}x{sizes}l{missing[1]}xd")
