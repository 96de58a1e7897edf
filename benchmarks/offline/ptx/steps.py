"""Checks a sequence of launches, such as a decode step, for races that programmatic dependent launch makes possible.

    with recorded(DEVICES["sm_90"], seed=1) as step:
        model.greedy(batch, cache)  # on the CPU, with dependent launches
    step.check()

A kernel may start when each CTA of the previous kernel has executed griddepcontrol.launch_dependents, or has ended.
After griddepcontrol.wait all earlier kernels have ended, because each of them has waited for the one before it. Before
a kernel's wait, these may still run:

- the previous kernel;
- the kernel before that one, if each CTA of the previous kernel let dependents start before it had waited; and so on.

None of these may write what the kernel reads before its wait, or read or write what the kernel writes before its wait.
A torch operation counts as a kernel without dependent launch: it starts when all earlier ones have ended. It reads its
arguments and writes its results, or the tensors that it changes in place.

Each byte is checked, and memory that is freed and allocated again is the same memory. Prefetches touch nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenkern.kernels.dispatch import dependent_launches
from qwenkern.kernels.triton import tuning

from .arguments import Storages
from .device import Change, device
from .faults import Fault
from .launch import Launch
from .values import Array

NONE = np.zeros((0, 2), np.int64)
DOES: dict[str, tuple[str, ...]] = {
    "load": ("read",),
    "copy": ("read",),
    "bulk load": ("read",),
    "atomic": ("read", "written"),
    "store": ("written",),
    "bulk store": ("written",),
    "prefetch": (),
}
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


@dataclass
class Ran:
    """A kernel or a torch operation, and what it touched, as intervals [n, 2] of addresses on this machine."""

    name: str
    is_dependent: bool  # it may start before the previous kernel has ended
    waits_first: bool  # it lets the next kernel start only when some CTA has waited, or ended
    names: list[tuple[int, int, str]]  # the first argument in a storage: its start, its end, its name
    early_reads: Array = field(default_factory=lambda: NONE)  # before its wait
    early_writes: Array = field(default_factory=lambda: NONE)
    reads: Array = field(default_factory=lambda: NONE)  # at any time
    writes: Array = field(default_factory=lambda: NONE)

    def place(self, address: int) -> str:
        for start, end, name in self.names:
            if start <= address < end:
                return f"byte {address - start} of the storage of {name}"
        return "memory"


class Step:
    """The launches, in order."""

    def __init__(self, ran: Iterable[Ran] = ()) -> None:
        self.ran = list(ran)

    def ended(self) -> list[int]:
        """For each launch, the number of earlier launches that have ended when it starts."""
        counts: list[int] = []
        for at, launch in enumerate(self.ran):
            if not launch.is_dependent or at == 0:
                counts.append(at)
            else:
                counts.append(max(counts[-1], at - 1 if self.ran[at - 1].waits_first else 0))
        return counts

    def hazards(self) -> list[str]:
        found = []
        for at, (launch, ended) in enumerate(zip(self.ran, self.ended(), strict=True)):
            for before in range(ended, at):
                other = self.ran[before]
                for does, mine, did, theirs in (
                    ("reads", launch.early_reads, "writes", other.writes),
                    ("writes", launch.early_writes, "writes", other.writes),
                    ("writes", launch.early_writes, "reads", other.reads),
                ):
                    address = _first_common(mine, theirs)
                    if address is not None:
                        found.append(
                            f"{launch.name} (launch {at}) {does} before its wait {launch.place(address)}, which"
                            f" {other.name} (launch {before}) {did} and may not have ended"
                        )
        return found

    def check(self) -> None:
        """Raises Fault at the first hazard."""
        for hazard in self.hazards():
            raise Fault(hazard)


@contextlib.contextmanager
def recorded(this: tuning.Device, seed: int, change: Change = lambda name, ptx: ptx) -> Iterator[Step]:
    """In this context kernels run as in ``device``, but accesses before their wait raise nothing: ``check`` judges
    them."""
    step = Step()

    @contextlib.contextmanager
    def watch(name: str, launch: Launch, storages: Storages) -> Iterator[None]:
        launch.memory.leave_early_accesses()
        touched = _Touched(len(launch.memory))
        launch.memory.observers.append(touched)
        yield
        step.ran.append(touched.ran(name, launch, storages))

    with _as_on_a_gpu(), _TorchOperations(step), device(this, seed, change, watch=watch), dependent_launches():
        yield step


class _Touched:
    """Which bytes of a launch's memory are touched: before the wait, and at any time."""

    def __init__(self, size: int) -> None:
        self._early = {"read": np.zeros(size, np.bool_), "written": np.zeros(size, np.bool_)}
        self._ever = {"read": np.zeros(size, np.bool_), "written": np.zeros(size, np.bool_)}

    def access(self, how: str, offsets: Array, size: int, early: bool) -> None:
        places = offsets[:, None] + np.arange(size)
        for did in DOES[how]:
            self._ever[did][places] = True
            if early:
                self._early[did][places] = True

    def ran(self, name: str, launch: Launch, storages: Storages) -> Ran:
        names = []
        for buffer, argument in enumerate(storages.names):
            start = storages.start(buffer)
            names.append((start, start + launch.memory.lengths[buffer], argument))
        touched = self._early["read"], self._early["written"], self._ever["read"], self._ever["written"]
        intervals = [self._intervals(launch, storages, each) for each in touched]
        return Ran(name, launch.is_dependent, launch.waits_first, names, *intervals)

    @staticmethod
    def _intervals(launch: Launch, storages: Storages, touched: Array) -> Array:
        """The touched intervals of the arguments. A kernel's own scratch memory is left out, as nobody else uses it."""
        found = [NONE]
        for buffer in range(len(storages.names)):
            start = launch.memory.starts[buffer]
            mine = touched[start : start + launch.memory.lengths[buffer]].astype(np.int8)
            edges = np.nonzero(np.diff(mine, prepend=0, append=0))[0]
            found.append(edges.reshape(-1, 2) + storages.start(buffer))
        return np.concatenate(found)


