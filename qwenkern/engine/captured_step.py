"""The decode step of the whole model, captured once for each number of sequences and replayed for every token.

    ids, positions, block tables ─► layers ─► logits ─► (on a GPU) tokens ─┐
     ▲                                                                     │
     └─────────────────────────────────────────────────────────────────────┘

capture.py says how each device captures, and whether its step draws the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import Batch, PagedCache
from ..kernels import c as c_backend
from ..kernels import waits_for_host
from ..qwen2 import Qwen2
from ..sampling import DrawSettings, SampledSequence, draw, or_not_finite
from .capture import Capture, Read, capture_for


class CapturedStep:
    """A captured step of ``size`` rows. With ``candidates=None`` it ends with the logits. Otherwise it draws each row's
    token from the ``candidates`` most likely tokens (sampling.draw), and the next replay continues from there."""

    def __init__(self, model: Qwen2, cache: PagedCache, size: int, candidates: int | None, capture: Capture) -> None:
        self._model, self._cache, self._candidates, self._capture = model, cache, candidates, capture
        device, pages = cache.device, -(-model.config.context_length // cache.page_size)
        spare = cache.spare_page
        self._batch = Batch(  # rows without a sequence write to the spare page, and their positions stay fixed
            ids=torch.zeros(size, dtype=torch.int64, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            slots=torch.full((size,), spare * cache.page_size, device=device),
            block_tables=torch.full((size, pages), spare, dtype=torch.int32, device=device),
            lengths=torch.ones(size, dtype=torch.int32, device=device),
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=device),
            is_decode=True,
        )
        self._moves = torch.zeros(size, dtype=torch.int32, device=device)  # 1 for rows with a sequence, else 0
        self._settings = DrawSettings.neutral(size, device)
        self.owner: object = None  # the pipeline whose sequences the next replay continues
        with torch.inference_mode():
            self.replay, self.out = capture.capture(self._run)

    def load(self, batch: Batch) -> None:
        """Sets the rows to the next tokens of a decode batch and their places in the cache."""
        count, pages = batch.block_tables.shape
        mine = self._batch
        mine.block_tables[:count, :pages] = batch.block_tables
        for name in ("ids", "positions", "slots", "lengths"):
            getattr(mine, name)[:count] = getattr(batch, name)
        mine.positions[count:], mine.lengths[count:], mine.block_tables[count:] = 0, 1, self._cache.spare_page
        mine.slots[count:] = self._cache.spare_page * self._cache.page_size
        self._moves[:count], self._moves[count:] = 1, 0

    def load_settings(self, sequences: Sequence[SampledSequence]) -> None:
        """Sets how each sequence draws its tokens."""
        self._capture.upload(self._settings.values[:, : len(sequences)], DrawSettings.of(sequences))

    def load_uniforms(self, sequences: Sequence[SampledSequence]) -> None:
        """Sets the random numbers of the next replay, if it draws at random."""
        if self._candidates is not None and self._candidates > 1:
            uniforms = [sequence.uniform() for sequence in sequences]
            self._capture.upload(self._settings.uniforms[: len(sequences)], uniforms)

    def add_page(self, row: int, at: int, page: int) -> None:
        """Writes a page number into a row's block table."""
        self._capture.upload(self._batch.block_tables[row, at : at + 1], [page])

    def tokens(self) -> Read:
        """The tokens of the latest replay; calling the result waits for them."""
        return self._capture.download(self.out)

    def _run(self) -> Tensor:
        batch = self._batch
        if self._candidates is None:
            return self._model(batch, self._cache)
        size = self._cache.page_size
        pages = batch.block_tables.gather(1, (batch.positions // size)[:, None])[:, 0]
        torch.add(batch.positions % size, pages, alpha=size, out=batch.slots)
        if self._candidates == 1:
            largest, tokens = self._model.greedy(batch, self._cache)
        else:
            logits = self._model(batch, self._cache)
            largest, tokens = logits.amax(-1), draw(logits, self._settings, self._candidates)
        batch.ids.copy_(tokens)  # also if not finite: the next replay starts before the host checks them
        batch.positions.add_(self._moves)
        batch.lengths.add_(self._moves)
        return or_not_finite(tokens, largest)


class CapturedSteps:
    """The captured steps of a model over a cache. Each is captured when it is first needed."""

    def __init__(self, model: Qwen2, cache: PagedCache, capture: Capture | None = None) -> None:
        self.capture = capture or capture_for(cache.device)
        self._model, self._cache = model, cache
        self._steps: dict[tuple[int, int | None], CapturedStep | None] = {}

    @property
    def in_flight(self) -> int:
        """The number of steps that are launched before the tokens of the first one are read. 0: the host draws the
        tokens."""
        return self.capture.steps_in_flight

    def get(self, sequences: int, candidates: int | None = None) -> CapturedStep | None:
        """The captured step for so many sequences, which is captured now if it is missing. None if it cannot be
        captured."""
        size = self.capture.padded(sequences)
        if size is None or self._waits_for_host():
            return None
        if (size, candidates) not in self._steps:
            self._steps[size, candidates] = self._captured(size, candidates)
        return self._steps[size, candidates]

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [S, V] of a decode batch, valid until the next call. None if the step cannot be captured."""
        step = self.get(len(batch.lengths))
        if step is None:
            return None
        step.load(batch)
        step.replay()
        return step.out[: len(batch.lengths)]

    def _waits_for_host(self) -> bool:
        cache = self._cache
        return cache.device.type == "cuda" and waits_for_host(self._model.config.num_attention_heads, cache.pages[0])

    def _captured(self, size: int, candidates: int | None) -> CapturedStep | None:
        try:
            return CapturedStep(self._model, self._cache, size, candidates, self.capture)
        except c_backend.CannotRecord:  # C refuses the dtype or a size: torch runs the step
            return None
