"""The loop that turns prompts into text: prefill, decode, sample, until every sequence has ended.

Each step runs the tokens of some sequences that are not in the cache yet: a chunk of the prompts first, then one token
of every sequence. A sequence that the cache has no room for waits, and starts again from its tokens when it has.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from .cache import BlockTable, PagedCache
from .decode import DecodeStep, DecodeSteps
from .qwen2 import Qwen2
from .sampling import BELOW_ONE, SamplingParams, TokenLogprob, draw_width, sample
from .tokenizer import Detokenizer

MAX_BATCH = 64  # sequences that decode together


@dataclass(frozen=True)
class Limits:
    """What one pass may hold.

    ``alone`` is the promise that a sequence's bits do not depend on its company: prompts are read one at a time, and a
    sequence starts when the cache has room for all of it, so that none is ever evicted and computed anew. The ops keep
    their part of it up to ``max_batch``."""

    prefill_chunk: int  # prompt tokens
    max_batch: int = MAX_BATCH  # sequences
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
        self.output_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.text = ""
        self.finish_reason: str | None = None  # "stop" or "length"
        self.stop_reason: int | str | None = None  # the id or string that ended it
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
) -> Iterator[tuple[Sequence, str]]:
    """Runs sequences to their ends. Yields each one whenever it has a new token, with the text that became certain.
    Decodes with captured ``steps`` where there are any.

    Closing the iterator gives the pages back. Prompts are processed in chunks, so memory does not grow with their
    length."""
    waiting, running = deque(sequences), []
    try:
        while waiting or running:
            for sequence, token in _advance(model, cache, waiting, running, limits, steps):
                text = sequence.accept(token)
                if sequence.finish_reason:
                    cache.release(sequence.table)
                    running.remove(sequence)
                yield sequence, text
    finally:
        for sequence in running:
            cache.release(sequence.table)


def _advance(
    model: Qwen2,
    cache: PagedCache,
    waiting: deque[Sequence],
    running: list[Sequence],
    limits: Limits,
    steps: DecodeSteps | None,
) -> Iterable[tuple[Sequence, TokenLogprob | int]]:
    """The next token of some sequences: of one pass, or of many that need no decision in between."""
    with cache.lock:
        _admit(cache, waiting, running, limits)
        parts = _next_parts(cache, waiting, running, limits)
        rows = [sequence for sequence, _ in parts]
        goes_ahead = (
            (steps and steps.ahead)
            and all(row.output_ids and len(row.pending_ids) == 1 and not row.params.needs_host for row in rows)
            and sum(cache.missing_pages(row.table, 1) for row in rows) <= cache.num_free_pages
            and steps.step(len(rows), draw_width(rows, model.config.vocab_size))
        )
        if not goes_ahead:
            ends = list(accumulate(len(ids) for _, ids in parts))
            tables = [(sequence.table, ids) for sequence, ids in parts]
            captured = steps if all(row.output_ids for row in rows) else None  # not for a prompt of one token
            logits = forward(model, cache, tables, [end - 1 for end in ends], captured)
            complete = {row: sequence for row, sequence in enumerate(rows) if not sequence.pending_ids}
            sampled, chosen = _fork(cache, complete, waiting, running, limits)
            return zip(sampled, sample(logits[chosen], sampled), strict=True) if sampled else ()
    return _decode_ahead(cache, rows, steps, draw_width(rows, model.config.vocab_size))


def _decode_ahead(
    cache: PagedCache, rows: list[Sequence], steps: DecodeSteps, width: int
) -> Iterator[tuple[Sequence, int]]:
    """Tokens of sequences that each have one pending token, until one of them ends or the cache is full. Steps are
    launched before the tokens of the last ones are read; what a sequence decodes beyond its end is thrown away."""
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
                goes_on = sum(cache.missing_pages(row.table, 1) for row in rows) <= cache.num_free_pages
                if goes_on and not drains:
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


def _admit(cache: PagedCache, waiting: deque[Sequence], running: list[Sequence], limits: Limits) -> None:
    """Starts waiting sequences, in order, while there is room for all of their tokens."""
    while waiting and len(running) < limits.max_batch:
        needed = len(waiting[0].pending_ids)
        if limits.alone:
            needed += waiting[0].max_tokens - 1  # the last one is never cached
        if running and cache.missing_pages(waiting[0].table, needed) > cache.num_free_pages:
            return
        cache.extend(waiting[0].table, needed)  # raises where even an empty cache is too small
        running.append(waiting.popleft())


def _next_parts(
    cache: PagedCache, waiting: deque[Sequence], running: list[Sequence], limits: Limits
) -> list[tuple[Sequence, list[int]]]:
    """What the next pass computes: a chunk of unfinished prompts, or else the last token of every sequence."""
    parts, budget = [], limits.prefill_chunk
    for sequence in running:
        pending = sequence.pending_ids
        if len(pending) > 1 and budget and not (limits.alone and parts):
            parts.append((sequence, pending[:budget]))
            budget -= len(parts[-1][1])
    if parts:
        return parts
    while sum(cache.missing_pages(sequence.table, 1) for sequence in running) > cache.num_free_pages:
        if len(running) == 1:
            break  # nobody left to make room: let the cache say so
        latest = running.pop()
        cache.release(latest.table)
        waiting.appendleft(latest)
    return [(sequence, sequence.pending_ids) for sequence in running]


def _fork(
    cache: PagedCache,
    complete: dict[int, Sequence],
    waiting: deque[Sequence],
    running: list[Sequence],
    limits: Limits,
) -> tuple[list[Sequence], list[int]]:
    """The sequences to sample for, each with its row of logits: the complete ones and the siblings that start there."""
    sampled, rows = [], []
    for row, sequence in complete.items():
        siblings, sequence.siblings = sequence.siblings, []
        started = [sequence]
        for sibling in siblings:
            to_come = sibling.max_tokens - 1 if limits.alone else 0
            # a page at least: for a copy of the one that is being filled
            if cache.num_free_pages <= cache.missing_pages(sequence.table, to_come) or (
                limits.alone and len(running) == limits.max_batch
            ):
                waiting.append(sibling)
                continue
            sibling.table = cache.fork(sequence.table)
            cache.extend(sibling.table, to_come)
            started.append(sibling)
            running.append(sibling)
        sampled += started
        rows += [row] * len(started)
    return sampled, rows
