"""Counts the tokens of a turn, as OpenAI's APIs report them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .answering import Answer
from .turns import Finished, Turn


@dataclass
class Usage:
    """The tokens of a turn. A prompt counts once, however many answers it has."""

    prompt: int = 0
    cached: int = 0  # of the prompts
    completion: int = 0

    @classmethod
    def of(cls, answers: Iterable[Answer], turn: Turn) -> Usage:
        usage = cls()
        for answer in answers:
            usage.add(answer.finished, turn)
        return usage

    def add(self, finished: Finished, turn: Turn) -> None:
        """Adds an answer that has ended."""
        self.completion += finished.num_tokens
        if finished.index % turn.params.n == 0:
            self.prompt += finished.num_prompt_tokens
            self.cached += finished.num_cached_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
