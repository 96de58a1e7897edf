"""A CTA's shared memory (section 5.1.6), and who may touch which byte of it until the next barrier.

For each byte is kept which warps have read it and written it since the last barrier, whether an asynchronous copy is
under way to it, and whether anything has ever been written to it. Two writes of one value are no race."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .memory import rows_of
from .values import U8, U32, Array

COPYING = 1 << 30  # beside the bits of the warps that have written
UNWRITTEN = 1 << 31
MAX_WARPS = 30


class SharedMemory:
    def __init__(self, size: int) -> None:
        self._size, room = size, -(-size // 16) * 16
        self._bytes = np.full(room, 0xEE, U8)
        self._written = np.full(room, UNWRITTEN, U32)
        self._read = np.zeros(room, U32)
        self._rows, self._written_rows, self._read_rows = (
            rows_of(self._bytes),
            rows_of(self._written),
            rows_of(self._read),
        )

    def barrier(self) -> None:
        """All warps have come to one: what they did before is seen by all."""
        self._written &= U32(COPYING | UNWRITTEN)
        self._read[:] = 0

    def load(self, warp: int, addresses: Array, size: int) -> Array:
        """Bytes [n, size] at addresses int64 [n], for one warp."""
        rows = self._check(addresses, size)
        written = self._written_rows[size].take(rows, axis=0) & U32(~(1 << warp) & 0xFFFFFFFF)
        if np.count_nonzero(written):
            at, bits = self._first(written, addresses)
            if bits & COPYING:
                raise Fault(f"reads byte {at} of shared memory, which an asynchronous copy may still write")
            if bits & UNWRITTEN:
                raise Fault(f"reads byte {at} of shared memory, which was never written")
            raise Fault(f"reads byte {at} of shared memory, which {_warps(bits)} wrote since the last barrier")
        self._read_rows[size][rows] |= U32(1 << warp)
        return self._rows[size].take(rows, axis=0)

    def store(self, warp: int, addresses: Array, data: Array) -> None:
        """Bytes [n, size]."""
        size = data.shape[1]
        rows = self._check_write(warp, addresses, size, data)
        self._rows[size][rows] = data
        self._written_rows[size][rows] = (self._written_rows[size][rows] & U32(~UNWRITTEN & 0xFFFFFFFF)) | U32(
            1 << warp
        )
        if np.count_nonzero(self._rows[size].take(rows, axis=0) != data):
            raise Fault("two lanes store different values to one address of shared memory")

    def begin_copy(self, warp: int, addresses: Array, size: int) -> None:
        """From now on ``size`` bytes at each of the addresses may change at any moment."""
        rows = self._check_write(warp, addresses, size, None)
        self._written_rows[size][rows] |= U32(COPYING)

    def end_copy(self, warp: int, addresses: Array, data: Array) -> None:
        """The warp that asked for it has waited for it; the others need a barrier to know of that."""
        size = data.shape[1]
        rows = addresses // size
        self._rows[size][rows] = data
        self._written_rows[size][rows] = U32(1 << warp)

    def _check(self, addresses: Array, size: int) -> Array:
        if np.count_nonzero(addresses & (size - 1)):
            wrong = addresses[np.nonzero(addresses & (size - 1))[0][0]]
            raise Fault(f"misaligned: {size} bytes of shared memory at {wrong:#x}")
        outside = (addresses < 0) | (addresses > self._size - size)
        if np.count_nonzero(outside):
            wrong = addresses[np.nonzero(outside)[0][0]]
            raise Fault(f"out of bounds: {size} bytes of shared memory at {wrong}, which has {self._size} bytes")
        return addresses // size

    def _check_write(self, warp: int, addresses: Array, size: int, data: Array | None) -> Array:
        rows = self._check(addresses, size)
        others = U32(~(1 << warp | COPYING | UNWRITTEN) & 0xFFFFFFFF)
        read = self._read_rows[size].take(rows, axis=0) & others
        if np.count_nonzero(read):
            at, bits = self._first(read, addresses)
            raise Fault(f"writes byte {at} of shared memory, which {_warps(bits)} read since the last barrier")
        written = self._written_rows[size].take(rows, axis=0)
        if np.count_nonzero(copying := written & U32(COPYING)):
            at, _ = self._first(copying, addresses)
            raise Fault(f"writes byte {at} of shared memory, which an asynchronous copy may still write")
        written &= others
        if data is not None:
            written[self._rows[size].take(rows, axis=0) == data] = 0
        if np.count_nonzero(written):
            at, bits = self._first(written, addresses)
            raise Fault(f"writes byte {at} of shared memory, which {_warps(bits)} wrote since the last barrier")
        return rows

    @staticmethod
    def _first(found: Array, addresses: Array) -> tuple[int, int]:
        """The first byte of [n, size] where something was found, and what."""
        lane, byte = np.argwhere(found)[0]
        return int(addresses[lane] + byte), int(found[lane, byte])


def _warps(bits: int) -> str:
    return "warp " + ", ".join(str(warp) for warp in range(MAX_WARPS) if bits >> warp & 1)
