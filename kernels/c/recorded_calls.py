"""Calls of C functions, run one by one, or recorded and replayed together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..recording import CannotRecord, is_recording, recorder, recording
from . import build, threads
from .calls import Call

_of_thread = threading.local()  # scratch: Scratch


class Scratch:
    """Scratch memory that is reused, and grows when a call needs more. The page faults of fresh memory cost more than a
    small op."""

    def __init__(self) -> None:
        self._memory = _floats(0)

    def __call__(self, size: int) -> Tensor:
        if self._memory.numel() < size:
            self._memory = _floats(size)
        return self._memory


def _floats(size: int) -> Tensor:
    """A float32 tensor on the CPU, independent of torch's default dtype and device."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


class RecordedCalls:
    """The C calls of a function, recorded once and replayed together, like kernels in a CUDA graph: a replay runs no
    Python and allocates nothing, and one team of threads runs all calls. The calls use the memory that their tensors
    had when they were recorded."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.calls: list[bytes] = []
        self.scratch = Scratch()
        self._kept: list[tuple[Tensor | None, ...]] = []
        self._packed = b""
        self._threads = threads.count()

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Records the C calls made in this context, without running them. Raises CannotRecord if an operation of torch
        would compute something."""
        build.prepare()  # before the recording, during which torch may not compute
        with recording(self), _OnlyViews():
            yield
        self._packed = b"".join(self.calls)

    def replay(self) -> None:
        play(self._packed, len(self.calls), self._threads)

    def add(self, call: Call) -> None:
        op, packed, tensors = call
        self.ops.append(op)
        self.calls.append(packed)
        self._kept.append(tensors)


class _OnlyViews(TorchDispatchMode):
    """Lets torch allocate tensors and make views, but compute nothing."""

    allowed = ("empty", "new_empty", "empty_like", "empty_strided")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function._schema.name.removeprefix("aten::") not in self.allowed:
            raise CannotRecord(f"{function.name()} is not in C")
        return function(*args, **(kwargs or {}))


def run(call: Call, team: int | None = None) -> None:
    """Runs a call in a team of ``team`` threads (default: threads.count()), or records it."""
    if is_recording():
        recorder().add(call)
    else:
        play(call[1], 1, team)


def play(calls: bytes, count: int, team: int | None = None) -> None:
    """Runs ``count`` calls, which follow each other in the bytes ``calls``."""
    build.prepared().library.run(calls, count, team or threads.count())


def scratch(size: int) -> Tensor:
    """Memory for ``size`` float32 values, valid for the next call only."""
    if is_recording():
        return recorder().scratch(size)
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = Scratch()
    return _of_thread.scratch(size)
