"""A stand-in for a sequence, with the fields that sampling needs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from qwenkern import SamplingParams
from qwenkern.sampling import Matcher, TokenHistory


@dataclass(eq=False)
class FakeRow:
    params: SamplingParams
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    end_ids: frozenset[int] = frozenset()
    seed: int = 0
    matcher: Matcher | None = None

    def __post_init__(self) -> None:
        self.history = TokenHistory()
        self.params = self.params.with_defaults({"temperature": 1.0})
        self._random = random.Random(self.seed)

    def uniform(self) -> float:
        return self._random.random()
