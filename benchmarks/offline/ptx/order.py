"""What each warp of a CTA knows of the others' accesses to memory: vector clocks.

Time is one counter for the CTA; each access is stamped with the present moment. A barrier, or an mbarrier's phase that
completes, hands on what some warps know to others. An access is ordered behind another one if its warp knows of that
warp's moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .values import U32, Array

MAX_WARPS = 32
LAST = 0xFFFF_FFF0  # moments end here


@dataclass
class Knowledge:
    """What somebody knows of: per warp the latest moment of its accesses, the latest one that also has a
    fence.proxy.async behind it, and which bulk copies have arrived."""

    seen: Array
    fenced: Array
    copies: set[int] = field(default_factory=set)

    def join(self, other: Knowledge) -> None:
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)
        self.copies |= other.copies


def nothing(num_warps: int) -> Knowledge:
    return Knowledge(np.zeros(num_warps, U32), np.zeros(num_warps, U32))


class Clocks:
    def __init__(self, num_warps: int) -> None:
        assert num_warps <= MAX_WARPS
        self.now = 1
        self.known = [nothing(num_warps) for _ in range(num_warps)]
        self._numbers = 0
        self.floor = [0] * num_warps  # up to here a warp knows of everything; of its own accesses it always knows

    def number(self) -> int:
        """Of a bulk copy."""
        self._numbers += 1
        return self._numbers

    def release(self, warp: int) -> Knowledge:
        """What others may learn from this warp now, of which its own accesses are a part."""
        known = self.known[warp]
        given = Knowledge(known.seen.copy(), known.fenced.copy(), set(known.copies))
        given.seen[warp] = self._next()
        return given

    def acquire(self, warp: int, given: Knowledge) -> None:
        self.known[warp].join(given)
        self._set_floor(warp)

    def barrier(self, warps: Sequence[int]) -> None:
        """All of these know what each of them knows."""
        common = nothing(len(self.known))
        for warp in warps:
            common.join(self.known[warp])
        common.seen[list(warps)] = self._next()
        for warp in warps:
            self.known[warp] = Knowledge(common.seen.copy(), common.fenced.copy(), set(common.copies))
            self._set_floor(warp)

    def fence(self, warp: int) -> None:
        """fence.proxy.async: what this warp knows of is ordered before asynchronous accesses from here on."""
        known = self.known[warp]
        np.maximum(known.fenced, known.seen, out=known.fenced)
        known.fenced[warp] = self._next()

    def _next(self) -> int:
        moment, self.now = self.now, self.now + 1
        assert self.now < LAST
        return moment

    def _set_floor(self, warp: int) -> None:
        seen = self.known[warp].seen
        others = np.delete(seen, warp)
        self.floor[warp] = int(others.min()) if len(others) else self.now
