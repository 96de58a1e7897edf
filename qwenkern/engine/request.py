"""A request: one completion of a prompt, with its parameters and its output so far."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..cache import BlockTable
from ..errors import Error
from ..sampling import BELOW_ONE, Matcher, SamplingParams, TokenHistory, TokenLogprob
from ..text.detokenizer import Detokenizer
from .stop_strings import StopStrings

if TYPE_CHECKING:
    from .speculation import State


@dataclass(eq=False)
class Request:
    """One completion of a prompt. With ``on_logits``, the logits after each token of the prompt instead.

    Only the thread that steps the engine changes it, except for ``aborted``."""

    prompt_ids: list[int]
    params: SamplingParams  # with all defaults filled in
    end_ids: frozenset[int]  # token ids that end the text
    max_tokens: int
    detokenizer: Detokenizer | None = None  # None: token ids only
    matcher: Matcher | None = None  # of params' grammar, if there is one
    prompt_index: int = 0
    sample_index: int = 0
    siblings: list[Request] = field(default_factory=list)  # other completions of the same prompt, not started yet
    is_streamed: bool = False  # whether the caller reads the text while it is generated
    # The engine's thread calls this with the next rows of the prompt's logits, float32 [<= 64, V]; no token is drawn.
    on_logits: Callable[[Tensor], None] | None = None

    def __post_init__(self) -> None:
        self.table = BlockTable(self.params.cache_salt or "")
        self.arrived = 0.0  # time.monotonic() when it was added to an engine, or earlier if the caller says so
        self.has_started = False  # whether it has ever had pages
        self.last_token_at = 0.0  # time.monotonic() of its latest token; 0: it has none
        self.num_found = 0  # tokens of the prompt that the cache still had when the request started
        self.num_scored = 0  # tokens of the prompt whose logits on_logits has been given
        self.output_ids: list[int] = []
        self.history = TokenHistory()
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: str | None = None  # "stop" or "length"
        self.stop_reason: int | str | None = None  # the token id or stop string that ended the text
        self.aborted = False
        self.error: Error | None = None  # the error that ended the request
        self.speculated: State | None = None  # the state of speculative decoding
        self._stops = StopStrings(self.params.stop)
        seed = self.params.seed
        self._random = random.Random() if seed is None else random.Random(f"{seed}/{self.sample_index}")

    @property
    def has_ended(self) -> bool:
        return self.aborted or self.finish_reason is not None or self.error is not None

    @property
    def num_cached(self) -> int:
        return self.table.length

    @property
    def num_pending(self) -> int:
        """The number of tokens of the prompt and the output that are not in the cache yet."""
        return len(self.prompt_ids) + len(self.output_ids) - self.table.length

    def pending_ids(self, count: int) -> list[int]:
        """The next ``count`` pending tokens, or all if there are fewer."""
        cached, prompt = self.table.length, len(self.prompt_ids)
        if cached >= prompt:
            return self.output_ids[cached - prompt : cached - prompt + count]
        return self.prompt_ids[cached : cached + count] + self.output_ids[: max(0, cached + count - prompt)]

    def uniform(self) -> float:
        return min(self._random.random(), BELOW_ONE)

    def accept(self, token: TokenLogprob | int) -> str:
        """Appends a token. Returns the text that no later token can change. Sets finish_reason if it was the last
        token."""
        if isinstance(token, TokenLogprob):
            self.logprobs.append(token)
            token = token.token_id
        self.output_ids.append(token)
        if token in self.end_ids and len(self.output_ids) >= self.params.min_tokens:
            self.finish_reason, self.stop_reason = "stop", token
            return self._emit("", last=True)
        text = self.detokenizer.add(token) if self.detokenizer else ""
        if self.matcher:
            self.matcher.accept(token)
        if self.matcher and self.matcher.has_ended:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.max_tokens:
            self.finish_reason = "length"
        return self._emit(text, last=self.finish_reason is not None)

    def _emit(self, text: str, last: bool) -> str:
        if last and self.detokenizer:
            text += self.detokenizer.finish()
        if len(self.output_ids) >= self.params.min_tokens:
            text = self._stops.add(text)
        if self._stops.found is not None:
            self.finish_reason, self.stop_reason = "stop", self._stops.found
        elif last:
            text += self._stops.finish()
        self.text += text
        return text


def with_siblings(requests: Iterable[Request]) -> list[Request]:
    """The requests, each with the completions of its prompt that have not started."""
    return [each for request in requests for each in (request, *request.siblings)]
