"""Global memory (section 5.1.4): the buffers that a kernel's arguments point into, and which of their bytes it may
touch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .faults import Fault
from .values import U8, Array

SIZES = (1, 2, 4, 8, 16)  # bytes that a thread may move at once
BASE = 0x7F_0000_0000_00  # so high that an address cut to 32 bits leads nowhere
ALIGNMENT = 256  # of a buffer; also at least as many bytes lie between two of them


def rows_of(flat: Array) -> dict[int, Array]:
    """The same memory as rows of 1 to 16 elements: gathering whole rows is faster than their elements."""
    return {size: flat.reshape(-1, size) for size in SIZES}


class GlobalMemory:
    """Buffers of bytes, far from each other, and for each which bytes of it are elements of an argument."""

    def __init__(self, buffers: Sequence[tuple[Array, Array]]) -> None:
        self._starts = []
        size = ALIGNMENT
        for data, _ in buffers:
            self._starts.append(size)
            size += -(-len(data) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        self._bytes, self._valid = np.full(size, 0xEE, U8), np.zeros(size, np.bool_)
        self._lengths = [len(data) for data, _ in buffers]
        for start, (data, valid) in zip(self._starts, buffers, strict=True):
            self._bytes[start : start + len(data)] = data
            self._valid[start : start + len(data)] = valid
        self._rows, self._valid_rows = rows_of(self._bytes), rows_of(self._valid)

    def address(self, buffer: int) -> int:
        return BASE + self._starts[buffer]

    def contents(self, buffer: int) -> Array:
        return self._bytes[self._starts[buffer] : self._starts[buffer] + self._lengths[buffer]]

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
        valid = self._valid_rows[size].take(rows, axis=0)
        if np.count_nonzero(valid) != valid.size:
            raise Fault(f"out of bounds: {size} bytes {self._place(offsets[np.nonzero(~valid.all(axis=1))[0][0]])}")
        return rows

    def load(self, addresses: Array, size: int) -> Array:
        """Bytes [n, size]."""
        return self._rows[size].take(self.check(addresses, size), axis=0)

    def store(self, addresses: Array, data: Array) -> None:
        """Bytes [n, size]."""
        size = data.shape[1]
        rows = self.check(addresses, size)
        self._rows[size][rows] = data
        if np.count_nonzero(self._rows[size].take(rows, axis=0) != data):
            raise Fault("two lanes store different values to one address of global memory")

    def _place(self, offset: int) -> str:
        buffer = max((at for at, start in enumerate(self._starts) if start <= offset), default=0)
        return f"at byte {offset - self._starts[buffer]} of buffer {buffer}, which has {self._lengths[buffer]} bytes"
