"""Forward passes over short prompts, padded to one of a few lengths. From the second pass of a length on, they replay a
CUDA graph.

    prompts, T tokens ─► rows of the captured graph (16, 32, 64, ...) ─► layers ─► last row of each prompt ─► logits

        prompt 0   prompt 1   padding
       │▒▒▒▒▒▒▒▒▒▒│▒▒▒▒▒▒▒▒▒▒│░░░░░░░│    the padding is a sequence of its own, in the cache's spare page

A forward pass has about ten launches per layer. Up to some thousand tokens (PROMPT_LENGTHS of capture.py), the GPU
completes a launch before the host has made the next one. The first pass of a length runs op by op, which compiles and
loads its kernels. The second pass is captured with these kernels, so it takes no longer than a pass without a capture.
All passes of a length have the same number of rows, captured or not, and so the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..cache import Batch, BlockTable, PagedCache
from ..kernels import waits_for_host
from ..qwen2 import Qwen2
from .capture import Capture

MOST_PROMPTS = 7  # per captured pass; with the padding, 8 sequences, so every table begins at a multiple of 16 bytes
CPU = torch.device("cpu")  # whatever torch's default is
Part = tuple[BlockTable, Sequence[int]]


class CapturedPrefill:
    """A forward pass over up to MOST_PROMPTS prompts, in ``size`` rows."""

    def __init__(self, model: Qwen2, cache: PagedCache, size: int, capture: Capture) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        sequences, pages = MOST_PROMPTS + 1, -(-model.config.context_length // cache.page_size)
        device = cache.device
        self._wide = torch.zeros(3 * size + MOST_PROMPTS, dtype=torch.int64, device=device)
        ids, positions, slots, self._rows = self._wide.split((size, size, size, MOST_PROMPTS))
        self._narrow = torch.zeros(sequences * pages + 2 * sequences + 1, dtype=torch.int32, device=device)
        tables, lengths, starts = self._narrow.split((sequences * pages, sequences, sequences + 1))
        tables = tables.view(sequences, pages)
        self._batch = Batch(ids, positions, slots, tables, lengths, starts, is_decode=False)
        self._has_run = False
        self._captured: tuple[Callable[[], None], Tensor] | None = None  # replays the pass, which fills the tensor

    def __call__(self, parts: Sequence[Part], rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), V] after the given tokens, valid until the next pass. The sequences have the pages for
        their tokens."""
        self._load(Batch.of(parts, self._cache.page_size, CPU), rows)
        if not self._has_run:
            logits = self._run()
            self._has_run = True
        else:
            self._captured = self._captured or self._capture.capture(self._run, has_run=True)
            replay, logits = self._captured
            replay()
        return logits[: len(rows)]

    def _load(self, batch: Batch, rows: Sequence[int]) -> None:
        """Sets the rows of the pass: two asynchronous copies to the device."""
        mine, spare = self._batch, self._cache.spare_page
        tokens, (sequences, pages) = len(batch.ids), batch.block_tables.shape
        padding = len(mine.ids) - tokens
        free = spare * self._cache.page_size + torch.arange(padding, device=CPU) % self._cache.page_size
        zeros = torch.zeros(padding, dtype=torch.int64, device=CPU)
        last = torch.tensor([*rows, *[0] * (MOST_PROMPTS - len(rows))], device=CPU)
        wide = torch.cat((batch.ids, zeros, batch.positions, zeros, batch.slots, free, last))
        tables = torch.full(mine.block_tables.shape, spare, dtype=torch.int32, device=CPU)
        tables[:sequences, :pages] = batch.block_tables
        lengths = torch.ones(MOST_PROMPTS + 1, dtype=torch.int32, device=CPU)
        lengths[:sequences] = batch.lengths
        lengths[-1] = max(1, padding)
        # sequences without a prompt have no tokens
        starts = torch.full((MOST_PROMPTS + 2,), tokens, dtype=torch.int32, device=CPU)
        starts[:sequences] = batch.query_starts[:-1]
        starts[-1] = len(mine.ids)
        self._capture.upload(self._wide, wide)
        self._capture.upload(self._narrow, torch.cat((tables.flatten(), lengths, starts)))

    def _run(self) -> Tensor:
        return self._model(self._batch, self._cache, self._rows)


class CapturedPrefills:
    """The captured passes of a model over a cache, one for each padded length."""

    def __init__(self, model: Qwen2, cache: PagedCache, capture: Capture) -> None:
        self._model, self._cache, self._capture = model, cache, capture
        self._passes: dict[int, CapturedPrefill] = {}
        self._waits_for_host: bool | None = None  # not known yet

    def logits(self, parts: Sequence[Part], rows: Sequence[int]) -> Tensor | None:
        """Logits [len(rows), V] after the given tokens of a pass, valid until the next pass. Returns None and does
        nothing if no captured pass supports these parts."""
        size = self._capture.padded_prompt(sum(len(ids) for _, ids in parts))
        if size is None or len(parts) > MOST_PROMPTS or len(rows) > MOST_PROMPTS or not self._can_capture():
            return None
        if size not in self._passes:
            self._passes[size] = CapturedPrefill(self._model, self._cache, size, self._capture)
        for table, ids in parts:
            self._cache.extend(table, len(ids))
        return self._passes[size](parts, rows)

    def _can_capture(self) -> bool:
        """Whether no op waits for the host. This is determined once."""
        if self._waits_for_host is None:
            heads, pages = self._model.config.num_attention_heads, self._cache.pages[0]
            self._waits_for_host = self._cache.device.type == "cuda" and waits_for_host(heads, pages)
        return not self._waits_for_host
