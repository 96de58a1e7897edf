"""Scores prompts: the log-probability of each token of a prompt, given the tokens before it."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack

import torch
from torch import Tensor

from ..engine import Request
from ..errors import NonFiniteError
from ..Model import Model
from ..sampling import SamplingParams, TokenLogprob
from ..sampling.logprobs import packed, unpacked
from .answering import running
from .service import Service


class _Scored:
    """A prompt, and the log-probabilities of its tokens but the first. The thread of the engine adds them."""

    def __init__(self, ids: list[int], top: int, salt: str | None) -> None:
        self.logprobs: list[TokenLogprob] = []
        self._top = top
        self.request = Request(ids, SamplingParams(cache_salt=salt), frozenset(), max_tokens=0)
        self.request.on_logits = torch.inference_mode()(self._take)

    def _take(self, logits: Tensor) -> None:
        """Takes the next rows of logits [R, V]. The row of the prompt's last token scores no token of the prompt."""
        done = len(self.logprobs)
        targets = self.request.prompt_ids[done + 1 :][: len(logits)]
        if not targets:
            return
        logprobs = logits[: len(targets)].log_softmax(-1)
        top = min(self._top, logprobs.shape[-1])
        rows = torch.cat(packed(logprobs, torch.tensor(targets, device=logits.device), max(1, top)), -1).tolist()
        self.logprobs += [unpacked(token, row, top) for token, row in zip(targets, rows, strict=True)]


async def prompt_logprobs(
    service: Service, model: Model, prompts: list[list[int]], top: int, salt: str | None = None
) -> list[list[TokenLogprob]]:
    """For each prompt, the log-probabilities of its tokens but the first, each with those of the ``top`` most likely
    tokens. salt: as SamplingParams.cache_salt.

    Raises ApiError as `running`, and NonFiniteError."""
    scored = [_Scored(ids, top, salt) for ids in prompts]

    def checked() -> list[Request]:
        for ids in prompts:
            model._prompts.check(ids)
        return [each.request for each in scored]

    async with AsyncExitStack() as stack:
        take = await stack.enter_async_context(running(service, model, lambda: service.in_pool(checked)))
        while await take():
            pass
    for index, each in enumerate(scored):
        for position, logprob in enumerate(each.logprobs):
            if not math.isfinite(logprob.logprob):
                raise NonFiniteError.at(position, model.dtype, f"prompt {index}")
    return [each.logprobs for each in scored]
