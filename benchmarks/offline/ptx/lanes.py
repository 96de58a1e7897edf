"""Instructions that combine the lanes of a warp (sections 9.7.9.7 shfl, 9.7.13.13 redux, 9.7.14.5 mma, ldmatrix,
stmatrix). All lanes must take part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Fault, Unknown
from .parse import Instruction, Operand, Program, Vector
from .table import decodes
from .values import F16, F32, F64, LANES, TYPES, U8, U16, U32, Array, widen
from .warp import WHOLE, Source, Step, Stop, Warp, address, items, only, source, target

LANE = np.arange(LANES)


def _every_lane(operand: Operand, program: Program) -> Source:
    """Reads a mask of lanes. Raises Fault unless the mask has all lanes."""
    read = source(operand, TYPES["b32"], program)

    def check(warp: Warp) -> Array:
        mask = read(warp)
        if np.count_nonzero(mask != U32(0xFFFFFFFF)):
            raise Fault(f"waits for the lanes {int(mask[0]):#x}, and not for all")
        return mask

    return check


def _spread(warp: Warp) -> None:
    """If an operand has no value in some lane, no lane's result has one, because it depends on all lanes."""
    if warp.without is not None:
        warp.without = WHOLE


def _together(instruction: Instruction, step: Step) -> Step:
    def run(warp: Warp) -> Stop | None:
        warp.all_together(instruction.opcode)
        return step(warp)

    return run


@decodes("shfl")
def shfl(instruction: Instruction, program: Program) -> Step:
    """9.7.9.7: reads a register of another lane. c has the last lane to read, and the bits of a lane's number that
    select its segment; beyond a segment a lane reads itself."""
    only(instruction, ("sync", "bfly", "idx", "up", "down", "b32"))
    to, of, b, c, mask = instruction.operands
    write = target(to, TYPES["b32"])
    reads = [source(each, TYPES["b32"], program) for each in (of, b, c)]
    check, mode = _every_lane(mask, program), instruction.modifiers[1]

    def step(warp: Warp) -> None:
        check(warp)
        value, distance, limits = (read(warp) for read in reads)
        distance, segment = distance.astype(np.int64) & 31, limits.astype(np.int64) >> 8 & 31
        last = (LANE & segment) | (limits & 31 & ~segment)
        other = {
            "up": LANE - distance,
            "down": LANE + distance,
            "bfly": LANE ^ distance,
            "idx": (LANE & segment) | (distance & ~segment),
        }[mode]
        inside = other >= last if mode == "up" else other <= last
        origin = np.where(inside, other, LANE)
        if warp.without is not None:
            warp.without = warp.without[origin]
        write(warp, value[origin])

    return _together(instruction, step)


