"""Many calls on a cache that cannot hold them all: all of them finish, in their order, with the texts that they get on
an idle model."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from engine.test_decode import NotCaptured
from support.clock import set_clock
from support.clockwork import clockwork, tokens_of
from support.engines import PATIENCE, Gate, check_pages, eventually, read, run_all
from support.models import tiny_model

from qwenkern import RequestError, SamplingParams
from qwenkern.engine import Engine, Limits
from qwenkern.engine import pace as pace_module
from qwenkern.engine.pace import LEAST, Pace
from qwenkern.engine.scheduler import FEW, PRIORITY, Scheduler

PROMPTS = [
    [n * 7 % 503 for n in range(start, start + length)] for start, length in ((5, 70), (9, 130), (3, 20), (8, 64))
]
HOW = {"max_tokens": 100, "ignore_eos": True}  # one of them fits the small cache, two do not
SMALL = 256


@pytest.fixture(scope="module")
def expected():
    return [completion.token_ids for completion in tiny_model().generate(PROMPTS, **HOW)]


def small(**keywords: Any):
    return tiny_model(cache_tokens=SMALL, **keywords)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Runs each work in a thread of its own. Returns their results, or raises the first error."""
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            found[index] = works[index]()
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    for value in found.values():
        if isinstance(value, BaseException):
            raise value
    return [found[index] for index in range(len(works))]


@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_that_fit_alone_wait_for_each_other(expected, deterministic):
    model = small(deterministic=deterministic)
    expected = (
        expected if not deterministic else [small(deterministic=True).generate(p, **HOW).token_ids for p in PROMPTS]
    )
    texts = at_once(*[lambda prompt=prompt: model.generate(prompt, **HOW).token_ids for prompt in PROMPTS * 2])
    assert texts == expected * 2
    check_pages(model)


def test_lists_and_completions_of_one_prompt_wait_too(expected):
    model = small()
    texts = at_once(
        lambda: [completion.token_ids for completion in model.generate(PROMPTS, **HOW)],
        lambda: [completion.token_ids for completion in model.generate(PROMPTS[2], n=5, temperature=0, **HOW)],
        lambda: [completion.token_ids for completion in model.generate(PROMPTS[::-1], **HOW)],
    )
    assert texts == [expected, [expected[2]] * 5, expected[::-1]]
    check_pages(model)


def test_scores_and_logits_wait_and_are_right(expected):
    ids = [n * 3 % 503 for n in range(200)]
    calm = tiny_model(prefill_chunk=30)
    score, logits = calm.score(ids).logprobs, calm.forward(ids)
    model = small(prefill_chunk=30)
    found = at_once(
        lambda: model.score(ids).logprobs,
        lambda: model.generate(PROMPTS[1], **HOW).token_ids,
        lambda: model.forward(ids),
        lambda: model.generate(PROMPTS[0], **HOW).token_ids,
        lambda: model.score(ids).logprobs,
    )
    assert found[0] == found[4] == score
    assert torch.equal(found[2], logits)
    assert [found[1], found[3]] == [expected[1], expected[0]]
    check_pages(model)


@pytest.mark.parametrize("work", ["generate", "score", "forward", "stream"])
def test_an_open_stream_that_nobody_reads_hinders_nobody(work):
    """It keeps waiting neither the thread that opened it nor another one, and its own text is complete in the end."""

    def streamed(model, prompt):
        stream = model.stream(prompt, **HOW)
        read(stream, 100)
        return stream.completion.token_ids

    works = {
        "generate": lambda model: model.generate(PROMPTS[0], **HOW).token_ids,
        "score": lambda model: model.score(list(range(200))).logprobs,
        "forward": lambda model: model.forward(list(range(200))).tolist(),
        "stream": lambda model: streamed(model, PROMPTS[0]),
    }
    calm = small()
    text, theirs = streamed(calm, PROMPTS[1]), works[work](calm)
    model = small()
    stream = model.stream(PROMPTS[1], **HOW)
    read(stream, 40)
    assert works[work](model) == theirs
    assert at_once(lambda: works[work](model)) == [theirs]
    read(stream, 60)
    assert stream.completion.token_ids == text
    assert list(stream) == []
    check_pages(model)


def test_one_thread_may_read_streams_in_turns_that_do_not_fit(expected):
    model = small()
    streams = [model.stream(prompt, **HOW) for prompt in PROMPTS[:3]]
    for _ in range(100):
        for stream in streams:
            read(stream, 1)
    assert [list(stream) for stream in streams] == [[], [], []]
    assert [stream.completion.token_ids for stream in streams] == expected[:3]
    check_pages(model)


