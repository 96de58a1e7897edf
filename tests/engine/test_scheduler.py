"""Calls share a cache that does not hold them all. All of them finish, with the same texts as on an idle model."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import tiny_model

from qwenkern import RequestError, SamplingParams
from qwenkern.engine import sharing

PATIENCE = 60  # seconds after which a thread counts as hanging
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
    """What each work returns, each in a thread of its own, or the first error."""
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


def all_free(model) -> bool:
    return model.cache.num_free_tokens == model.cache.num_tokens and not model.cache.shares


@pytest.mark.parametrize("deterministic", [False, True])
def test_threads_that_fit_alone_wait_for_each_other(expected, deterministic):
    model = small(deterministic=deterministic)
    expected = (
        expected if not deterministic else [small(deterministic=True).generate(p, **HOW).token_ids for p in PROMPTS]
    )
    texts = at_once(*[lambda prompt=prompt: model.generate(prompt, **HOW).token_ids for prompt in PROMPTS * 2])
    assert texts == expected * 2
    assert all_free(model)


def test_lists_and_completions_of_one_prompt_wait_too(expected):
    model = small()
    texts = at_once(
        lambda: [completion.token_ids for completion in model.generate(PROMPTS, **HOW)],
        lambda: [completion.token_ids for completion in model.generate(PROMPTS[2], n=5, temperature=0, **HOW)],
        lambda: [completion.token_ids for completion in model.generate(PROMPTS[::-1], **HOW)],
    )
    assert texts == [expected, [expected[2]] * 5, expected[::-1]]
    assert all_free(model)


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
    assert all_free(model)


def read(stream, count: int) -> None:
    for _ in range(count):
        next(stream._outputs)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("work", ["generate", "score", "forward", "stream"])
def test_an_open_stream_hinders_nobody(deterministic, work):
    """Neither the thread that reads it nor another one, and its own text is the same in the end, to the last bit where
    that is promised."""
    logprobs = {"logprobs": 0, "temperature": 1.0, "seed": 4}

    def begin(model):
        stream = model.stream(PROMPTS[1], **HOW, **logprobs)
        read(stream, 40)
        return stream

    works = {
        "generate": lambda model: model.generate(PROMPTS[0], **HOW).token_ids,
        "score": lambda model: model.score(list(range(200))).logprobs,
        "forward": lambda model: model.forward(list(range(200))).tolist(),
        "stream": lambda model: list(model.stream(PROMPTS[0], **HOW)._outputs)[-1].request.output_ids,
    }
    calm = small(deterministic=deterministic)
    single = begin(calm)
    read(single, 60)
    theirs = works[work](calm)
    model = small(deterministic=deterministic)
    stream = begin(model)
    started = time.monotonic()
    assert works[work](model) == theirs
    if work == "score":
        assert time.monotonic() - started < 10
    read(stream, 5)
    assert at_once(lambda: works[work](model)) == [theirs]
    read(stream, 55)
    tokens, expected = stream.completion.logprobs, single.completion.logprobs
    assert [token.token_id for token in tokens] == [token.token_id for token in expected]
    if deterministic:
        assert tokens == expected
    else:
        assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in expected], abs=1e-4)
    assert list(stream) == []
    assert all_free(model)


def test_one_thread_may_read_streams_in_turns_that_do_not_fit(expected):
    model = small()
    streams = [model.stream(prompt, **HOW) for prompt in PROMPTS[:3]]
    for _ in range(100):
        for stream in streams:
            read(stream, 1)
    assert [list(stream) for stream in streams] == [[], [], []]
    assert [stream.completion.token_ids for stream in streams] == expected[:3]
    assert all_free(model)


def test_a_stream_that_is_read_keeps_its_pages(expected, monkeypatch):
    """Of two readers that do not fit together one waits until the other is through, and nothing is computed twice."""
    monkeypatch.setattr(sharing, "PATIENCE", 5.0)
    model, passes = small(), []
    forward = type(model.module).forward
    model.module.forward = lambda batch, *args: (passes.append(len(batch.ids)), forward(model.module, batch, *args))[1]
    model._engine(), setattr(model._runner.captured.capture, "padded", lambda sequences: None)

    def consume(prompt):
        stream = model.stream(prompt, **HOW)
        for _ in stream._outputs:
            time.sleep(0.001)
        return stream.completion.token_ids

    assert at_once(*[lambda p=p: consume(p) for p in PROMPTS[:2]]) == expected[:2]
    assert sum(passes) == sum(len(prompt) + 99 for prompt in PROMPTS[:2])


def test_who_came_first_is_served_first(monkeypatch):
    monkeypatch.setattr(sharing, "PATIENCE", 5.0)  # the stream keeps its pages although nobody reads it
    model, starts, enter = small(), [], sharing.Share._enter
    stream = model.stream(PROMPTS[0], **HOW)
    read(stream, 30)

    def note_start(share, request):
        starts.append(len(request.prompt_ids))
        enter(share, request)

    monkeypatch.setattr(sharing.Share, "_enter", note_start)

    def when_in_line(count: int, work: Callable[[], Any]) -> None:
        until = time.monotonic() + PATIENCE
        while (found := sum(share._ticket is not None for share in list(model.cache.shares))) < count:
            assert time.monotonic() < until, f"{found} requests wait in line, expected {count}"
            time.sleep(0.001)
        work()

    def generate(length: int) -> None:
        model.generate([1] * length, max_tokens=2, ignore_eos=True)

    at_once(
        lambda: when_in_line(0, lambda: generate(250)),
        lambda: when_in_line(1, lambda: generate(20)),
        lambda: when_in_line(2, lambda: generate(200)),
        lambda: when_in_line(3, stream.close),
    )
    assert starts == [250, 20, 200], "the one of 20 tokens would have found room at once"


def test_streams_come_and_go_at_random(expected):
    """Threads that generate, score, stop in the middle, and leave streams open."""
    import random

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
    for index, stream in itertools.chain(*kept):
        list(stream)
        assert stream.completion.token_ids == expected[index]
    assert all_free(model)


def test_what_an_empty_cache_cannot_hold_is_refused():
    model = small()
    model.module.config = model.config
    [request] = model._requests([[1] * 200], SamplingParams(max_tokens=50, ignore_eos=True))
    request.max_tokens = 100
    with model._engine() as engine, pytest.raises(RequestError, match=r"room for 256 tokens, .* of 200 .*needs 299"):
        engine.add(request)
    assert not engine.has_requests
    request.max_tokens = 57
    engine = model._engine()
    engine.add(request)
    request.max_tokens = 100  # so that it is seen only as it grows
    with pytest.raises(RequestError, match=r"room for 256 more tokens of its 256.*needs 257 more"):
        list(engine.run([]))
    assert not engine.has_requests
    assert all_free(model)


def test_a_stream_that_waits_may_be_closed(monkeypatch):
    monkeypatch.setattr(sharing.Share, "_is_idle", lambda _: False)  # the first keeps its pages
    model = small()
    first, waiting = (model.stream(prompt, **HOW) for prompt in PROMPTS[:2])
    read(first, 40)
    reader = threading.Thread(target=lambda: list(waiting), daemon=True)
    reader.start()
    while not any(share._ticket is not None for share in list(model.cache.shares)):
        time.sleep(0.001)
    waiting.close()
    reader.join(PATIENCE)
    assert not reader.is_alive()
    assert not waiting.completion.token_ids
    first.close()
    assert all_free(model)
