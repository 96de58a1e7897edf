"""Memory for weights."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap

import torch
from torch import Tensor

from .errors import RequestError

HUGE_PAGE = 2 << 20
_PIECE = 64 << 20  # bytes of a pool's pieces
_ALIGNMENT = 64  # bytes


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor whose values are undefined. Raises RequestError where the device gives no memory for it."""
    try:
        return _empty(shape, dtype, device)
    except (OSError, OverflowError, RuntimeError) as error:  # what mmap and torch say where there is no memory
        reason = str(error).partition("\n")[0]
        raise RequestError(
            f"device {device} gives no memory for weights of shape {list(shape)} in {dtype}: {reason}"
        ) from error


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU large tensors lie in huge pages where the system has them, because a processor that streams weights
    fetches further ahead in those."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


class Pool:
    """Memory on the CPU for the tensors of many weights, so that small ones lie in huge pages too. The tensors fill
    pieces of it, one after the other. A piece is freed with the last of its tensors, once the pool is gone."""

    def __init__(self, total: int) -> None:
        """``total``: the bytes that all tensors will take, about."""
        self._piece = min(_PIECE, total)
        self._rests: list[Tensor] = []  # of each piece, what no tensor has yet

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor whose values are undefined. Raises RequestError where there is no memory for it."""
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        place = next((i for i, rest in enumerate(self._rests) if len(rest) >= taken), None)
        if place is None:
            place = len(self._rests)
            self._rests.append(allocate((max(taken, self._piece),), torch.uint8, torch.device("cpu")))
        found, self._rests[place] = self._rests[place].split([taken, len(self._rests[place]) - taken])
        return found[:size].view(dtype).view(shape)


def give_back() -> None:
    """Gives the system the memory that was freed, which the C library may keep for later: a tokenizer is made of many
    small pieces. Only glibc has a function for that."""
    with contextlib.suppress(AttributeError, TypeError):  # Windows cannot open the program itself
        ctypes.CDLL(None).malloc_trim(0)