def test_streams_come_and_go_at_random(expected):
    """Threads generate, score, stop early, and leave streams open."""
    model = small()

    def work(seed):
        choose = random.Random(seed)
        kept = []
        for _ in range(4):
            prompt = choose.randrange(4)
            stream = model.stream(PROMPTS[prompt], **HOW)
            read(stream, choose.randrange(1, 60))
            kept.append((prompt, stream))
            if choose.random() < 0.3:
                kept.pop(choose.randrange(len(kept)))[1].close()
            if choose.random() < 0.3:
                model.score(PROMPTS[1])
            if choose.random() < 0.5 and kept:
                index, stream = kept.pop(choose.randrange(len(kept)))
                list(stream)
                assert stream.completion.token_ids == expected[index]
        for index, stream in kept[1:]:
            count = stream.completion.num_tokens
            assert stream.completion.token_ids == expected[index][:count]
        return kept

    kept = at_once(*[lambda seed=seed: work(seed) for seed in range(4)])
    for index, stream in [each for some in kept for each in some]:
        list(stream)
        assert stream.completion.token_ids == expected[index]
    check_pages(model)


def test_what_an_empty_cache_cannot_hold_is_refused():
    model = small()
    [request] = model._requests([[1] * 200], SamplingParams(max_tokens=50, ignore_eos=True))
    request.max_tokens = 100
    with pytest.raises(RequestError, match=r"room for 256 tokens, .* of 200 .*needs 299"):
        model._loop.engine.add(request)
    assert not model._loop.engine.has_requests
    request.max_tokens = 57
    run_all(model, [request])
    assert len(request.output_ids) == 57
    check_pages(model)


def test_a_stream_that_waits_may_be_closed():
    model = small()
    with Gate(model) as gate:
        first, waiting = (model.stream(prompt, **HOW) for prompt in (PROMPTS[1], PROMPTS[1][::-1]))
        gate.steps(10)
        assert model._loop.engine.scheduler.num_waiting == 1
        reader = threading.Thread(target=lambda: list(waiting), daemon=True)
        reader.start()
        eventually(waiting._call._reading.locked)
        waiting.close()
        reader.join(PATIENCE)
        assert not reader.is_alive()
        assert not waiting.completion.token_ids
        first.close()
        gate.steps(1)
    check_pages(model)


# The order of requests and steps, on a model that computes nothing.


def request_of(model, length: int, start: int = 1, **how: Any):
    prompt = [(start + 5 * at) % model.config.vocab_size for at in range(length)]
    params = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, "temperature": 0} | how)
    return model._requests([prompt], params)[0]


def engine_of(model, **limits: Any) -> Engine:
    return Engine(model._runner, Limits(**{"prefill_chunk": 40, "finds_prefixes": False} | limits))


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [1000.0]
    set_clock(monkeypatch, monotonic=lambda: now[0])
    return now


def starts(engine: Engine, requests) -> list:
    """The requests in the order of their first tokens."""
    order = []
    with engine:
        while engine.has_requests:
            order += [output.request for output in engine.step() if output.request not in order]
    assert all(len(request.output_ids) == request.max_tokens for request in requests)
    return order


def test_who_came_first_is_served_first():
    model = clockwork(NotCaptured(), cache_tokens=256)
    engine = engine_of(model)
    requests = [request_of(model, length) for length in (250, 20, 240, 10, 30)]
    for request in requests:
        engine.add(request)
    assert starts(engine, requests) == requests, "those of 20, 10 and 30 tokens would have found room earlier"


def test_a_short_prompt_does_not_wait_for_a_long_one():
    model = clockwork(NotCaptured(), cache_tokens=2048)
    engine = engine_of(model)
    with engine:
        engine.add(long := request_of(model, 400))
        engine.step()
        engine.add(short := request_of(model, 20))
        for _ in range(2):
            engine.step()
        assert short.output_ids
        assert 400 - 40 - 2 * 40 <= long.num_pending < 400 - 40


def test_short_prompts_do_not_stop_a_long_one():
    model = clockwork(NotCaptured(), cache_tokens=2048)
    engine = engine_of(model)
    with engine:
        engine.add(long := request_of(model, 400))
        chunks = 0
        while not long.output_ids:
            engine.add(request_of(model, 40, max_tokens=1))
            engine.step()
            chunks += 1
        assert chunks <= 2 * 400 // 40 + 1
        for request in list(engine.scheduler.running):
            engine.abort(request)


