"""The changes to the logits in a captured step, against those on the host: bit by bit, for random parameters."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.sampled_rows import FakeRow

from qwenkern import RequestError, SamplingParams, TokenLogprob
from qwenkern.sampling import NOT_FINITE, Drawing, Sampling, TokenStates, sample, sampled
from qwenkern.sampling.penalties import penalise

VOCABULARY = 101  # not a multiple of 32


def some_params(numbers: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=numbers.choice([0.0, 0.7, 1.5]),
        top_k=numbers.choice([0, 1, 5, 80]),
        top_p=numbers.choice([1.0, 0.8]),
        min_p=numbers.choice([0.0, 0.1]),
        repetition_penalty=numbers.choice([1.0, 1.05, 1.3, 0.8]),
        presence_penalty=numbers.choice([0.0, 0.37, -1.2]),
        frequency_penalty=numbers.choice([0.0, 0.11, -0.3]),
        logit_bias=numbers.choice(
            [{}, {numbers.randrange(VOCABULARY): numbers.choice([3.3, -math.inf]) for _ in range(9)}]
        ),
        min_tokens=numbers.choice([0, 3, 12]),
        logprobs=numbers.choice([None, None, 0, 3]),
    )


def some_row(numbers: random.Random, seed: int = 0, **fields) -> FakeRow:
    prompt = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(1, 40))]
    output = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(1, 10))]
    ends = frozenset(numbers.sample(range(VOCABULARY), 2))
    params = SamplingParams(**fields) if fields else some_params(numbers)
    return FakeRow(params, prompt, output, ends, seed)


def upload(target, values):
    target.copy_(torch.as_tensor(values, dtype=target.dtype))


class Step:
    """Captures the sampling of some rows. ``launch`` runs it on given logits."""

    def __init__(self, states: TokenStates, rows: list[FakeRow], spare: int = 1) -> None:
        self.rows, size = rows, len(rows) + spare
        drawing = Drawing.of(rows, VOCABULARY)
        if drawing.adjusts:
            states.reserve(size)
        moves = torch.tensor([1] * len(rows) + [0] * spare, dtype=torch.int32)
        self.sampling = Sampling(drawing, states, moves)
        self.sampling.load(rows, upload)

    def launch(self, logits: torch.Tensor) -> list:
        self.sampling.launch(self.rows, upload)
        spare = logits.new_zeros(len(self.sampling._moves) - len(self.rows), VOCABULARY)
        tokens, out = self.sampling.run(torch.cat([logits, spare]))
        assert ((tokens >= 0) & (tokens < VOCABULARY)).all()
        return [sampled(row, each) for row, each in zip(out.tolist()[: len(self.rows)], self.rows, strict=True)]


def accept(rows, tokens) -> None:
    for row, token in zip(rows, tokens, strict=True):
        row.output_ids.append(token.token_id if isinstance(token, TokenLogprob) else token)


@pytest.mark.parametrize("seed", range(40))
def test_the_logits_are_those_of_the_host(seed):
    numbers = random.Random(seed)
    rows, states = [some_row(numbers) for _ in range(6)], TokenStates(VOCABULARY, torch.device("cpu"))
    states.reserve(len(rows))
    slots = torch.tensor(states.load(rows, upload))
    from qwenkern.sampling.drawing import DRAW_ROWS, settings_of

    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4
    found = states.adjust(logits, slots, torch.tensor(settings_of(rows)[DRAW_ROWS:]))
    for each, mine, row in zip(logits, found, rows, strict=True):
        penalise(each, row)
        assert torch.equal(mine, each)


@pytest.mark.parametrize("seed", range(40))
def test_tokens_and_logprobs_are_those_of_the_host(seed):
    """Over many steps, with changing rows, and with steps of the host in between."""
    numbers, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    states = TokenStates(VOCABULARY, torch.device("cpu"))
    pairs = [[some_row(random.Random(f"{seed}/{at}"), seed=at) for _ in range(2)] for at in range(12)]
    for _ in range(8):
        chosen = numbers.sample(pairs, numbers.randrange(1, 11))
        mine, theirs = zip(*chosen, strict=True)
        step = Step(states, list(mine), spare=numbers.randrange(3))
        for _ in range(numbers.randrange(1, 4)):
            logits = torch.randn(len(mine), VOCABULARY, generator=generator) * 4
            expected = sample(logits.clone(), theirs)
            found = step.launch(logits)
            assert found == expected
            accept(mine, found), accept(theirs, expected)
        if numbers.random() < 0.3:  # as after a preemption
            accept(mine, [5] * len(mine)), accept(theirs, [5] * len(theirs))


def test_a_sequence_is_uploaded_once():
    rows, states = (
        [some_row(random.Random(at), presence_penalty=1.0) for at in range(9)],
        TokenStates(VOCABULARY, torch.device("cpu")),
    )
    states.reserve(8)
    uploads = []

    def counted(target, values):
        uploads.append(target)
        upload(target, values)

    for _ in range(3):
        states.load(rows[:8], counted)
    assert len(uploads) == 2 * 8
    assert len(set(states.load(rows[1:], counted))) == 8  # the ninth row takes the slot of the first
    assert len(uploads) == 2 * 9
    step = Step(states, rows[1:8], spare=1)
    del uploads[:]
    for _ in range(2):
        accept(rows[1:8], step.launch(torch.zeros(7, VOCABULARY)))
        states.load(rows[1:8], counted)
    assert not uploads, "the step itself keeps the histories"
    del rows[2:], step
    states.load(rows, counted)  # the first row returns, into a slot that has become free
    assert len(uploads) == 2


def test_a_mask_of_a_grammar_forbids():
    row, states = (
        some_row(random.Random(1), temperature=0.9, repetition_penalty=1.2),
        TokenStates(VOCABULARY, torch.device("cpu")),
    )
    step = Step(states, [row])
    allowed = [3, 31, 32, 100]
    words = [0] * 4
    for token in allowed:
        words[token // 32] |= 1 << (token % 32)
    [slot] = states.load([row], upload)
    states.allowed[slot] = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    drawn = []
    for seed in range(60):
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        drawn += step.launch(logits)
    assert set(drawn) == set(allowed)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_what_leaves_no_token_is_the_hosts_error(logprobs):
    forbidden = dict.fromkeys(range(VOCABULARY), -math.inf)
    most = {"logit_bias": {token: bias for token, bias in forbidden.items() if token != 7}, "min_tokens": 9}
    for fields, ends in (
        ({"logit_bias": forbidden}, ()),
        (most, (7,)),
        ({"repetition_penalty": 1e-300}, ()),
        ({"presence_penalty": 0.5}, ()),
    ):
        for value in (0.0, math.nan, math.inf):
            pair = [
                FakeRow(SamplingParams(logprobs=logprobs, **fields), list(range(VOCABULARY)), [1], frozenset(ends))
                for _ in range(2)
            ]
            logits = torch.linspace(-1, 1, VOCABULARY)[None].clone()
            logits[0, 3] += value
            [found], [expected] = (
                Step(TokenStates(VOCABULARY, torch.device("cpu")), pair[:1]).launch(logits),
                sample(logits.clone(), pair[1:]),
            )
            assert str(found) == str(expected)
            assert isinstance(found, RequestError) == (value == 0 and "presence_penalty" not in fields)
            assert (found == NOT_FINITE) == (value != 0)
