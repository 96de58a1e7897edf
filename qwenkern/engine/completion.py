"""The results of a model's calls: completions, streams of text, scores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..sampling import TokenLogprob
from .engine import Output
from .loop import AsyncCall, Call
from .request import Request


@dataclass(frozen=True)
class Completion:
    """The text that the model generated after a prompt."""

    text: str
    token_ids: list[int]  # includes the id that ended the text
    finish_reason: str | None  # "stop": an end id or stop string; "length": max_tokens or the context; None: not ended
    stop_reason: int | str | None  # the token id or stop string that ended the text
    logprobs: list[TokenLogprob] | None  # one for each token, if requested
    num_prompt_tokens: int
    prompt_index: int = 0  # the index of the prompt in the list
    sample_index: int = 0  # the index among the prompt's n completions
    num_cached_tokens: int = 0  # tokens of the prompt that were still in the cache, and not computed again

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @classmethod
    def of(cls, request: Request) -> Completion:
        return cls(
            text=request.text,
            token_ids=list(request.output_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=None if request.params.logprobs is None else list(request.logprobs),
            num_prompt_tokens=len(request.prompt_ids),
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            num_cached_tokens=request.num_found,
        )


class _Pieces:
    """The part of a text that a caller has read so far."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._text: list[str] = []
        self._ids: list[int] = []
        self._finish_reason: str | None = None

    @property
    def completion(self) -> Completion:
        """The completion as far as it has been read."""
        whole = Completion.of(self._request)
        if self._finish_reason:
            return whole
        logprobs = None if whole.logprobs is None else whole.logprobs[: len(self._ids)]
        return replace(
            whole,
            text="".join(self._text),
            token_ids=list(self._ids),
            logprobs=logprobs,
            finish_reason=None,
            stop_reason=None,
        )

    def _take(self, output: Output) -> str:
        self._text.append(output.text)
        self._ids += output.token_ids
        self._finish_reason = output.finish_reason
        return output.text


class Stream(_Pieces):
    """Text as it is generated. Iterate over the pieces, then read ``completion``. ``close`` stops the generation.

    The engine generates the text up to its end, even if the caller does not read it. A stream without references is
    closed."""

    def __init__(self, call: Call, request: Request) -> None:
        super().__init__(request)
        self._call = call

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        for output in self._call:
            if text := self._take(output):
                return text
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the generation. ``completion`` keeps the text that was read. If another thread is reading, its
        iteration ends."""
        self._call.close()


class AsyncStream(_Pieces):
    """A Stream for coroutines: ``async for`` over the pieces."""

    def __init__(self, call: AsyncCall, request: Request) -> None:
        super().__init__(request)
        self._call = call

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        async for output in self._call:
            if text := self._take(output):
                return text
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the generation. ``completion`` keeps the text that was read."""
        self._call.close()


@dataclass(frozen=True)
class Score:
    """The natural log-probability of each token of a text, given the tokens before it."""

    token_ids: list[int]
    logprobs: list[float]  # of token_ids[1:]; the first token has none before it

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-probability. None for a text of one token."""
        if not self.logprobs:
            return None
        return torch.tensor(self.logprobs, dtype=torch.float64, device="cpu").mean().neg().exp().item()
