"""Bulk copies between global and shared memory, of boxes of tensors or of consecutive bytes (section 9.7.9.25), through
the asynchronous proxy.

To shared memory: the bytes arrive, in any order, only when no warp can go on without them. An mbarrier counts them, and
a warp that has waited for the mbarrier may read them. To global memory: the copy may read its bytes until the lane has
waited for its group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from .faults import Fault, Unknown
from .mbarriers import Mbarrier
from .parse import Instruction, Number, Operand, Program, TensorAddress
from .tensor_maps import SIZE, TensorMap
from .values import LANES, TYPES, U8, Array
from .warp import Source, Step, Warp, address, items, only, source

if TYPE_CHECKING:
    from .launch import Cta


@dataclass
class ToShared:
    number: int
    places: Array  # addresses in shared memory, of 16 bytes each
    data: Array
    mbarrier: Mbarrier


@dataclass
class ToGlobal:
    warp: int
    lane: int
    read: Array  # addresses in shared memory
    write: Callable[[], None]


@dataclass
class Groups:
    """Bulk copies to global memory of one lane."""

    open: list[ToGlobal] = field(default_factory=list)
    committed: list[list[ToGlobal]] = field(default_factory=list)  # may still read shared memory
    unwritten: list[list[ToGlobal]] = field(default_factory=list)  # have read it, but not yet written global memory


class BulkCopies:
    def __init__(self, cta: Cta) -> None:
        self._cta = cta
        self._to_shared: list[ToShared] = []
        self._groups: dict[tuple[int, int], Groups] = {}  # by warp and lane
        self.maps: dict[int, bool] = {}  # tensor maps that this CTA wrote, by address: whether a fence followed

    def load(self, warp: int, places: Array, data: Array, at: int) -> None:
        """Begins a copy of bytes [n, 16] to shared memory, counted in the mbarrier at address ``at``."""
        mbarrier = self._cta.mbarriers.find(warp, at)
        self._cta.shared.begin_bulk_write(warp, places)
        self._to_shared.append(ToShared(self._cta.clocks.number(), places, data, mbarrier))

    def arrives(self, random: Random) -> bool:
        """Completes a random copy to shared memory. Returns whether there was one."""
        if not self._to_shared:
            return False
        copy = self._to_shared.pop(random.randrange(len(self._to_shared)))
        self._cta.shared.end_bulk_write(copy.number, copy.places, copy.data)
        self._cta.mbarriers.bytes_arrive(copy.mbarrier, copy.data.size, copy.number)
        return True

    def store(self, warp: int, lane: int, places: Array, write: Callable[[Array], None]) -> None:
        """Begins a copy of shared memory, 16 bytes at each address, to global memory, which ``write`` writes."""
        data = self._cta.shared.begin_async_read(warp, places)
        self._cta.stores(warp)
        copy = ToGlobal(warp, lane, places, lambda: write(data))
        self._groups.setdefault((warp, lane), Groups()).open.append(copy)

    def commit(self, warp: int, lane: int) -> None:
        groups = self._groups.get((warp, lane))
        if groups:
            groups.committed.append(groups.open)
            groups.open = []

    def wait(self, warp: int, lane: int, most: int, only_read: bool) -> None:
        """Completes groups until at most the latest ``most`` are under way."""
        groups = self._groups.get((warp, lane))
        if not groups:
            return
        while len(groups.committed) > most:
            group = groups.committed.pop(0)
            for copy in group:
                self._cta.shared.end_async_read(warp, copy.read)
            groups.unwritten.append(group)
        while not only_read and len(groups.unwritten) + len(groups.committed) > most:
            for copy in groups.unwritten.pop(0):
                copy.write()
            self._cta.stores(warp)

    def releases(self) -> None:
        for (warp, _), groups in self._groups.items():
            if groups.open or groups.committed or groups.unwritten:
                raise Fault(f"releases what was stored, while a bulk copy of warp {warp} may still write global memory")

    def end(self) -> None:
        """Completes the copies after all warps have ended. Raises Fault if shared memory may still be used."""
        place = f"[CTA {self._cta.place} in {self._cta.program.name}]"
        if self._to_shared:
            raise Fault(f"ends while a bulk copy may still write shared memory {place}")
        for (warp, _), groups in self._groups.items():
            if groups.open or groups.committed:
                raise Fault(f"warp {warp} ends while its bulk copy may still read shared memory {place}")
            for group in groups.unwritten:
                for copy in group:
                    copy.write()


def decode(instruction: Instruction, program: Program) -> Step:
    """cp.async.bulk"""
    if "commit_group" in instruction.modifiers:
        only(instruction, ("async", "bulk", "commit_group"))
        return lambda warp: _for_lanes(warp, lambda lane: warp.cta.bulk.commit(warp.number, lane))
    if "wait_group" in instruction.modifiers:
        only(instruction, ("async", "bulk", "wait_group", "read"))
        (most,) = instruction.operands
        if not isinstance(most, Number):
            raise Unknown(f"{most} groups")
        only_read = "read" in instruction.modifiers
        return lambda warp: _for_lanes(warp, lambda lane: warp.cta.bulk.wait(warp.number, lane, most.bits, only_read))
    known = ("async", "bulk", "tensor", "tile", "global", "shared::cta", "shared::cluster", "bulk_group")
    only(instruction, (*known, "1d", "2d", "3d", "4d", "5d", "mbarrier::complete_tx::bytes"))
    is_tensor = "tensor" in instruction.modifiers
    if "bulk_group" in instruction.modifiers:
        return (_store_tensor if is_tensor else _store_bytes)(instruction, program)
    return (_load_tensor if is_tensor else _load_bytes)(instruction, program)


def _for_lanes(warp: Warp, action: Callable[[int], None]) -> None:
    for lane in range(LANES) if warp.active is None else np.nonzero(warp.active)[0]:
        action(int(lane))


def _load_tensor(instruction: Instruction, program: Program) -> Step:
    to, of, counted = instruction.operands
    places, mbarrier = address(to, program), address(counted, program)
    boxes = _boxes(of, instruction, program)

    def step(warp: Warp) -> None:
        at, counter, (maps, *coordinates) = places(warp), mbarrier(warp), [each(warp) for each in boxes]
        warp.need("an operand of a bulk copy")

        def load(lane: int) -> None:
            tensor = _map(warp, int(maps[lane]))
            elements, inside = tensor.elements([int(each[lane]) for each in coordinates])
            data = np.zeros((len(elements), tensor.element), U8)
            data[inside] = warp.cta.memory.load(elements[inside], tensor.element, warp.waits, "bulk load")
            warp.cta.bulk.load(warp.number, tensor.places(int(at[lane])), data.reshape(-1, 16), int(counter[lane]))

        _for_lanes(warp, load)

    return step


def _store_tensor(instruction: Instruction, program: Program) -> Step:
    to, of = instruction.operands
    places, boxes = address(of, program), _boxes(to, instruction, program)

    def step(warp: Warp) -> None:
        at, (maps, *coordinates) = places(warp), [each(warp) for each in boxes]
        warp.need("an operand of a bulk copy")

        def store(lane: int) -> None:
            tensor = _map(warp, int(maps[lane]))
            elements, inside = tensor.elements([int(each[lane]) for each in coordinates])
            early = warp.waits

            def write(data: Array) -> None:
                pieces = data.reshape(-1, tensor.element)[inside]
                warp.cta.memory.store(elements[inside], pieces, early, "bulk store")

            warp.cta.bulk.store(warp.number, lane, tensor.places(int(at[lane])), write)

        _for_lanes(warp, store)

    return step


def _boxes(operand: Operand, instruction: Instruction, program: Program) -> list[Source]:
    """The address of a tensor map, and the coordinates of a box."""
    if not isinstance(operand, TensorAddress) or f"{len(items(operand.at))}d" not in instruction.modifiers:
        raise Unknown("coordinates")
    where = source(operand.base, TYPES["b64"], program)
    return [where, *[source(each, TYPES["s32"], program) for each in items(operand.at)]]


def _map(warp: Warp, at: int) -> TensorMap:
    if not warp.cta.bulk.maps.get(at, True):
        raise Fault("uses a tensor map that was written, and no fence.proxy.tensormap stands between")
    if at % 64:
        raise Fault(f"misaligned: a tensor map at {at:#x}")
    data = warp.cta.memory.load(np.arange(at, at + SIZE, 16), 16)
    return TensorMap.of(data.tobytes())


def _load_bytes(instruction: Instruction, program: Program) -> Step:
    to, of, size, counted = instruction.operands
    reads = [address(to, program), address(of, program), source(size, TYPES["u32"], program), address(counted, program)]

    def step(warp: Warp) -> None:
        at, origins, sizes, counters = [each(warp) for each in reads]
        warp.need("an operand of a bulk copy")

        def load(lane: int) -> None:
            pieces = np.arange(0, _whole(int(sizes[lane])), 16)
            data = warp.cta.memory.load(origins[lane] + pieces, 16, warp.waits, "bulk load")
            warp.cta.bulk.load(warp.number, at[lane] + pieces, data, int(counters[lane]))

        _for_lanes(warp, load)

    return step


def _store_bytes(instruction: Instruction, program: Program) -> Step:
    to, of, size = instruction.operands
    reads = [address(to, program), address(of, program), source(size, TYPES["u32"], program)]

    def step(warp: Warp) -> None:
        at, origins, sizes = [each(warp) for each in reads]
        warp.need("an operand of a bulk copy")

        def store(lane: int) -> None:
            pieces = np.arange(0, _whole(int(sizes[lane])), 16)
            places, early = at[lane] + pieces, warp.waits

            def write(data: Array) -> None:
                warp.cta.memory.store(places, data, early, "bulk store")

            warp.cta.bulk.store(warp.number, lane, origins[lane] + pieces, write)

        _for_lanes(warp, store)

    return step


def _whole(size: int) -> int:
    if size % 16:
        raise Fault(f"a bulk copy of {size} bytes, which is no multiple of 16")
    return size
