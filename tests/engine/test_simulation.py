"""Thousands of random requests, with common prefixes, priorities and completions, on a cache that holds few of them.
Some requests are aborted, and some forward passes fail. After each step every page is accounted for. In the end, every
text is the one that the request gets alone.

The model has no layers (support/clockwork.py): a token that is lost, doubled or read from a wrong page changes the
text. ARRIVALS requests arrive in each simulation; 50,000 take some minutes."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from engine.test_decode import IN_C, Fake, NotCaptured, in_c
from engine.test_interrupts import Gpu
from support.clock import set_clock
from support.clockwork import clockwork, tokens_of
from support.engines import PATIENCE, check_pages, read, run_all
from support.models import tiny_model

from qwenkern import SamplingParams
from qwenkern.cache import PagedCache
from qwenkern.engine import Engine, Limits, Request
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.engine.speculation import Costs
from qwenkern.errors import EngineError

ARRIVALS = 350
PAGE, PAGES = 8, 40  # tokens of a page; pages of the cache
__all__ = ["in_c"]  # a fixture
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without prefixes": {"finds_prefixes": False},
    "drafts": {"speculated_rows": 16},
    "deterministic": {"batch_invariant": True, "max_batch": 4},
    "deterministic, drafts": {"batch_invariant": True, "speculated_rows": 4, "max_batch": 4},
    "pipelined": {"capture": Gpu},
}


class Injected(RuntimeError):
    """A fault injected by the test."""


class Simulation:
    """One engine, and all its requests."""

    def __init__(self, seed: int, capture: type = NotCaptured, **limits: Any) -> None:
        self.choose = random.Random(seed)
        self.model = model = clockwork(capture(), vocab_size=8)
        model.cache = PagedCache(model.config, PAGE * PAGES, torch.float32, torch.device("cpu"), page_size=PAGE)
        model._runner.__init__(model.module, model.cache, model._runner.captured.capture)
        self.engine = Engine(model._runner, Limits(**{"prefill_chunk": 24, "max_batch": 6} | limits))
        self.groups: list[list[Request]] = []
        self.live: set[Request] = set()
        self.rows: dict[Request, list[torch.Tensor]] = {}
        self.gained: Counter[Request] = Counter()
        self.last: Counter[Request] = Counter()
        self.failed: set[Request] = set()
        self.preempted = self.faults = self.evicted = self.found = 0
        self.beginnings = [[self.choose.randrange(8) for _ in range(90)] for _ in range(4)]
        self._watch()

    def _watch(self) -> None:
        scheduler, cache, module = self.engine.scheduler, self.model.cache, self.model.module
        preempt, evicted, forward = scheduler._preempt, cache._evicted, module.forward

        def counted_preempt(request):
            self.preempted += 1
            preempt(request)

        def counted_evicted():
            self.evicted += 1
            return evicted()

        def host_forward(*args):
            is_replayed = getattr(module_capture, "running", False)  # a replay on a GPU cannot fail, or fails for good
            return forward(*args) if is_replayed else self.may_fail(forward, *args)

        module_capture = self.model._runner.captured.capture
        scheduler._preempt, cache._evicted = counted_preempt, counted_evicted
        module.forward = module.model.forward = host_forward

    def may_fail(self, work, *args):
        """Does the work. At random, fails before or after it."""
        fails = self.engine._faults < 2 and self.choose.random() < 0.01
        if fails and self.choose.random() < 0.5:
            self._fail()
        result = work(*args)
        if fails:
            self._fail()
        return result

    def _fail(self) -> None:
        self.faults += 1
        together = [each for request in self.engine._in_pass for each in (request, *request.siblings)]
        self.failed |= {request for request in together if not request.has_ended}
        raise self.choose.choice([Injected, torch.OutOfMemoryError])("injected")

    def arrive(self) -> None:
        choose = self.choose
        prompt = choose.choice(self.beginnings)[: choose.randrange(1, 90)]
        prompt = prompt + [choose.randrange(8) for _ in range(choose.randrange(1, 30))]
        how: dict[str, Any] = {"temperature": 0} if choose.random() < 0.7 else {"temperature": 1.0, "seed": 7}
        if choose.random() < 0.2:
            how["stop_token_ids"] = [choose.randrange(8)]
        params = SamplingParams(
            max_tokens=choose.randrange(1, 40),
            n=choose.choice([1, 1, 1, 2, 3]),
            priority=choose.choice([0, 0, 0, 1, -1]),
            cache_salt=choose.choice([None, None, "a"]),
            logprobs=choose.choice([None, None, 1]),
            ignore_eos=True,
            **how,
        )
        group = self.model._requests([prompt], params)
        if choose.random() < 0.1:
            del group[1:]
            group[0].siblings, group[0].max_tokens = [], 0
            rows = self.rows[group[0]] = []
            group[0].on_logits = lambda part: rows.append(part.clone())
        for request in group:
            request.is_streamed = choose.random() < 0.5
        self.groups.append(group)
        self.live.update(group)
        self.engine.add(group[0])

    def step(self) -> None:
        for output in self.engine.step():
            request = output.request
            assert not self.last[request], "an output after the last one"
            assert not request.aborted
            self.gained[request] += len(output.token_ids)
            self.last[request] += output.is_last
            if output.is_last:
                self.live.discard(request)

    def run(self, arrivals: int) -> None:
        steps = 0
        while arrivals or self.engine.has_requests:
            busy = self.engine.scheduler.num_waiting > 8
            while arrivals and self.choose.random() < (0.1 if busy else 0.5):
                self.arrive()
                arrivals -= 1
            if self.live and self.choose.random() < 0.03:
                request = self.choose.choice(sorted(self.live, key=id_of(self.groups)))
                self.engine.abort(request)
                self.live.discard(request)
            self.step()
            self.check()
            steps += 1
            assert steps < 500 * (len(self.groups) + 10), "it does not come to an end"
        assert not self.live
        assert self.model.cache.num_free_pages == PAGES

    def check(self) -> None:
        cache, scheduler = self.model.cache, self.engine.scheduler
        used = Counter(page for request in scheduler.running for page in request.table.pages)
        assert [used[page] for page in range(PAGES)] == cache._users, "a page has another number of users"
        assert sorted([*used, *cache._free, *cache._kept]) == list(range(PAGES)), "a page is lost, or in two places"
        index = cache._index
        assert all(page in index for page in cache._kept)
        assert not any(page in index for page in cache._free)
        assert {entry.page for entry in index._entries.values()} == set(index._keys)
        assert all(index._entries[key].page == page for page, key in index._keys.items())
        waiting = [request for _, _, request in scheduler._waiting] + list(scheduler._arrivals)
        places = Counter(each for first in [*waiting, *scheduler.running] for each in (first, *first.siblings))
        assert all(count == 1 for count in places.values()), "a request is in two places"
        assert {request for request in self.live if not request.has_ended} <= set(places), "a request is lost"
        assert len(scheduler.running) <= scheduler.limits.max_batch
        for request in scheduler.running:
            table = request.table
            assert len(set(table.pages)) == len(table.pages)
            assert table.length <= len(table.pages) * PAGE
        for request in waiting:
            assert not request.table.pages
        self._check_contents()

    def _check_contents(self) -> None:
        """Checks that the pages in the prefix cache contain the tokens under which they are found."""
        capture = self.model._runner.captured.capture
        if capture.steps_in_flight and self.choose.random() < 0.9:
            return  # rarely, because the check ends the steps in flight
        capture.run_until(lambda: False)
        keys = self.model.cache.pages[0].k[:, :, 0, 0].numpy()
        for page, (_, tokens) in self.model.cache._index._keys.items():
            assert np.array_equal(keys[page], np.frombuffer(tokens, dtype=np.int32)), f"page {page}"

    def check_texts(self) -> None:
        alone = clockwork(NotCaptured(), vocab_size=8)
        for group in self.groups:
            expected = self.alone(alone, group)
            for request, ids in zip(group, expected, strict=True):
                assert request.has_ended
                assert self.gained[request] <= len(request.output_ids)
                if request.aborted:
                    assert request.output_ids == ids[: len(request.output_ids)]
                    continue
                assert self.gained[request] == len(request.output_ids), "a token is lost or doubled"
                assert self.last[request] == 1
                assert (request in self.failed) == isinstance(request.error, EngineError)
                if request.error:
                    assert "injected" in str(request.error)
                    assert request.output_ids == ids[: len(request.output_ids)]
                else:
                    assert request.output_ids == ids
                    self.found += request.num_found

    def alone(self, model, group: list[Request]) -> list[list[int]]:
        first = group[0]
        if first.on_logits:
            rows = torch.cat(self.rows[first] or [torch.empty(0, 8)])
            whole = model.forward(first.prompt_ids)
            assert torch.equal(rows, whole[: len(rows)])
            assert len(rows) == len(whole) or first.aborted or first.error
            return [[]]
        if first.params.temperature == 0:
            return [tokens_of(request, 8) for request in group]
        again = model._requests([first.prompt_ids], first.params)
        run_all(model, again[:1], finds_prefixes=False)
        return [request.output_ids for request in again]


def id_of(groups: list[list[Request]]):
    order = {request: at for at, request in enumerate(each for group in groups for each in group)}
    return lambda request: order[request]


@pytest.mark.slow
@pytest.mark.parametrize("limits", VARIANTS.values(), ids=VARIANTS)
def test_a_simulation(limits, monkeypatch):
    now, load = [0.0], CapturedStep.load

    def tick() -> float:
        now[0] += 0.01
        return now[0]

    def in_order(step, batch):  # a GPU runs torch's own operations in order with launched steps
        if isinstance(step._capture, Fake):
            step._capture.run_until(lambda: False)
        load(step, batch)

    set_clock(monkeypatch, monotonic=tick)  # so that a seed gives the same run on every machine
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1.0)  # drafts have the maximal length
    monkeypatch.setattr(CapturedStep, "load", in_order)
    simulation, launch = Simulation(seed=len(str(limits)), **limits), CapturedStep.launch
    monkeypatch.setattr(CapturedStep, "launch", lambda *args: simulation.may_fail(launch, *args))
    simulation.run(ARRIVALS)
    simulation.check_texts()
    assert simulation.faults > 3
    assert sum(request.aborted for group in simulation.groups for request in group) > 10
    if not limits.get("batch_invariant"):
        assert simulation.preempted > 10
    if limits.get("finds_prefixes", True):
        assert simulation.evicted > 10
        assert simulation.found > 100
    if limits.get("speculated_rows"):
        assert 0 < simulation.engine.speculation.num_accepted < simulation.engine.speculation.num_drafted


def crowd(model, expected: list[list[int]], prompts: list[list[int]], count: int, **how: Any) -> None:
    """Threads generate and stream. A third of them stop early."""
    wrong: list[str] = []
    barrier = threading.Barrier(count)

    def caller(index: int) -> None:
        at, choose = index % len(prompts), random.Random(index)
        barrier.wait(PATIENCE)
        try:
            if index % 3 == 0:
                with model.stream(prompts[at], **how) as stream:
                    read(stream, choose.randrange(4))
                mine, right = stream.completion.token_ids, expected[at][: stream.completion.num_tokens]
            elif index % 3 == 1:
                mine, right = model.generate(prompts[at], **how).token_ids, expected[at]
            else:
                stream = model.stream(prompts[at], **how)
                read(stream, len(expected[at]))
                mine, right = stream.completion.token_ids, expected[at]
            if mine != right:
                wrong.append(f"{index}: {mine}, expected {right}")
        except BaseException as error:
            wrong.append(f"{index}: {error!r}")

    threads = [threading.Thread(target=caller, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    assert wrong == []
    check_pages(model)


@pytest.mark.slow
def test_two_hundred_threads():
    """On a cache for six of their requests."""
    model = clockwork(NotCaptured(), cache_tokens=768)
    prompts = [[(at * step + 3) % 64 for at in range(10 + 9 * step)] for step in range(12)]
    requests = model._requests(prompts, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0))
    crowd(model, [tokens_of(r) for r in requests], prompts, 200, max_tokens=12, ignore_eos=True, temperature=0)


@pytest.mark.slow
def test_threads_on_a_real_model_get_the_bits_of_their_own(in_c):
    model = tiny_model(IN_C, torch.bfloat16, deterministic=True, cache_tokens=1024, prefill_chunk=64)
    prompts = [[(at * step + 3) % 503 for at in range(10 + 30 * step)] for step in range(5)]
    how = {"max_tokens": 8, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    expected = [model.generate(prompt, **how).token_ids for prompt in prompts]
    crowd(model, expected, prompts, 60, **how)
