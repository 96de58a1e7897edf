"""Counts the tokens of a turn, for the `usage` of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .answering import Answer
from .turns import Finished, Turn


@dataclass
class Usage:
    """The numbers of tokens of a turn. A prompt with several answers counts once."""

    prompt: int = 0
    cached: int = 0  # tokens of the prompts that the cache had
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
