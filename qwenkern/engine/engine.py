"""The engine: it takes requests at any time, and each step computes the next token of some of them."""

from __future__ import annotations

import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import torch

from ..cache import PagedCache
from ..errors import EngineError, Error, NonFiniteError, RequestError
from ..sampling import NOT_FINITE, Drawing, Sampled, sample
from .draft_model import DraftModel
from .pipeline import DecodePipeline
from .request import Request, with_siblings
from .runner import Runner
from .scheduler import MAX_BATCH, Limits, Scheduled, Scheduler
from .speculation import Speculation

MOST_FAULTS = 3  # after so many failed forward passes in a row the engine stops


class Output(NamedTuple):
    """The result of a step for one request."""

    request: Request
    token_ids: list[int]  # new tokens
    text: str  # new text that no later token can change
    finish_reason: str | None = None  # "stop" or "length" if the request has ended
    error: Error | None = None  # the error that ended the request, if any

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Engine:
    """Runs requests on a model, in steps.

    >>> with Engine(runner, limits) as engine:
    ...     engine.add(request)
    ...     while engine.has_requests:
    ...         for output in engine.step():
    ...             print(output.text, end="")

    Any thread may call ``add`` and ``abort`` at any time. Only one thread at a time may call ``step``. While an engine
    has requests, nothing else may use its cache.

    A failure ends as few requests as possible. If a request's logits are not finite or its sampling fails, this request
    ends with an error. If a forward pass fails, for example because the memory is full, the requests in it end. If
    several passes in a row fail, or the device is lost, all requests end, ``fault`` has the reason, and the engine
    accepts no more requests. An interrupt such as KeyboardInterrupt ends all requests, frees their pages, and is
    raised."""

    def __init__(self, runner: Runner, limits: Limits, draft_model: DraftModel | None = None) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.cache, limits, runner.weights_version)
        self.counts = self.scheduler.counts
        self.speculation = Speculation(limits.speculated_rows, draft_model) if limits.speculated_rows > 1 else None
        self.fault: EngineError | None = None
        self._pipeline: DecodePipeline | None = None
        self._in_pass: list[Request] = []  # the requests of the forward pass in progress
        self._works: deque[Callable[[], None]] = deque()  # functions to call between two forward passes
        self._faults = 0  # forward passes that failed since the last success
        self._stepping: dict[str, int] = {}  # the thread that is in a step
        weakref.finalize(self, _give_back, runner.cache, self.scheduler.running)  # for an engine that is not closed

    @property
    def has_requests(self) -> bool:
        """Whether there are requests that have not ended, steps whose tokens are not read yet, or functions to call."""
        return self.scheduler.has_requests or self._pipeline is not None or bool(self._works)

    def add(self, *requests: Request) -> None:
        """Adds requests and their siblings, from any thread. They start in a later step, when the cache has room. The
        same step sees all of them.

        Raises RequestError if one of them does not fit even an empty cache, and EngineError if the engine has stopped;
        then none is added."""
        if self.fault:
            raise self.fault.again()
        cache = self.runner.cache
        for request in requests:
            num_tokens = len(request.prompt_ids) + max(0, request.max_tokens - 1)  # the last one is never cached
            if num_tokens > cache.num_tokens:
                raise RequestError(
                    f"the key-value cache has room for {cache.num_tokens} tokens, and a prompt of "
                    f"{len(request.prompt_ids)} tokens with max_tokens {request.max_tokens} needs {num_tokens}: pass a "
                    "larger cache_tokens to Model.from_pretrained"
                )
        self.scheduler.add(*requests)

    def abort(self, request: Request) -> None:
        """Ends a request, from any thread. No later step has an output for it. Its pages are free when the steps in
        flight are done. Other completions of its prompt continue. Has no effect on a request that has ended."""
        self.scheduler.abort(request)

    def between_passes(self, work: Callable[[], None]) -> None:
        """Makes the next step call ``work`` before its forward pass. Any thread may call this."""
        self._works.append(work)

    def step(self) -> list[Output]:
        """Runs one forward pass.

        Returns the outputs of the pass. The list is empty if the pass computed only a part of a prompt, or if there are
        no requests. The error of an output is a NonFiniteError if the logits are not finite, a RequestError if biases
        and penalties forbid every token, or an EngineError if the pass failed."""
        me = threading.get_ident()
        if self._stepping.setdefault("thread", me) != me:
            raise RequestError("another thread is in a step of this engine; expected one at a time")
        try:
            if self.counts.busy_since is None:
                self.counts.busy_since = time.monotonic()
            try:
                outputs = self._step()
            except Exception as error:
                return self._after_fault(error)
            self._faults = 0
            if self._in_pass:
                self.counts.busy_since = time.monotonic()
            return outputs
        except BaseException:
            self._forget_all()
            raise
        finally:
            self._stepping.clear()
            if not self.has_requests:
                self.counts.busy_since = None

    def close(self) -> None:
        """Ends all requests and frees their pages. No other thread may be in a step."""
        try:
            self._pipeline = None
            for request in self.scheduler.drop_all():
                request.aborted = True
        except BaseException:
            self._forget_all()
            raise

    def stop(self, error: EngineError) -> list[Output]:
        """Ends all requests with an error, and accepts no more. No other thread may be in a step."""
        self.fault = error
        self._pipeline = None
        return [self._failed(request, error.again()) for request in self.scheduler.drop_all()]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self) -> list[Output]:
        self._in_pass = []
        while self._works:
            self.runner.cache.forget_if_changed(self.runner.weights_version())
            self._works.popleft()()
        if self._pipeline:
            self._in_pass = self._pipeline.requests
            if tokens := self._pipeline.tokens():
                return self._accept(tokens)
            self._pipeline = None
        scheduled = self.scheduler.schedule()
        self._in_pass = [request for request, _ in scheduled]
        if not scheduled:
            return []
        if scheduled[0].request.on_logits:
            return self._score(*scheduled[0])
        if drafts := self._drafts():
            return self._verify(scheduled, drafts)
        self._pipeline = self._new_pipeline()
        return self._accept(self._pipeline.tokens() if self._pipeline else self._decode(scheduled))

    def _new_pipeline(self) -> DecodePipeline | None:
        """A pipeline of the scheduled requests. None unless the device draws the tokens."""
        captured, requests = self.runner.captured, self._in_pass
        if not captured.in_flight or not all(map(_decodes, requests)) or any(each.matcher for each in requests):
            return None  # a step that is launched ahead cannot know what a grammar allows
        drawing = Drawing.of(requests, self.runner.model.config.vocab_size)
        if captured.get(len(requests), drawing) is None:
            return None
        return DecodePipeline(self.runner, self.scheduler, requests, drawing)

    def _decode(self, scheduled: list[Scheduled]) -> list[tuple[Request, Sampled]]:
        """Runs a forward pass. Samples a token for every request whose pending tokens are now all computed, and for its
        siblings, which start here."""
        may_replay = all(request.output_ids for request, _ in scheduled)  # False for a prompt, even of one token
        begin = time.monotonic()
        if not may_replay:
            self.scheduler.pace.begin(sum(len(ids) for _, ids in scheduled))
        ends = accumulate(len(ids) for _, ids in scheduled)
        last_rows = [  # of the requests whose next token follows from this pass
            end - 1 for end, (request, ids) in zip(ends, scheduled, strict=True) if len(ids) == request.num_pending
        ]
        logits = self.runner.logits([(request.table, ids) for request, ids in scheduled], last_rows, may_replay)
        requests: list[Request] = []
        rows: list[int] = []
        for request, _ in scheduled:
            self.scheduler.remember(request)
            if not request.num_pending:
                started = self.scheduler.fork(request) if request.siblings else [request]
                self._in_pass += started[1:]
                rows += [rows[-1] + 1 if rows else 0] * len(started)
                requests += started
        if not requests:
            return []
        _prepare(requests, logits.is_cpu)
        chosen = logits if rows == list(range(len(logits))) else logits[rows]
        tokens = list(zip(requests, sample(chosen, requests), strict=True))
        self.scheduler.pace.read()
        if self.speculation and may_replay and len(scheduled) <= self.speculation.most_rows:
            self.speculation.costs.read(len(scheduled), time.monotonic() - begin)
        return tokens

    def _drafts(self) -> dict[Request, list[int]]:
        """A draft for each request of the next step. Empty if the step cannot verify drafts."""
        requests, cache = self._in_pass, self.runner.cache
        if not self.speculation or not all(map(_decodes, requests)):
            return {}
        drafts = self.speculation.drafts(requests)
        missing = sum(cache.missing_pages(each.table, 1 + len(drafts.get(each, ()))) for each in requests)
        return drafts if cache.has_room(missing) else {}

    def _verify(self, scheduled: list[Scheduled], drafts: dict[Request, list[int]]) -> list[Output]:
        """Runs a decode step over the next token of each request and its draft. Draws the tokens that agree with the
        draft, and one more."""
        assert self.speculation
        begin, outputs, row = time.monotonic(), [], 0
        parts = [(request.table, ids + drafts.get(request, [])) for request, ids in scheduled]
        logits = self.runner.each_logits(parts)
        _prepare(self._in_pass, logits.is_cpu)
        for request, (table, ids) in zip(self._in_pass, parts, strict=True):
            drawn = 0
            while not request.has_ended and drawn < len(ids) and (not drawn or request.output_ids[-1] == ids[drawn]):
                table.length += 1
                [token] = sample(logits[row + drawn : row + drawn + 1], [request])
                outputs.append(self._accept_one(request, token))
                drawn += 1
            if request in drafts:
                self.speculation.read(request, drafts[request], max(0, drawn - 1))
            row += len(ids)
        self.counts.drafted, self.counts.accepted = self.speculation.num_drafted, self.speculation.num_accepted
        self.speculation.costs.read(row, time.monotonic() - begin)
        return outputs

    def _accept(self, tokens: Iterable[tuple[Request, Sampled]]) -> list[Output]:
        return [self._accept_one(request, token) for request, token in tokens if not request.has_ended]

    def _accept_one(self, request: Request, token: Sampled) -> Output:
        if isinstance(token, RequestError):
            return self._failed(request, token)
        if token == NOT_FINITE:
            where = f"prompt_index {request.prompt_index}, sample_index {request.sample_index}"
            position = len(request.prompt_ids) + len(request.output_ids) - 1
            return self._failed(request, NonFiniteError.at(position, self.runner.cache.dtype, where))
        text = request.accept(token)
        self.counts.token(request)
        if request.finish_reason:
            self.counts.ended(request, request.finish_reason)
            self.scheduler.end(request)
        return Output(request, request.output_ids[-1:], text, request.finish_reason)

    def _failed(self, request: Request, error: Error) -> Output:
        request.error = error
        self.counts.ended(request, "error")
        self.scheduler.end(request, is_sound=False)
        return Output(request, [], "", error=error)

    def _score(self, request: Request, ids: list[int]) -> list[Output]:
        """Runs a forward pass over a part of a prompt whose logits are all requested."""
        assert request.on_logits
        begin = request.table.length
        x = self.runner.hidden([(request.table, ids)])
        self.scheduler.remember(request)
        for row in range(max(begin, request.num_scored), request.table.length, MAX_BATCH):
            rows = x[row - begin : row - begin + MAX_BATCH]
            request.on_logits(self.runner.logits_of(rows))
            request.num_scored += len(rows)  # not given again if the request is preempted
        if request.num_pending:
            return []
        if x.is_cuda:
            torch.cuda.current_stream(x.device).synchronize()  # the reader may use another stream
        request.finish_reason = "length"
        self.counts.ended(request, request.finish_reason)
        self.scheduler.end(request)
        return [Output(request, [], "", request.finish_reason)]

    def _after_fault(self, error: Exception) -> list[Output]:
        """Ends the requests of a failed forward pass, or all requests if later passes would fail, too."""
        self._pipeline = None
        self._faults += 1
        reason = f"{type(error).__name__}: {error}"
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass
        is_lost = _is_lost(error) or not self._in_pass
        if is_lost or self._faults >= MOST_FAULTS:
            often = "" if is_lost else f"{self._faults} forward passes failed in a row, the last one with "
            fault = EngineError(f"the engine has stopped, load the model again: {often}{reason}")
            fault.__cause__ = error
            return self.stop(fault)
        failed = EngineError(f"the forward pass of this request failed: {reason}")
        failed.__cause__ = error
        group = with_siblings(self._in_pass)
        return [self._failed(request, failed.again()) for request in group if not request.has_ended]

    def _forget_all(self) -> None:
        """Ends all requests, whatever state an interrupt has left them in."""
        self._pipeline = None
        self.scheduler.reset()
        self.runner.cache.reset()


def _decodes(request: Request) -> bool:
    """Whether the prompt is computed and one token is pending, so that a captured step can compute the next one."""
    return bool(request.output_ids) and request.num_pending == 1


def _prepare(requests: Iterable[Request], is_cpu: bool) -> None:
    """Computes the tokens that grammars allow next, while a GPU still runs the forward pass. On a CPU the pass is over,
    and a greedy request may not need the mask."""
    for request in requests:
        if request.matcher and not (is_cpu and request.params.is_greedy):
            request.matcher.prepare()


def _is_lost(error: Exception) -> bool:
    """Whether a GPU that raises this error will also fail in every later forward pass."""
    kinds = getattr(torch, "AcceleratorError", ())
    return not isinstance(error, torch.OutOfMemoryError) and (isinstance(error, kinds) or "CUDA error" in str(error))


def _give_back(cache: PagedCache, running: dict[Request, None]) -> None:
    for request in list(running):
        cache.give_back(request.table)