def _as_on_a_gpu() -> AbstractContextManager[Any]:
    """In this context no op reads the values of its arguments, as on a GPU."""
    stack = contextlib.ExitStack()
    for name, module in list(sys.modules.items()):
        if name.startswith("qwenkern.kernels") and hasattr(module, "can_look_at"):
            stack.enter_context(mock.patch.object(module, "can_look_at", return_value=False))
    return stack


class _TorchOperations(TorchDispatchMode):
    def __init__(self, step: Step) -> None:
        super().__init__()
        self._step = step

    def __torch_dispatch__(
        self, func: Any, types: Collection[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        schema = func._schema
        inputs = [each for each in tree_leaves((args, given)) if isinstance(each, Tensor)]
        outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        written = [
            value
            for argument, value in zip(schema.arguments, [*args, *given.values()], strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor)
        ]
        if func.overloadpacket.__name__ in NO_KERNEL or (not written and func.is_view):
            return result
        written += [each for each in outputs if not any(_same_storage(each, other) for other in inputs)]
        if written or inputs:
            names = [(int(start), int(end), "a tensor") for start, end in _whole(inputs + written)]
            self._step.ran.append(Ran(str(func), False, True, names, reads=_whole(inputs), writes=_whole(written)))
        return result


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _whole(tensors: list[Tensor]) -> Array:
    """The interval from the first to the last byte of each tensor."""
    found = [NONE]
    for tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            found.append(np.array([[start, start + (last + 1) * tensor.element_size()]], np.int64))
    return np.concatenate(found)


def _first_common(some: Array, others: Array) -> int | None:
    """The first address that lies in an interval of each."""
    if not len(some) or not len(others):
        return None
    others = others[np.argsort(others[:, 0])]
    ends = np.maximum.accumulate(others[:, 1])  # the largest end of all intervals that start no later
    for start, end in some[np.argsort(some[:, 0])]:
        last = int(np.searchsorted(others[:, 0], end)) - 1  # the last one that starts before this one ends
        if last >= 0 and ends[last] > start:
            later = others[: last + 1]
            return int(np.maximum(later[later[:, 1] > start, 0], start).min())
    return None
