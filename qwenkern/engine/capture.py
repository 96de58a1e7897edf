"""Capturing and replaying a function of tensors: a CUDA graph on a GPU, recorded C calls on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import c as c_backend
from ..kernels import dependent_launches

Replay = Callable[[], None]
Read = Callable[[], list[int]]


class Capture(Protocol):
    """What a kind of device does for the captured step, beyond torch's operations."""

    steps_in_flight: int  # steps launched before the tokens of the first one are read; 0: the host draws the tokens

    def padded(self, sequences: int) -> int | None:
        """Rows of the step that so many sequences use. None: such a step is not captured."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """A replay of the function, and the tensor that it fills."""

    def upload(self, target: Tensor, values: Sequence[float] | Sequence[Sequence[float]]) -> None:
        """Writes numbers into a tensor, in order with what is launched, without waiting."""

    def download(self, source: Tensor) -> Read:
        """What the tensor holds once all that was launched so far has run. Only the returned function waits."""


class CallCapture:
    """On a CPU: the C calls of the function, recorded and made again. The step ends with the logits."""

    steps_in_flight = 0

    def padded(self, sequences: int) -> int | None:
        if c_backend.prepare():  # there is no C here
            return None
        return sequences if sequences <= c_backend.prepared().limits.max_few_tokens else None

    def capture(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        recorded = c_backend.RecordedCalls()
        with recorded.record():
            out = function()
        return recorded.replay, out

    def upload(self, target: Tensor, values: Sequence[float] | Sequence[Sequence[float]]) -> None:
        target.copy_(torch.tensor(values, dtype=target.dtype, device="cpu"))

    def download(self, source: Tensor) -> Read:
        return source.tolist


class GraphCapture:
    """On a GPU: a CUDA graph. The step draws the tokens too, and the host reads them one step behind."""

    steps_in_flight = 1
    _lock = threading.Lock()  # a capture begins by waiting for the device, which would break another one

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def padded(self, sequences: int) -> int | None:
        """1, 2, 4, 8, then multiples of 8: few graphs, and at most as much waste as work."""
        return 1 << (sequences - 1).bit_length() if sequences <= 8 else -(-sequences // 8) * 8

    def capture(self, function: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        with GraphCapture._lock, torch.cuda.device(self._stream.device), dependent_launches():
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()  # once outside of the graph: kernels are compiled and loaded, workspaces allocated
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # relaxed: another thread of the program may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                out = function()
        return graph.replay, out

    def upload(self, target: Tensor, values: Sequence[float] | Sequence[Sequence[float]]) -> None:
        target.copy_(torch.tensor(values, dtype=target.dtype, device="cpu", pin_memory=True), non_blocking=True)

    def download(self, source: Tensor) -> Read:
        copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
        copy.copy_(source, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(source.device))

        def read() -> list[int]:
            arrived.synchronize()
            return copy.tolist()

        return read


def capture_for(device: torch.device) -> Capture:
    return GraphCapture(device) if device.type == "cuda" else CallCapture()
