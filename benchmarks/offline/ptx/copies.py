"""Asynchronous copies from global to shared memory (section 9.7.9.25), in groups. A copy reads its bytes at once, and
writes them as late as allowed: when its warp waits for it."""

from __future__ import annotations

import numpy as np

from . import bulk
from .faults import Unknown
from .parse import Instruction, Number, Program, Register
from .table import decodes
from .values import LANES, TYPES, U8
from .warp import Step, Warp, address, only, source


@decodes("cp")
def cp_async(instruction: Instruction, program: Program) -> Step:
    if "bulk" in instruction.modifiers:
        return bulk.decode(instruction, program)
    if "commit_group" in instruction.modifiers:
        only(instruction, ("async", "commit_group"))
        return _commit
    if "wait_group" in instruction.modifiers:
        only(instruction, ("async", "wait_group"))
        (most,) = instruction.operands
        if not isinstance(most, Number):
            raise Unknown(f"{most} groups")
        return lambda warp: _wait(warp, most.bits)
    if "wait_all" in instruction.modifiers:
        only(instruction, ("async", "wait_all"))

        def wait_all(warp: Warp) -> None:
            _commit(warp)
            _wait(warp, 0)

        return wait_all
    return _copy(instruction, program)


def _copy(instruction: Instruction, program: Program) -> Step:
    only(instruction, ("async", "ca", "cg", "shared", "shared::cta", "global", "L2::64B", "L2::128B", "L2::256B"))
    to, of, size, *rest = instruction.operands
    if not isinstance(size, Number) or size.bits not in (4, 8, 16) or len(rest) > 1:
        raise Unknown("sizes")
    if rest and isinstance(rest[0], Register) and rest[0].type == "pred":
        raise Unknown("ignore-src")
    whole = size.bits
    filled = source(rest[0], TYPES["u32"], program) if rest else None
    to_shared, from_global = address(to, program), address(of, program)

    def step(warp: Warp) -> None:
        lanes = np.arange(LANES) if warp.active is None else np.nonzero(warp.active)[0]
        places, origins = to_shared(warp)[lanes], from_global(warp)[lanes]
        sizes = np.full(len(lanes), whole) if filled is None else filled(warp)[lanes]
        warp.need("an address or a size")
        if np.count_nonzero((sizes != whole) & (sizes != 0)):
            raise Unknown("cp.async that fills part of its bytes with zeros")
        data = np.zeros((len(lanes), whole), U8)
        data[sizes == whole] = warp.cta.memory.load(origins[sizes == whole], whole, warp.waits, "copy")
        warp.cta.shared.begin_copy(warp.number, places, whole)
        warp.under_way.copies.append((places, data))

    return step


def _commit(warp: Warp) -> None:
    warp.all_together("cp.async.commit_group")
    warp.under_way.copy_groups.append(warp.under_way.copies)
    warp.under_way.copies = []


def _wait(warp: Warp, most: int) -> None:
    """Completes groups until at most the latest ``most`` are under way."""
    warp.all_together("cp.async.wait_group")
    while len(warp.under_way.copy_groups) > most:
        for places, data in warp.under_way.copy_groups.pop(0):
            warp.cta.shared.end_copy(warp.number, places, data)
