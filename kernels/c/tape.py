"""Calls of C functions: run one by one, or recorded on a tape and played together."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import threads
from .build import library
from .call import Call

_recording = threading.local()


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


class NotRecordable(RuntimeError):
    """What ran under Tape.record is more than calls of C functions."""


class Tape:
    """The calls of C functions that a function makes, recorded once and played in one go: no Python, no allocation, and
    one team of threads from the first to the last. It works on the memory that its tensors had when it was recorded."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._kept: list[Tensor | None] = []
        self.scratch = Scratch()
        self._threads = threads.count()

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Records what runs within it, without running it. Raises NotRecordable if torch were to compute something."""
        library()  # compiled and measured before, if it must be
        _recording.tape = self
        try:
            with _OnlyViews():
                yield
        finally:
            _recording.tape = None
        self._packed = (Call * len(self.calls))(*self.calls)

    def replay(self) -> None:
        play(self._packed, len(self._packed), self._threads)

    def add(self, call: Call, tensors: Sequence[Tensor | None]) -> None:
        self.calls.append(call)
        self._kept += tensors


class _OnlyViews(TorchDispatchMode):
    """Lets torch make tensors and views of them, but compute nothing."""

    allowed = ("empty", "new_empty", "empty_like", "empty_strided")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and function._schema.name.removeprefix("aten::") not in self.allowed:
            raise NotRecordable(f"{function.name()} is not in C")
        return function(*args, **(kwargs or {}))


def run(
    op: str, tensors: Sequence[Tensor | None], sizes: Sequence[int], scalar: float = 0.0, team: int | None = None
) -> None:
    """Runs a C function, in a team of its own, or adds the call to the tape that is being recorded."""
    call = Call.of(op, tensors, sizes, scalar)
    if is_recording():
        _recording.tape.add(call, tensors)
    else:
        play(ctypes.byref(call), 1, team)


def play(calls: Any, count: int, team: int | None = None) -> None:
    """Runs so many calls that lie one after the other, in ``team`` threads (default: threads.count())."""
    library().run(calls, count, team or threads.count())


def scratch(size: int) -> Tensor:
    """Memory for so many float32 that only the next call uses."""
    if is_recording():
        return _recording.tape.scratch(size)
    if not hasattr(_recording, "scratch"):
        _recording.scratch = Scratch()
    return _recording.scratch(size)


def is_recording() -> bool:
    return getattr(_recording, "tape", None) is not None
