"""Constraints on a text: how they are checked, bounded, compiled and followed."""

from __future__ import annotations

import json
import math
import random
import re
from types import SimpleNamespace

import llguidance
import numpy as np
import pytest
import torch
from pydantic import BaseModel
from support.sampled_rows import FakeRow
from support.toy_tokenizer import END, byte_tokenizer

from qwenkern import EngineError, RequestError, SamplingParams
from qwenkern.sampling import Grammars, Overrun, grammar_compiler, grammar_trial, matcher, sample
from qwenkern.sampling.grammar import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH, Grammar, grammar_of

WIDTH = 503  # more logits than the tokenizer has ids


@pytest.fixture
def grammars():
    return Grammars(byte_tokenizer(WIDTH), WIDTH)


@pytest.fixture
def quick(monkeypatch):
    """Compiles grammars without a trial in a process of its own."""
    monkeypatch.setattr(grammar_compiler, "_try", lambda source: ("", 0))


def within(depth: int) -> dict:
    schema: dict = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


class Colour(BaseModel):
    name: str
    red: int


class Unsayable(BaseModel):
    call: type(print)  # type: ignore[valid-type]
    model_config = {"arbitrary_types_allowed": True}


CIRCLE: dict = {}
CIRCLE["items"] = CIRCLE


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": "{"}, "json_schema is '{'; expected JSON"),
        ({"json_schema": "[1]"}, r"json_schema is \[1\]; expected a JSON schema as a dict"),
        ({"json_schema": '{"maximum": NaN}'}, "NaN is no number of JSON"),
        ({"json_schema": False}, "json_schema is False; expected a JSON schema"),
        ({"json_schema": {"maximum": math.inf}}, "expected what JSON can hold"),
        ({"json_schema": {"const": {1, 2}}}, "expected what JSON can hold"),
        ({"json_schema": {"const": "\ud800"}}, r"json_schema has a lone surrogate, U\+D800"),
        ({"json_schema": within(MAX_SCHEMA_DEPTH + 1)}, f"more than {MAX_SCHEMA_DEPTH} objects and arrays"),
        ({"json_schema": CIRCLE}, "objects and arrays within each other"),
        ({"json_schema": {"const": "x" * MAX_GRAMMAR_BYTES}}, f"expected {MAX_GRAMMAR_BYTES} at most"),
        ({"json_schema": "[" * 30_000}, "json_schema is '.*expected JSON"),
        ({"json_schema": Unsayable}, "has no JSON schema"),
        ({"json_schema": {"type": "object", "minProperties": 2}}, "minProperties 2 with 0 required properties"),
        ({"regex": ""}, "regex is ''; expected a text that is not empty"),
        ({"regex": 1}, "regex is 1; expected a text"),
        ({"regex": "x" * (MAX_GRAMMAR_BYTES + 1)}, f"regex has {MAX_GRAMMAR_BYTES + 1} bytes"),
        ({"choice": []}, r"choice is \[\]; expected a list of texts"),
        ({"choice": "yes"}, "choice is 'yes'; expected a list of texts"),
        ({"choice": ["a", ""]}, "expected a list of texts that are not empty"),
        ({"choice": [str(n) for n in range(MAX_CHOICES + 1)]}, f"choice has {MAX_CHOICES + 1} texts"),
        ({"grammar": ["start"]}, "grammar is .*expected a text"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice are given; expected one of json_schema, regex, choice"),
    ],
)
def test_what_is_no_form_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_a_form_is_kept_as_text():
    schema = {"type": "object", "properties": {"é": {}, "a": {}}, "minProperties": 2, "required": ["é", "a"]}
    assert json.loads(SamplingParams(json_schema=schema).json_schema) == schema
    assert list(json.loads(SamplingParams(json_schema=json.dumps(schema)).json_schema)["properties"]) == ["é", "a"]
    assert SamplingParams(json_schema=True).json_schema == '{"type":"object"}'
    assert json.loads(SamplingParams(json_schema=Colour).json_schema) == Colour.model_json_schema()
    assert SamplingParams(choice=["b", "a", "b"]).choice == ("b", "a")
    assert SamplingParams(json_schema=within(MAX_SCHEMA_DEPTH)).json_schema
    assert grammar_of(SamplingParams()) is None


def text_of(found, rng) -> str:
    """A random text that the grammar allows, drawn byte by byte."""
    tokenizer, ids = byte_tokenizer(WIDTH), []
    while not found.has_ended:
        allowed = [token for token in range(WIDTH) if found.mask().allows(token)]
        token = rng.choice(allowed)
        if token == END:
            break
        ids.append(token)
        found.accept(token)
    return tokenizer.decode(ids)


