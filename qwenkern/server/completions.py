"""POST /v1/completions: continues texts and token ids, echoes and scores them on request, and fills in code."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import RequestError
from ..Model import Model
from ..sampling import TokenLogprob
from ..text.tokenizer import Tokenizer
from . import answering, scoring, sse
from .admission import check_length
from .answering import Answer
from .bodies import Some
from .endpoints import Endpoint
from .errors import ApiError
from .fields import Sampled
from .service import Service
from .settings import Bounds
from .tokens_as_text import CompletionLogprobs
from .turns import Finished, Started, Text, Turn
from .usage import Usage

DEFAULT_TOKENS = 16  # max_tokens where it is absent, as in OpenAI's API
_FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


class CompletionBody(Sampled):
    """The body of a request."""

    prompt: str | Some[str] | Some[int] | Some[list[int]]
    max_tokens: int | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    return_token_ids: bool | None = None  # a field of vLLM: each choice also has the ids of its tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def is_scored(self) -> bool:
        """Whether the client also requests the log-probabilities of the prompts."""
        return bool(self.echo) and self.logprobs is not None

    def turn(self, bounds: Bounds) -> Turn:
        """The turn that the body asks for, without `suffix` and `echo`. Raises ApiError."""
        if not 0 < len(self.prompts) <= bounds.prompts:
            raise _wrong("prompt", f"prompt has {len(self.prompts)} prompts; expected 1 to {bounds.prompts}")
        if self.best_of not in (None, self.n or 1):
            raise _wrong(
                "best_of", f"best_of is {self.best_of}; expected n, {self.n or 1}: this server ranks no answers"
            )
        if (self.logprobs or 0) > bounds.top_logprobs:
            raise _wrong("logprobs", f"logprobs is {self.logprobs}; expected at most {bounds.top_logprobs}")
        if self.echo and self.suffix is not None:
            raise _wrong("suffix", "suffix goes with a prompt that is not echoed; expected echo: false")
        max_tokens = DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens
        if self.echo and not max_tokens:
            max_tokens = 1  # valid for SamplingParams; nothing is drawn
        params = self.sampling(bounds, max_tokens=max_tokens, logprobs=self.logprobs)
        if len(self.prompts) * params.n > bounds.answers:
            raise _wrong(
                "n", f"{len(self.prompts)} prompts and n = {params.n}; expected at most {bounds.answers} answers"
            )
        return Turn(list(self.prompts), params, is_streamed=bool(self.stream))


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


@dataclass
class _Prompt:
    """A prompt as token ids, and its echo."""

    ids: list[int]
    text: str = ""
    logprobs: list[TokenLogprob] | None = None  # of ids[1:]


def _prepared(model: Model, body: CompletionBody) -> list[_Prompt]:
    """The prompts as token ids. Raises RequestError."""
    prompts, found = model._prompts, []
    for prompt in body.prompts:
        suffix = body.suffix
        check_length(model, prompt, suffix or "")
        ids = prompts.encode(prompt) if suffix is None else _to_fill_in(model.tokenizer, prompt, suffix)
        prompts.check(ids)
        text = ""
        if body.echo:
            text = prompt if isinstance(prompt, str) else _text(model, ids)
        found.append(_Prompt(ids, text))
    return found


def _text(model: Model, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special=False) if model.tokenizer else ""


def _to_fill_in(tokenizer: Tokenizer | None, prompt: str | list[int], suffix: str) -> list[int]:
    """The prompt that makes a Coder model write the code between a prefix and a suffix (fill in the middle)."""
    marks = [tokenizer.id_of(mark) for mark in _FIM] if tokenizer else [None]
    if tokenizer is None or None in marks:
        raise RequestError(f"suffix needs a model with the tokens {', '.join(_FIM)}; expected one of Qwen2.5-Coder")
    before, after, middle = (mark for mark in marks if mark is not None)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return [*tokenizer.beginning_ids, before, *ids, after, *tokenizer.encode(suffix), middle]


async def create(service: Service, request: Request, body: CompletionBody) -> Response:
    """Continues texts or token ids. With `suffix`, a Coder model fills in code between prompt and suffix."""
    turn = await service.in_pool(body.turn, service.settings.bounds)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model or service.models.names[0],
    }
    if body.stream:
        return await sse.stream(_chunks(service, body, turn, head), sse.openai_error)
    async with service.models.use(body.model) as model:
        prompts, turn = await _read(service, model, body, turn)
        answers = await _answers(service, model, body, turn, prompts)

        def response() -> Response:
            choices = [_choice(answer, model, body, turn, prompts) for answer in answers]
            return JSONResponse(head | {"choices": choices, "usage": Usage.of(answers, turn).body()})

        return await service.in_pool(response)  # in a thread: prompts may have many log-probabilities


async def _read(service: Service, model: Model, body: CompletionBody, turn: Turn) -> tuple[list[_Prompt], Turn]:
    """The prompts as token ids, scored on request, and the turn with these ids. Without echo and suffix: no prompts,
    and the same turn."""
    if not body.echo and body.suffix is None:
        return [], turn
    prompts = await service.aside(_prepared, model, body)
    ids = [prompt.ids for prompt in prompts]
    if body.is_scored:
        most = service.settings.bounds.scored_tokens
        if (count := sum(map(len, ids)) * turn.params.n) > most:  # each answer echoes its prompt
            raise _wrong("prompt", f"the prompts to echo have {count} tokens; expected at most {most} in a request")
        top, salt = body.logprobs or 0, turn.params.cache_salt
        for prompt, logprobs in zip(
            prompts, await scoring.prompt_logprobs(service, model, ids, top, salt), strict=True
        ):
            prompt.logprobs = logprobs
    return prompts, Turn(list(ids), turn.params, is_streamed=turn.is_streamed)


async def _answers(
    service: Service, model: Model, body: CompletionBody, turn: Turn, prompts: list[_Prompt]
) -> list[Answer]:
    if not body.echo or body.max_tokens != 0:
        return await answering.answers(service, model, turn)
    n = turn.params.n
    return [
        Answer(index, [], [], [], Finished(index, "length", None, len(prompts[index // n].ids), 0, 0))
        for index in range(n * len(prompts))
    ]


def _echo(model: Model, prompt: _Prompt) -> dict[str, Any] | None:
    """The log-probabilities of an echoed prompt. Its text has its special tokens."""
    if prompt.logprobs is None:
        return None
    writing = CompletionLogprobs(model, skip_special=False)
    return _joined(writing.first(prompt.ids[0]), writing.of(prompt.logprobs))


def _joined(*parts: dict[str, Any]) -> dict[str, Any]:
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


def _choice(answer: Answer, model: Model, body: CompletionBody, turn: Turn, prompts: list[_Prompt]) -> dict[str, Any]:
    echoed, logprobs = "", None
    if body.echo:
        prompt = prompts[answer.index // turn.params.n]
        echoed, logprobs = prompt.text, _echo(model, prompt)
    text = echoed + answer.text
    if body.logprobs is not None:
        own = CompletionLogprobs(model, turn.params.skip_special_tokens, len(echoed)).of(answer.logprobs)
        logprobs = _joined(logprobs, own) if logprobs else own
    choice = {"index": answer.index, "text": text, "logprobs": logprobs, "finish_reason": answer.finished.reason}
    return choice | ({"token_ids": answer.token_ids} if body.return_token_ids else {})


async def _chunks(
    service: Service, body: CompletionBody, turn: Turn, head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    start = "data: " + json.dumps(head)[:-1]
    usage, tail = Usage(), ', "usage": null}\n\n' if body.include_usage else "}\n\n"

    def chunk(
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        token_ids: Sequence[int] = (),
    ) -> bytes:
        ids = f', "token_ids": {list(token_ids)}' if body.return_token_ids else ""
        return (
            f'{start}, "choices": [{{"index": {index}, "text": {json.dumps(text)}, "logprobs": '
            f'{json.dumps(logprobs) if logprobs else "null"}, "finish_reason": {json.dumps(reason)}{ids}}}]{tail}'
        ).encode()

    async with service.models.use(body.model) as model:
        prompts, turn = await _read(service, model, body, turn)
        n, skip_special = turn.params.n, turn.params.skip_special_tokens
        echoed = [len(prompt.text) for prompt in prompts] or [0] * len(body.prompts)
        writing = [CompletionLogprobs(model, skip_special, begin) for begin in echoed for _ in range(n)]
        if body.echo and body.max_tokens == 0:
            for answer in await _answers(service, model, body, turn, prompts):
                prompt = prompts[answer.index // n]
                yield chunk(answer.index, prompt.text, _echo(model, prompt))
                yield chunk(answer.index, "", None, answer.finished.reason)
                usage.add(answer.finished, turn)
        else:
            async with aclosing(answering.events(service, model, turn)) as events:
                async for event in events:
                    index = event.index
                    if isinstance(event, Text):
                        if event.text or event.logprobs or body.return_token_ids:
                            logprobs = writing[index].of(event.logprobs) if event.logprobs else None
                            yield chunk(index, event.text, logprobs, token_ids=event.token_ids)
                    elif isinstance(event, Started) and body.echo:
                        prompt = prompts[index // n]
                        yield chunk(index, prompt.text, _echo(model, prompt))
                    elif isinstance(event, Finished):
                        usage.add(event, turn)
                        yield chunk(index, "", None, event.reason)
    if body.include_usage:
        yield f'{start}, "choices": [], "usage": {json.dumps(usage.body())}}}\n\n'.encode()
    yield sse.DONE


ENDPOINTS = [Endpoint("/v1/completions", "POST", create, CompletionBody, "Continues prompts", streams=True)]
