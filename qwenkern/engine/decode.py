"""The decode step, captured once for each number of sequences and replayed for every token.

    ids, positions, block tables ─► layers ─► logits ─► (on a GPU) tokens ─┐
     ▲                                                                     │
     └─────────────────────────────────────────────────────────────────────┘

On a GPU the step is a CUDA graph that draws the tokens too and feeds them to its next replay; the host reads them one
step behind. On a CPU it is recorded calls of C ops (kernels/c) that end with the logits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..cache import Batch, PagedCache
from ..kernels import c as c_backend
from ..kernels import dependent_launches, waits_for_host
from ..qwen2 import Qwen2
from ..sampling import Row, Settings, draw, or_not_finite

Read = Callable[[], list[int]]


class Device(Protocol):
    """What capturing needs of a kind of device, beyond torch's operations."""

    ahead: int  # steps launched before the tokens of the first one are read; 0: tokens are drawn by the host

    def size(self, sequences: int) -> int | None:
        """Rows of the step that so many sequences use; None: such a step is not captured."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A replay of the function, and the tensor that it fills."""

    def upload(self, target: Tensor, values: Sequence[float]) -> None:
        """Writes numbers into a tensor, in order with what is launched, without waiting."""

    def download(self, source: Tensor) -> Read:
        """What the tensor holds once all that was launched so far has run. Only the returned function waits."""


class Cpu:
    ahead = 0

    def size(self, sequences: int) -> int | None:
        if c_backend.prepare():  # there is no C here
            return None
        return sequences if sequences <= c_backend.prepared().limits.max_few_tokens else None

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded = c_backend.RecordedCalls()
        with recorded.record():
            out = function()
        return recorded.replay, out

    def upload(self, target: Tensor, values: Sequence[float]) -> None:
        target.copy_(torch.tensor(values, dtype=target.dtype, device="cpu"))

    def download(self, source: Tensor) -> Read:
        return source.tolist


class Cuda:
    ahead = 1
    _lock = threading.Lock()  # a capture begins by waiting for the device, which would break another one

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def size(self, sequences: int) -> int | None:
        """1, 2, 4, 8, then multiples of 8: few graphs, and at most as much waste as work."""
        return 1 << (sequences - 1).bit_length() if sequences <= 8 else -(-sequences // 8) * 8

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with Cuda._lock, torch.cuda.device(self._stream.device), dependent_launches():
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                function()  # once outside of the graph: kernels are compiled and loaded, workspaces allocated
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # relaxed: another thread of the program may allocate meanwhile
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"):
                out = function()
        return graph.replay, out

    def upload(self, target: Tensor, values: Sequence[float]) -> None:
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


class DecodeStep:
    """A captured step of ``size`` rows. With ``width`` 0 it ends with the logits; otherwise it draws each row's token
    (as sampling.draw does with this width), and its next replay continues from there."""

    def __init__(self, model: Qwen2, cache: PagedCache, size: int, width: int, device: Device) -> None:
        self._model, self._cache, self._width, self._device = model, cache, width, device
        place, pages = cache.k.device, -(-model.config.context_length // cache.page_size)
        spare = cache.spare_page
        self._batch = Batch(  # rows without a sequence write to the spare page, and stay where they are
            ids=torch.zeros(size, dtype=torch.int64, device=place),
            positions=torch.zeros(size, dtype=torch.int64, device=place),
            slots=torch.full((size,), spare * cache.page_size, device=place),
            block_tables=torch.full((size, pages), spare, dtype=torch.int32, device=place),
            lengths=torch.ones(size, dtype=torch.int32, device=place),
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=place),
            is_decode=True,
        )
        self._moves = torch.zeros(size, dtype=torch.int32, device=place)  # 1 for rows with a sequence
        self._settings = Settings.neutral(size, place)
        self.user: object = None  # whose sequences it continues
        with torch.inference_mode():
            self._replay, self.out = device.capture(self._run)

    def load(self, batch: Batch) -> None:
        """Takes the next tokens of a decode batch, and their places."""
        count, pages = batch.block_tables.shape
        mine = self._batch
        mine.block_tables[:count, :pages] = batch.block_tables
        for name in ("ids", "positions", "slots", "lengths"):
            getattr(mine, name)[:count] = getattr(batch, name)
        mine.positions[count:], mine.lengths[count:], mine.block_tables[count:] = 0, 1, self._cache.spare_page
        mine.slots[count:] = self._cache.spare_page * self._cache.page_size
        self._moves[:count], self._moves[count:] = 1, 0

    def load_settings(self, rows: Sequence[Row]) -> None:
        """Takes how each row draws its tokens."""
        self._device.upload(self._settings.values[:, : len(rows)], Settings.of(rows))

    def load_numbers(self, rows: Sequence[Row]) -> None:
        """Takes the random numbers of the next replay, if it needs any."""
        if self._width > 1:
            self._device.upload(self._settings.uniforms[: len(rows)], [row.uniform() for row in rows])

    def add_page(self, row: int, at: int, page: int) -> None:
        self._device.upload(self._batch.block_tables[row, at : at + 1], [page])

    def launch(self) -> None:
        self._replay()

    def tokens(self) -> Read:
        return self._device.download(self.out)

    def _run(self) -> Tensor:
        batch = self._batch
        if not self._width:
            return self._model(batch, self._cache)
        size = self._cache.page_size
        pages = batch.block_tables.gather(1, (batch.positions // size)[:, None])[:, 0]
        torch.add(batch.positions % size, pages, alpha=size, out=batch.slots)
        if self._width == 1:
            largest, tokens = self._model.likeliest(batch, self._cache)
        else:
            logits = self._model(batch, self._cache)
            largest, tokens = logits.amax(-1), draw(logits, self._settings, self._width)
        batch.ids.copy_(tokens)  # the next replay runs before the host has seen whether these are right
        batch.positions.add_(self._moves)
        batch.lengths.add_(self._moves)
        return or_not_finite(tokens, largest)


class DecodeSteps:
    """The captured steps of a model over a cache, each made when it is first needed."""

    def __init__(self, model: Qwen2, cache: PagedCache, device: Device | None = None) -> None:
        self.cache = cache
        self._model = model
        self._device = device or (Cuda(cache.k.device) if cache.k.is_cuda else Cpu())
        self._steps: dict[tuple[int, int], DecodeStep | None] = {}

    @property
    def ahead(self) -> int:
        return self._device.ahead

    def step(self, sequences: int, width: int = 0) -> DecodeStep | None:
        """The step for so many sequences, or None where none can be captured."""
        size, cache = self._device.size(sequences), self.cache
        if size is None or (cache.k.is_cuda and waits_for_host(self._model.config.num_attention_heads, cache.k[0])):
            return None
        if (size, width) not in self._steps:
            try:
                made = DecodeStep(self._model, self.cache, size, width, self._device)
            except c_backend.CannotRecord:  # another dtype, sizes that C does not take, no compiler: torch runs it
                made = None
            self._steps[size, width] = made
        return self._steps[size, width]

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [S, V] of a decode batch, valid until the next call; None where the step cannot be captured."""
        step = self.step(len(batch.lengths))
        if step is None:
            return None
        step.load(batch)
        step.launch()
        return step.out[: len(batch.lengths)]
