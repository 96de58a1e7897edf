"""The different tokens of a sequence, and their numbers, for penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


class TokenHistory:
    """The different tokens of one sequence's prompt and output, and how often each one is in the output.

    >>> history = TokenHistory()
    >>> ids, counts = history.of(prompt_ids, output_ids)  # later calls look at new tokens of the output only
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # token id -> its place in the tensors
        self._ids = torch.empty(0, dtype=torch.int64, device="cpu")
        self._counts = torch.empty(0, dtype=torch.float32, device="cpu")
        self._looked_at = -1  # number of tokens of the output; -1: not even the prompt

    def of(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The different token ids of both [N] int64, and how often each is in the output [N] float32. Both are valid
        until the next call. Between two calls the prompt stays the same and the output only grows."""
        if self._looked_at < 0:
            self._looked_at = 0
            self._add(dict.fromkeys(prompt_ids, 0))
        if self._looked_at < len(output_ids):
            self._add(Counter(output_ids[self._looked_at :]))
            self._looked_at = len(output_ids)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]

    def _add(self, counts: dict[int, int]) -> None:
        start = len(self._places)
        fresh = [token for token in counts if token not in self._places]
        self._places.update(zip(fresh, range(start, start + len(fresh)), strict=True))
        if len(self._places) > len(self._ids):
            room = max(256, 2 * len(self._places))
            self._ids, self._counts = (
                torch.cat([each[:start], each.new_zeros(room - start)]) for each in (self._ids, self._counts)
            )
        self._ids[start : len(self._places)] = torch.tensor(fresh, dtype=torch.int64, device="cpu")
        places = torch.tensor([self._places[token] for token in counts], dtype=torch.int64, device="cpu")
        self._counts[places] += torch.tensor(list(counts.values()), dtype=torch.float32, device="cpu")
