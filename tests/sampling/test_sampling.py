"""Sampling parameters and the choice of tokens, against transformers' processors and against counted frequencies."""

from __future__ import annotations

import enum
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from support.sampled_rows import FakeRow
from transformers.generation import logits_process as theirs

from qwenkern import RequestError, SamplingParams, TokenLogprob
from qwenkern.engine.stop_strings import StopStrings
from qwenkern.errors import shown
from qwenkern.sampling import NOT_FINITE, sample

VOCABULARY = 60


@pytest.fixture
def logits():
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def _choose(logits, row):
    [token] = sample(logits[None].clone(), [row])
    if isinstance(token, RequestError):
        raise token
    return token


def test_temperature_zero_takes_the_most_probable(logits):
    assert _choose(logits, FakeRow(SamplingParams(temperature=0))) == logits.argmax().item()
    assert _choose(logits, FakeRow(SamplingParams(temperature=1e-9))) == logits.argmax().item()
    assert _choose(logits, FakeRow(SamplingParams(temperature=1e-5))) == logits.argmax().item()


@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"top_k": 5}, {"logprobs": 2}, {"min_tokens": 3}], ids=str)
@pytest.mark.parametrize("values", [[math.nan], [math.inf], [math.inf, math.nan], [-math.inf] * VOCABULARY], ids=str)
def test_a_row_that_is_not_finite_gets_no_token(logits, fields, values):
    """The other rows get the tokens that they would get without it."""
    damaged = logits.clone()
    damaged[-len(values) :] = torch.tensor(values)
    rows = [
        FakeRow(SamplingParams(**fields), output_ids=[1, 2], end_ids=frozenset([3]), seed=seed) for seed in range(3)
    ]
    single = [sample(logits[None].clone(), [row]) for row in rows]
    rows = [
        FakeRow(SamplingParams(**fields), output_ids=[1, 2], end_ids=frozenset([3]), seed=seed) for seed in range(3)
    ]
    tokens = sample(torch.stack([logits, damaged, logits]), rows)
    assert tokens[1] == NOT_FINITE
    assert [tokens[0], tokens[2]] == [*single[0], *single[2]]


def test_minus_infinity_is_a_logit_like_any_other(logits):
    logits[logits.argmax()] = -math.inf
    assert _choose(logits, FakeRow(SamplingParams(temperature=0))) == logits.argmax().item()


@pytest.mark.parametrize("fields", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}, {"logprobs": 2}], ids=str)
def test_where_all_tokens_are_forbidden_none_is_drawn(logits, fields):
    bias = dict.fromkeys(range(VOCABULARY), -math.inf)
    with pytest.raises(RequestError, match="every token is forbidden by logit_bias; expected at least one"):
        _choose(logits, FakeRow(SamplingParams(logit_bias=bias, **fields)))
    del bias[7]
    for seed in range(20):
        token = _choose(logits, FakeRow(SamplingParams(logit_bias=bias, **fields), seed=seed))
        assert getattr(token, "token_id", token) == 7
    ends = frozenset([7])
    with pytest.raises(RequestError, match="every token is forbidden by logit_bias and min_tokens;"):
        _choose(logits, FakeRow(SamplingParams(logit_bias=bias, min_tokens=2, **fields), end_ids=ends, output_ids=[1]))
    late = FakeRow(SamplingParams(logit_bias=bias, min_tokens=2, **fields), end_ids=ends, output_ids=[1, 1])
    assert getattr(token := _choose(logits, late), "token_id", token) == 7


def test_a_penalty_that_makes_a_logit_infinite_is_named(logits):
    row = FakeRow(SamplingParams(repetition_penalty=1e-300), prompt_ids=[logits.argmax().item()])
    with pytest.raises(RequestError, match="repetition_penalty 1e-300 makes a logit inf"):
        _choose(logits, row)


FILTERS = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.7},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_tokens_come_as_often_reference_model_says(logits, fields):
    """10,000 draws, with evenly spaced random numbers: each frequency equals its probability to one draw."""
    scores = logits[None].clone()
    for name, processor in (
        ("temperature", theirs.TemperatureLogitsWarper),
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if name in fields:
            scores = processor(fields[name])(None, scores)
    expected = scores.softmax(-1)[0]
    count = 10_000
    row = FakeRow(SamplingParams(**fields))
    grid = iter([(n + 0.5) / count for n in range(count)])
    row.uniform = lambda: next(grid)
    drawn = sample(logits.repeat(count, 1), [row] * count)
    found = torch.bincount(torch.tensor(drawn), minlength=VOCABULARY) / count
    assert (found - expected).abs().max() <= 1.01 / count
    assert (found > 0).sum() <= (expected > 0).sum()


def test_rows_of_a_batch_do_not_disturb_one_another(logits):
    single = [_choose(logits, FakeRow(SamplingParams(**fields), seed=n)) for n, fields in enumerate(FILTERS)]
    together = sample(
        logits.repeat(len(FILTERS), 1), [FakeRow(SamplingParams(**fields), seed=n) for n, fields in enumerate(FILTERS)]
    )
    assert together == single


def _adjusted(logits, row):
    """The logits after penalties."""
    from qwenkern.sampling.penalties import penalise

    out = logits.clone()
    penalise(out, row)
    return out


def test_repetition_penalty_is_that_of_transformers(logits):
    row = FakeRow(SamplingParams(repetition_penalty=1.3), prompt_ids=[1, 2, 2, 3], output_ids=[3, 9])
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[1, 2, 2, 3, 3, 9]]), logits[None].clone())[0]
    assert torch.equal(_adjusted(logits, row), expected)


