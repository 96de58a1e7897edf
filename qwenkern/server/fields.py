"""The fields that /v1/chat/completions and /v1/completions share, and how they become SamplingParams."""

from __future__ import annotations

from typing import Any, Literal

from ..errors import RequestError
from ..sampling import SamplingParams
from . import errors
from .bodies import Body, Some
from .errors import ApiError
from .functions import Functions
from .settings import Bounds
from .structured import Structured

_TAKEN = (  # fields that have the same name in SamplingParams
    "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "n", "skip_special_tokens",
    "priority", "cache_salt",
)  # fmt: skip


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # the server adds no padding


class Sampled(Structured):
    """A body with the fields that control how tokens are drawn."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Some[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # for the log
    # not OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Some[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None

    def sampling(self, bounds: Bounds, functions: Functions | None = None, **more: Any) -> SamplingParams:
        """The SamplingParams of the request. more: further fields of SamplingParams. Raises ApiError, which names the
        field of the body."""
        given = {name: value for name in _TAKEN if (value := getattr(self, name)) is not None}
        if self.stream_options and not self.stream:
            raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
        if (n := given.get("n", 1)) > bounds.n:
            raise ApiError(400, f"n is {n}; expected at most {bounds.n}", param="n", code="invalid_value")
        if isinstance(self.stop, list) and len(self.stop) > bounds.stops:
            message = f"stop has {len(self.stop)} strings; expected at most {bounds.stops}"
            raise ApiError(400, message, param="stop", code="invalid_value")
        given |= {name: value for name, value in more.items() if value is not None}
        form = functions.forms(self.form(), self.names()) if functions else self.form()
        try:
            return SamplingParams(**given, **form)
        except RequestError as error:
            raise errors.of(error, self.names()) from None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)
