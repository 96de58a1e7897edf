"""Tokens with their log-probabilities, in the forms of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..Model import Model
from ..sampling import TokenLogprob


def token_text(model: Model, token_id: int) -> tuple[str, list[int]]:
    """A token as text and as bytes. A part of a character is spelled as OpenAI does: bytes:\\xe4\\xbd."""
    raw = model.tokenizer.token_bytes(token_id) if model.tokenizer else b""
    try:
        return raw.decode(), list(raw)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def chat_logprobs(logprobs: Sequence[TokenLogprob], model: Model) -> dict[str, Any]:
    """For /v1/chat/completions."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text, raw = token_text(model, token_id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": raw}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top.items()]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}
