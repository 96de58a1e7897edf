"""A model without layers: its next token is a sum over all tokens that its pages hold. So the text changes if a page is
wrong, or if a token is lost or written twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support.engines import with_capture
from support.models import TINY, tiny_model

from qwenkern.cache import Batch, PagedCache
from qwenkern.engine import Request
from qwenkern.engine.capture import Capture

SMALL = replace(
    TINY, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip


class Sums:
    """Stands in for the layers: stores token ids as keys, and computes the most likely token from all ids of a
    sequence."""

    def __init__(self, vocabulary: int, capture: Any = None) -> None:
        self._noise = np.linspace(0, 1, vocabulary, dtype=np.float32)
        self._capture = capture

    def forward(self, batch: Batch, cache: PagedCache, rows: torch.Tensor | None = None) -> torch.Tensor:
        if not getattr(self._capture, "running", True):
            self._capture.run_until(lambda: False)  # like a GPU, first runs everything launched earlier
        pages = cache.pages[0].k[:, :, 0, 0].numpy()
        slots = batch.slots.numpy()
        pages[slots // cache.page_size, slots % cache.page_size] = batch.ids
        starts, positions, tables = batch.query_starts.numpy(), batch.positions.numpy(), batch.block_tables.numpy()
        rows = np.arange(len(slots)) if rows is None else rows.numpy()
        logits = np.tile(self._noise, (len(rows), 1))
        for logit, row in zip(logits, rows, strict=True):
            past = pages[tables[np.searchsorted(starts, row, "right") - 1]].ravel()[: positions[row] + 1]
            logit[self.next(past)] += 3
        return torch.from_numpy(logits)

    def next(self, past: np.ndarray) -> int:
        """The most likely token after these tokens."""
        return _next(past, len(self._noise))

    def greedy(self, batch: Batch, cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward(batch, cache).max(-1)


def clockwork(capture: Capture, dtype: torch.dtype = torch.float32, **keywords: Any):
    """A model of Sums. Fields of its Config may be given as keywords, too."""
    fields = {name: keywords.pop(name) for name in list(keywords) if hasattr(SMALL, name)}
    model = tiny_model(replace(SMALL, **fields), dtype, **{"prefill_chunk": 40} | keywords)
    return with_layers(model, Sums(model.config.vocab_size, capture), capture)


def with_layers(model, layers: Sums, capture: Capture | None = None):
    """The model, with ``layers`` in place of its own."""
    model.module.forward, model.module.greedy = layers.forward, layers.greedy
    model.module.model.forward, model.module.logits = layers.forward, lambda logits: logits
    return with_capture(model, capture)


def tokens_of(request: Request, vocabulary: int = SMALL.vocab_size) -> list[int]:
    """The greedy text of a request that runs alone, computed from the definition."""
    ids = list(request.prompt_ids)
    while len(ids) < len(request.prompt_ids) + request.max_tokens:
        ids.append(_next(ids, vocabulary))
        if ids[-1] in request.end_ids:
            break
    return ids[len(request.prompt_ids) :]


def _next(past: Sequence[int] | np.ndarray, vocabulary: int) -> int:
    return int(np.asarray(past, dtype=np.float64) @ np.arange(1, len(past) + 1)) % vocabulary
