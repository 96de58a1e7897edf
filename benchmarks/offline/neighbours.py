"""Consecutive kernels of a captured step: how many programs of a kernel fit on an SM while the previous one still runs.

With programmatic dependent launch, the next kernel's programs start on an SM with enough free resources, and request
their first bytes before they wait. If no program fits beside the previous kernel's programs, it starts when one of
these ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwenkern.benchmarks.offline.machine_code import DEVICES, REGISTERS, RESIDENT, occupancy

Kernel = Any  # a row of the compile report: case, kernel, grid, code, early


def resident(key: str, kernel: Kernel) -> int:
    """The number of a kernel's programs on an SM of ``DEVICES[key]``, if the kernel runs alone and its programs are
    spread evenly."""
    return min(occupancy(key, kernel.code), -(-math.prod(kernel.grid) // DEVICES[key].num_sms))


def room(key: str, before: Kernel, after: Kernel) -> int:
    """The number of programs of ``after`` that fit on an SM beside the resident programs of ``before``."""
    warps, programs, shared = RESIDENT[key]
    count, one, other = resident(key, before), before.code, after.code
    return min(
        programs - count,
        (warps - count * one.warps) // other.warps,
        (REGISTERS - count * one.held) // other.held,
        (shared * 1024 - count * (one.shared + 1024)) // (other.shared + 1024),
    )


def overlaps_nothing(key: str, before: Kernel, after: Kernel) -> str | None:
    """The fault if nothing of ``after`` overlaps ``before``: its programs do not fit beside those of ``before``, and
    request nothing before they wait. None if something overlaps, or if the early requests were not counted."""
    if after.early != 0 or room(key, before, after):
        return None
    return f"no program fits beside those of {before.kernel}, and none requests a byte before it waits"


def pairs(kernels: Sequence[Kernel], last: str) -> list[tuple[Kernel, Kernel]]:
    """Each kernel of a step with the next one: within a layer, from a layer to the next layer, and from the last layer
    to the kernels of the op ``last``."""
    layer = [kernel for kernel in kernels if kernel.case != last]
    end = [kernel for kernel in kernels if kernel.case == last]
    return [*zip(layer, [*layer[1:], layer[0]], strict=True), *zip([layer[-1], *end[:-1]], end, strict=True)]
