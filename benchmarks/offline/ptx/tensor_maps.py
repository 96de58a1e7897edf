"""Tensor maps (section 5.5.8): 128 bytes that describe a tensor of up to five dimensions in global memory, and the
boxes of it that bulk copies move. NVIDIA does not document the bytes; here they are:

    0 address, 8 rank - 1, 12 element type, 16 interleaving, 20 swizzling, 24 fill, 28 five sizes of the box,
    48 five sizes, 68 five strides of elements, 88 four strides in bytes

The innermost dimension is the first."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .faults import Fault, Unknown
from .parse import Instruction, Number, Program
from .table import decodes
from .values import TYPES, U8, Array
from .warp import Step, Warp, address, only, source

SIZE = 128
LAYOUT = struct.Struct("<Q5I5I5I5I4Q8x")
# The byte and the size of each field of tensormap.replace; of several fields, those of the first
FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 4),
    "elemtype": (12, 4),
    "interleave_layout": (16, 4),
    "swizzle_mode": (20, 4),
    "fill_mode": (24, 4),
    "box_dim": (28, 4),
    "global_dim": (48, 4),
    "element_stride": (68, 4),
    "global_stride": (88, 8),
}
# Bytes of the element types u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 tf32 tf32.ftz, by their numbers
ELEMENTS = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
SWIZZLES = (16, 32, 64, 128)  # bytes of a row of the pattern; 16: none


@dataclass(frozen=True)
class TensorMap:
    start: int
    element: int  # bytes
    swizzle: int  # as in SWIZZLES
    box: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all dimensions

    @classmethod
    def of(cls, data: bytes) -> TensorMap:
        start, rank, kind, interleave, swizzle, fill, *rest = LAYOUT.unpack(data)
        rank += 1
        box, sizes, steps, strides = (tuple(rest[at : at + 5]) for at in range(0, 20, 5))
        if rank > 5 or kind >= len(ELEMENTS) or interleave or swizzle >= len(SWIZZLES) or fill:
            raise Unknown(f"a tensor map of rank {rank}, type {kind}, swizzling {swizzle}, with fill mode {fill}")
        if any(step != 1 for step in steps[:rank]):
            raise Unknown("a tensor map that leaves out elements")
        element = ELEMENTS[kind]
        found = cls(start, element, SWIZZLES[swizzle], box[:rank], sizes[:rank], (element, *strides)[:rank])
        found.check()
        return found

    def check(self) -> None:
        """Section 5.5.3.2, and the limits of cuTensorMapEncodeTiled."""
        inner = self.box[0] * self.element
        if self.start % 16 or any(stride % 16 for stride in self.strides[1:]):
            raise Fault(f"a tensor map whose address or strides are no multiples of 16 bytes: {self}")
        if not all(0 < size <= 256 for size in self.box) or 0 in self.sizes:
            raise Fault(f"a tensor map with an empty tensor, or a box beyond 256 elements: {self}")
        if inner % 16 or (self.swizzle > 16 and inner > self.swizzle):
            raise Fault(f"a tensor map whose box has rows of {inner} bytes: {self}")

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element

    def elements(self, at: Sequence[int]) -> tuple[Array, Array]:
        """The addresses (int64) of the box's elements at these coordinates, and which of them lie in the tensor."""
        places, inside = np.full(1, self.start, np.int64), np.ones(1, bool)
        for start, count, size, stride in zip(
            reversed(at), reversed(self.box), reversed(self.sizes), reversed(self.strides), strict=True
        ):
            index = start + np.arange(count)
            places = (places[:, None] + index * stride).reshape(-1)
            inside = (inside[:, None] & ((index >= 0) & (index < size))).reshape(-1)
        return places, inside

    def places(self, to: int) -> Array:
        """Addresses in shared memory of the box's pieces of 16 bytes, in order. Bits 4 and up of an address are
        combined by XOR with the bits three places above (section 5.5.6)."""
        if to % 128:
            raise Fault(f"misaligned: a bulk copy of a tensor at byte {to} of shared memory")
        places = to + np.arange(0, self.bytes, 16)
        return places ^ ((places >> 7 & (self.swizzle // 16 - 1)) << 4)


def encode(
    start: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    kind: int,
    swizzle: int,
    fill: int = 0,
) -> bytes:
    """The bytes of a tensor map. ``strides`` are in bytes, without that of the innermost dimension."""
    rank = len(sizes)

    def five(values: Sequence[int]) -> list[int]:
        return [*values, *[0] * (5 - len(values))]

    return LAYOUT.pack(
        start, rank - 1, kind, 0, swizzle, fill, *five(box), *five(sizes), *five([1] * rank), *five(strides)[:4]
    )


@decodes("tensormap")
def tensormap(instruction: Instruction, program: Program) -> Step:
    if instruction.modifiers[0] == "replace":
        return _replace(instruction, program)
    return _copy(instruction, program)


def _replace(instruction: Instruction, program: Program) -> Step:
    """Replaces a field of a map in shared memory."""
    only(instruction, ("replace", "tile", *FIELDS, "shared", "shared::cta", "b1024", "b32", "b64"))
    (name,) = (each for each in instruction.modifiers if each in FIELDS)
    place, *which, value = instruction.operands
    first, size = FIELDS[name]
    if which:
        (index,) = which
        if not isinstance(index, Number):
            raise Unknown("a field's number")
        first += size * index.bits
    at, read = address(place, program), source(value, TYPES[f"b{8 * size}"], program)

    def step(warp: Warp) -> None:
        places, values = at(warp) + first, read(warp)
        warp.need("an address, or a field of a tensor map,")
        lanes = slice(None) if warp.active is None else warp.active
        data = values[lanes].view(U8).reshape(-1, size)
        for part in range(0, size, 4):  # the eight bytes of a stride are aligned to 4 bytes here
            warp.cta.shared.store(warp.number, places[lanes] + part, data[:, part : part + 4])

    return step


def _copy(instruction: Instruction, program: Program) -> Step:
    """Copies a map from shared to global memory. A CTA may use it after a fence.proxy.tensormap."""
    known = ("cp_fenceproxy", "global", "shared::cta", "tensormap::generic", "release", "gpu", "sync", "aligned")
    only(instruction, known)
    to, of, size = instruction.operands
    if size != Number(SIZE):
        raise Unknown("sizes")
    to_global, from_shared = address(to, program), address(of, program)

    def step(warp: Warp) -> None:
        warp.all_together("tensormap.cp_fenceproxy")
        places, origins = to_global(warp)[:1], from_shared(warp)[:1]
        warp.need("an address")
        for part in range(0, SIZE, 16):
            data = warp.cta.shared.load(warp.number, origins + part, 16)
            warp.cta.memory.store(places + part, data)
        warp.cta.bulk.maps[int(places[0])] = False

    return step


def acquire(instruction: Instruction, program: Program) -> Step:
    """fence.proxy.tensormap::generic.acquire: from here on this CTA may use the map."""
    only(instruction, ("proxy", "tensormap::generic", "acquire", "gpu"))
    at = address(instruction.operands[0], program)

    def step(warp: Warp) -> None:
        places = at(warp)
        warp.need("an address")
        warp.cta.bulk.maps[int(places[0])] = True

    return step
