"""Runs a forward pass: makes a batch of the scheduled sequences and computes their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import Batch, BlockTable, PagedCache
from ..qwen2 import Qwen2
from .capture import Capture
from .captured_prefill import CapturedPrefills
from .captured_step import CapturedSteps

Part = tuple[BlockTable, Sequence[int]]  # a sequence, and the token ids that the forward pass computes for it


class Runner:
    """A model and its cache. One thread at a time may run a forward pass."""

    def __init__(self, model: Qwen2, cache: PagedCache, capture: Capture | None = None) -> None:
        self.model = model
        self.cache = cache
        self.captured = CapturedSteps(model, cache, capture)
        self._parameters = list(model.parameters())
        self.prefills = CapturedPrefills(model, cache, self.captured.capture)

    def weights_version(self) -> int:
        """A number that changes when a weight is changed in place. The keys and values in the cache are then out of
        date."""
        return sum(parameter._version for parameter in self._parameters)

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part], rows: list[int] | None = None, captured: bool = False) -> Tensor:
        """Runs a forward pass. Returns the logits after all tokens, or after those of the given rows: float32 [rows,
        V].

        captured: whether the captured step may be replayed, if there is one for this batch. Passes over prompts may be
        captured in any case, if rows are given. Logits of a captured pass are valid until the next pass."""
        logits = None
        if rows is not None and not (captured and all(len(ids) == 1 for _, ids in parts)):
            logits = self.prefills.logits(parts, rows)
        if logits is None:
            batch = self.cache.batch(parts)
            if captured and batch.is_decode:
                logits = self.captured.logits(batch)
        if logits is None:
            chosen = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=batch.ids.device)
            logits = self.model(batch, self.cache, chosen)
        self.cache.advance(parts)
        return logits

    @torch.inference_mode()
    def each_logits(self, parts: Sequence[Part]) -> Tensor:
        """Runs a forward pass. Returns the logits after each token [T, V], with the bits that decoding the tokens one
        by one would give. Valid until the next pass. The tokens do not count as cached: the caller decides how many
        stay."""
        for table, ids in parts:
            self.cache.extend(table, len(ids))
        batch = Batch.one_by_one(parts, self.cache.page_size, self.cache.device)
        logits = self.captured.logits(batch)
        return self.model(batch, self.cache, None) if logits is None else logits

    @torch.inference_mode()
    def hidden(self, parts: Sequence[Part]) -> Tensor:
        """Runs the layers over all tokens of a forward pass. Returns the residual stream [T, K], for `logits_of`."""
        hidden = self.model.model(self.cache.batch(parts), self.cache)
        self.cache.advance(parts)
        return hidden

    @torch.inference_mode()
    def logits_of(self, x: Tensor) -> Tensor:
        return self.model.logits(x)
