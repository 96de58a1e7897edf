"""How the next token is chosen from the logits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..arguments import flag, number, whole
from ..errors import RequestError, shown

MAX_COMPLETIONS = 128
MAX_LOGPROBS = 100
MAX_STOPS = 128  # strings, all of which are looked for at every token
MAX_STOP_LENGTH = 1024  # characters
MAX_IDS = 2**18  # more than a vocabulary of the family has
FEW = 64  # tokens to choose from, where no row of a batch wants more: cheaper than to sort the vocabulary
BELOW_ONE = 1 - 2**-24  # in float32: a number closer to 1 would become 1, and draw what top_k or top_p ruled out
NOT_FINITE = -1  # in place of a token id where a row of logits has NaN or infinity on top
_NEUTRAL = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_GREEDY_BELOW = 1e-6  # a temperature so small cannot be told from 0 in float32


@dataclass(frozen=True)
class SamplingParams:
    """What a caller asks of the text. ``None`` means: as the checkpoint says (docs/generation.md), else neutral.

    The next token is drawn after these steps, in this order: repetition, presence and frequency penalty, logit_bias,
    temperature, top_k, top_p, min_p. Raises RequestError for a value out of its range."""

    max_tokens: int | None = None  # None: as the checkpoint says, else until the model's end or a full context
    min_tokens: int = 0  # before so many, neither an end-of-text id nor a stop string ends the text
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
    logprobs: int | None = None  # log-probabilities of the chosen token (0) and of so many likeliest ones
    skip_special_tokens: bool = True  # leave <|im_end|> and its like out of the text

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
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}; expected at most max_tokens, {self.max_tokens}")

    def with_defaults(self, sampling: Mapping[str, float]) -> SamplingParams:
        """Fills what is None from the checkpoint's values (Generation.sampling), else with what changes nothing."""
        defaults = _NEUTRAL | sampling
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def is_greedy(self) -> bool:
        return not self.temperature or self.temperature < _GREEDY_BELOW

    @property
    def needs_host(self) -> bool:
        """Whether choosing a token takes more than the logits and `draw`."""
        return self.changes_logits or self.logprobs is not None

    @property
    def changes_logits(self) -> bool:
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.min_tokens
            or self.repetition_penalty not in (None, 1.0)
        )


@dataclass(frozen=True)
class TokenLogprob:
    """The model's own natural log-probabilities of a token and the likeliest ones, before temperature and penalties."""

    token_id: int
    logprob: float
    top: dict[int, float]  # token id -> log-probability, likeliest first


class Row(Protocol):
    """What sampling must know of a sequence."""

    params: SamplingParams  # with defaults filled
    prompt_ids: list[int]
    output_ids: list[int]
    end_ids: frozenset[int]  # ids that end the text

    def uniform(self) -> float:
        """The sequence's next random number, from 0 to BELOW_ONE: its own, so that its text does not depend on its
        batch."""


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[Row]) -> list[TokenLogprob | int]:
    """The next token of each row of logits [R, V] (float32, may be overwritten): an id, or a TokenLogprob where the
    row asks for log-probabilities, or NOT_FINITE.

    Raises RequestError where a row's biases and penalties leave no token to draw."""
    finite = [math.isfinite(top) for top in logits.amax(-1).tolist()]  # a maximum is NaN where anything is
    logprobs = _logprobs(logits, rows)
    changed = [index for index, row in enumerate(rows) if row.params.changes_logits and finite[index]]
    for index in changed:
        _penalise(logits[index], rows[index])
    if changed:
        _check_choice(logits, rows, changed)
    width = draw_width(rows, logits.shape[-1])
    is_greedy = [row.params.is_greedy for row in rows]
    settings = None
    if width > 1:
        numbers = [0.0 if greedy else row.uniform() for greedy, row in zip(is_greedy, rows, strict=True)]
        settings = Settings(*(torch.tensor(values, **_like(logits)) for values in (Settings.of(rows), numbers)))
    tokens: list[TokenLogprob | int] = draw(logits, settings, width, any(is_greedy)).tolist()
    for index, of in enumerate(logprobs):
        if not finite[index]:
            tokens[index] = NOT_FINITE
        elif of is not None:
            tokens[index] = _with_logprobs(of, tokens[index])
    return tokens


def _check_choice(logits: Tensor, rows: Sequence[Row], changed: list[int]) -> None:
    """RequestError where what a row asks for makes all of its logits -inf, or one of them NaN or +inf."""
    for index, top in zip(changed, logits[changed].amax(-1).tolist(), strict=True):
        if math.isfinite(top):
            continue
        params = rows[index].params
        if top == -math.inf:
            is_early = len(rows[index].output_ids) < params.min_tokens
            by = " and ".join(["logit_bias"] * bool(params.logit_bias) + ["min_tokens"] * is_early)
            raise RequestError(f"every token is forbidden by {by}; expected at least one that may be drawn")
        raise RequestError(
            f"repetition_penalty {params.repetition_penalty} makes a logit {top}; expected a value that keeps it finite"
        )


