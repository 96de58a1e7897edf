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
    """A tensor with undefined values. Raises RequestError if the device has no memory for it."""
    try:
        return _empty(shape, dtype, device)
    except (OSError, OverflowError, RuntimeError) as error:  # what mmap and torch raise if there is no memory
        reason = str(error).partition("\n")[0]
        raise RequestError(
            f"device {device} has no memory for weights of shape {list(shape)} in {dtype}: {reason}"
        ) from error


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, large tensors lie in huge pages if the system has these, because a processor that streams weights
    prefetches further in a huge page."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # an operating system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size].view(dtype).view(shape)


class Pool:
    """CPU memory for the tensors of many weights, so that small tensors lie in huge pages, too. The pool allocates
    large pieces, which tensors fill one after the other. After the pool itself is freed, a piece is freed with the last
    of its tensors."""

    def __init__(self, total: int) -> None:
        """``total``: about how many bytes all tensors will take."""
        self._piece = min(_PIECE, total)
        self._rests: list[Tensor] = []  # the unused rest of each piece

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with undefined values. Raises RequestError if there is no memory for it."""
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        place = next((i for i, rest in enumerate(self._rests) if len(rest) >= taken), None)
        if place is None:
            place = len(self._rests)
            self._rests.append(allocate((max(taken, self._piece),), torch.uint8, torch.device("cpu")))
        found, self._rests[place] = self._rests[place].split([taken, len(self._rests[place]) - taken])
        return found[:size].view(dtype).view(shape)


def give_back() -> None:
    """Returns freed memory to the system. The C library may keep it for later, such as the many small allocations of a
    tokenizer that is loaded. Only glibc has a function for this."""
    with contextlib.suppress(AttributeError, TypeError):  # Windows cannot open the program itself
        ctypes.CDLL(None).malloc_trim(0)