@pytest.mark.parametrize("expression", [r"[a-c]{3}|x+", r"[0-9]{2}-(é|ß)\.", r"(a|b(c|d))*e"])
def test_the_masks_are_those_of_the_expression(grammars, quick, expression):
    rng = random.Random(1)
    texts = {text_of(grammars.matcher(Grammar("regex", expression), [END]), rng) for _ in range(40)}
    assert all(re.fullmatch(expression, text) for text in texts)
    assert len(texts) > 10


@pytest.mark.parametrize("text", ["yes", 'a "b" \\ c', "x|y", "(.*)", "a\nb\t", "#~&-<>%", "größe 🙂", "{1,2}[^]$"])
def test_a_choice_is_taken_as_it_is(grammars, quick, text):
    chosen = {
        text_of(grammars.matcher(Grammar("choice", json.dumps([text, "other"])), [END]), random.Random(n))
        for n in range(20)
    }
    assert chosen == {text, "other"}


def test_a_mask_is_what_llguidance_says_for_any_width_and_ends():
    rng = np.random.default_rng(0)
    for width in (31, 32, 33, 64, 503):
        for share in (0.01, 0.5, 0.99):
            bits = np.zeros(-(-(width + 1) // 32) * 32, dtype=bool)
            bits[: width + 1] = rng.random(width + 1) < share
            ends = frozenset({3, width - 1})
            found = matcher._mask(np.packbits(bits, bitorder="little").tobytes(), width, ends)
            expected = bits[:width].copy()
            expected[list(ends)] = bits[width]
            row = torch.arange(width, dtype=torch.float32)
            found.apply(row)
            assert torch.equal(row.isfinite(), torch.from_numpy(expected))
            assert torch.equal(row[row.isfinite()], torch.arange(width, dtype=torch.float32)[row.isfinite()])
            assert [found.allows(token) for token in range(width)] == expected.tolist()


def test_ids_without_a_token_are_never_drawn(grammars, quick):
    """A grammar that allows any text allows every token that is text, and no id beyond the vocabulary."""
    mask = grammars.matcher(Grammar("regex", r"(?s:.*)"), [END]).mask()
    allowed = {token for token in range(WIDTH) if mask.allows(token)}
    assert END in allowed
    assert max(allowed) == END
    assert END + 1 not in allowed  # <|im_start|>, a special token


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a{1000}){1000}"),
        ("json_schema", json.dumps({"allOf": [{"type": "integer", "multipleOf": n} for n in (97, 89, 83, 79)]})),
    ],
)
def test_what_takes_too_long_to_compile_is_refused(grammars, kind, source):
    with pytest.raises(RequestError, match=f"{kind} is not supported: it takes more than {grammar_trial.SECONDS} s"):
        grammars.matcher(Grammar(kind, source), [END])


def test_what_no_text_satisfies_is_refused(grammars):
    with pytest.raises(RequestError, match="json_schema is not supported"):
        grammars.matcher(Grammar("json_schema", '{"$ref":"#"}'), [END])


def test_compiled_grammars_are_kept_within_bounds(grammars, monkeypatch):
    tried = []
    monkeypatch.setattr(grammar_compiler, "_try", lambda source: (tried.append(source), ("", 2**26))[1])
    for name in "abcabc":
        grammars.matcher(Grammar("regex", name), [END])
    assert len(tried) == 3
    assert sum(size for _, size in grammars._compiled.values()) <= grammar_compiler.MAX_COMPILED_BYTES
    grammars.matcher(Grammar("regex", "d"), [END])
    grammars.matcher(Grammar("regex", "c"), [END])
    assert len(tried) == 4
    grammars.matcher(Grammar("regex", "a"), [END])  # the least recently used one was dropped
    assert len(tried) == 5


def test_the_reason_against_a_grammar_is_kept_within_bounds(grammars, monkeypatch):
    tried, answers = [], {"busy": EngineError("the machine is busy")}

    def trial(source):
        tried.append(source)
        if answer := next((answer for name, answer in answers.items() if name in source), None):
            raise answer
        return "it is bad", 0

    monkeypatch.setattr(grammar_compiler, "_try", trial)
    monkeypatch.setattr(grammar_compiler, "MAX_REFUSED", 2)

    def refused(name: str) -> None:
        with pytest.raises(RequestError, match=r"^regex is not supported: it "):
            grammars.matcher(Grammar("regex", name), [END])

    for name in "abaab":
        refused(name)
    assert len(tried) == 2
    assert grammars.knows(Grammar("regex", "a"))
    refused("c")
    refused("b")
    assert len(tried) == 3
    refused("a")  # the least recently requested one was dropped
    assert len(tried) == 4
    for _ in range(2):  # a busy machine is no reason to refuse a grammar
        with pytest.raises(EngineError, match="busy"):
            grammars.matcher(Grammar("regex", "busy"), [END])
    assert len(tried) == 6