def test_presence_and_frequency_count_the_output_only(logits):
    row = FakeRow(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt_ids=[4], output_ids=[7, 7, 8])
    expected = logits.clone()
    expected[7] -= 0.5 + 2 * 0.25
    expected[8] -= 0.5 + 0.25
    torch.testing.assert_close(_adjusted(logits, row), expected)


def test_logit_bias_forces_and_bans(logits):
    best = logits.argmax().item()
    assert _choose(logits, FakeRow(SamplingParams(temperature=0, logit_bias={17: 100}))) == 17
    assert _choose(logits, FakeRow(SamplingParams(temperature=0, logit_bias={best: -math.inf}))) != best


def test_a_bias_is_read_once_for_all_tokens(logits):
    class Counted(dict):
        reads = 0

        def values(self):
            self.reads += 1
            return super().values()

    row = FakeRow(SamplingParams(logit_bias={3: 100.0}, temperature=0))
    object.__setattr__(row.params, "logit_bias", counted := Counted(row.params.logit_bias))
    assert [_choose(logits, row) for _ in range(4)] == [3] * 4
    assert counted.reads == 1, "a bias of all tokens would take milliseconds for each"


def test_min_tokens_forbids_the_end(logits):
    best = logits.argmax().item()
    params = SamplingParams(temperature=0, min_tokens=2)
    assert _choose(logits, FakeRow(params, output_ids=[1], end_ids=frozenset({best}))) != best
    assert _choose(logits, FakeRow(params, output_ids=[1, 1], end_ids=frozenset({best}))) == best


def test_logprobs_are_the_models_own(logits):
    row = FakeRow(SamplingParams(temperature=0.1, top_k=2, logit_bias={17: 100}, logprobs=3))
    token = _choose(logits, row)
    expected = logits.log_softmax(-1)
    assert isinstance(token, TokenLogprob)
    assert token.token_id == 17
    assert token.logprob == pytest.approx(expected[17].item())
    assert list(token.top) == expected.topk(3).indices.tolist()
    assert list(token.top.values()) == pytest.approx(expected.topk(3).values.tolist())
    assert _choose(logits, FakeRow(SamplingParams(logprobs=0))).top == {}


def test_defaults_are_the_checkpoints_then_neutral():
    checkpoint = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
    filled = SamplingParams(top_k=3).with_defaults(checkpoint)
    assert (filled.temperature, filled.top_k, filled.top_p) == (0.7, 3, 0.8)
    assert (filled.min_p, filled.repetition_penalty) == (0.0, 1.05)
    assert SamplingParams().with_defaults({}).is_greedy
    assert not SamplingParams(temperature=1.0).with_defaults({}).is_greedy


