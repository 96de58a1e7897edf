"""Tokens with their log-probabilities, in the formats of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..Model import Model
from ..sampling import TokenLogprob
from ..text.detokenizer import Detokenizer

LEAST = -9999.0  # in place of -inf, which JSON cannot hold


def token_text(model: Model, token_id: int) -> tuple[str, list[int]]:
    """A token as text and as its bytes. The text of an incomplete character is like OpenAI's: bytes:\\xe4\\xbd."""
    return _as_text(model.tokenizer.token_bytes(token_id) if model.tokenizer else b"")


@lru_cache(maxsize=2**12)  # the most likely tokens come again and again
def _as_text(raw: bytes) -> tuple[str, list[int]]:
    try:
        return raw.decode(), list(raw)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def chat_logprobs(logprobs: Sequence[TokenLogprob], model: Model) -> dict[str, Any]:
    """The log-probabilities of a choice of /v1/chat/completions."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(model, token_id)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": raw}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top.items()]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The log-probabilities of a choice of /v1/completions: lists with an item for each token of an answer or a prompt.

    Call ``of`` for the tokens of each chunk. ``text_offset`` is the place where the text of a token begins. A token
    that completes a character begins where the character begins. begin: the length of the echo before the answer."""

    def __init__(self, model: Model, skip_special: bool, begin: int = 0) -> None:
        self._model = model
        self._detokenizer = Detokenizer(model.tokenizer, skip_special=skip_special) if model.tokenizer else None
        self._length = begin  # characters of the text so far, with the echo

    def first(self, token_id: int) -> dict[str, Any]:
        """The lists for the first token of a prompt, which has no log-probability."""
        text, offset = token_text(self._model, token_id)[0], self._advance(token_id)
        return {"tokens": [text], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [offset]}

    def of(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The lists for the next tokens."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in logprobs:
            text, logprob = token_text(self._model, each.token_id)[0], max(each.logprob, LEAST)
            top: dict[str, float] = {}
            for token_id, value in each.top.items():
                top.setdefault(token_text(self._model, token_id)[0], max(value, LEAST))
            top.setdefault(text, logprob)
            found["tokens"].append(text)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(top)
            found["text_offset"].append(self._advance(each.token_id))
        return found

    def _advance(self, token_id: int) -> int:
        before = self._length
        if self._detokenizer:
            self._length += len(self._detokenizer.add(token_id))
        return before
