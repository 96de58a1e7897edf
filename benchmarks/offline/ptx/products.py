"""Products of warp groups (section 9.7.15, wgmma): four warps multiply tiles of shared memory, asynchronously. Each
warp has 16 of the 64 rows of A and D, and runs by itself; all four must take the same products.

D is written to its registers as late as allowed: when the warp has waited for the product's group. Until then it is a
fault to read D, to write D, or to write the registers of A. A product whose registers were written since the last
wgmma.fence is also a fault. Sums are computed as for mma (lanes.py): in float64, rounded once per instruction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .faults import Fault, Unknown
from .lanes import ELEMENTS
from .parse import Instruction, Number, Operand, Program, Register, Vector
from .table import decodes
from .under_way import Product, Sums
from .values import F32, F64, LANES, PRED, TYPES, U8, U16, U32, U64, Array
from .warp import WHOLE, Source, Step, Warp, items, only, source

SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # bits 62 and 63 of a descriptor: bytes of a row of the pattern; 16: none
ROWS, WARPS = 64, 4


@dataclass(frozen=True)
class Descriptor:
    """9.7.15.5.1.2.2: the place of a matrix in shared memory."""

    start: int
    leading: int
    stride: int
    row: int  # bytes of a row of the swizzling pattern

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        if bits >> 49 & 7:
            raise Unknown("a matrix descriptor with a base offset")
        return cls(start, leading, stride, SWIZZLES[bits >> 62])

    def places(self, rows: int, transposed: bool) -> Array:
        """The addresses of the matrix's pieces of 16 bytes: [rows, 2] for a matrix [rows, K] with rows of 32 bytes;
        [16, rows // 8] for a transposed one, [K, rows] of two bytes each."""
        places = self.start + _offsets(rows, transposed, self.leading, self.stride, self.row)
        pattern = self.row // 16 - 1  # bits 4 and up are exchanged with those three above
        return places ^ ((places >> 7 & pattern) << 4)


@functools.lru_cache(maxsize=256)
def _offsets(rows: int, transposed: bool, leading: int, stride: int, row: int) -> Array:
    """The canonical layouts of 9.7.15.5.1: core matrices of 8 x 16 bytes, side by side in the rows of a pattern."""
    if not transposed:
        at, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
        return at % 8 * row + at // 8 * stride + chunk * (leading if row == 16 else 16)
    k, chunk = np.arange(16)[:, None], np.arange(rows // 8)[None, :]
    if row == 16:
        return k % 8 * 16 + k // 8 * leading + chunk * stride
    across = row // 16
    return k % 8 * row + k // 8 * stride + chunk % across * 16 + chunk // across * leading


class WarpGroups:
    """The products that each warp group takes: an instruction and its descriptors."""

    def __init__(self, num_warps: int) -> None:
        self._taken: list[list[tuple[int, ...]]] = [[] for _ in range(-(-num_warps // WARPS))]
        self._counts = [0] * num_warps

    def take(self, warp: int, product: tuple[int, ...]) -> None:
        taken, count = self._taken[warp // WARPS], self._counts[warp]
        if count == len(taken):
            taken.append(product)
        if taken[count] != product:
            raise Fault("the warps of a group take different products")
        self._counts[warp] += 1

    def end(self, here: str) -> None:
        for warp, count in enumerate(self._counts):
            if count != len(self._taken[warp // WARPS]):
                raise Fault(f"warp {warp} has taken {count} of its group's products{here}")


@decodes("wgmma")
def wgmma(instruction: Instruction, program: Program) -> Step:
    action = instruction.modifiers[0]
    if action == "mma_async":
        return _multiply(instruction, program)
    only(instruction, ("fence", "commit_group", "wait_group", "sync", "aligned"))
    if action == "fence":
        return lambda warp: _fence(warp)
    if action == "commit_group":
        return lambda warp: _commit(warp)
    (most,) = instruction.operands
    if not isinstance(most, Number):
        raise Unknown(f"{most} groups")
    return lambda warp: _wait(warp, most.bits)


def _fence(warp: Warp) -> None:
    """9.7.15.7.1: products may use the present contents of the registers."""
    warp.all_together("wgmma.fence")
    warp.under_way.fenced = {slot: warp.registers[slot] for slot in warp.cta.program.product_slots}


def _commit(warp: Warp) -> None:
    """9.7.15.7.2."""
    warp.all_together("wgmma.commit_group")
    warp.under_way.product_groups.append(warp.under_way.products)
    warp.under_way.products = []


def _wait(warp: Warp, most: int) -> None:
    """9.7.15.7.3: completes groups until at most the latest ``most`` are under way."""
    warp.all_together("wgmma.wait_group")
    groups = warp.under_way.product_groups
    while len(groups) > most:
        for product in groups.pop(0):
            for places in product.read:
                warp.cta.shared.end_async_read(warp.number, places)
            for register, value in product.registers:
                if warp.registers[register.slot] is not value:
                    raise Fault(f"{register.name} was written while a product might still read it")
            product.sums.products -= 1
            if not product.sums.products:
                _land(warp, product.sums)


def _land(warp: Warp, sums: Sums) -> None:
    columns = sums.value.reshape(2, 8, -1, 4, 2).transpose(2, 0, 4, 1, 3).reshape(-1, LANES)  # as mma's D, side by side
    fenced = warp.under_way.fenced
    for register, value in zip(sums.registers, columns, strict=True):
        if warp.registers[register.slot] is not None:
            raise Fault(f"{register.name} was written while a product might still write it")
        del warp.under_way.sums[register.slot]
        if not sums.defined:
            warp.lacks(WHOLE)
        warp.write(register.slot, np.ascontiguousarray(value).view(U32))
        warp.without = None
        if fenced is not None:
            fenced[register.slot] = warp.registers[register.slot]


def _multiply(instruction: Instruction, program: Program) -> Step:
    """9.7.15.5.2: D [64, N] = A [64, 16] B [16, N] + D, where A and B have elements of two bytes."""
    _, *head, shape, result, a_type, b_type = instruction.modifiers
    if head != ["sync", "aligned"] or result != "f32" or a_type != b_type or a_type not in ELEMENTS:
        raise Unknown("shape or types")
    columns = int(shape.removeprefix(f"m{ROWS}n").removesuffix("k16"))
    d, a, b, scale_d, negate_a, negate_b, *transposes = instruction.operands
    if Number(-1) in (negate_a, negate_b) or any(each not in (Number(0), Number(1)) for each in transposes):
        raise Unknown("negated operands")
    in_registers = isinstance(a, Vector)
    if len(transposes) != (1 if in_registers else 2) or len(items(d)) != columns // 2:
        raise Unknown("operands")
    a_transposed, b_transposed = ([False] * 2 + [each == Number(1) for each in transposes])[-2:]
    registers = tuple(_registers(d))
    program.product_slots.update(each.slot for each in registers)
    a_registers = _registers(a) if in_registers else []
    program.product_slots.update(each.slot for each in a_registers)
    load_a = _fragment(a_registers, program) if in_registers else _tile(a, ROWS, a_transposed, program)
    load_b, elements = _tile(b, columns, b_transposed, program), ELEMENTS[a_type]
    adds = _constant(scale_d) if isinstance(scale_d, Number) else source(scale_d, PRED, program)

    def step(warp: Warp) -> None:
        warp.all_together("wgmma.mma_async")
        _check_fenced(warp, (*a_registers, *registers))
        accumulates = adds(warp)
        warp.need("whether D is added")
        if accumulates.any() != accumulates.all():
            raise Fault("some lanes add D, and some do not")
        read: list[Array] = []
        left, described_a = load_a(warp, warp.number % WARPS, read)
        defined = warp.without is None
        warp.without = None
        right, described_b = load_b(warp, None, read)
        warp.cta.products.take(warp.number, (warp.at, described_a, described_b, int(accumulates[0])))
        sums = _sums(warp, registers, shape, columns, bool(accumulates[0]))
        products = np.einsum("mk,nk->mn", elements(left), elements(right))
        sums.value = (products + sums.value.astype(F64)).astype(F32) if accumulates[0] else products.astype(F32)
        sums.defined = sums.defined and defined
        sums.products += 1
        values = [(each, warp.registers[each.slot]) for each in a_registers]
        warp.under_way.products.append(Product(read, values, sums))

    return step


def _registers(vector: Operand) -> list[Register]:
    found = [each for each in items(vector) if isinstance(each, Register) and each.type in ("b32", "f32")]
    if len(found) != len(items(vector)) or len({each.slot for each in found}) != len(found):
        raise Unknown("registers")
    return found


def _constant(number: Number) -> Source:
    value = np.full(LANES, number.bits != 0)
    return lambda warp: value


# Returns a warp's part of a matrix, bits [rows, 16], and the bits of its descriptor, or 0
Load = Callable[[Warp, int | None, list[Array]], tuple[Array, int]]


def _fragment(registers: list[Register], program: Program) -> Load:
    """Loads A from registers, in the layout of mma's A."""
    reads = [source(each, TYPES["b32"], program) for each in registers]
    if len(reads) != 4:
        raise Unknown("registers of A")

    def load(warp: Warp, quarter: int | None, read: list[Array]) -> tuple[Array, int]:
        bits = np.array([each(warp) for each in reads]).view(U16).reshape(2, 2, 8, 8).transpose(1, 2, 0, 3)
        return np.ascontiguousarray(bits).reshape(16, 16), 0

    return load


def _tile(operand: Operand, rows: int, transposed: bool, program: Program) -> Load:
    """Loads a matrix from shared memory, or a quarter of its rows."""
    descriptor = source(operand, TYPES["b64"], program)

    def load(warp: Warp, quarter: int | None, read: list[Array]) -> tuple[Array, int]:
        bits = descriptor(warp).view(U64)
        warp.need("a matrix descriptor")
        if np.count_nonzero(bits != bits[0]):
            raise Fault("lanes have different matrix descriptors")
        places = Descriptor.of(int(bits[0])).places(rows, transposed)
        if quarter is not None:
            places = (
                places[:, 2 * quarter : 2 * quarter + 2] if transposed else places[16 * quarter : 16 * quarter + 16]
            )
        flat = places.reshape(-1).astype(np.int64)
        data = warp.cta.shared.begin_async_read(warp.number, flat)
        read.append(flat)
        matrix = data.view(U8).reshape(places.shape[0], -1).view(U16)
        return np.ascontiguousarray(matrix.T if transposed else matrix), int(bits[0])

    return load


def _check_fenced(warp: Warp, registers: tuple[Register, ...]) -> None:
    fenced = warp.under_way.fenced
    if fenced is None:
        raise Fault("no wgmma.fence stands before")
    for register in registers:
        if register.slot in warp.under_way.sums:
            continue
        if warp.registers[register.slot] is not fenced[register.slot]:
            raise Fault(f"{register.name} was written since the last wgmma.fence")


def _sums(warp: Warp, registers: tuple[Register, ...], shape: str, columns: int, adds: bool) -> Sums:
    """The sums that a product adds to: those of a product of the same shape that is under way, or the registers'."""
    under_way = warp.under_way
    if all(each.slot not in under_way.sums for each in registers):
        value = np.zeros((16, columns), F32)
        if adds:
            parts = [warp.registers[each.slot] for each in registers]
            undefined = [each.slot for each, part in zip(registers, parts, strict=True) if part is None]
            if undefined or any(each.slot in warp.undefined for each in registers):
                raise Fault("D comes from a register that was never written")
            value = np.stack([part for part in parts if part is not None]).view(F32)
            value = value.reshape(-1, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, columns)
        sums = Sums(registers, shape, np.ascontiguousarray(value), True)
        for each in registers:
            under_way.sums[each.slot] = sums
            warp.registers[each.slot] = None
            warp.undefined.pop(each.slot, None)
        return sums
    sums = under_way.sums.get(registers[0].slot, next(iter(under_way.sums.values())))
    if sums.registers != registers or sums.shape != shape:
        raise Fault("D is used by a product of another shape, which nobody has waited for")
    return sums
