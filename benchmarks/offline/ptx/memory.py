"""Global memory (section 5.1.4): the buffers that a kernel's arguments point into, and the bytes that the kernel may
touch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np

from .faults import Fault
from .values import U8, Array, Type

SIZES = (1, 2, 4, 8, 16)  # bytes that a thread may move at once
BASE = 0x7F_0000_0000_00  # so high that an address cut to 32 bits is outside all buffers
ALIGNMENT = 256  # of a buffer; also the least number of bytes between two buffers


def rows_of(flat: Array) -> dict[int, Array]:
    """The same memory as rows of 1 to 16 elements: gathering whole rows is faster than their elements."""
    return {size: flat.reshape(-1, size) for size in SIZES}


class Observer(Protocol):
    def access(self, how: str, offsets: Array, size: int, early: bool) -> None:
        """An instruction of a warp touches ``size`` bytes at each of these offsets of the memory. ``how`` is "load",
        "copy" (cp.async), "bulk load", "store", "bulk store", "atomic" or "prefetch". ``early``: before
        griddepcontrol.wait."""


class GlobalMemory:
    """Buffers of bytes, far from each other, and which bytes of each are elements of an argument. A buffer may be given
    by its size only: then its bytes are zeros, and it takes no memory before it is touched."""

    def __init__(self, buffers: Sequence[tuple[Array | int, Array | None]]) -> None:
        self.starts, self.lengths = [], [data if isinstance(data, int) else len(data) for data, _ in buffers]
        size = ALIGNMENT
        for length in self.lengths:
            self.starts.append(size)
            size += -(-length // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self._bytes, self._gaps = np.zeros(size, U8), np.zeros(size, np.bool_)
        for start, end in zip([0, *self._ends()], [*self.starts, size], strict=True):
            self._gaps[start:end] = True
        for start, end, (data, valid) in zip(self.starts, self._ends(), buffers, strict=True):
            if not isinstance(data, int):
                self._bytes[start:end] = data
            if valid is not None:
                self._gaps[start:end] = ~valid
        self._rows, self._gap_rows = rows_of(self._bytes), rows_of(self._gaps)
        self.observers: list[Observer] = []
        self._settled: dict[int, Array] | None = None  # rows of bool: allowed reads before griddepcontrol.wait
        self._judges_early = True

    def __len__(self) -> int:
        """The number of bytes, with the gaps between buffers."""
        return len(self._bytes)

    def _ends(self) -> list[int]:
        return [start + length for start, length in zip(self.starts, self.lengths, strict=True)]

    def address(self, buffer: int) -> int:
        return BASE + self.starts[buffer]

    def contents(self, buffer: int) -> Array:
        return self._bytes[self.starts[buffer] : self.starts[buffer] + self.lengths[buffer]]

    def check(self, addresses: Array, size: int) -> Array:
        """Numbers of the rows of ``size`` bytes at these addresses (int64), which must be whole elements."""
        offsets = addresses - BASE
        if np.count_nonzero(offsets & (size - 1)):
            wrong = addresses[np.nonzero(offsets & (size - 1))[0][0]]
            raise Fault(f"misaligned: {size} bytes of global memory at {wrong:#x}")
        rows = offsets // size
        outside = (offsets < 0) | (offsets >= len(self._bytes))
        if np.count_nonzero(outside):
            raise Fault(f"out of bounds: {addresses[np.nonzero(outside)[0][0]]:#x} is no address of global memory")
        gaps = self._gap_rows[size].take(rows, axis=0)
        if np.count_nonzero(gaps):
            raise Fault(f"out of bounds: {size} bytes {self._place(offsets[np.nonzero(gaps.any(axis=1))[0][0]])}")
        return rows

    def load(self, addresses: Array, size: int, early: bool = False, how: str = "load") -> Array:
        """Loads bytes [n, size]. ``early``: before griddepcontrol.wait."""
        rows = self.check(addresses, size)
        if early and self._judges_early and not self._is_settled(rows, size):
            raise Fault("reads global memory before griddepcontrol.wait")
        self._tell(how, addresses, size, early)
        return self._rows[size].take(rows, axis=0)

    def store(self, addresses: Array, data: Array, early: bool = False, how: str = "store") -> None:
        """Stores bytes [n, size]."""
        size = data.shape[1]
        rows = self.check(addresses, size)
        if early and self._judges_early:
            raise Fault("writes global memory before griddepcontrol.wait")
        self._tell(how, addresses, size, early)
        self._rows[size][rows] = data
        if np.count_nonzero(self._rows[size].take(rows, axis=0) != data):
            raise Fault("two lanes store different values to one address of global memory")

    def atomic(self, address: Array, compute: Callable[[Array], Array], type_: Type, early: bool) -> Array:
        """Replaces one element by ``compute`` of it. Returns the old value."""
        size = type_.bits // 8
        rows = self.check(address, size)
        if early and self._judges_early:
            raise Fault("writes global memory before griddepcontrol.wait")
        self._tell("atomic", address, size, early)
        before: Array = self._rows[size].take(rows, axis=0).view(type_.dtype)[:, 0]
        self._rows[size][rows] = compute(before).reshape(1, 1).view(U8)
        return before

    def prefetch(self, addresses: Array, early: bool) -> None:
        self.check(addresses, 1)
        self._tell("prefetch", addresses, 1, early)

    def settle(self, buffers: Collection[int]) -> None:
        """Allows reads of these buffers before griddepcontrol.wait: no kernel that may still run writes them."""
        settled = np.zeros(len(self._bytes), np.bool_)
        for buffer in buffers:
            settled[self.starts[buffer] : self.starts[buffer] + self.lengths[buffer]] = True
        self._settled = rows_of(settled)

    def _is_settled(self, rows: Array, size: int) -> bool:
        return self._settled is not None and bool(np.all(self._settled[size].take(rows, axis=0)))

    def leave_early_accesses(self) -> None:
        """Raises no Fault for accesses before griddepcontrol.wait, because an observer judges them."""
        self._judges_early = False

    def _tell(self, how: str, addresses: Array, size: int, early: bool) -> None:
        for observer in self.observers:
            observer.access(how, addresses - BASE, size, early)

    def _place(self, offset: int) -> str:
        buffer = max((at for at, start in enumerate(self.starts) if start <= offset), default=0)
        return f"at byte {offset - self.starts[buffer]} of buffer {buffer}, which has {self.lengths[buffer]} bytes"
