"""The decode step of the whole model, captured once for each number of sequences and replayed for every token.

    ids, positions, block tables ─► layers ─► logits ─► (on a GPU) tokens ─┐
     ▲                                                                     │
     └─────────────────────────────────────────────────────────────────────┘

capture.py defines how each device captures, and whether the step draws the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import Batch, PagedCache
from ..kernels import c as c_backend
from ..kernels import waits_for_host
from ..qwen2 import Qwen2
from ..sampling import Drawing, SampledSequence, Sampling, TokenStates, or_not_finite
from .capture import Capture, Read, capture_for


class CapturedStep:
    """A captured step of ``size`` rows. With ``drawing=None`` it ends with the logits. Otherwise it draws each row's
    token (sampling.Sampling), and the next replay continues from there."""

    def __init__(
        self,
        model: Qwen2,
        cache: PagedCache,
        size: int,
        drawing: Drawing | None,
        capture: Capture,
        states: TokenStates | None = None,
    ) -> None:
        self._model, self._cache, self._capture = model, cache, capture
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
        states = states or TokenStates(model.config.vocab_size, device)
        self._sampling = None if drawing is None else Sampling(drawing, states, self._moves)
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

    def load_sampling(self, sequences: Sequence[SampledSequence]) -> None:
        """Sets how each sequence draws its tokens."""
        if self._sampling:
            self._sampling.load(sequences, self._capture.upload)

    def launch(self, sequences: Sequence[SampledSequence]) -> None:
        """Replays the step for the loaded sequences, each with its next random number."""
        if self._sampling:
            self._sampling.launch(sequences, self._capture.upload)
        self.replay()

    def add_page(self, row: int, at: int, page: int) -> None:
        """Writes a page number into a row's block table."""
        self._capture.upload(self._batch.block_tables[row, at : at + 1], [page])

    def tokens(self) -> Read:
        """The tokens that the latest replay drew, for sampling.sampled. Calling the result waits for the replay."""
        return self._capture.download(self.out)

    def _run(self) -> Tensor:
        batch = self._batch
        if self._sampling is None:
            return self._model(batch, self._cache)
        size = self._cache.page_size
        pages = batch.block_tables.gather(1, (batch.positions // size)[:, None])[:, 0]
        torch.add(batch.positions % size, pages, alpha=size, out=batch.slots)
        if self._sampling.drawing.is_greedy:
            largest, tokens = self._model.greedy(batch, self._cache)
            out = or_not_finite(tokens, largest)
        else:
            tokens, out = self._sampling.run(self._model(batch, self._cache))
        batch.ids.copy_(tokens)  # also if not finite: the next replay starts before the host checks them
        batch.positions.add_(self._moves)
        batch.lengths.add_(self._moves)
        return out


class CapturedSteps:
    """The captured steps of a model over a cache. Each is captured when it is first needed."""

    def __init__(self, model: Qwen2, cache: PagedCache, capture: Capture | None = None) -> None:
        self.capture = capture or capture_for(cache.device)
        self._model, self._cache = model, cache
        self._states = TokenStates(model.config.vocab_size, cache.device)
        self._steps: dict[tuple[int, Drawing | None], CapturedStep | None] = {}

    @property
    def in_flight(self) -> int:
        """The number of steps that are launched before the tokens of the first one are read. 0: the host draws the
        tokens."""
        return self.capture.steps_in_flight

    def get(self, sequences: int, drawing: Drawing | None = None) -> CapturedStep | None:
        """The captured step for this number of sequences, which is captured now if it is missing. None if it cannot be
        captured. With ``drawing=None`` it ends with the logits."""
        size = self.capture.padded(sequences)
        if size is None or self._waits_for_host():
            return None
        if (size, drawing) not in self._steps:
            self._steps[size, drawing] = self._captured(size, drawing)
        return self._steps[size, drawing]

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

    def _captured(self, size: int, drawing: Drawing | None) -> CapturedStep | None:
        if drawing and drawing.adjusts and self._states.reserve(size):  # smaller steps are captured again
            self._steps = {key: step for key, step in self._steps.items() if not (key[1] and key[1].adjusts)}
        try:
            return CapturedStep(self._model, self._cache, size, drawing, self.capture, self._states)
        except c_backend.CannotRecord:  # C refuses the dtype or a size: torch runs the step
            return None
