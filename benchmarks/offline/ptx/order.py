"""Vector clocks: what each warp of a CTA knows of the other warps' accesses to memory.

Time is one counter for the CTA, and each access is stamped with the present moment. A barrier, or a completed phase of
an mbarrier, passes the knowledge of some warps to others. An access is ordered after an access of another warp if its
warp knows of that access's moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .values import U32, Array

MAX_WARPS = 32
LAST = 0xFFFF_FFF0  # moments end here


@dataclass
class Knowledge:
    """Known accesses: for each warp the latest known moment, and the latest one that a fence.proxy.async followed; and
    the bulk copies that are known to have arrived."""

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
        self.floor = [0] * num_warps  # up to this moment a warp knows of all accesses of the others

    def number(self) -> int:
        """A new number for a bulk copy."""
        self._numbers += 1
        return self._numbers

    def release(self, warp: int) -> Knowledge:
        """The knowledge that this warp passes to others now, including its own accesses."""
        known = self.known[warp]
        given = Knowledge(known.seen.copy(), known.fenced.copy(), set(known.copies))
        given.seen[warp] = self._next()
        return given

    def acquire(self, warp: int, given: Knowledge) -> None:
        self.known[warp].join(given)
        self._set_floor(warp)

    def barrier(self, warps: Sequence[int]) -> None:
        """Each of these warps then knows what any of them knew."""
        common = nothing(len(self.known))
        for warp in warps:
            common.join(self.known[warp])
        common.seen[list(warps)] = self._next()
        for warp in warps:
            self.known[warp] = Knowledge(common.seen.copy(), common.fenced.copy(), set(common.copies))
            self._set_floor(warp)

    def fence(self, warp: int) -> None:
        """fence.proxy.async: the accesses that this warp knows of are ordered before later asynchronous accesses."""
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