REFUSALS = [
    ({"max_tokens": 0}, "max_tokens is 0; expected a whole number of at least 1"),
    ({"max_tokens": -3}, "max_tokens is -3"),
    ({"max_tokens": 2.5}, "max_tokens is 2.5"),
    ({"max_tokens": True}, "max_tokens is True"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": None}, "min_tokens is None"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens is 3; expected at most max_tokens, 2"),
    ({"temperature": math.nan}, "temperature is nan; expected a number from 0"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": math.inf}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_p": 0}, "top_p is 0; expected a number above 0.0 to 1.0"),
    ({"top_p": 2}, "top_p is 2"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ({"presence_penalty": math.nan}, "presence_penalty is nan"),
    ({"frequency_penalty": 1e9}, "frequency_penalty is 1000000000.0"),
    ({"logit_bias": {-1: 1.0}}, "logit_bias's token id is -1"),
    ({"logit_bias": {"a": 1.0}}, "logit_bias's token id is 'a'"),
    ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\] is nan"),
    ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\] is inf"),
    ({"seed": "x"}, "seed is 'x'"),
    ({"seed": 2**70}, "seed is "),
    ({"n": 0}, "n is 0; expected a whole number from 1 to 128"),
    ({"n": 1_000_000}, "n is 1000000; expected a whole number from 1 to 128"),
    ({"logprobs": 10**6}, "logprobs is 1000000"),
    ({"stop": ""}, "stop contains ''"),
    ({"stop": ["a", 3]}, "stop contains 3"),
    ({"stop_token_ids": [-2]}, "stop_token_ids is -2"),
    *(({name: 10**400}, f"{name} is 1000") for name in ("temperature", "top_p", "min_p", "seed", "n", "logprobs")),
    *(({name: -(10**5000)}, f"{name} is a int that cannot be written") for name in ("max_tokens", "presence_penalty")),
    ({"logit_bias": {1: -(10**400)}}, r"logit_bias\[1\] is -1000"),
    ({"logit_bias": {10**400: True}}, "logit_bias.10000.* is True; expected a number"),
    ({"temperature": True}, "temperature is True"),
    ({"temperature": np.float64("nan")}, "temperature is .*nan"),
    ({"n": np.bool_(True)}, "n is .*True"),
    ({"n": torch.tensor([1, 2])}, "n is tensor"),
    ({"n": 1.0}, "n is 1.0"),
    ({"seed": "1"}, "seed is '1'"),
    ({"ignore_eos": "no"}, "ignore_eos is 'no'; expected True or False"),
    ({"ignore_eos": 1}, "ignore_eos is 1; expected True or False"),
    ({"skip_special_tokens": None}, "skip_special_tokens is None; expected True or False"),
    ({"priority": 1001}, "priority is 1001; expected a whole number from -1000 to 1000"),
    ({"priority": 0.5}, "priority is 0.5; expected a whole number"),
    ({"priority": None}, "priority is None"),
    ({"cache_salt": ""}, "cache_salt is ''; expected a text of 1 to 1024 characters, or None"),
    ({"cache_salt": "x" * 1025}, "cache_salt is 'xxx.*; expected a text of 1 to 1024 characters"),
    ({"cache_salt": b"mine"}, "cache_salt is b'mine'; expected a text"),
    ({"stop": {"a": 1}}, "stop is {'a': 1}; expected a string, a list of strings or None"),
    ({"stop": {"a"}}, "stop is {'a'}; expected a string"),
    ({"stop": b"a"}, "stop is b'a'; expected a string"),
    ({"stop": [b"a"]}, "stop contains b'a'"),
    ({"stop": 3}, "stop is 3; expected a string"),
    ({"stop": ["x"] * 100_000}, "stop has 100000 strings; expected 128 at most"),
    ({"stop": "x" * 1025}, "stop contains one of 1025 characters; expected 1024 at most"),
    ({"stop_token_ids": 3}, "stop_token_ids is 3; expected a list of token ids or None"),
    ({"stop_token_ids": "12"}, "stop_token_ids is '12'; expected a list"),
    ({"stop_token_ids": {1: 2}}, "stop_token_ids is {1: 2}; expected a list"),
    ({"stop_token_ids": [True]}, "stop_token_ids is True"),
    ({"stop_token_ids": [[]]}, r"stop_token_ids is \[\]"),
    ({"stop_token_ids": [0] * 10**6}, "stop_token_ids has 1000000 ids or more; expected 262144 at most"),
    ({"stop_token_ids": range(10**30)}, "stop_token_ids has 262145 ids or more; expected 262144 at most"),
    ({"logit_bias": [1]}, r"logit_bias is \[1\]; expected a dict of token ids and numbers, or None"),
    ({"logit_bias": dict.fromkeys(range(10**6), 0)}, "logit_bias has 1000000 ids; expected 262144 at most"),
    ({"logit_bias": {"1": 0, 1: 0}}, "logit_bias has token id 1 twice"),
    ({"logit_bias": {"-1": 0}}, "logit_bias's token id is '-1'"),
    ({"logit_bias": {"1.0": 0}}, "logit_bias's token id is '1.0'"),
    ({"logit_bias": {None: 0}}, "logit_bias's token id is None"),
    ({"logit_bias": {1: None}}, r"logit_bias\[1\] is None"),
    ({"logit_bias": {1: "2"}}, r"logit_bias\[1\] is '2'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS, ids=lambda value: shown(value, 40))
def test_values_out_of_range(fields, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(**fields)


def test_null_in_json_means_absent():
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None) == SamplingParams()


def test_what_is_an_integer_or_a_number_to_python_is_one_here():
    class Count(enum.IntEnum):
        THREE = 3

    given = SamplingParams(
        max_tokens=np.int64(3),
        n=Count.THREE,
        seed=torch.tensor(5),
        temperature=np.float32(0.5),
        top_p=Fraction(1, 2),
        stop_token_ids=[*np.arange(3).tolist(), np.int32(7)],
        logit_bias={"17": np.float64(1), np.int64(3): -math.inf},
    )
    wanted = SamplingParams(
        max_tokens=3,
        n=3,
        seed=5,
        temperature=0.5,
        top_p=0.5,
        stop_token_ids=[0, 1, 2, 7],
        logit_bias={17: 1.0, 3: -math.inf},
    )
    assert given == wanted
    plain = (given.max_tokens, given.n, given.seed, given.temperature, given.top_p, *given.stop_token_ids)
    assert {type(value) for value in plain} == {int, float}


def test_as_many_stop_strings_as_are_allowed_cost_little():
    stops = StopStrings(tuple("ab" * n + "c" for n in range(384, 512)))
    started = time.process_time()
    passed = "".join(stops.add("ab") for _ in range(600))
    assert time.process_time() - started < 10  # 2 s measured, with the worst text
    assert passed + stops.finish() == "ab" * 600


def test_the_ends_of_ranges_are_allowed():
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1.0, min_p=1, n=128, logprobs=0, seed=2**64 - 1)
