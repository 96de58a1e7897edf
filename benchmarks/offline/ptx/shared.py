"""A CTA's shared memory (section 5.1.6), and checks that each access is ordered after the accesses of other warps.

For each byte, it is stored which warp wrote it last and when, and when each warp read it last. In place of the moment
of the last write there may be a mark: an asynchronous copy to the byte is under way, a bulk copy has written it, or
nothing was ever written. Two writes of the same value are no race.

Products of warp groups and bulk copies use another path to memory, the asynchronous proxy (section 8.6), which sees
data of ordinary stores only after a fence.proxy.async. Data that cp.async has written counts as seen: the specification
does not say so, but CUTLASS's and Triton's products read such data without a fence."""

from __future__ import annotations

import numpy as np

from .faults import Fault
from .memory import rows_of
from .order import LAST, Clocks
from .values import U8, U32, Array

COPIED, COPYING, UNWRITTEN = LAST + 1, LAST + 2, LAST + 3  # marks in place of the moment of the last write
BY_COPY = 1 << 8  # added to the number of the warp if its cp.async has written


class SharedMemory:
    def __init__(self, size: int, clocks: Clocks) -> None:
        self._size, room = size, -(-size // 16) * 16
        self._clocks, num_warps = clocks, len(clocks.known)
        self._rows = rows_of(np.full(room, 0xEE, U8))
        self._written = rows_of(np.full(room, UNWRITTEN, U32))
        self._writer = rows_of(np.zeros(room, U32))  # the number of a warp or of a bulk copy
        self._read = [rows_of(np.zeros(room, U32)) for _ in range(num_warps)]
        self._last_read = [0] * num_warps
        self._reading = np.zeros(room // 16, np.int32)  # for each 16 bytes, the asynchronous reads that are under way
        self._num_reading = 0

    def load(self, warp: int, addresses: Array, size: int) -> Array:
        """A warp loads bytes [n, size] at addresses int64 [n]."""
        rows = self._check(addresses, size)
        self._check_read(warp, rows, addresses, size)
        self._note_read(warp, rows, size)
        return self._rows[size].take(rows, axis=0)

    def store(self, warp: int, addresses: Array, data: Array) -> None:
        """A warp stores bytes [n, size]."""
        size = data.shape[1]
        rows = self._check(addresses, size)
        raced = self._check_write(warp, rows, addresses, size, data)
        moment: int | Array = self._clocks.now
        writer: int | Array = warp
        if raced is not None:  # another warp's write of the same value still counts
            moment = np.where(raced, self._written[size].take(rows, axis=0), self._clocks.now)
            writer = np.where(raced, self._writer[size].take(rows, axis=0), warp)
        self._rows[size][rows] = data
        self._written[size][rows] = moment
        self._writer[size][rows] = writer
        if np.count_nonzero(self._rows[size].take(rows, axis=0) != data):
            raise Fault("two lanes store different values to one address of shared memory")

    def store_object(self, warp: int, addresses: Array, data: Array) -> None:
        """Stores an mbarrier: a warp that knows of the store may use it, also through the asynchronous proxy."""
        size = data.shape[1]
        rows = self._check(addresses, size)
        self._check_write(warp, rows, addresses, size, None)
        number = self._clocks.number()
        self._clocks.known[warp].copies.add(number)
        self._rows[size][rows] = data
        self._written[size][rows] = COPIED
        self._writer[size][rows] = number

    # Asynchronous copies (cp.async)

    def begin_copy(self, warp: int, addresses: Array, size: int) -> None:
        """From now on ``size`` bytes at each of the addresses may change at any moment."""
        rows = self._check(addresses, size)
        self._check_write(warp, rows, addresses, size, None)
        self._written[size][rows] = COPYING

    def end_copy(self, warp: int, addresses: Array, data: Array) -> None:
        """The warp that began the copy has waited for it. The other warps need a barrier to know of the copy."""
        size = data.shape[1]
        rows = addresses // size
        self._rows[size][rows] = data
        self._written[size][rows] = self._clocks.now
        self._writer[size][rows] = warp | BY_COPY

    # The asynchronous proxy: 16 bytes at each address

    def begin_bulk_write(self, warp: int, addresses: Array) -> None:
        rows = self._check(addresses, 16)
        self._check_fenced(warp, rows, addresses, "writes")
        self._check_write(warp, rows, addresses, 16, None)
        self._written[16][rows] = COPYING

    def end_bulk_write(self, number: int, addresses: Array, data: Array) -> None:
        """The copy has arrived. A warp that waits for its mbarrier knows of it."""
        rows = addresses // 16
        self._rows[16][rows] = data
        self._written[16][rows] = COPIED
        self._writer[16][rows] = number

    def begin_async_read(self, warp: int, addresses: Array) -> Array:
        """Reads bytes [n, 16]. Until ``end_async_read`` nobody may write them."""
        rows = self._check(addresses, 16)
        self._check_read(warp, rows, addresses, 16)
        self._check_fenced(warp, rows, addresses, "reads")
        np.add.at(self._reading, rows, 1)
        self._num_reading += 1
        return self._rows[16].take(rows, axis=0)

    def end_async_read(self, warp: int, addresses: Array) -> None:
        """The warp has waited for the read."""
        rows = addresses // 16
        np.subtract.at(self._reading, rows, 1)
        self._num_reading -= 1
        self._note_read(warp, rows, 16)

    def _check(self, addresses: Array, size: int) -> Array:
        if np.count_nonzero(addresses & (size - 1)):
            wrong = addresses[np.nonzero(addresses & (size - 1))[0][0]]
            raise Fault(f"misaligned: {size} bytes of shared memory at {wrong:#x}")
        outside = (addresses < 0) | (addresses > self._size - size)
        if np.count_nonzero(outside):
            wrong = addresses[np.nonzero(outside)[0][0]]
            raise Fault(f"out of bounds: {size} bytes of shared memory at {wrong}, which has {self._size} bytes")
        return addresses // size

    def _note_read(self, warp: int, rows: Array, size: int) -> None:
        self._read[warp][size][rows] = self._last_read[warp] = self._clocks.now

    def _check_read(self, warp: int, rows: Array, addresses: Array, size: int) -> None:
        written = self._written[size].take(rows, axis=0)
        if len(rows) == 0 or written.max() <= self._clocks.floor[warp]:
            return
        for moment, why in ((COPYING, "which an asynchronous copy may still write"), (UNWRITTEN, "never written")):
            if np.count_nonzero(found := written == moment):
                why = "which was never written" if moment == UNWRITTEN else why
                raise Fault(f"reads byte {_first(found, addresses)} of shared memory, {why}")
        unknown = self._unknown(warp, written, self._writer[size].take(rows, axis=0))
        if np.count_nonzero(unknown):
            raise Fault(f"reads {self._what(unknown, rows, addresses, size)}")

    def _check_write(self, warp: int, rows: Array, addresses: Array, size: int, data: Array | None) -> Array | None:
        """Returns where another warp wrote the same value without this warp's knowledge (bool [n, size])."""
        seen = self._clocks.known[warp].seen
        for other, last in enumerate(self._last_read):
            if other != warp and last > seen[other]:
                read = self._read[other][size].take(rows, axis=0)
                if np.count_nonzero(found := read > seen[other]):
                    at = _first(found, addresses)
                    raise Fault(f"writes byte {at} of shared memory, which warp {other} read since the last barrier")
        if self._num_reading and np.count_nonzero(found := self._reading.take(rows * size // 16)):
            at = int(addresses[np.nonzero(found)[0][0]])
            raise Fault(f"writes byte {at} of shared memory, which an asynchronous operation may still read")
        written = self._written[size].take(rows, axis=0)
        if len(rows) == 0 or written.max() <= self._clocks.floor[warp]:
            return None
        if np.count_nonzero(found := written == COPYING):
            at = _first(found, addresses)
            raise Fault(f"writes byte {at} of shared memory, which an asynchronous copy may still write")
        unknown = self._unknown(warp, written, self._writer[size].take(rows, axis=0))
        if not np.count_nonzero(unknown):
            return None
        raced = unknown
        if data is not None:
            unknown = unknown & (self._rows[size].take(rows, axis=0) != data)
        if np.count_nonzero(unknown):
            raise Fault(f"writes {self._what(unknown, rows, addresses, size)}")
        return raced

    def _check_fenced(self, warp: int, rows: Array, addresses: Array, does: str) -> None:
        written, writer = self._written[16].take(rows, axis=0), self._writer[16].take(rows, axis=0)
        ordinary = (written < COPIED) & (writer < BY_COPY)
        unfenced = ordinary & (written > self._clocks.known[warp].fenced[np.where(ordinary, writer, 0)])
        if np.count_nonzero(unfenced):
            by, at = writer[unfenced][0], _first(unfenced, addresses)
            raise Fault(
                f"{does} byte {at} of shared memory asynchronously, which warp {by} stored, and no fence.proxy.async"
                " stands between"
            )

    def _unknown(self, warp: int, written: Array, writer: Array) -> Array:
        """The writes that this warp does not know of."""
        known = self._clocks.known[warp]
        ordinary = written < COPIED
        by = np.where(ordinary, writer & (BY_COPY - 1), 0)
        unknown = ordinary & (by != warp) & (written > known.seen[by])
        if np.count_nonzero(copied := written == COPIED):
            arrived = np.isin(writer, list(known.copies)) if known.copies else np.zeros_like(copied)
            unknown |= copied & ~arrived
        return unknown

    def _what(self, unknown: Array, rows: Array, addresses: Array, size: int) -> str:
        lane, byte = np.argwhere(unknown)[0]
        writer = int(self._writer[size][rows[lane], byte]) & (BY_COPY - 1)
        if self._written[size][rows[lane], byte] == COPIED:
            return f"byte {addresses[lane] + byte} of shared memory, which a bulk copy or mbarrier.init wrote unawaited"
        return f"byte {addresses[lane] + byte} of shared memory, which warp {writer} wrote since the last barrier"


def _first(found: Array, addresses: Array) -> int:
    """The first byte of [n, size] where something was found."""
    lane, byte = np.argwhere(found)[0]
    return int(addresses[lane] + byte)
