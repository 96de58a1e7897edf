"""Calls of C functions: run one by one, or recorded and replayed together."""

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
    """Memory that is used again, larger when more is asked for: fresh pages would cost more than a small op."""

    def __init__(self) -> None:
        self._memory = _floats(0)

    def __call__(self, size: int) -> Tensor:
        if self._memory.numel() < size:
            self._memory = _floats(size)
        return self._memory


def _floats(size: int) -> Tensor:
    """Whatever torch's default dtype and device are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


class RecordedCalls:
    """The calls of C functions that a function makes, recorded once and replayed in one go, which is to C ops what a
    CUDA graph is to kernels: no Python, no allocation, and one team of threads from the first call to the last. They
    work on the memory that their tensors had when they were recorded."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.calls: list[bytes] = []
        self.scratch = Scratch()
        self._kept: list[tuple[Tensor | None, ...]] = []
        self._packed = b""
        self._threads = threads.count()

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Records what runs within it, without running it. Raises CannotRecord if torch were to compute something."""
        build.prepare()  # here, where torch may compute
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
    """Lets torch make tensors and views of them, but compute nothing."""

    allowed = ("empty", "new_empty", "empty_like", "empty_strided")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function._schema.name.removeprefix("aten::") not in self.allowed:
            raise CannotRecord(f"{function.name()} is not in C")
        return function(*args, **(kwargs or {}))


def run(call: Call, team: int | None = None) -> None:
    """Runs a call in a team of its own, of ``team`` threads (default: threads.count()); or records it."""
    if is_recording():
        recorder().add(call)
    else:
        play(call[1], 1, team)


def play(calls: bytes, count: int, team: int | None = None) -> None:
    """Runs so many calls that lie one after the other."""
    build.prepared().library.run(calls, count, team or threads.count())


def scratch(size: int) -> Tensor:
    """Memory for so many float32 that only the next call uses."""
    if is_recording():
        return recorder().scratch(size)
    if not hasattr(_of_thread, "scratch"):
        _of_thread.scratch = Scratch()
    return _of_thread.scratch(size)