def test_a_higher_priority_starts_earlier_and_no_request_starves(clock):
    """A request whose priority is higher by one may come up to PRIORITY seconds later, and still starts first."""
    model = clockwork(NotCaptured(), cache_tokens=256)
    engine = engine_of(model)
    engine.add(running := request_of(model, 200))
    engine.step()
    low, late = request_of(model, 190), request_of(model, 190, priority=1)
    engine.add(low)
    clock[0] += PRIORITY - 0.1
    engine.add(soon := request_of(model, 190, priority=1))
    clock[0] += 0.2
    engine.add(late)
    engine.add(negative := request_of(model, 190, priority=-1))
    assert starts(engine, []) == [running, soon, low, late, negative]


def test_a_prompt_of_higher_priority_is_read_before_one_that_is_being_read(clock):
    model = clockwork(NotCaptured(), cache_tokens=1024)
    with engine_of(model) as engine:
        engine.add(long := request_of(model, 400))
        engine.step()
        clock[0] += 1.0
        engine.add(urgent := request_of(model, 90, priority=1), usual := request_of(model, 30))
        for _ in range(3):
            engine.step()
        assert urgent.output_ids
        assert long.num_cached < 100
        assert [each for each in starts(engine, [long, urgent, usual]) if each is not urgent] == [usual, long]


def test_a_stream_of_urgent_requests_does_not_starve_another(clock):
    model = clockwork(NotCaptured(), cache_tokens=256)
    with engine_of(model) as engine:
        engine.add(patient := request_of(model, 200))
        before = 0
        engine.add(request_of(model, 200, priority=2))
        while not patient.output_ids:
            clock[0] += 1.0
            if engine.scheduler.num_waiting < 2:
                engine.add(request_of(model, 200, priority=2))
            before += sum(output.is_last for output in engine.step())
            assert clock[0] < 1000 + 10 * PRIORITY, "it waits for ever"
        assert before, "nobody came before it, so this shows nothing"
        assert clock[0] > 1000 + 2 * PRIORITY


def test_preemption_takes_the_last_in_order_and_the_first_goes_on(clock):
    model = clockwork(NotCaptured(), cache_tokens=256)
    engine = engine_of(model)
    preempted = []
    preempt = engine.scheduler._preempt
    engine.scheduler._preempt = lambda request: preempted.append(request) or preempt(request)
    first, second, urgent = (
        request_of(model, length, max_tokens=60, priority=priority) for length, priority in ((60, 0), (61, 0), (62, 3))
    )
    for request in (first, second, urgent):
        engine.add(request)
        clock[0] += 1.0
    starts(engine, [first, second, urgent])
    assert preempted
    assert set(preempted) <= {first, second}, "the urgent one is first in order"
    assert preempted[0] is second
    for request in (first, second, urgent):
        assert request.output_ids == tokens_of(request)


def test_chunks_of_prompts_and_decode_steps_take_turns():
    """While a prompt of many chunks is computed, a stream gets a token after each chunk."""
    model = clockwork(NotCaptured(), cache_tokens=1024)
    with engine_of(model) as engine:
        engine.add(stream := request_of(model, 20, max_tokens=60))
        engine.step()
        engine.add(long := request_of(model, 400))
        reads, gained = [], []
        while not long.output_ids:
            cached, count = long.num_cached, len(stream.output_ids)
            engine.step()
            reads.append(long.num_cached - cached)
            gained.append(len(stream.output_ids) - count)
        assert sum(map(bool, reads)) == 10
        for (read_now, token), (read_next, next_token) in pairwise(zip(reads, gained, strict=True)):
            assert bool(read_now) != bool(token), "a pass reads a chunk or gives a token"
            assert token or next_token, "two chunks, one after the other"
            assert read_now or read_next


def test_all_that_decode_take_part_in_each_turn():
    model = clockwork(NotCaptured(), cache_tokens=1024)
    with engine_of(model) as engine:
        streams = [request_of(model, 20, start, max_tokens=60) for start in range(5)]
        engine.add(*streams)
        while not all(request.output_ids for request in streams):
            engine.step()
        engine.add(long := request_of(model, 400))
        while not long.output_ids:
            assert {output.request for output in engine.step()} in (set(), set(streams), {long})