TRIAL = """
import os, resource, signal, sys, time
{}
"""


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        ("resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass", "it takes more than"),
        ("bytes(1 << 50)", "it takes more than"),
        ("os.abort()", "it takes more than"),  # as Rust does without memory
        ("sys.exit(7)", "llguidance fails on it (status 7)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "llguidance fails on it (status -11)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", None),
        ("time.sleep(60)", None),
    ],
)
def test_how_a_trial_ends(tmp_path, monkeypatch, happens, reason):
    """A trial that ends for a reason other than the grammar is an EngineError, not a RequestError."""
    (tmp_path / "trial.py").write_text(TRIAL.format(happens))
    monkeypatch.setattr(grammar_compiler.grammar_trial, "__file__", str(tmp_path / "trial.py"))
    if reason:
        found, size = grammar_compiler._try("")
        assert found.startswith(reason)
        assert size == 0
    else:
        monkeypatch.setattr(grammar_compiler, "_PATIENCE", 1.0)
        with pytest.raises(EngineError, match=r"busy|killed"):
            grammar_compiler._try("")


class Failing:
    """A state of llguidance that fails after a number of masks."""

    def __init__(self, state, after) -> None:
        self._state, self._left = state, after

    def __getattr__(self, name):
        return getattr(self._state, name)

    def deep_copy(self):
        return self

    def compute_bitmask(self):
        self._left -= 1
        return self._state.compute_bitmask()

    def is_error(self):
        return self._left < 0 or self._state.is_error()


def test_a_text_goes_on_where_the_shared_state_has_failed(grammars, quick):
    grammar = Grammar("regex", "[ab]{9}")
    found, whole = (grammars.matcher(grammar, [END]) for _ in range(2))
    found._state = Failing(found._state, 4)
    assert text_of(found, random.Random(1)) == text_of(whole, random.Random(1))
    assert grammar not in grammars._compiled  # other texts get a newly compiled one, too


def test_a_matcher_that_fails_ends_its_row_alone(grammars, quick):
    grammar = Grammar("regex", "[ab]{9}")
    rows = [FakeRow(SamplingParams(), matcher=grammars.matcher(grammar, [END])) for _ in range(3)]
    rows[1].matcher._state = Failing(rows[1].matcher._state, 0)
    rows[1].matcher._fresh = lambda: Failing(grammars._compile(grammar), 0)
    free, broken, held = sample(torch.zeros(3, WIDTH), [FakeRow(SamplingParams(), seed=5), *rows[1:]])
    assert isinstance(free, int)
    assert isinstance(broken, RequestError)
    assert "the grammar cannot go on after 0 tokens" in str(broken)
    assert byte_tokenizer(WIDTH).decode([held]) in "ab"


def test_a_mask_that_takes_too_long_ends_the_text(grammars, quick, monkeypatch):
    monkeypatch.setattr(matcher, "SLOW", -1.0)
    with pytest.raises(RequestError, match="it has taken -1 s more than 10 ms for each token"):
        grammars.matcher(Grammar("regex", "a"), [END]).mask()


def test_texts_of_one_call_may_take_so_long_together(grammars, quick, monkeypatch):
    """Also without masks, as for greedy decoding on a CPU: the time of each call of llguidance counts."""
    now, step = [0.0], [0.0]

    def thread_time() -> float:
        now[0] += step[0]
        return now[0]

    monkeypatch.setattr(matcher, "time", SimpleNamespace(thread_time=thread_time))
    grammar, overrun = Grammar("regex", "[ab]*"), Overrun()
    overruns = (overrun, overrun, None, None)
    found, sibling, again, other = (grammars.matcher(grammar, [END], each) for each in overruns)
    (token,) = byte_tokenizer(WIDTH).encode("a")
    step[0] = matcher.EACH / 4
    for _ in range(1000):  # at this rate, a text may go on for ever
        assert found.allows(token)
        found.accept(token)
    step[0] = 0.35
    assert found.allows(token)  # calls llguidance twice
    sibling.accept(token)
    for each in (found, sibling):
        with pytest.raises(RequestError, match=r"cannot go on after .* tokens: it has taken 1 s more than 10 ms"):
            each.allows(token) and each.allows(token)
    step[0] = 0.6  # s for each call, also to compile again and to follow the text again
    again._state = Failing(again._state, 0)
    with pytest.raises(RequestError, match="it has taken 1 s more"):
        again.mask()
    step[0] = 0.1
    assert other.allows(token)
    with pytest.raises(RequestError, match="regex is not supported: it has taken 1 s more"):
        grammars.matcher(grammar, [END])  # so that nobody waits for it again


