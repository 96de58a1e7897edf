"""An exception at any line, and between any two bytecodes, of the code that calls share: no page and no lock is lost,
and the model works afterwards.

Each scenario runs once to list the places that it passes. Then it runs again for MOST of them, with a
KeyboardInterrupt raised there. With MOST = None, all 60,000 places are tried, which takes a quarter of an hour."""

from __future__ import annotations

import dis
import functools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_decode import Fake, NotCaptured, with_capture
from support.models import TINY, tiny_model

import qwenkern
from qwenkern.cache import Batch, PagedCache
from qwenkern.engine import sharing
from qwenkern.engine.captured_step import CapturedStep

SMALL = replace(
    TINY, vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip
FILES = {
    str(file)
    for pattern in ("Model.py", "engine/*.py", "cache/*.py", "sampling/*.py")
    for file in Path(qwenkern.__file__).parent.glob(pattern)
}
LONG, SHORT = [n * 7 % 64 for n in range(70)], [5, 6, 7]
HOW = {"ignore_eos": True, "temperature": 0}
MOST: int | None = 150  # of each scenario's lines, and of its bytecodes, drawn at random


def lists(model) -> None:
    """More prompts than the cache holds, with completions that fork and some that find no room, and one that grows."""
    model.generate([LONG, SHORT, LONG[:63]], n=2, max_tokens=3, seed=1, temperature=1.0, ignore_eos=True, logprobs=1)


def preempts(model) -> None:
    model.generate([LONG[:62], LONG[:61], LONG[:60], LONG[1:62]], max_tokens=5, **HOW)


def streams(model) -> None:
    """Of two open streams one loses its pages, and takes them back from the other."""
    with model.stream(LONG, max_tokens=60, **HOW) as one, model.stream(LONG[1:], max_tokens=60, **HOW) as two:
        for stream in (one, two, one):
            next(stream._outputs)
            next(stream._outputs)
        model.score(LONG + LONG)
    list(model.stream(SHORT, max_tokens=2, **HOW))


def waits(model) -> None:
    """Another thread's stream sleeps, and has the pages that this one needs."""
    theirs = model.stream(LONG, max_tokens=60, **HOW)
    thread = threading.Thread(target=lambda: next(theirs._outputs))
    thread.start()
    thread.join()
    model.generate([LONG + LONG[:30]], max_tokens=2, min_tokens=1, logit_bias={3: 1.0}, **HOW)
    theirs.close()


def captures(model) -> None:
    model._runner.captured._steps.clear()
    model.generate([SHORT, LONG], max_tokens=3, **HOW)
    model.generate([SHORT], max_tokens=3, temperature=1.0, ignore_eos=True)


def comes_and_goes(model) -> None:
    """Requests that are added between steps, of which two are aborted: one that runs, and one that waits for room."""
    with model._engine() as engine:
        requests = [
            request
            for prompt in (LONG, SHORT, LONG[1:], LONG[2:])
            for request in model._requests([prompt], qwenkern.SamplingParams(max_tokens=4, **HOW))
        ]
        for request in requests:
            engine.add(request)
            engine.step()
        engine.abort(requests[0])
        engine.step()
        engine.abort(requests[3])
        while engine.has_requests:
            engine.step()


def logits(model) -> None:
    model.forward([LONG, LONG])
    model.score(SHORT)


class Gpu(Fake):
    """What it runs is not Python there, so nothing is raised in it."""

    def run_until(self, done: Callable[[], Any]) -> None:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            super().run_until(done)
        finally:
            sys.settrace(tracer)


class Sums:
    """In place of the layers: keeps token ids as keys, and makes the most likely token from all of a sequence's. Wrong
    pages give another text."""

    def __init__(self, vocabulary: int, device: Any) -> None:
        self._noise = np.linspace(0, 1, vocabulary, dtype=np.float32)
        self._device = device

    def forward(self, batch: Batch, cache: PagedCache, rows: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(self._device, Fake) and not self._device.running:
            self._device.run_until(lambda: False)  # a GPU runs what was launched before
        pages = cache.pages[0].k[:, :, 0, 0].numpy()
        slots = batch.slots.numpy()
        pages[slots // cache.page_size, slots % cache.page_size] = batch.ids
        starts, positions, tables = batch.query_starts.numpy(), batch.positions.numpy(), batch.block_tables.numpy()
        rows = np.arange(len(slots)) if rows is None else rows.numpy()
        logits = np.tile(self._noise, (len(rows), 1))
        for logit, row in zip(logits, rows, strict=True):
            past = pages[tables[np.searchsorted(starts, row, "right") - 1]].ravel()[: positions[row] + 1]
            logit[int(past @ np.arange(1, len(past) + 1)) % len(logit)] += 3
        return torch.from_numpy(logits)

    def greedy(self, batch: Batch, cache: PagedCache) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward(batch, cache).max(-1)


SCENARIOS: dict[str, tuple[Callable[[Any], None], dict[str, Any]]] = {
    "lists": (lists, {}),
    "preempts": (preempts, {}),
    "streams": (streams, {}),
    "waits": (waits, {}),
    "comes and goes": (comes_and_goes, {}),
    "logits": (logits, {}),
    "lists, deterministic": (lists, {"deterministic": True}),
    "streams, deterministic": (streams, {"deterministic": True}),
    "preempts, pipelined": (preempts, {"device": Gpu}),
    "streams, pipelined": (streams, {"device": Gpu}),
    "captures, pipelined": (captures, {"device": Gpu}),
    "comes and goes, pipelined": (comes_and_goes, {"device": Gpu}),
}


def make(device: Callable[[], Any] = NotCaptured, **keywords: Any):
    model = tiny_model(SMALL, cache_tokens=192, prefill_chunk=40, **keywords)
    capture = with_capture(model, device())._runner.captured.capture
    sums = Sums(SMALL.vocab_size, capture)
    model.module.forward, model.module.greedy = sums.forward, sums.greedy
    model.module.model.forward, model.module.logits = sums.forward, lambda logits: logits
    return model


@functools.cache
def leaves_a_with(code: CodeType) -> frozenset[int]:
    """Offsets between the body of a with statement and the call of its __exit__. An exception there would leave out
    __exit__, but none comes: the interpreter looks for signals after calls and backward jumps."""
    found, steps = set(), list(dis.get_instructions(code))
    for at in range(len(steps) - 3):
        if [(step.opname, step.argval) for step in steps[at : at + 3]] == [("LOAD_CONST", None)] * 3:
            begin = at - 1 if steps[at - 1].opname in ("SWAP", "NOP") else at
            found |= {step.offset for step in steps[begin : at + 5]}  # until CALL
    return frozenset(found)


class Tracer:
    """Calls ``arrive`` with (code, offset) at each line, or bytecode, of FILES that this thread comes to."""

    def __init__(self, arrive: Callable[[tuple[CodeType, int]], None], bytecodes: bool) -> None:
        self._arrive, self._bytecodes = arrive, bytecodes

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "call":
            if frame.f_code.co_filename not in FILES:
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = self._bytecodes, not self._bytecodes
        elif event in ("line", "opcode") and frame.f_lasti not in leaves_a_with(frame.f_code):
            self._arrive((frame.f_code, frame.f_lasti))
        return self

    def run(self, work: Callable[[], None]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            work()
        finally:
            sys.settrace(before)


def places(model, scenario: Callable[[Any], None], bytecodes: bool) -> Iterator[tuple[tuple[CodeType, int], int]]:
    """Each place, and which of its visits: the first and the last."""
    visits: Counter[tuple[CodeType, int]] = Counter()
    Tracer(lambda place: visits.update([place]), bytecodes).run(lambda: scenario(model))
    for place, count in visits.items():
        yield from ((place, visit) for visit in sorted({1, count}))


def interrupted(
    model, scenario: Callable[[Any], None], place: tuple[CodeType, int], visit: int, bytecodes: bool
) -> bool:
    left = visit

    def arrive(at: tuple[CodeType, int]) -> None:
        nonlocal left
        if at == place:
            left -= 1
            if not left:
                raise KeyboardInterrupt

    try:
        Tracer(arrive, bytecodes).run(lambda: scenario(model))
    except KeyboardInterrupt:
        return True
    return False


def check(model, expected: list[int]) -> None:
    cache = model.cache
    assert not cache.lock.locked(), "a lock stays taken"
    assert not cache.shares, "a share of the cache stays"
    assert cache.num_free_pages == cache.num_pages, "pages are lost"
    with cache.lock:
        assert cache.has_room(cache.num_pages), "pages are lost"
    assert model.generate(LONG, max_tokens=6, **HOW).token_ids == expected, "another text"


@pytest.mark.parametrize("bytecodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_interrupt_anywhere_loses_nothing(name, bytecodes, monkeypatch):
    monkeypatch.setattr(sharing, "PATIENCE", 0.001)
    load = CapturedStep.load

    def in_order(step, batch):  # likewise
        if isinstance(step._capture, Fake):
            step._capture.run_until(lambda: False)
        load(step, batch)

    monkeypatch.setattr(CapturedStep, "load", in_order)
    scenario, keywords = SCENARIOS[name]
    model = make(**keywords)
    expected = model.generate(LONG, max_tokens=6, **HOW).token_ids
    scenario(model)  # what is made once is made
    todo = list(places(model, scenario, bytecodes))
    check(model, expected)
    if MOST and len(todo) > MOST:
        todo = random.Random(name).sample(todo, MOST)
    struck = 0
    for place, visit in todo:
        struck += interrupted(model, scenario, place, visit, bytecodes)
        try:
            check(model, expected)
        except AssertionError as error:
            code, offset = place
            line = next(line for start, end, line in code.co_lines() if start <= offset < end)
            raise AssertionError(f"{code.co_qualname}, line {line}, offset {offset}, visit {visit}: {error}") from None
    assert struck > 0.9 * len(todo), "the scenario does not pass the same places again, so this shows little"
