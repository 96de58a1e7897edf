"""Runs a turn on a model's engine. Yields its events as they happen, or returns whole answers at the end.

    Turn ─► place in the queue ─► requests, made in threads of the service ─► AsyncCall ─► Text, ToolCall, Finished

If the generator of events ends early, for example because the client has disconnected, its requests are aborted
within one step of the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ..engine import AsyncCall, Request
from ..engine.engine import Output
from ..errors import RequestError
from ..Model import Model
from ..sampling import TokenLogprob
from ..sampling.grammar import grammar_of
from .admission import check_length
from .functions import Splitter, without_grammar
from .service import Service
from .turns import CallEvent, Event, Finished, Started, Text, ToolCall, Turn


@dataclass
class Answer:
    """A whole answer."""

    index: int  # prompt_index * n + sample_index
    parts: list[str | ToolCall]  # texts, not empty, and calls, in the order in which the model wrote them
    token_ids: list[int]
    logprobs: list[TokenLogprob]  # empty if not requested
    finished: Finished

    @property
    def text(self) -> str:
        """The whole text, without the calls."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [part for part in self.parts if isinstance(part, ToolCall)]


async def events(service: Service, model: Model, turn: Turn) -> AsyncGenerator[Event, None]:
    """Yields the events of a turn as they happen. Use it with ``contextlib.aclosing``. Raises ApiError and
    qwenkern.Error."""
    async with running(service, model, lambda: _requests(service, model, turn)) as take:
        writing: dict[Request, _Writing] = {}
        while outputs := await take():
            for output in outputs if len(outputs) == 1 else _joined(outputs):
                written = writing.get(output.request)
                if not written:
                    written = writing[output.request] = _Writing(output.request, turn)
                    yield written.started()
                for event in written.events(output):
                    yield event


async def answers(service: Service, model: Model, turn: Turn) -> list[Answer]:
    """The answers of a turn, in the order of their index. Raises ApiError and qwenkern.Error."""
    found: list[Answer] = []
    async with running(service, model, lambda: _requests(service, model, turn), only_last=True) as take:
        while outputs := await take():
            found += [_Writing(output.request, turn).answer() for output in outputs]
    return sorted(found, key=lambda answer: answer.index)


@asynccontextmanager
async def running(
    service: Service, model: Model, make: Callable[[], Awaitable[list[Request]]], only_last: bool = False
) -> AsyncIterator[Callable[[], Awaitable[list[Output]]]]:
    """Waits in the queue, makes requests with ``make``, and runs them. Yields a function that returns the next outputs,
    as `AsyncCall.take`. only_last: each request has only its last output.

    Raises ApiError 429 if too many turns wait already, and 503 if this one has waited too long."""
    bounds = service.settings.bounds
    place = service.admission.enter()
    try:
        try:
            requests = await asyncio.wait_for(make(), bounds.waiting_seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise service.admission.too_long() from None
        first = [request for request in requests if request.sample_index == 0]
        running = model._loop.engine.scheduler.running
        place.has_started = lambda: any(request in running or request.output_ids for request in first)
        async with AsyncCall(model._loop, first, only_last) as call:
            left = place.since + bounds.waiting_seconds - time.monotonic()
            expired = False

            def expire() -> None:
                nonlocal expired
                if not place.has_started():
                    expired = True
                    call.close()

            timer = asyncio.get_running_loop().call_later(max(0.0, left), expire)

            async def take() -> list[Output]:
                outputs = await call.take()
                place.leave()
                return outputs

            try:
                yield take
            finally:
                timer.cancel()
            if expired:
                raise service.admission.too_long()
    finally:
        place.leave()


def _joined(outputs: list[Output]) -> list[Output]:
    """Joins the outputs of each request that came while nobody read them, so that a client gets one event for them."""
    of_each: dict[Request, list[Output]] = {}
    for output in outputs:
        of_each.setdefault(output.request, []).append(output)
    return [
        each[-1]._replace(
            token_ids=[id for one in each for id in one.token_ids], text="".join(one.text for one in each)
        )
        for each in of_each.values()
    ]


async def _requests(service: Service, model: Model, turn: Turn) -> list[Request]:
    grammar = grammar_of(turn.params)
    for prompt in turn.prompts:
        check_length(model, prompt, turn.tools)
    try:
        if grammar and not model.grammars.knows(grammar):
            await service.grammars.do(model.grammars.compiled, grammar)
        how = turn.params, turn.tools or None, turn.continues, turn.shortens
        requests = await service.in_pool(model._requests, turn.prompts, *how)
    except RequestError as error:
        if turn.tools and turn.params.grammar and str(error).startswith("grammar"):  # made of the tools, not sent
            raise without_grammar(error, turn.params.grammar) from None
        raise
    for request in requests:
        request.is_streamed = turn.is_streamed
    return requests


class _Writing:
    """Turns the outputs of one request into the events of one answer."""

    def __init__(self, request: Request, turn: Turn) -> None:
        self._request = request
        self._index = request.prompt_index * turn.params.n + request.sample_index
        self._with_logprobs = turn.params.logprobs is not None
        self._tells_each = self._with_logprobs or request.detokenizer is None  # each output has an event
        self._splitter = Splitter(self._index, turn.tools) if turn.tools else None
        self._come = 0  # tokens of the outputs so far
        self._told = 0  # tokens that events have had

    def events(self, output: Output) -> list[Event]:
        """The events of an output. Tokens without text wait for the next text, unless log-probabilities are requested,
        or the model has no tokenizer and thus no text."""
        self._come += len(output.token_ids)  # the request may have more tokens by now
        parts = self._split(output.text, output.is_last)
        text = parts[0] if parts and isinstance(parts[0], str) else ""
        found: list[Event] = []
        if text or output.is_last or self._tells_each:
            told, self._told = self._told, self._come
            if text or told < self._come:
                ids, logprobs = self._request.output_ids[told : self._come], []
                if self._with_logprobs:
                    logprobs = self._request.logprobs[told : self._come]
                found.append(Text(self._index, text, ids, logprobs))
        found += [Text(self._index, part) if isinstance(part, str) else part for part in parts[bool(text) :]]
        return [*found, self.finished()] if output.is_last else found

    def _split(self, text: str, is_last: bool) -> list[str | CallEvent]:
        """The texts and the events of calls in the next text of the model."""
        if self._splitter:
            return self._splitter.add(text, is_last)
        return [text] if text else []

    def started(self) -> Started:
        return Started(self._index, len(self._request.prompt_ids), self._request.num_found)

    def finished(self) -> Finished:
        request, reason = self._request, self._request.finish_reason or "stop"
        if reason == "stop" and self._splitter and self._splitter.num_calls:
            reason = "tool_calls"
        return Finished(
            index=self._index,
            reason=reason,
            stop_reason=request.stop_reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=request.num_found,
            num_tokens=len(request.output_ids),
        )

    def answer(self) -> Answer:
        """The whole answer, once it has ended."""
        request = self._request
        parts: list[str | ToolCall] = []
        for part in self._split(request.text, is_last=True):
            if isinstance(part, str) and part and parts and isinstance(parts[-1], str):
                parts[-1] += part
            elif part and isinstance(part, str | ToolCall):
                parts.append(part)
        return Answer(
            index=self._index,
            parts=parts,
            token_ids=list(request.output_ids),
            logprobs=list(request.logprobs),
            finished=self.finished(),
        )
