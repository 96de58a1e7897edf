"""The loop that turns prompts into text: prefill, decode, sample, until every sequence has ended.

Each step runs the tokens of some sequences that are not in the cache yet: a chunk of the prompts first, then one token
of every sequence. A sequence that the cache has no room for waits, or loses its pages to another, as scheduler.py says,
and starts again from its tokens.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ..cache import BlockTable, PagedCache
from ..errors import NonFiniteError
from ..qwen2 import Qwen2
from ..sampling import BELOW_ONE, NOT_FINITE, SamplingParams, TokenLogprob, draw_width, sample
from ..text.tokenizer import Detokenizer
from .decode import DecodeStep, DecodeSteps
from .scheduler import Call

MAX_BATCH = 64  # sequences that decode together


@dataclass(frozen=True)
class Limits:
    """What one pass may hold.

    ``alone`` is the promise that a sequence's bits do not depend on its company: prompts are read one at a time, and a
    sequence starts when the cache has room for all of it, so that it keeps its pages. Only a stream that nobody reads
    can lose them; what it decoded is then decoded again, token by token, for the same bits. The ops keep their part of
    the promise up to ``max_batch``."""

    prefill_chunk: int  # prompt tokens
    max_batch: int = MAX_BATCH  # rows of logits: sequences, and completions of the same prompt that start with them
    alone: bool = False


class StopStrings:
    """Passes text on, except what a stop string could still begin with, and ends it before the first one."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.strings = strings
        self.held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        self.held += text
        matches = [(at, stop) for stop in self.strings if (at := self.held.find(stop)) >= 0]
        if matches:
            at, self.found = min(matches)
            text, self.held = self.held[:at], ""
            return text
        keep = max((self._overlap(stop) for stop in self.strings), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def finish(self) -> str:
        text, self.held = self.held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that ``stop`` begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)


@dataclass(eq=False)
class Sequence:
    """One completion in the making."""

    prompt_ids: list[int]
    params: SamplingParams  # with defaults filled
    end_ids: frozenset[int]  # ids that end the text
    max_tokens: int
    detokenizer: Detokenizer | None = None  # None: token ids only
    prompt_index: int = 0
    sample_index: int = 0
    siblings: list[Sequence] = field(default_factory=list)  # other completions of the same prompt, not started yet

    def __post_init__(self) -> None:
        self.table = BlockTable()
        self.started = 0
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: str | None = None  # "stop" or "length"
        self.stop_reason: int | str | None = None  # the id or string that ended it
        self.unwanted = False  # its reader has closed it
        self._stops = StopStrings(self.params.stop)
        seed = self.params.seed
        self._random = random.Random() if seed is None else random.Random(f"{seed}/{self.sample_index}")

    @property
    def pending_ids(self) -> list[int]:
        """Tokens that are not in the cache yet."""
        cached = self.table.length
        if cached >= len(self.prompt_ids):
            return self.output_ids[cached - len(self.prompt_ids) :]
        return self.prompt_ids[cached:] + self.output_ids

    def uniform(self) -> float:
        return min(self._random.random(), BELOW_ONE)

    def accept(self, token: TokenLogprob | int) -> str:
        """Appends a token. Returns the text that is now certain; sets finish_reason when it was the last one."""
        if isinstance(token, TokenLogprob):
            self.logprobs.append(token)
            token = token.token_id
        self.output_ids.append(token)
        if token in self.end_ids and len(self.output_ids) >= self.params.min_tokens:
            self.finish_reason, self.stop_reason = "stop", token
            return self._emit("", last=True)
        text = self.detokenizer.add(token) if self.detokenizer else ""
        is_last = len(self.output_ids) >= self.max_tokens
        if is_last:
            self.finish_reason = "length"
        return self._emit(text, last=is_last)

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


def generate(
    model: Qwen2,
    cache: PagedCache,
    sequences: list[Sequence],
    limits: Limits,
    steps: DecodeSteps | None = None,
) -> Generator[tuple[Sequence, str], None, None]:
    """Runs sequences to their ends. Yields each one whenever it has a new token, with the text that became certain.
    Decodes with captured ``steps`` where there are any.

    Closing the iterator gives the pages back, and so does an error, which ends all of these sequences and no others.
    Prompts are processed in chunks, so memory does not grow with their length. Raises NonFiniteError where a token's
    logits are not finite."""
    call = Call(cache, sequences)
    return call.serve(_generate(model, call, limits, steps))


