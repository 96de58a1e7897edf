"""Requests that arrive and end between steps: each gets the same tokens as alone, and no page is lost."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from engine.test_decode import IN_C, Fake, NotCaptured, in_c
from support.engines import run, with_capture
from support.models import TINY, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import NonFiniteError, RequestError, SamplingParams
from qwenkern.engine import Engine, Limits
from qwenkern.engine.captured_step import CapturedStep

PROMPTS = [
    [n * 7 % 503 for n in range(start, start + length)] for start, length in ((9, 62), (3, 130), (2, 17), (8, 1))
]
COUNT = 7  # tokens of each text
SMALL = replace(
    TINY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
HOWS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 4},
    "on the host": {"temperature": 1.0, "seed": 4, "logprobs": 0, "repetition_penalty": 1.1},
}
pytestmark = pytest.mark.processor
__all__ = ["in_c"]  # a fixture


@pytest.fixture(params=[NotCaptured, Fake], ids=["one by one", "pipelined"])
def model(request, monkeypatch):
    load = CapturedStep.load

    def in_order(step, batch):  # a GPU runs torch's own operations in order with launched steps
        step._capture.run_until(lambda: False)
        load(step, batch)

    monkeypatch.setattr(CapturedStep, "load", in_order)
    return make(request.param)


def make(capture=NotCaptured, **keywords):
    return with_capture(tiny_model(SMALL, tokenizer=byte_tokenizer(TINY.vocab_size), **keywords), capture())


def request_of(model, prompt, **how):
    [request] = model._requests([prompt], SamplingParams(**{"max_tokens": COUNT, "ignore_eos": True} | how))
    return request


def engine_of(model, **limits):
    return Engine(model._runner, Limits(**{"prefill_chunk": 80, "finds_prefixes": False} | limits))


def finish(engine):
    """Runs all steps. Returns their outputs."""
    outputs = []
    while engine.has_requests:
        outputs += engine.step()
    return outputs


def by_itself(model, prompt, **how):
    with engine_of(model) as engine:
        engine.add(request := request_of(model, prompt, **how))
        finish(engine)
    return request.output_ids


def all_free(model):
    return model.cache.num_free_pages == model.cache.num_pages


def num_steps(model, requests):
    with engine_of(model) as engine:
        for request in requests:
            engine.add(request)
        count = 0
        while engine.has_requests:
            engine.step()
            count += 1
    return count


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_request_added_at_any_step_gets_the_tokens_that_it_gets_by_itself(model, how):
    expected = [by_itself(model, prompt, **how) for prompt in PROMPTS]
    assert len({tuple(each) for each in expected}) == len(PROMPTS)
    for at in range(num_steps(model, [request_of(model, PROMPTS[0], **how)]) + 2):
        with engine_of(model) as engine:
            requests = [request_of(model, prompt, **how) for prompt in PROMPTS]
            engine.add(requests[0])
            for _ in range(at):
                engine.step()
            for request in requests[1:]:
                engine.add(request)
                engine.step()
            finish(engine)
        assert [request.output_ids for request in requests] == expected, f"added after step {at}"
        assert all_free(model)


@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_abort_at_any_step_gives_the_pages_back_and_changes_nobody_else(model, how, which):
    prompts = PROMPTS[:3]
    expected = [by_itself(model, prompt, **how) for prompt in prompts]
    for at in range(num_steps(model, [request_of(model, prompt, **how) for prompt in prompts]) + 2):
        with engine_of(model) as engine:
            requests = [request_of(model, prompt, **how) for prompt in prompts]
            for request in requests:
                engine.add(request)
            for _ in range(at):
                engine.step()
            aborted = requests[which]
            ended, had = aborted.finish_reason, len(aborted.output_ids)
            engine.abort(aborted)
            for _ in range(3):  # at most: the steps in flight, and one more
                if aborted.table.pages:
                    engine.step()
            assert not aborted.table.pages
            assert not any(output.request is aborted for output in finish(engine))
        assert (aborted.finish_reason, len(aborted.output_ids)) == (ended, had)
        assert aborted.output_ids == expected[which][:had]
        others = [index for index in range(3) if index != which]
        assert [requests[index].output_ids for index in others] == [expected[index] for index in others], at
        assert all_free(model)


def test_a_request_added_in_mid_run_starts_soon(model):
    with engine_of(model) as engine:
        first, second = request_of(model, PROMPTS[0], max_tokens=40), request_of(model, PROMPTS[2])
        engine.add(first)
        for _ in range(6):
            engine.step()
        engine.add(second)
        for _ in range(3):  # at most: the steps in flight, and the prompt
            engine.step()
        assert second.output_ids
        assert not first.has_ended


def test_bits_do_not_depend_on_who_comes_and_goes_where_that_is_promised(in_c):
    """With recorded calls of the C functions."""
    how = {"temperature": 1.0, "seed": 6, "logprobs": 0}
    limits = {"max_batch": 16, "batch_invariant": True}
    model = tiny_model(IN_C, torch.bfloat16)
    model._loop  # noqa: B018

    def bits(request):
        return [(token.token_id, token.logprob) for token in request.logprobs]

    expected = []
    for prompt in PROMPTS:
        with engine_of(model, **limits) as engine:
            engine.add(request := request_of(model, prompt, **how))
            finish(engine)
        expected.append(bits(request))
    for at in range(5):
        with engine_of(model, **limits) as engine:
            requests = [request_of(model, prompt, **how) for prompt in PROMPTS]
            for request in requests:
                engine.add(request)
                for _ in range(at):
                    engine.step()
            engine.abort(requests[1])
            finish(engine)
        assert [bits(request) for request in requests if request is not requests[1]] == [*expected[:1], *expected[2:]]
        assert bits(requests[1]) == expected[1][: len(requests[1].output_ids)]
    assert any(step for step in model._runner.captured._steps.values())
    assert all_free(model)


def test_outputs_make_up_the_texts(model):
    group = model._requests(PROMPTS[:3], SamplingParams(n=2, temperature=1.0, seed=3, max_tokens=7, ignore_eos=True))
    with engine_of(model) as engine:
        for request in [request for request in group if not request.sample_index]:
            engine.add(request)
        outputs = finish(engine)
    for request in group:
        mine = [output for output in outputs if output.request is request]
        assert [token for output in mine for token in output.token_ids] == request.output_ids
        assert "".join(output.text for output in mine) == request.text
        assert [output.finish_reason for output in mine] == [None] * 6 + ["length"]
    assert len(outputs) == 6 * 7


def test_a_step_without_requests_returns_nothing_at_once(model):
    engine = engine_of(model)
    assert [engine.step() for _ in range(20)] == [[]] * 20
    engine.add(request_of(model, PROMPTS[0]))
    finish(engine)
    assert not engine.has_requests
    assert [engine.step() for _ in range(20)] == [[]] * 20
    for _ in range(20):
        engine.add(request := request_of(model, PROMPTS[0]))
        engine.abort(request)
        assert engine.step() == []
        assert not engine.has_requests
    assert all_free(model), "an engine that is done holds nothing, also when it is not closed"
    engine.add(late := request_of(model, PROMPTS[2]))
    finish(engine)
    assert late.output_ids == by_itself(model, PROMPTS[2])


def test_other_threads_add_and_abort(model):
    expected = [by_itself(model, prompt, max_tokens=40) for prompt in PROMPTS]
    requests = [request_of(model, prompt, max_tokens=40) for prompt in PROMPTS * 6]
    aborted = requests[1::4]
    done = threading.Event()

    def client(mine):
        for request in mine:
            engine.add(request)
            if request in aborted:
                while request.num_cached < 3 and not request.has_ended:
                    time.sleep(0.0005)
                engine.abort(request)

    with engine_of(model) as engine:
        clients = [threading.Thread(target=client, args=(requests[start::4],), daemon=True) for start in range(4)]
        for thread in clients:
            thread.start()
        waiter = threading.Thread(target=lambda: [thread.join(60) for thread in clients] and done.set(), daemon=True)
        waiter.start()
        gained = []
        while engine.has_requests or not done.is_set():
            gained += engine.step()
        waiter.join(60)
    assert done.is_set()
    for index, request in enumerate(requests):
        if request not in aborted:
            assert request.output_ids == expected[index % 4]
            assert request.finish_reason == "length"
        else:
            assert request.output_ids == expected[index % 4][: len(request.output_ids)]
    assert all_free(model)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("which", range(4))
def test_an_abort_among_completions_of_a_prompt_leaves_the_others(model, which, at):
    """Aborts before the prompt, within the prompt, and after the fork. Three decode at a time, so one waits."""
    how = {"temperature": 1.0, "seed": 8, "max_tokens": 5, "ignore_eos": True}
    expected = [each.token_ids for each in model.generate(PROMPTS[1], n=4, **how)]
    group = model._requests([PROMPTS[1]], SamplingParams(n=4, **how))
    with engine_of(model, max_batch=3) as engine:
        engine.add(group[0])
        for _ in range(at):
            engine.step()
        had = len(group[which].output_ids)
        engine.abort(group[which])
        finish(engine)
    assert len(group[which].output_ids) == had
    for index in {0, 1, 2, 3} - {which}:
        assert group[index].output_ids == expected[index]
    assert all_free(model)


def test_an_abort_makes_room_for_one_that_waits():
    model = make(cache_tokens=192)
    engine = engine_of(model)
    first, second = (request_of(model, prompt, max_tokens=50) for prompt in (PROMPTS[1], PROMPTS[0][::-1]))
    engine.add(first)
    engine.add(second)
    for _ in range(8):
        engine.step()
    assert first.output_ids
    assert not second.num_cached
    engine.abort(first)
    engine.step()
    assert not first.table.pages
    assert second.num_cached
    finish(engine)
    assert second.output_ids == by_itself(model, second.prompt_ids, max_tokens=50)


def test_an_abort_of_one_that_waits_or_has_ended_or_never_came():
    small = make(cache_tokens=192)
    with engine_of(small) as engine:
        first, second = request_of(small, PROMPTS[1]), request_of(small, PROMPTS[0])
        engine.add(first), engine.step(), engine.add(second), engine.step()
        engine.abort(second)
        engine.abort(request_of(small, PROMPTS[2]))
        finish(engine)
        engine.abort(first)
        assert not engine.has_requests
    assert first.finish_reason == "length"
    assert first.output_ids == by_itself(small, PROMPTS[1])
    assert not second.output_ids
    assert all_free(small)


def scored(model, ids):
    """A request for the logits of a prompt, and the list that gets them."""
    request, rows = request_of(model, ids), []
    request.on_logits, request.max_tokens = (lambda part: rows.append(part.clone())), 0
    return request, rows


def test_a_prompt_is_scored_among_requests_that_decode(model):
    ids = [n * 3 % 503 for n in range(150)]
    expected = [by_itself(model, prompt) for prompt in PROMPTS[:2]]
    logits = model.forward(ids)
    with engine_of(model) as engine:
        requests = [request_of(model, prompt) for prompt in PROMPTS[:2]]
        request, rows = scored(model, ids)
        outputs = []
        for each in (requests[0], request, requests[1]):
            engine.add(each)
            outputs += [output for _ in range(4) for output in engine.step()]
        outputs += finish(engine)
    assert [request.output_ids for request in requests] == expected
    torch.testing.assert_close(torch.cat(rows), logits)
    assert max(map(len, rows)) <= 64
    [output] = [output for output in outputs if output.request is request]
    assert (output.finish_reason, output.token_ids, output.error) == ("length", [], None)
    assert all_free(model)


def test_what_is_computed_again_is_not_scored_again():
    """Between two chunks of a prompt, another request grows and takes the pages of the prompt."""
    model = make(cache_tokens=256)
    ids = PROMPTS[1] + PROMPTS[0][:20]
    expected, preempted = model.forward(ids), []
    with engine_of(model, prefill_chunk=20) as engine:
        preempt = engine.scheduler._preempt
        engine.scheduler._preempt = lambda request: preempted.append(request.num_scored) or preempt(request)
        engine.add(first := request_of(model, PROMPTS[0], max_tokens=8))  # 62 tokens: the third it decodes is in a page
        while len(first.output_ids) < 2:
            engine.step()
        request, rows = scored(model, ids)
        engine.add(request)
        finish(engine)
    assert preempted
    assert 0 < preempted[0] < len(ids)
    torch.testing.assert_close(torch.cat(rows), expected)
    assert all_free(model)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0, "seed": 1, "logprobs": 0}], ids=str)
def test_an_error_in_a_request_ends_that_one(model, how):
    expected = [by_itself(model, prompt, **how) for prompt in PROMPTS[:2]]
    with torch.no_grad():
        model.module.model.embed_tokens.weight[500] = float("nan")
    forbidden = {"logit_bias": dict.fromkeys(range(503), -float("inf"))}
    with engine_of(model) as engine:
        lives = [request_of(model, prompt, **how) for prompt in PROMPTS[:2]]
        damaged, choosy = request_of(model, [2, 500], **how), request_of(model, [2, 3], **how | forbidden)
        for request in (lives[0], damaged, choosy, lives[1]):
            engine.add(request)
        outputs = finish(engine)
    assert [request.output_ids for request in lives] == expected
    for request, kind, message in (
        (damaged, NonFiniteError, "the logits after position 1 are not finite"),
        (choosy, RequestError, "every token is forbidden by logit_bias"),
    ):
        [output] = [output for output in outputs if output.request is request]
        assert isinstance(output.error, kind)
        assert message in str(output.error)
        assert (output.token_ids, output.finish_reason, request.output_ids) == ([], None, [])
    assert all_free(model)
    with pytest.raises(NonFiniteError):
        list(run(engine_of(model), [request_of(model, [9]), request_of(model, [500])]))
    assert all_free(model)


def test_an_interrupt_ends_all_requests_and_the_engine_works_afterwards(model, monkeypatch):
    expected = by_itself(model, PROMPTS[2])
    engine = engine_of(model)
    engine.add(request_of(model, PROMPTS[0]), request_of(model, PROMPTS[1]))
    for _ in range(3):
        engine.step()

    def interrupt(tokens):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_accept", interrupt)
        with pytest.raises(KeyboardInterrupt):
            finish(engine)
    assert not engine.has_requests
    assert engine.step() == []
    assert all_free(model)
    engine.add(after := request_of(model, PROMPTS[2]))
    finish(engine)
    assert after.output_ids == expected


def test_one_thread_at_a_time_makes_steps(model, monkeypatch):
    engine, found = engine_of(model), []
    engine.add(request_of(model, PROMPTS[2]))
    schedule = engine.scheduler.schedule

    def meanwhile():
        def step():
            try:
                engine.step()
            except RequestError as error:
                found.append(str(error))

        thread = threading.Thread(target=step)
        thread.start()
        thread.join(20)
        return schedule()

    monkeypatch.setattr(engine.scheduler, "schedule", meanwhile)
    assert len(engine.step()) == 1
    assert found == ["another thread is in a step of this engine; expected one at a time"]
    monkeypatch.setattr(engine.scheduler, "schedule", schedule)
    assert len(finish(engine)) == COUNT - 1


def test_an_engine_that_is_dropped_gives_its_pages_back(model):
    engine = engine_of(model)
    engine.add(request_of(model, PROMPTS[1]))
    for _ in range(4):
        engine.step()
    assert not all_free(model)
    del engine
    assert all_free(model)
