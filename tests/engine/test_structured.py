"""Texts under a constraint: whatever the model prefers, the grammar accepts its text."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
import torch
from engine.test_decode import IN_C, Fake, in_c
from engine.test_speculation import HOWS
from support.engines import check_pages, with_capture
from support.models import TINY, tiny_model
from support.toy_tokenizer import END, byte_tokenizer

from qwenkern import Model, RequestError
from qwenkern.engine.speculation import Costs

pytestmark = pytest.mark.processor
__all__ = ["in_c"]  # a fixture

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "colour": {"enum": ["red", "green", "a longer one"]},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "colour", "numbers"],
    "additionalProperties": False,
}
PROMPTS = ["hello", "a person:", "x" * 70]


@pytest.fixture
def make(in_c, monkeypatch):
    monkeypatch.setattr(Costs, "of", lambda costs, rows: 1.0)  # so that drafts have the maximal length
    return lambda **keywords: tiny_model(IN_C, torch.bfloat16, tokenizer=byte_tokenizer(TINY.vocab_size), **keywords)


def outcome(model, **how):
    keywords = {"max_tokens": 250, "logprobs": 2, "json_schema": PERSON} | how
    done = model.generate(PROMPTS, **keywords)
    return [(each.token_ids, each.text, each.logprobs, each.finish_reason, each.stop_reason) for each in done]


@pytest.mark.parametrize("how", [how for how in HOWS if how != "stops"])
def test_the_text_is_the_same_with_and_without_drafts(make, how):
    model = make()
    found, expected = outcome(model, **HOWS[how]), outcome(make(speculate=False), **HOWS[how])
    assert found == expected
    assert model._loop.engine.speculation.num_accepted > 0
    for _, text, _, finish_reason, _ in found:
        if finish_reason == "stop":
            jsonschema.validate(json.loads(text), PERSON)
    assert any(each[3] == "stop" for each in found)


def test_a_text_ends_where_its_grammar_does(make):
    done = make().generate(["a"] * 40, regex="[a-c]{3,5}", temperature=1.0, seed=1, n=2, ignore_eos=True, max_tokens=9)
    texts = {each.text for each in done}
    assert all(re.fullmatch("[a-c]{5}", text) for text in texts)  # only the grammar ends it
    assert {(each.finish_reason, each.stop_reason) for each in done} == {("stop", None)}


def test_an_end_of_the_text_is_drawn_only_where_the_grammar_may_end(make):
    done = make().generate(["a"], regex="(ab)+", temperature=30.0, n=16, seed=1, max_tokens=40)
    assert {each.stop_reason for each in done} == {END}
    assert all(re.fullmatch("(ab)+", each.text) for each in done)
    assert len({each.text for each in done}) > 1
    longer = make().generate(["a"], regex="(ab)+", n=16, seed=1, max_tokens=40, logit_bias={END: 9.0}, min_tokens=5)
    assert {each.text for each in longer} == {"ababab"}  # END comes after 6 tokens, where the grammar may end again


def test_steps_launched_ahead_do_not_miss_a_mask():
    """A device draws the tokens itself, one step ahead of the host, for texts without a grammar only."""
    make = lambda: tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))  # noqa: E731
    fake = Fake()
    model, plain = with_capture(make(), fake), make()
    how = {"temperature": 1.0, "seed": 1, "max_tokens": 120}
    assert model.generate(PROMPTS, **how) == plain.generate(PROMPTS, **how)
    assert "read" in fake.log  # the device has drawn tokens
    fake.log.clear()
    how |= {"json_schema": PERSON}
    assert model.generate(PROMPTS, **how) == plain.generate(PROMPTS, **how)
    assert "read" not in fake.log


def test_rows_with_and_without_a_grammar_share_a_batch(make):
    model = make()
    how = {"temperature": 1.0, "seed": 1, "max_tokens": 60}
    alone = [model.generate("a", json_schema=PERSON, **how), model.generate("a", **how)]
    streams = [model.stream("a", json_schema=PERSON, **how), model.stream("a", **how)]
    for stream in streams:
        assert [*stream]
    assert [stream.completion.token_ids for stream in streams] == [each.token_ids for each in alone]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"json_schema": {"type": "nothing"}}, "json_schema is not supported: .*nothing"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema is not supported: .*uniqueItems"),
        ({"regex": "(a"}, "regex is not supported"),
        ({"grammar": "start: missing"}, "grammar is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_with_the_reason(how, words):
    with pytest.raises(RequestError, match=words):
        tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size)).generate("a", **how)


def test_a_model_without_a_tokenizer_has_no_grammar():
    with pytest.raises(RequestError, match="needs a tokenizer"):
        tiny_model().generate([1], regex="a")


def test_where_the_grammar_and_biases_leave_nothing_the_request_ends_alone():
    model = tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))
    other = model.stream("b", max_tokens=40)
    with pytest.raises(RequestError, match="forbidden by logit_bias and the grammar"):
        model.generate("a", regex="!", logit_bias={0: float("-inf")})
    assert other.completion.finish_reason is None or len(other.completion.token_ids) == 40
    assert len([*other, other.completion][-1].token_ids) == 40


def test_siblings_have_a_place_of_their_own_in_the_grammar(make):
    how = {"temperature": 1.0, "seed": 3, "max_tokens": 250, "json_schema": PERSON}
    group = make().generate("a", n=3, **how)
    assert len({each.text for each in group}) == 3
    assert group[0].text == make().generate("a", **how).text
    for each in group:
        jsonschema.validate(json.loads(each.text), PERSON)


def test_a_preempted_text_goes_on_in_its_grammar():
    how = {"temperature": 1.0, "seed": 3, "max_tokens": 200, "json_schema": PERSON}
    model = tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size), cache_tokens=320, prefix_cache=False)
    alone = [model.generate(prompt, **how).token_ids for prompt in PROMPTS]
    preempted, preempt = [], model._loop.engine.scheduler._preempt
    model._loop.engine.scheduler._preempt = lambda request: (preempted.append(request), preempt(request))
    assert [each.token_ids for each in model.generate(PROMPTS * 2, **how)] == alone * 2
    assert preempted


def test_a_stop_string_and_max_tokens_end_a_text_before_its_grammar_does(make):
    done = make().generate("a", json_schema=PERSON, stop='"name"', max_tokens=200, temperature=1.0, seed=3)
    assert (done.finish_reason, done.stop_reason) == ("stop", '"name"')
    done = make().generate("a", regex="[ab]{40}", max_tokens=7)
    assert (done.finish_reason, len(done.text)) == ("length", 7)
    done = make().generate("a", regex="[ab]{7}", max_tokens=7)  # both ends come together
    assert (done.finish_reason, len(done.text)) == ("stop", 7)


def test_the_prefix_cache_and_scores_do_not_see_the_grammar(make):
    model = make()
    prompt = "the same beginning of a prompt " * 5
    before = model.score(prompt)
    how = {"temperature": 1.0, "seed": 3, "max_tokens": 200, "json_schema": PERSON}
    first, again = model.generate(prompt, **how), model.generate(prompt, **how)
    assert again.num_cached_tokens > first.num_cached_tokens == 0
    assert again.text == first.text
    assert model.score(prompt) == before


def test_a_stream_that_is_closed_leaves_others_alone(make):
    model = make()
    how = {"temperature": 1.0, "seed": 3, "max_tokens": 200, "json_schema": PERSON}
    alone = model.generate("a", **how)
    left, kept = model.stream("b", **how), model.stream("a", **how)
    next(left)
    left.close()
    assert "".join(kept) == alone.text
    check_pages(model)


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("demo")
def test_the_demo_model_writes_what_parses(demo_path, in_c):
    """With a real vocabulary, in which a token may span several parts of JSON."""
    model = Model.from_pretrained(demo_path, device="cpu")
    ask = [{"role": "user", "content": "Invent a person: name, favourite colour, three numbers. Answer in JSON."}]
    plain = model.chat(ask, json_schema=PERSON, max_tokens=120)
    person = json.loads(plain.text)
    jsonschema.validate(person, PERSON)
    assert plain.finish_reason == "stop"
    assert model._loop.engine.speculation.num_accepted > 0  # drafts of the property names, which the grammar forces
    slow = Model.from_pretrained(demo_path, device="cpu", speculate=False)
    assert slow.chat(ask, json_schema=PERSON, max_tokens=120).token_ids == plain.token_ids
    assert model.chat(ask, choice=["yes", "no"], max_tokens=9).text in ("yes", "no")
    assert re.fullmatch(r"\([0-9]{3}\) [0-9]{4}", model.chat(ask, regex=r"\([0-9]{3}\) [0-9]{4}", max_tokens=20).text)
    schema = {"type": "object", "properties": {"größe": {"enum": ["groß 🙂"]}}, "required": ["größe"]}
    assert json.loads(model.chat(ask, json_schema=schema | {"additionalProperties": False}, max_tokens=60).text) == {
        "größe": "groß 🙂"
    }