def _penalise(row: Tensor, sequence: Row) -> None:
    """Penalties, biases and forbidden ends, in place, on one row of logits [V]."""
    params = sequence.params
    if params.repetition_penalty != 1.0:
        seen = _ids(set(sequence.prompt_ids) | set(sequence.output_ids), row)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sequence.output_ids)
        often = torch.tensor(list(counts.values()), **_like(row))
        row[_ids(counts, row)] -= params.presence_penalty + params.frequency_penalty * often
    if params.logit_bias:
        row[_ids(params.logit_bias, row)] += torch.tensor(list(params.logit_bias.values()), **_like(row))
    if len(sequence.output_ids) < params.min_tokens:
        row[_ids(sequence.end_ids, row)] = -math.inf


@dataclass(frozen=True)
class Settings:
    """How each of R rows draws its token, as tensors."""

    values: Tensor  # [4, R] float32: temperature (0: greedy), top_k, top_p, min_p
    uniforms: Tensor  # [R] float32: a random number in [0, 1)

    @staticmethod
    def neutral(size: int, device: torch.device) -> Settings:
        """Greedy rows."""
        return Settings(*(torch.zeros(*shape, size, dtype=torch.float32, device=device) for shape in ((4,), ())))

    @staticmethod
    def of(rows: Sequence[Row]) -> list[list[float]]:
        """The values of some rows."""
        columns = [
            (
                0.0 if params.is_greedy else params.temperature,
                min(params.top_k, 2**31) or math.inf,
                params.top_p if params.top_p < 1 else math.inf,
                params.min_p,
            )
            for params in (row.params for row in rows)
        ]
        return [list(values) for values in zip(*columns, strict=True)]


def draw_width(rows: Sequence[Row], vocabulary: int) -> int:
    """How many of the likeliest tokens the rows choose from: 1, FEW or all."""
    largest = max(1 if row.params.is_greedy else row.params.top_k or vocabulary for row in rows)
    return next((width for width in (1, FEW) if largest <= width), vocabulary)


def or_not_finite(ids: Tensor, largest: Tensor) -> Tensor:
    """Token ids [R], and NOT_FINITE where the largest logit of the row [R] is NaN or infinite."""
    return torch.where(largest.abs() < math.inf, ids, NOT_FINITE)


def draw(logits: Tensor, settings: Settings | None, width: int, some_greedy: bool = True) -> Tensor:
    """One token id [R] a row of logits [R, V] among its ``width`` likeliest, by inverting the cumulative distribution
    at the row's random number; with width 1 it takes no settings. Nothing waits for a device, so it can be captured in
    a CUDA graph. A row that is not finite gets some id."""
    if width == 1:
        return logits.argmax(-1)
    temperature, top_k, top_p, min_p = settings.values[..., None]
    few = width < logits.shape[-1]
    values, ids = logits.topk(width) if few else logits.sort(-1, descending=True)
    # likeliest first, so the first column is the maximum: subtracted before dividing, nothing overflows
    values = (values - values[:, :1]) / torch.where(temperature > 0, temperature, 1.0)
    ranks = torch.arange(values.shape[-1], device=logits.device)
    probabilities = values.masked_fill(ranks >= top_k, -math.inf).softmax(-1)
    before = probabilities.double().cumsum(-1) - probabilities
    dropped = (before >= top_p) | (probabilities < probabilities[:, :1] * min_p)
    dropped &= ranks > 0
    cumulative = probabilities.masked_fill(dropped, 0.0).double().cumsum(-1)
    target = settings.uniforms.double()[:, None] * cumulative[:, -1:]
    chosen = (cumulative <= target).sum(-1, keepdim=True)
    drawn = ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1)).squeeze(-1)
    return torch.where(temperature[:, 0] > 0, drawn, logits.argmax(-1)) if some_greedy else drawn


def _logprobs(logits: Tensor, rows: Sequence[Row]) -> list[tuple[Tensor, int] | None]:
    """Log-probabilities of the rows that ask for them, and how many each wants; before anything changes the logits."""
    wanted = [row.params.logprobs for row in rows]
    return [None if k is None else (logits[index].log_softmax(-1), k) for index, k in enumerate(wanted)]


def _with_logprobs(of: tuple[Tensor, int], token: int) -> TokenLogprob:
    logprobs, k = of
    values, ids = logprobs.topk(min(k, len(logprobs)))
    return TokenLogprob(token, logprobs[token].item(), dict(zip(ids.tolist(), values.tolist(), strict=True)))


def _like(logits: Tensor) -> dict[str, Any]:
    """For torch.tensor, which would follow torch's default dtype and device."""
    return {"dtype": logits.dtype, "device": logits.device}


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)


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