REDUCTIONS: dict[str, Callable[[Array], Any]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


@decodes("redux")
def redux(instruction: Instruction, program: Program) -> Step:
    """9.7.13.13."""
    only(instruction, ("sync", *REDUCTIONS, "s32", "u32", "b32"))
    type_, reduce = TYPES[instruction.modifiers[-1]], REDUCTIONS[instruction.modifiers[1]]
    to, of, mask = instruction.operands
    write, read, check = target(to, type_), source(of, type_, program), _every_lane(mask, program)

    def step(warp: Warp) -> None:
        check(warp)
        value = np.full(LANES, reduce(read(warp)), type_.dtype)
        _spread(warp)
        write(warp, value)

    return _together(instruction, step)


# 9.7.14.5.15: a matrix of 8 x 8 elements of two bytes is in one register of each lane: lane l has columns 2 (l mod 4)
# and 2 (l mod 4) + 1 of row l // 4. So the registers of the 32 lanes are the matrix, row by row.


def _matrices(instruction: Instruction, registers: Operand) -> tuple[int, bool]:
    """The number of matrices, and whether they are transposed."""
    only(instruction, ("sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"))
    (count,) = (int(each[1:]) for each in instruction.modifiers if each in ("x1", "x2", "x4"))
    if len(items(registers)) != count:
        raise Unknown(f"{len(items(registers))} registers for {count} matrices")
    return count, "trans" in instruction.modifiers


@decodes("ldmatrix")
def ldmatrix(instruction: Instruction, program: Program) -> Step:
    """9.7.14.5.15: loads matrices. Lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i."""
    to, at = instruction.operands
    count, transposed = _matrices(instruction, to)
    writes, addresses = [target(each, TYPES["b32"]) for each in items(to)], address(at, program)

    def step(warp: Warp) -> None:
        places = addresses(warp)
        warp.need("an address")
        rows = warp.cta.shared.load(warp.number, places[: 8 * count], 16)
        matrices = rows.view(U16).reshape(count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(1, 2))
        for write, lanes in zip(writes, matrices.reshape(count, 64).view(U32), strict=True):
            write(warp, lanes)

    return _together(instruction, step)


@decodes("stmatrix")
def stmatrix(instruction: Instruction, program: Program) -> Step:
    """9.7.14.5.16."""
    at, of = instruction.operands
    count, transposed = _matrices(instruction, of)
    reads, addresses = [source(each, TYPES["b32"], program) for each in items(of)], address(at, program)

    def step(warp: Warp) -> None:
        matrices = np.stack([read(warp) for read in reads]).view(U16).reshape(count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(1, 2))
        rows, places = matrices.reshape(8 * count, 8).view(U8), addresses(warp)
        warp.need("an address, or what is stored,")
        warp.cta.shared.store(warp.number, places[: 8 * count], rows)

    return _together(instruction, step)


ELEMENTS: dict[str, Callable[[Array], Array]] = {
    "bf16": lambda bits: widen(bits).astype(F64),
    "f16": lambda bits: bits.view(F16).astype(F64),
}


@decodes("mma")
def mma(instruction: Instruction, program: Program) -> Step:
    """9.7.14.5.8: D [16, 8] = A [16, 16] B [16, 8] + C, with operands of two bytes and sums in float32. The order of a
    tensor core's sums and its intermediate roundings are not specified. Here each sum is computed in float64, in one
    order for all elements, and rounded once: the error is hardly more than half a unit in the last place of float32."""
    *head, result, a_type, b_type, c_type = instruction.modifiers
    if head != ["sync", "aligned", "m16n8k16", "row", "col"] or (result, c_type) != ("f32", "f32"):
        raise Unknown("shape or types")
    if a_type != b_type or a_type not in ELEMENTS:
        raise Unknown(f"elements {a_type} and {b_type}")
    to, *sources = instruction.operands
    if [len(each.items) if isinstance(each, Vector) else 0 for each in (to, *sources)] != [4, 4, 2, 4]:
        raise Unknown("registers")
    writes = [target(each, TYPES["f32"]) for each in items(to)]
    a, b = ([source(each, TYPES["b32"], program) for each in items(vector)] for vector in sources[:2])
    c, elements = [source(each, TYPES["f32"], program) for each in items(sources[2])], ELEMENTS[a_type]

    def step(warp: Warp) -> None:
        # Registers 0 and 1 of A are its upper left and lower left quarter, 2 and 3 the right quarters. B is stored with
        # its columns as rows. Registers 0 and 1 of C and D are the even and odd columns of the upper half.
        left = np.array([read(warp) for read in a]).view(U16).reshape(2, 2, 8, 8).transpose(1, 2, 0, 3)
        right = np.array([read(warp) for read in b]).view(U16).reshape(2, 8, 8).transpose(1, 0, 2)
        added = np.array([read(warp) for read in c], F64).reshape(2, 2, 8, 4).transpose(0, 2, 3, 1)
        products = np.einsum(
            "mk,nk->mn",
            elements(np.ascontiguousarray(left).reshape(16, 16)),
            elements(np.ascontiguousarray(right).reshape(8, 16)),
        )
        sums = (products + added.reshape(16, 8)).astype(F32).reshape(2, 8, 4, 2).transpose(0, 3, 1, 2)
        _spread(warp)
        for write, lanes in zip(writes, sums.reshape(4, LANES), strict=True):
            write(warp, lanes)

    return _together(instruction, step)
