"""Data movement between registers and memory (section 9.7.9; 9.7.13.5 atom)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np

from .faults import Unknown
from .parse import Address, Instruction, Name, Operand, Program, Vector
from .table import decodes
from .values import LANES, TYPES, U8, Array, Type, constant
from .warp import HIGH, LOW, NOTHING, WHOLE, Step, Stop, Warp, address, items, only, source, target

CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")  # 9.7.9.1: hints, which change no value
TYPE_NAMES = tuple(TYPES)


@decodes("mov")
def mov(instruction: Instruction, program: Program) -> Step:
    """9.7.9.3."""
    type_ = TYPES[instruction.modifiers[-1]]
    only(instruction, TYPE_NAMES)
    to, of = instruction.operands
    if isinstance(to, Vector):
        return _unpack(to, of, type_, program)
    if isinstance(of, Vector):
        return _pack(to, of, type_, program)
    write, read = target(to, type_), source(of, type_, program, copied=True)
    return lambda warp: write(warp, read(warp))


def _pack(to: Operand, of: Vector, type_: Type, program: Program) -> Step:
    """9.7.9.4: packs two parts into a register, the lower part first."""
    low, high = (source(each, TYPES[f"b{type_.bits // 2}"], program) for each in of.items)
    write = target(to, type_)

    def step(warp: Warp) -> None:
        parts, missing = [], []
        for read in (low, high):
            parts.append(read(warp))
            missing.append(NOTHING if warp.without is None else warp.without)
            warp.without = None
        if missing[0] is not NOTHING or missing[1] is not NOTHING:
            warp.lacks((missing[0] & LOW) | (missing[1] & HIGH))
        write(warp, np.stack(parts, axis=1).view(type_.stored)[:, 0])

    return step


def _unpack(to: Vector, of: Operand, type_: Type, program: Program) -> Step:
    part = TYPES[f"b{type_.bits // 2}"]
    read = source(of, type_, program, copied=True)
    writes = [target(each, part) for each in to.items]

    def step(warp: Warp) -> None:
        parts = np.ascontiguousarray(read(warp).view(part.dtype).reshape(LANES, 2).T)
        missing = warp.without
        for half, write, value in zip((LOW, HIGH), writes, parts, strict=True):
            if missing is not None:
                warp.without = np.where(missing & half, WHOLE, NOTHING)
            write(warp, value)

    return step


@decodes("selp")
def selp(instruction: Instruction, program: Program) -> Step:
    """9.7.6.3. The source that is not chosen need not have a value."""
    type_ = TYPES[instruction.modifiers[0]]
    only(instruction, TYPE_NAMES)
    to, *sources, chooser = instruction.operands
    write, choose = target(to, type_), source(chooser, TYPES["pred"], program)
    x, y = (source(each, type_, program) for each in sources)

    def step(warp: Warp) -> None:
        chosen = choose(warp)
        unknown, warp.without = warp.without, None
        value = x(warp)
        without_x, warp.without = warp.without, None
        value = np.where(chosen, value, y(warp))
        without_y, warp.without = warp.without, unknown
        for without, lanes in ((without_x, chosen), (without_y, ~chosen)):
            if without is not None:
                warp.lacks(without * lanes)
        write(warp, value)

    return step


@decodes("ld")
def ld(instruction: Instruction, program: Program) -> Step:
    """9.7.9.8, only weak loads."""
    if instruction.modifiers[0] == "param":
        return _ld_param(instruction, program)
    count, type_ = _moved(instruction)
    to, at = instruction.operands
    writes = [target(each, type_, wider=True) for each in items(to)]
    addresses, size = address(at, program), count * type_.bits // 8
    load = _load_global if "global" in instruction.modifiers else _load_shared

    def step(warp: Warp) -> None:
        places, lanes = addresses(warp), warp.lanes()
        warp.need("an address")
        parts = load(warp, places if lanes is None else places[lanes], size).view(type_.dtype)
        columns = np.empty((len(writes), LANES), type_.dtype)
        columns[:, slice(None) if lanes is None else lanes] = parts.T
        for write, value in zip(writes, columns, strict=True):
            write(warp, value)

    return step


def _ld_param(instruction: Instruction, program: Program) -> Step:
    only(instruction, ("param", *TYPE_NAMES))
    type_ = TYPES[instruction.modifiers[-1]]
    to, at = instruction.operands
    if not isinstance(at, Address) or not isinstance(at.base, Name) or at.offset:
        raise Unknown("part of a parameter")
    name, write = at.base.text, target(to, type_, wider=True)
    if TYPES[program.parameters[name]].bits != type_.bits:
        raise Unknown(f"a parameter of type {program.parameters[name]}")
    return lambda warp: write(warp, constant(warp.cta.arguments[name], type_))


@decodes("st")
def st(instruction: Instruction, program: Program) -> Step:
    """9.7.9.11, only weak stores."""
    count, type_ = _moved(instruction)
    at, of = instruction.operands
    reads = [source(each, type_, program, wider=True) for each in items(of)]
    addresses = address(at, program)
    store = _store_global if "global" in instruction.modifiers else _store_shared

    def step(warp: Warp) -> None:
        places, lanes = addresses(warp), warp.lanes()
        data = np.empty((LANES, count), type_.dtype)
        for at, read in enumerate(reads):
            data[:, at] = read(warp)
        warp.need("an address, or what is stored,")
        if lanes is None:
            store(warp, places, data.view(U8))
        else:
            store(warp, places[lanes], data[lanes].view(U8))

    return step


def _moved(instruction: Instruction) -> tuple[int, Type]:
    """The number and type of the elements that a thread loads or stores."""
    only(instruction, ("global", "shared", "shared::cta", "v2", "v4", "v8", *CACHE, *TYPE_NAMES))
    if ("global" in instruction.modifiers) == any(each.startswith("shared") for each in instruction.modifiers):
        raise Unknown("generic addresses")
    count = next((int(each[1:]) for each in instruction.modifiers if each in ("v2", "v4", "v8")), 1)
    type_ = TYPES[instruction.modifiers[-1]]
    vectors = [each for each in instruction.operands if not isinstance(each, Address)]
    if len(vectors) != 1 or len(items(vectors[0])) != count or count * type_.bits > 128:
        raise Unknown(f"{count} elements of {type_.name}")
    return count, type_


def _load_global(warp: Warp, places: Array, size: int) -> Array:
    return warp.cta.memory.load(places, size, warp.waits)


def _load_shared(warp: Warp, places: Array, size: int) -> Array:
    return warp.cta.shared.load(warp.number, places, size)


def _store_global(warp: Warp, places: Array, data: Array) -> None:
    warp.cta.stores(warp.number)
    warp.cta.memory.store(places, data, warp.waits)


def _store_shared(warp: Warp, places: Array, data: Array) -> None:
    warp.cta.shared.store(warp.number, places, data)


@decodes("prefetch")
def prefetch(instruction: Instruction, program: Program) -> Step:
    """9.7.9.15: a hint, which may come before griddepcontrol.wait. Its address must still be one of an argument."""
    only(instruction, ("global", "L1", "L2"))
    addresses = address(instruction.operands[0], program)

    def step(warp: Warp) -> None:
        places, lanes = addresses(warp), warp.lanes()
        warp.need("an address")
        warp.cta.memory.prefetch(places if lanes is None else places[lanes], warp.waits)

    return step


ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": operator.add,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
}
RELEASES = ("release", "acq_rel")


def _with(compute: Callable[[Array, Array], Array], value: Array, before: Array) -> Array:
    return compute(before, value)


@decodes("atom")
def atom(instruction: Instruction, program: Program) -> Step:
    """9.7.13.5, on integers. Lanes operate in their order; other warps and CTAs may run after each instruction."""
    *_, name, kind = instruction.modifiers
    orders = ("relaxed", "acquire", *RELEASES)
    only(instruction, ("global", "gpu", "sys", *orders, *ATOMIC, "u32", "s32", "u64", "s64", "b32", "b64"))
    if "global" not in instruction.modifiers or name not in ATOMIC or len(instruction.operands) != 3:
        raise Unknown("atomic operation")
    type_, compute = TYPES[kind], ATOMIC[name]
    to, at, of = instruction.operands
    write, addresses, read = target(to, type_), address(at, program), source(of, type_, program)
    releases = any(each in RELEASES for each in instruction.modifiers)

    def step(warp: Warp) -> Stop | None:
        if releases:
            warp.cta.releases(warp.number)
        places, values, before = addresses(warp), read(warp), np.zeros(LANES, type_.dtype)
        warp.need("an address, or what is added,")
        for lane in range(LANES) if warp.active is None else np.nonzero(warp.active)[0]:
            place, value = places[lane : lane + 1], values[lane : lane + 1]
            before[lane] = warp.cta.memory.atomic(place, functools.partial(_with, compute, value), type_, warp.waits)[0]
        write(warp, before)
        return Stop.TURN

    return step
