"""The sampling parameters of a request, and the properties of a sequence that sampling needs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arguments import flag, number, whole
from ..errors import RequestError, shown
from . import grammar as form
from .history import TokenHistory
from .matcher import Matcher

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 100
MAX_STOPS = 128  # strings; each is searched for after every token
MAX_STOP_LENGTH = 1024  # characters of a stop string, or of a salt
MAX_IDS = 2**18  # more than the vocabulary of any Qwen2.5 model
_NEUTRAL = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_GREEDY_BELOW = 1e-6  # smaller temperatures have the effect of 0 in float32


@dataclass(frozen=True)
class SamplingParams:
    """The sampling parameters of a request. ``None`` means the checkpoint's value (docs/generation.md), or else a
    neutral one.

    The next token is drawn after these steps, in this order: repetition, presence and frequency penalty, logit_bias,
    the grammar (json_schema, regex, choice or grammar), temperature, top_k, top_p, min_p. Raises RequestError for a
    value out of its range."""

    max_tokens: int | None = None  # None: the checkpoint's value, else up to an end id or a full context
    min_tokens: int = 0  # before this number of tokens, no end-of-text id or stop string ends the text
    temperature: float | None = None  # 0: greedy, the most likely token
    top_k: int | None = None  # only the k most likely tokens; 0: all
    top_p: float | None = None  # only the most likely tokens that together reach this probability
    min_p: float | None = None  # only tokens at least this fraction as likely as the most likely one
    repetition_penalty: float | None = None  # divides positive logits of tokens seen in prompt or output
    presence_penalty: float = 0.0  # subtracted from logits of tokens in the output
    frequency_penalty: float = 0.0  # the same, times how often they occur there
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id (also as text) -> added to its logit
    seed: int | None = None  # the same seed and prompt give the same text; None: a new one each time
    stop: str | Sequence[str] = ()  # the text ends before the first of these
    stop_token_ids: Sequence[int] = ()  # besides the model's own end-of-text ids
    ignore_eos: bool = False  # go on after end-of-text ids
    n: int = 1  # completions of each prompt
    logprobs: int | None = None  # log-probabilities of the chosen token, and of this many (0 or more) most likely ones
    skip_special_tokens: bool = True  # leave special tokens such as <|im_end|> out of the text
    priority: int = 0  # among waiting requests, one of higher priority starts first; docs/requests.md
    cache_salt: str | None = None  # only prompts with the same salt share cached pages; docs/requests.md
    # The constraint on the text: at most one of these; docs/structured-output.md
    json_schema: Any = None  # JSON of this schema: a dict, JSON text, a class of pydantic; True: any object
    regex: str | None = None  # a text that this expression matches as a whole
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | None = None  # a text of this grammar, in llguidance's Lark syntax

    def __post_init__(self) -> None:
        def put(name: str, check: Callable[..., Any], *limits: Any, **options: Any) -> None:
            object.__setattr__(self, name, check(name, getattr(self, name), *limits, **options))

        put("max_tokens", whole, 1, optional=True)
        put("min_tokens", whole, 0)
        put("temperature", number, 0.0, 100.0, optional=True)
        put("top_k", whole, 0, optional=True)
        put("top_p", number, 0.0, 1.0, optional=True, open_below=True)
        put("min_p", number, 0.0, 1.0, optional=True)
        put("repetition_penalty", number, 0.0, 100.0, optional=True, open_below=True)
        put("presence_penalty", number, -100.0, 100.0)
        put("frequency_penalty", number, -100.0, 100.0)
        put("logit_bias", _biases)
        put("seed", whole, -(2**63), 2**64 - 1, optional=True)
        put("stop", _stop_strings)
        put("stop_token_ids", _token_ids)
        put("ignore_eos", flag)
        put("n", whole, 1, MAX_COMPLETIONS)
        put("logprobs", whole, 0, MAX_LOGPROBS, optional=True)
        put("skip_special_tokens", flag)
        put("priority", whole, -1000, 1000)
        put("cache_salt", _salt)
        form.only_one_of({name: getattr(self, name) for name in form.KINDS})
        put("json_schema", form.json_schema)
        put("regex", form.expression)
        put("choice", form.choices)
        put("grammar", form.expression)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}; expected at most max_tokens, {self.max_tokens}")

    def with_defaults(self, sampling: Mapping[str, float]) -> SamplingParams:
        """Replaces None by the checkpoint's values (Generation.sampling), or else by neutral values."""
        defaults: dict[str, Any] = {**_NEUTRAL, **sampling}
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @cached_property
    def biases(self) -> tuple[Tensor, Tensor]:
        """The ids [N] int64 and the values [N] float32 of logit_bias. Made once, because N may be large."""
        ids = torch.tensor(list(self.logit_bias), dtype=torch.int64, device="cpu")
        return ids, torch.tensor(list(self.logit_bias.values()), dtype=torch.float32, device="cpu")

    @property
    def is_greedy(self) -> bool:
        return not self.temperature or self.temperature < _GREEDY_BELOW

    @property
    def changes_logits(self) -> bool:
        """Whether an operation changes the logits before the temperature does."""
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.repetition_penalty not in (None, 1.0)
        )


class SampledSequence(Protocol):
    """The properties of a sequence that sampling needs."""

    params: SamplingParams  # with all defaults filled in
    prompt_ids: list[int]
    output_ids: list[int]
    end_ids: frozenset[int]  # token ids that end the text
    history: TokenHistory  # of its tokens; empty at first
    matcher: Matcher | None  # of its grammar, if it has one

    def uniform(self) -> float:
        """The sequence's next random number, from 0 to BELOW_ONE. Each sequence has a generator of its own, so its text
        does not depend on the batch."""


def _stop_strings(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)):
        raise RequestError(f"{name} is {shown(value)}; expected a string, a list of strings or None")
    if len(strings) > MAX_STOPS:
        raise RequestError(f"{name} has {len(strings)} strings; expected {MAX_STOPS} at most")
    for text in strings:
        if not isinstance(text, str) or not text:
            raise RequestError(f"{name} contains {shown(text)}; expected non-empty strings")
        if len(text) > MAX_STOP_LENGTH:
            raise RequestError(f"{name} contains one of {len(text)} characters; expected {MAX_STOP_LENGTH} at most")
    return tuple(dict.fromkeys(strings))


def _salt(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not 0 < len(value) <= MAX_STOP_LENGTH):
        raise RequestError(f"{name} is {shown(value)}; expected a text of 1 to {MAX_STOP_LENGTH} characters, or None")
    return value


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise RequestError(f"{name} is {shown(value)}; expected a list of token ids or None")
    if isinstance(value, range):
        value = value[: MAX_IDS + 1]  # the length of a range may be too large for len()
    if len(value) > MAX_IDS:
        raise RequestError(f"{name} has {len(value)} ids or more; expected {MAX_IDS} at most")
    return tuple(whole(name, token, 0) for token in value)


def _biases(name: str, value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"{name} is {shown(value)}; expected a dict of token ids and numbers, or None")
    if len(value) > MAX_IDS:
        raise RequestError(f"{name} has {len(value)} ids; expected {MAX_IDS} at most")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_text = isinstance(key, str) and re.fullmatch("[0-9]{1,18}", key)  # keys of JSON objects are strings
        token = whole(f"{name}'s token id", int(key) if is_text else key, 0)
        if token in biases:
            raise RequestError(f"{name} has token id {token} twice; expected it once")
        biases[token] = number(f"{name}[{token}]", bias, -math.inf, 1000.0)
    return biases
