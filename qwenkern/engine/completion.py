"""The results of a model's calls: completions, streams of text, scores."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from ..errors import RequestError
from ..sampling import TokenLogprob
from .engine import Output
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
        )


class Stream:
    """Text as it is generated. Iterate over the pieces, then read ``completion``. ``close`` stops the generation.

    An open stream that is not read keeps its pages of the key-value cache until another call needs them. When it is
    read again, its tokens are computed again as soon as there is room."""

    def __init__(self, outputs: Generator[Output, None, None], request: Request) -> None:
        self._outputs = outputs
        self._request = request

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            for output in self._outputs:
                if self._request.aborted:  # another thread closed the stream during this step
                    self._outputs.close()
                elif output.text:
                    return output.text
        except ValueError as error:
            if not _is_being_read(error):
                raise
            raise RequestError("another thread is reading this stream; expected one reader at a time") from None
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the generation. The text so far stays in ``completion``. If another thread is reading, its iteration
        ends after the step in progress; if that thread waits for room in the cache, it ends shortly after."""
        self._request.aborted = True
        try:
            self._outputs.close()
        except ValueError as error:
            if not _is_being_read(error):
                raise

    @property
    def completion(self) -> Completion:
        """The completion so far."""
        return Completion.of(self._request)


def _is_being_read(error: ValueError) -> bool:
    return error.args == ("generator already executing",)


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