class Words:
    """A vocabulary with tokens of several bytes, so that a forced text has several tokenizations."""

    tokens = [bytes([n]) for n in range(256)] + [b"th", b"the", b" quick", b" qu", b" brown", b'"name', b'":', b"ick"]
    vocab_size, special_ids = len(tokens) + 1, frozenset([len(tokens)])

    def token_bytes(self, token_id):
        return b"<|im_end|>" if token_id in self.special_ids else self.tokens[token_id]

    def encode(self, text, *, allow_special=True):
        rest, ids = text.encode(), []
        while rest:
            ids.append(
                max(range(len(self.tokens)), key=lambda n: rest.startswith(self.tokens[n]) * len(self.tokens[n]))
            )
            rest = rest[len(self.tokens[ids[-1]]) :]
        return ids


FORMS = [
    Grammar("choice", json.dumps(["the quick brown", "the quickest", "then"])),
    Grammar("regex", r"[ab]+ the( quick)?"),
    Grammar("json_schema", json.dumps({"type": "object", "properties": {"name": {"type": "integer"}}})),
]


def test_a_token_is_allowed_without_a_mask_where_it_is_with_one(quick):
    """For all tokens at all places of some texts, also where llguidance accepts more tokenizations than its mask."""
    words, rng, narrower = Words(), random.Random(1), 0
    for form in FORMS * 3:
        [end] = words.special_ids
        found = Grammars(words, words.vocab_size).matcher(form, [end])
        while not found.has_ended and len(found._taken) < 20:
            mask = found.mask()
            allowed = [token for token in range(words.vocab_size) if mask.allows(token)]
            for token in range(words.vocab_size):
                found._mask = None
                assert found.allows(token) is (token in allowed)
                narrower += token not in allowed and found._state.validate_tokens([token])
            if allowed == [end]:
                break
            found.accept(rng.choice([token for token in allowed if token != end]))
    assert narrower


def test_a_greedy_row_takes_its_largest_logit_or_the_largest_of_those_allowed(grammars, quick):
    class Counted:
        masks = 0

        def __getattr__(self, name):
            return getattr(found._real, name)

        def compute_bitmask(self):
            Counted.masks += 1
            return found._real.compute_bitmask()

    a, b, c = byte_tokenizer(WIDTH).encode("abc")
    found = grammars.matcher(Grammar("regex", "[ab]{9}"), [END])
    found._real, found._state = found._state, Counted()
    greedy = SamplingParams(temperature=0)
    for value, expected, masks in ((1.0, b, 0), (4.0, b, 1)):  # value: the logit of c, which is forbidden
        logits = torch.zeros(2, WIDTH)
        logits[:, a], logits[:, b], logits[:, c] = 2.0, 3.0, value
        rows = [FakeRow(greedy), FakeRow(greedy, matcher=found)]
        assert sample(logits.clone(), rows) == [c if value == 4.0 else b, expected]
        assert Counted.masks == masks
        found.accept(expected)
    biased = FakeRow(SamplingParams(temperature=0, logit_bias={b: -9.0}), matcher=found)
    assert sample(logits, [biased, FakeRow(greedy)]) == [a, c]  # the bias is added before the mask


def test_logprobs_are_those_before_the_mask(grammars, quick):
    logits = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    expected = logits[0].log_softmax(-1)
    row = FakeRow(SamplingParams(logprobs=2), matcher=grammars.matcher(Grammar("regex", "[ab]"), [END]))
    [found] = sample(logits.clone(), [row])
    assert byte_tokenizer(WIDTH).decode([found.token_id]) in "ab"
    assert found.logprob == pytest.approx(expected[found.token_id].item())
    assert list(found.top) == expected.topk(2).indices.tolist()


def test_without_llguidance_the_error_says_what_to_install(grammars, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(RequestError, match="pip install llguidance"):
        grammars.matcher(Grammar("regex", "a"), [END])
    assert llguidance
