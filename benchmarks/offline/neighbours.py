"""Consecutive kernels of a captured step: which programs of the next one find room while the one before still runs.

With programmatic dependent launch the next kernel's programs start where there is room, and request their first bytes
before they wait. If there is no room beside the resident programs of the kernel before, they start as those end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwenkern.benchmarks.offline.machine_code import DEVICES, REGISTERS, RESIDENT, occupancy

Kernel = Any  # a row of the compile report: case, kernel, grid, code, early


def resident(key: str, kernel: Kernel) -> int:
    """The programs of a kernel that an SM of ``DEVICES[key]`` holds, if it runs alone and they are spread evenly."""
    return min(occupancy(key, kernel.code), -(-math.prod(kernel.grid) // DEVICES[key].num_sms))


def room(key: str, before: Kernel, after: Kernel) -> int:
    """The programs of ``after`` that find room on an SM beside the resident programs of ``before``."""
    warps, programs, shared = RESIDENT[key]
    count, one, other = resident(key, before), before.code, after.code
    return min(
        programs - count,
        (warps - count * one.warps) // other.warps,
        (REGISTERS - count * one.held) // other.held,
        (shared * 1024 - count * (one.shared + 1024)) // (other.shared + 1024),
    )


def overlaps_nothing(key: str, before: Kernel, after: Kernel) -> str | None:
    """What is wrong if nothing of ``after`` overlaps ``before``: it finds no room beside it, and its programs request
    nothing before they wait. None if something does, or if what it requests was not counted."""
    if after.early != 0 or room(key, before, after):
        return None
    return f"no program fits beside those of {before.kernel}, and none requests a byte before it waits"


def pairs(kernels: Sequence[Kernel], last: str) -> list[tuple[Kernel, Kernel]]:
    """Each kernel of a step with the next one: within a layer, from it to the next layer, and to those of the op
    ``last`` behind all layers."""
    layer = [kernel for kernel in kernels if kernel.case != last]
    end = [kernel for kernel in kernels if kernel.case == last]
    return [*zip(layer, [*layer[1:], layer[0]], strict=True), *zip([layer[-1], *end[:-1]], end, strict=True)]