def _generate(model: Qwen2, call: Call, limits: Limits, steps: DecodeSteps | None) -> Iterator[tuple[Sequence, str]]:
    while call.waiting or call.running:
        if any(sequence.unwanted for sequence in call.waiting):  # a stream, the only one of its call
            return
        for sequence, token in _advance(model, call, limits, steps):
            if token == NOT_FINITE:
                raise _not_finite(call.cache, sequence)
            text = sequence.accept(token)
            if sequence.finish_reason:
                call.end(sequence)
            yield sequence, text


def all_logits(model: Qwen2, cache: PagedCache, ids: list[int], chunk: int) -> Generator[Tensor, None, None]:
    """Logits after every token of a sequence, in order, at most MAX_BATCH rows at a time: float32 [rows, V]."""
    sequence = Sequence(ids, SamplingParams(), frozenset(), max_tokens=1)
    call = Call(cache, [sequence])
    return call.serve(_all_logits(model, call, sequence, chunk))


def _all_logits(model: Qwen2, call: Call, sequence: Sequence, chunk: int) -> Iterator[Tensor]:
    cache, ids, done = call.cache, sequence.prompt_ids, 0
    while done < len(ids):
        start = None
        with cache.lock:
            call.take_back()
            if call.running or call.start(len(ids)):
                start = sequence.table.length  # before ``done`` where its pages went to another meanwhile
                parts = [(sequence.table, ids[start : start + chunk])]
                x, residual = model.model(cache.batch(parts), cache)
                cache.advance(parts)
        if start is None:
            call.wait()
        elif start == done:
            done += len(x)
            for rows in zip(x.split(MAX_BATCH), residual.split(MAX_BATCH), strict=True):
                with cache.lock:
                    logits = model.logits(*rows)
                yield logits


def _not_finite(cache: PagedCache, sequence: Sequence) -> NonFiniteError:
    where = f"prompt_index {sequence.prompt_index}, sample_index {sequence.sample_index}"
    position = len(sequence.prompt_ids) + len(sequence.output_ids) - 1
    return NonFiniteError.at(position, cache.k.dtype, where)


def _advance(
    model: Qwen2, call: Call, limits: Limits, steps: DecodeSteps | None
) -> Iterable[tuple[Sequence, TokenLogprob | int]]:
    """The next token of some sequences: of one pass, or of many that need no decision in between."""
    cache = call.cache
    with cache.lock:
        call.take_back()
        _admit(call, limits)
        parts = _next_parts(call, limits)
        rows = [sequence for sequence, _ in parts]
        goes_ahead = (
            (steps and steps.ahead and rows)
            and all(row.output_ids and len(row.pending_ids) == 1 and not row.params.needs_host for row in rows)
            and cache.has_room(call.missing())
            and steps.step(len(rows), draw_width(rows, model.config.vocab_size))
        )
        if rows and not goes_ahead:
            ends = list(accumulate(len(ids) for _, ids in parts))
            tables = [(sequence.table, ids) for sequence, ids in parts]
            captured = steps if all(row.output_ids for row in rows) else None  # not for a prompt of one token
            logits = forward(model, cache, tables, [end - 1 for end in ends], captured)
            complete = {row: sequence for row, sequence in enumerate(rows) if not sequence.pending_ids}
            sampled, chosen = _fork(call, complete, limits)
            return zip(sampled, sample(logits[chosen], sampled), strict=True) if sampled else ()
    if not rows:
        call.wait()
        return ()
    return _decode_ahead(call, rows, steps, draw_width(rows, model.config.vocab_size))


