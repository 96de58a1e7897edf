"""The engine: it takes requests at any time, and each step computes the next token of some of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from ..errors import Error, NonFiniteError, RequestError
from ..sampling import NOT_FINITE, Drawing, Sampled, sample
from .pipeline import DecodePipeline
from .request import Request
from .runner import Runner
from .scheduler import MAX_BATCH, Limits, Scheduled, Scheduler


class Output(NamedTuple):
    """The result of a step for one request."""

    request: Request
    token_ids: list[int]  # new tokens
    text: str  # new text that no later token can change
    finish_reason: str | None = None  # "stop" or "length" if the request has ended
    error: Error | None = None  # the error that ended the request, if any
    logits: Iterator[Tensor] | None = None  # if it wants its prompt's: next rows, float32 [<= 64, V] each


class Engine:
    """Runs requests on a model, in steps.

    >>> with Engine(runner, limits) as engine:
    ...     engine.add(request)
    ...     while engine.has_requests:
    ...         for output in engine.step():
    ...             print(output.text, end="")

    Any thread may call ``add`` and ``abort`` at any time. Only one thread at a time may call ``step``. Several engines
    may use one runner. They share its cache by the rules of sharing.py; the requests of different engines are never in
    one batch.

    If a request's logits are not finite or its sampling fails, that request ends with an error. An exception in a step,
    such as a KeyboardInterrupt, ends all requests of this engine and frees their pages. Other engines continue."""

    def __init__(self, runner: Runner, limits: Limits) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.cache, limits)
        self._pipeline: DecodePipeline | None = None
        self._stepping = threading.Lock()
        self._finalizer = weakref.finalize(self, self.scheduler.close)  # for an engine that nobody closes

    @property
    def has_requests(self) -> bool:
        """Whether there are requests that have not ended, or steps whose tokens are not read yet."""
        return self.scheduler.has_requests or self._pipeline is not None

    def add(self, request: Request) -> None:
        """Adds a request and its siblings, from any thread. They start in a later step, when the cache has room.

        Raises RequestError if the request does not fit even an empty cache."""
        cache, num_tokens = self.runner.cache, len(request.prompt_ids) + max(0, request.max_tokens - 1)
        if num_tokens > cache.num_tokens:  # the last token is never cached
            raise RequestError(
                f"the key-value cache has room for {cache.num_tokens} tokens, and a request of "
                f"{len(request.prompt_ids)} and max_tokens {request.max_tokens} needs {num_tokens}: pass a larger "
                "cache_tokens to Model.from_pretrained"
            )
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request, from any thread. This call waits for the forward pass in progress. When it returns, the
        request's pages are free, and no later step has an output for it. Other completions of its prompt continue. A
        request that has already ended is left as it is."""
        request.aborted = True
        with self.runner.cache.lock:
            self.scheduler.abort(request)

    def step(self) -> list[Output]:
        """Runs one forward pass. If the cache has no room for any request, waits for up to 0.1 s instead.

        Returns the outputs of the pass. The list is empty if the pass read a part of a prompt, or if there are no
        requests. The error of an output is a NonFiniteError if the logits are not finite, or a RequestError if biases
        and penalties forbid every token."""
        if not self._stepping.acquire(blocking=False):
            raise RequestError("another thread is in a step of this engine; expected one at a time")
        try:
            self.scheduler.share.begin_step()
            outputs = self._step()
            self.scheduler.share.end_step()
            return outputs
        except BaseException:
            self.close()
            raise
        finally:
            self._stepping.release()

    def run(self, requests: Iterable[Request]) -> Generator[Output, None, None]:
        """Adds requests and runs steps until all of them have ended. When the iteration ends, for whatever reason, the
        pages are freed. Raises the error of the first request that fails."""
        try:
            try:
                for request in requests:
                    self.add(request)
                while self.has_requests:
                    for output in self.step():
                        if output.error:
                            raise output.error
                        yield output
            finally:
                self.close()
        finally:
            self.close()  # a second KeyboardInterrupt may have interrupted the first close

    def close(self) -> None:
        """Ends all requests and frees their pages. No other thread may be in a step."""
        self.scheduler.close()
        self._pipeline = None
        self._finalizer.detach()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self) -> list[Output]:
        if self._pipeline:
            if tokens := self._pipeline.tokens():
                return self._accept(tokens)
            self._pipeline = None
        if not self.scheduler.has_requests:
            return []
        with self.runner.cache.lock, self.runner.cache.order:
            scheduled = self.scheduler.schedule()
            if scheduled and scheduled[0].request.wants_logits:
                return self._score(*scheduled[0])
            self._pipeline = self._new_pipeline(scheduled)
            sampled = self._decode(scheduled) if scheduled and not self._pipeline else []
        if self._pipeline:
            return self._accept(self._pipeline.tokens())
        if not scheduled and self.scheduler.has_requests:
            self.scheduler.share.wait()
        return self._accept(sampled)

    def _new_pipeline(self, scheduled: list[Scheduled]) -> DecodePipeline | None:
        """A pipeline of the scheduled requests. None unless the device draws the tokens."""
        captured, requests = self.runner.captured, [request for request, _ in scheduled]
        if not requests or not captured.in_flight or not all(map(_may_be_pipelined, requests)):
            return None
        drawing = Drawing.of(requests, self.runner.model.config.vocab_size)
        if captured.get(len(requests), drawing) is None:
            return None
        return DecodePipeline(self.runner, self.scheduler, requests, drawing)

    def _decode(self, scheduled: list[Scheduled]) -> list[tuple[Request, Sampled]]:
        """Runs a pass, and samples a token for every request whose pending tokens are now all computed, and for its
        siblings, which start there."""
        last_rows = [end - 1 for end in accumulate(len(ids) for _, ids in scheduled)]
        may_replay = all(request.output_ids for request, _ in scheduled)  # False for a prompt, even of one token
        logits = self.runner.logits([(request.table, ids) for request, ids in scheduled], last_rows, may_replay)
        requests, rows = [], []
        for row, (request, _) in enumerate(scheduled):
            if not request.pending_ids:
                started = self.scheduler.fork(request)
                requests += started
                rows += [row] * len(started)
        return list(zip(requests, sample(logits[rows], requests), strict=True)) if requests else []

    def _accept(self, tokens: Iterable[tuple[Request, Sampled]]) -> list[Output]:
        return [self._accept_one(request, token) for request, token in tokens if not request.has_ended]

    def _accept_one(self, request: Request, token: Sampled) -> Output:
        if isinstance(token, RequestError):
            return self._fail(request, token)
        if token == NOT_FINITE:
            where = f"prompt_index {request.prompt_index}, sample_index {request.sample_index}"
            position = len(request.prompt_ids) + len(request.output_ids) - 1
            return self._fail(request, NonFiniteError.at(position, self.runner.cache.dtype, where))
        text = request.accept(token)
        if request.finish_reason:
            self.scheduler.end(request)
        return Output(request, request.output_ids[-1:], text, request.finish_reason)

    def _fail(self, request: Request, error: Error) -> Output:
        request.error = error
        self.scheduler.end(request)
        return Output(request, [], "", error=error)

    def _score(self, request: Request, ids: list[int]) -> list[Output]:
        """Runs a pass over a part of a prompt whose logits are all requested. If the request lost its pages, the logits
        that were already returned are not returned again. The caller holds the cache's lock."""
        start = request.num_cached
        x = self.runner.hidden([(request.table, ids)])
        if start != request.num_scored:
            return []
        request.num_scored += len(ids)
        if request.num_scored == len(request.prompt_ids):
            request.finish_reason = "length"
            self.scheduler.end(request)
        return [Output(request, [], "", request.finish_reason, logits=self._logits(x))]

    def _logits(self, x: Tensor) -> Iterator[Tensor]:
        for rows in x.split(MAX_BATCH):
            self.scheduler.share.begin_step()
            with self.runner.cache.lock, self.runner.cache.order:
                logits = self.runner.logits_of(rows)
            self.scheduler.share.end_step()
            yield logits


def _may_be_pipelined(request: Request) -> bool:
    """Whether the captured step can compute and draw the next token: one pending token, after the prompt's pass."""
    return bool(request.output_ids) and len(request.pending_ids) == 1