def test_a_chunk_under_a_stream_is_bounded_by_the_time_that_it_takes(clock):
    """Each prompt token takes 2 ms. The limit of 0.25 s allows 125 tokens, so a chunk has 64."""
    model = clockwork(NotCaptured(), cache_tokens=4096, max_position_embeddings=4096)
    sizes, forward = [], model.module.forward

    def slow(batch, *args):
        sizes.append(len(batch.ids))
        clock[0] += 0.002 * len(batch.ids)
        return forward(batch, *args)

    model.module.forward = slow
    with engine_of(model, prefill_chunk=512) as engine:
        engine.add(first := request_of(model, 600))
        while not first.output_ids:
            engine.step()
        assert sizes == [512, 88], "nobody waits for a token, so chunks are long"
        engine.abort(first)
        engine.add(stream := request_of(model, 20, max_tokens=200))
        stream.is_streamed = True
        while not stream.output_ids:
            engine.step()
        sizes.clear()
        engine.add(long := request_of(model, 1000))
        latest, gaps = clock[0], []
        while not long.output_ids:
            if engine.step():
                gaps.append(clock[0] - latest)
                latest = clock[0]
        assert set(sizes) == {64, 1, 1000 % 64}
        assert max(gaps) <= 0.25 + 0.002
        stream.is_streamed = False
        sizes.clear()
        engine.add(other := request_of(model, 1024, start=2))
        while not other.output_ids:
            engine.step()
        assert set(sizes) == {512, 2}, "a call that shows nothing before its end does not shorten the chunks"


def test_the_pace(monkeypatch):
    now = [0.0]
    set_clock(monkeypatch, pace_module, monotonic=lambda: now[0])
    pace = Pace(2048, 0.25)
    assert pace.chunk() == 2048, "nothing is known yet"

    def passes(tokens, seconds):
        pace.begin(tokens)
        now[0] += seconds
        pace.read()

    passes(512, 0.512)
    assert pace.chunk() == 128, "the largest power of two below 250"
    for _ in range(40):
        passes(512, 0.0512)
    assert pace.chunk() == 2048
    for _ in range(40):
        passes(512, 51.2)
    assert pace.chunk() == LEAST
    pace.read()
    assert pace.chunk() == LEAST, "without a prompt nothing is read"
    for _ in range(40):  # the host waits for two passes at once
        pace.begin(256)
        now[0] += 0.256
        passes(256, 0.256)
    assert pace.chunk() == 128
    assert Pace(40, 0.25).chunk() == 40


def test_waiting_requests_cost_nothing_a_step():
    """The work of a step does not grow with the number of waiting requests. The test counts calls, not time."""
    import sys

    def calls(waiting: int) -> int:
        model = clockwork(NotCaptured(), cache_tokens=256)
        with engine_of(model) as engine:
            engine.add(request_of(model, 100, max_tokens=100))
            for _ in range(3):
                engine.step()
            engine.add(*[request_of(model, 200) for _ in range(waiting)])
            engine.step()
            count = 0

            def profile(*_: object) -> None:
                nonlocal count
                count += 1

            sys.setprofile(profile)
            for _ in range(5):
                engine.step()
            sys.setprofile(None)
            assert engine.scheduler.num_waiting == waiting
            return count

    assert calls(3000) == calls(1)


def test_an_aborted_request_that_waits_never_starts():
    model = clockwork(NotCaptured(), cache_tokens=256)
    with engine_of(model) as engine:
        engine.add(first := request_of(model, 200))
        engine.step()
        second, third = request_of(model, 200), request_of(model, 200)
        engine.add(second, third)
        engine.step()
        engine.abort(second)
        assert starts(engine, [first, third]) == [first, third]
    assert not second.num_cached
    assert isinstance(engine.scheduler, Scheduler)


def test_aborted_requests_do_not_pile_up_behind_one_without_room():
    model = clockwork(NotCaptured(), cache_tokens=256)
    with engine_of(model) as engine:
        engine.add(first := request_of(model, 200, max_tokens=50))
        engine.step()
        engine.add(head := request_of(model, 200))
        most = 0
        for _ in range(40):
            gone = [request_of(model, 200) for _ in range(20)]
            engine.add(*gone)
            engine.step()
            for request in gone:
                engine.abort(request)
            most = max(most, engine.scheduler.num_waiting)
        assert not first.has_ended
        assert not head.num_cached, "nobody's turn came meanwhile"
        assert most <= 2 * FEW
        assert starts(engine, [first, head]) == [first, head]