def _decode_ahead(call: Call, rows: list[Sequence], steps: DecodeSteps, width: int) -> Iterator[tuple[Sequence, int]]:
    """Tokens of sequences that each have one pending token, until one of them ends or the cache is full. Steps are
    launched before the tokens of the last ones are read; what a sequence decodes beyond its end is thrown away."""
    cache = call.cache
    me, unread, launches = object(), deque(), 0
    most = min(sequence.max_tokens - len(sequence.output_ids) for sequence in rows)
    while True:
        drains = False
        goes_on = launches < most and not any(sequence.finish_reason for sequence in rows)
        if goes_on and len(unread) <= steps.ahead:
            with cache.lock:
                step = steps.step(len(rows), width)
                fresh = step.user is not me  # at first, or since another generation used it
                drains = fresh and bool(unread)
                goes_on = all(cache.holds(row.table) for row in rows) and cache.has_room(call.missing())
                if goes_on and not drains:
                    step.user = None  # until all of it has worked
                    _launch(cache, rows, step, fresh)
                    step.user = me
                    unread.append(step.tokens())
                    launches += 1
        if unread and (len(unread) > steps.ahead or not goes_on or drains):
            tokens = unread.popleft()()
            for sequence, token in zip(rows, tokens[: len(rows)], strict=True):
                if not sequence.finish_reason:
                    yield sequence, token
        elif not goes_on:
            return


@torch.inference_mode()
def _launch(cache: PagedCache, rows: list[Sequence], step: DecodeStep, fresh: bool) -> None:
    """Launches a step: with tokens and places that the host knows, or from where its last replay ended."""
    if fresh:
        parts = [(row.table, row.pending_ids) for row in rows]
        step.load(cache.batch(parts))
        step.load_settings(rows)
    else:
        for index, row in enumerate(rows):
            if cache.missing_pages(row.table, 1):
                cache.extend(row.table, 1)
                step.add_page(index, len(row.table.pages) - 1, row.table.pages[-1])
    step.load_numbers(rows)
    step.launch()
    for row in rows:
        row.table.length += 1


@torch.inference_mode()
def forward(
    model: Qwen2,
    cache: PagedCache,
    parts: list[tuple[BlockTable, list[int]]],
    rows: list[int] | None = None,
    steps: DecodeSteps | None = None,
) -> Tensor:
    """One pass over the next tokens of some sequences: float32 logits of all tokens, or of the given rows."""
    batch = cache.batch(parts)
    logits = steps.logits(batch) if steps and batch.is_decode else None
    if logits is None:
        chosen = None if rows is None else torch.tensor(rows, dtype=torch.int64, device=batch.ids.device)
        logits = model(batch, cache, chosen)
    cache.advance(parts)
    return logits


def _admit(call: Call, limits: Limits) -> None:
    """Starts waiting sequences, in order, while there is room for all of their tokens."""
    while call.waiting:
        sequence = call.waiting[0]
        rows = sum(1 + len(each.siblings) for each in [*call.running, sequence])
        if call.running and rows > limits.max_batch:
            call.leave_line()
            return
        to_come = sequence.max_tokens - len(sequence.output_ids) - 1 if limits.alone else 0  # the last is never cached
        if not call.start(len(sequence.pending_ids) + to_come):
            return


def _next_parts(call: Call, limits: Limits) -> list[tuple[Sequence, list[int]]]:
    """What the next pass computes: a chunk of unfinished prompts, or else the next token of every sequence."""
    parts, budget = [], limits.prefill_chunk
    for sequence in call.running:
        pending = sequence.pending_ids
        if limits.alone and len(pending) > 1:  # what was decoded at first is decoded again
            pending = pending[: max(1, len(sequence.prompt_ids) - sequence.table.length)]
        if len(pending) > 1 and budget and not (limits.alone and parts):
            parts.append((sequence, pending[:budget]))
            budget -= len(parts[-1][1])
    if parts:
        return parts
    call.grow()
    return [(sequence, sequence.pending_ids[:1]) for sequence in call.running]


def _fork(call: Call, complete: dict[int, Sequence], limits: Limits) -> tuple[list[Sequence], list[int]]:
    """The sequences to sample for, each with its row of logits: the complete ones and the siblings that start there.
    Siblings that find no room wait, and the first of them starts the others."""
    sampled, rows = [], []
    for row, sequence in complete.items():
        siblings, sequence.siblings = deque(sequence.siblings), []
        started = [sequence]
        while siblings and len(call.running) < limits.max_batch:
            if not call.fork(sequence, siblings[0], siblings[0].max_tokens - 1 if limits.alone else 0):
                break
            started.append(siblings.popleft())
        if siblings:
            first, *others = siblings
            first.siblings = others
            call.waiting.appendleft(first)
        sampled += started
        rows += [row] * len(started)
    return sampled, rows
