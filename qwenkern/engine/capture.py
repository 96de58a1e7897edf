"""Captures and replays a function of tensors: as a CUDA graph on a GPU, as recorded C calls on a CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels import c as c_backend
from ..kernels import dependent_launches

PROMPT_LENGTHS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048)
"""Rows of a captured pass over prompts. For 2,048 rows of 3B, an H100 takes 20 ms, and a host launches for 26 ms."""
Numbers = Tensor | Sequence[float] | Sequence[Sequence[float]]  # a tensor is on the host
Replay = Callable[[], None]
Read = Callable[[], list[Any]]


class Capture(Protocol):
    """The operations of a captured step that differ between devices."""

    steps_in_flight: int  # steps launched before the tokens of the first one are read; 0: the host draws the tokens

    def padded(self, sequences: int) -> int | None:
        """The number of rows of the captured step for this number of sequences. None: the step is not captured."""

    def padded_prompt(self, tokens: int) -> int | None:
        """The number of rows of the captured forward pass over this number of prompt tokens. None: it is not
        captured."""

    def capture(self, function: Callable[[], Tensor], has_run: bool = False) -> tuple[Replay, Tensor]:
        """Captures the function. Returns a function that replays it, and the tensor that a replay fills. ``has_run``:
        the function has run before on the same tensors, so its kernels are compiled and loaded."""

    def upload(self, target: Tensor, values: Numbers) -> None:
        """Writes numbers into a tensor, in stream order, without waiting."""

    def download(self, source: Tensor) -> Read:
        """Starts a copy of the tensor to the host, in stream order. The returned function waits for it and returns the
        values."""


class CallCapture:
    """On a CPU: records the C calls of the function, and repeats them. The step ends with the logits."""

    steps_in_flight = 0

    def padded(self, sequences: int) -> int | None:
        if c_backend.prepare():  # C cannot run here
            return None
        return sequences if sequences <= c_backend.prepared().limits.max_few_tokens else None

    def padded_prompt(self, tokens: int) -> None:
        """None: on a CPU, a forward pass over a prompt does not wait for launches."""

    def capture(self, function: Callable[[], Tensor], has_run: bool = False) -> tuple[Replay, Tensor]:
        recorded = c_backend.RecordedCalls()
        with recorded.record():
            out = function()
        return recorded.replay, out

    def upload(self, target: Tensor, values: Numbers) -> None:
        target.copy_(torch.as_tensor(values, dtype=target.dtype, device="cpu"))

    def download(self, source: Tensor) -> Read:
        return source.tolist


class GraphCapture:
    """On a GPU: a CUDA graph. The step also draws the tokens, and the host reads them one step later."""

    steps_in_flight = 1
    _lock = threading.Lock()  # a capture begins with a device synchronisation, which would break a concurrent capture

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._kept: dict[Any, Tensor] = {}  # tensors that the kernels of all graphs share

    def padded(self, sequences: int) -> int | None:
        """1, 2, 4, 8, then multiples of 8: few graphs, and padding at most doubles the rows."""
        return 1 << (sequences - 1).bit_length() if sequences <= 8 else -(-sequences // 8) * 8

    def padded_prompt(self, tokens: int) -> int | None:
        """The next of PROMPT_LENGTHS. Each length needs a graph of its own. At most half of the rows are padding, from
        512 on at most a quarter. Longer passes are not captured: there the GPU takes longer than the host's launches.
        """
        return next((length for length in PROMPT_LENGTHS if tokens <= length), None)

    def capture(self, function: Callable[[], Tensor], has_run: bool = False) -> tuple[Replay, Tensor]:
        """A function that has run before is captured with the kernels that it ran: those without programmatic dependent
        launch. It shares no tensors with other graphs, because these cannot be allocated during a capture."""
        kept = None if has_run else self._kept
        with GraphCapture._lock, torch.cuda.device(self._stream.device), dependent_launches(kept, on=not has_run):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                if has_run:
                    torch.cuda.current_blas_handle()  # this thread may not have one yet
                else:
                    function()  # warm-up: compiles and loads kernels
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # The graph keeps the address of cuBLAS's workspace, which must come from the graph's own pool: other code
            # (torch.compile) frees the workspace that the warm-up allocated.
            torch._C._cuda_clearCublasWorkspaces()
            # relaxed: other threads may allocate memory meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                out = function()
            torch._C._cuda_clearCublasWorkspaces()  # other code must not use the pool's workspace
        return graph.replay, out

    def upload(self, target: Tensor, values: Numbers) -> None:
        target.copy_(torch.as_tensor(values, dtype=target.dtype, device="cpu").pin_memory(), non_blocking=True)

    def download(self, source: Tensor) -> Read:
        copy = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
        copy.copy_(source, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(source.device))

        def read() -> list[Any]:
            arrived.synchronize()
            return copy.tolist()

        return read


def capture_for(device: torch.device) -> Capture:
    return GraphCapture(device) if device.type == "cuda" else CallCapture()
