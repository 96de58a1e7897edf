"""The draw in C against sorting with whole numbers in Python, on every target and as plain loops."""

from __future__ import annotations

import math
import random

import pytest
import torch
from c import emulated
from c.test_ops import Plain, fast, in_c, refusal, torchs  # noqa: F401  # the fixture runs by itself
from support.draws import some_logits, some_settings, sorted_draw
from support.references import guard, guarded_allocations

from qwenkern import kernels
from qwenkern.kernels import c as c_backend
from qwenkern.kernels.c import draw as of_c
from qwenkern.kernels.c import recorded_calls

BELOW_ONE = 1 - 2**-24
ALL = (1.0, math.inf, math.inf, 0.0)


def drawn(logits, settings, uniforms):
    """In C, which must take it, with NaN around what it reads and canaries around what it allocates."""
    given = [logits, logits.amax(-1), torch.tensor(settings).T.contiguous(), torch.tensor(uniforms)]
    assert refusal("draw", *given) is None
    if emulated.is_emulated():
        return fast.draw(*given).tolist()
    recorded_calls._of_thread.__dict__.pop("scratch", None)  # so that it is allocated anew
    with guarded_allocations():
        return fast.draw(*(guard(each, 5 if each is logits else 0) for each in given)).tolist()


def by_sorting(logits, settings, uniforms):
    rows = zip(logits, settings, torch.tensor(uniforms).tolist(), strict=True)
    return [sorted_draw(row, *of_row, uniform) for row, of_row, uniform in rows]


def assert_that_of_sorting(logits, settings, uniforms):
    assert drawn(logits, settings, uniforms) == by_sorting(logits, settings, uniforms)


def some_uniforms(numbers, count):
    return [min(BELOW_ONE, numbers.choice([0.0, BELOW_ONE, numbers.random()])) for _ in range(count)]


@pytest.mark.parametrize("vocabulary", [1, 2, 63, 128, 700, 1280, 3001])
@pytest.mark.parametrize("seed", range(4))
def test_a_draw_is_that_of_sorting(vocabulary, seed):
    numbers = random.Random(f"{seed}/{vocabulary}")
    logits = torch.stack([some_logits(numbers, vocabulary) for _ in range(8)])
    assert_that_of_sorting(logits, [some_settings(numbers) for _ in logits], some_uniforms(numbers, len(logits)))


def test_a_token_is_the_same_alone_and_in_a_batch():
    numbers = random.Random(0)
    logits = torch.stack([some_logits(numbers, 900) for _ in range(24)])
    settings, uniforms = [some_settings(numbers) for _ in logits], some_uniforms(numbers, len(logits))
    together = drawn(logits, settings, uniforms)
    assert together == [drawn(logits[i : i + 1], settings[i : i + 1], uniforms[i : i + 1])[0] for i in range(24)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert together == drawn(logits, settings, uniforms)
    finally:
        torch.set_num_threads(threads)


def test_a_large_vocabulary():
    if emulated.is_emulated() or isinstance(c_backend.library(), Plain):
        pytest.skip("takes long")
    logits = torch.randn(7, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    logits[1] = logits[1].bfloat16().float()
    settings = [(0.7, 20, 0.8, 0.0), ALL, (0.7, math.inf, 0.9, 0.0), (1.0, 64, 1.0, 0.0)]
    settings += [(1.2, 5000, 0.9, 0.01), (2.0, math.inf, 1.0, 0.02), (100.0, math.inf, 0.7, 0.0)]
    assert_that_of_sorting(logits, settings, [0.9, 0.7, 0.97, 0.999, 0.9, 0.95, 0.6])


def test_the_places_of_equal_logits_count():
    """Thousands of them, in one interval; -0 is 0."""
    logits = torch.full((6, 2500), -3.0)
    logits[:, ::2] = 1.5
    logits[:, 2000] = 1.505
    logits[5] = torch.tensor([0.0, -0.0]).repeat(1250)
    settings = [ALL, (1.0, 900, 0.9, 0.0), (1.0, 3, 1.0, 0.0), (0.5, 20, 0.3, 0.9), (2.0, 2000, 0.7, 0.0)]
    assert_that_of_sorting(logits, [*settings, (1.0, 700, 0.9, 1.0)], [0.7, 0.99, 0.5, 0.4, 0.93, 0.77])


@pytest.mark.parametrize("vocabulary", [40, 1000])
def test_a_filter_keeps_neither_more_nor_less(vocabulary):
    """Of equal logits, so that a token is a known part of the whole. The last of what is kept is drawn."""
    count = vocabulary // 4
    kept = [(1.0, math.inf, 1.0, 0.0), (1.0, float(count), 1.0, 0.0), (1.0, float(vocabulary), 0.25, 0.0)]
    kept += [(1.0, 2.0 * count, 0.5, 0.0), (1.0, float(count), 1.0, 1.0), (1.0, math.inf, 0.25, 0.9)]
    logits = torch.full((len(kept), vocabulary), 3.0)
    expected = [vocabulary - 1, *[count - 1] * 5]
    assert drawn(logits, kept, [BELOW_ONE] * len(kept)) == expected
    logits[:, count + 5 :] -= 1e-3  # others come behind them
    settings = [(1.0, float(vocabulary), 1.0, 0.9999), (1.0, count + 7.0, 1.0, 0.0)]
    assert drawn(logits[:2], settings, [BELOW_ONE] * 2) == [count + 4, count + 6]


def test_many_different_logits_in_one_interval():
    """On both sides of zero, where floats are dense; and the largest ones, where they are not."""
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(1))
    logits = torch.stack([(order - 1250) * 2e-6, (order - 1250) * 1e-30, 1e6 + order / 16])
    settings = [ALL, (1.0, 2000, 0.9, 0.0), (1e4, 2400, 0.5, 0.0)]
    assert_that_of_sorting(logits, settings, [0.73, 0.91, 0.4])


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 0.01])
@pytest.mark.parametrize("top_k", [20.0, math.inf])
def test_a_tiny_temperature_leaves_the_largest(temperature, top_k):
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(2)) * 3
    logits[1, [40, 290]] = logits.amax() + 1
    settings = [(temperature, top_k, math.inf, 0.0)] * 2
    assert drawn(logits, settings, [BELOW_ONE, 0.4]) == [logits[0].argmax().item(), 40]
    assert drawn(logits, settings, [0.0, BELOW_ONE])[1] == 290


@pytest.mark.parametrize("top_k", [1.0, 20.0, 80.0, math.inf])
def test_forbidden_tokens_are_never_drawn(top_k):
    logits = torch.full((4, 500), -math.inf)
    logits[0, 499] = logits[1, 0] = -80.0
    logits[2, [3, 130, 131]] = torch.tensor([-1e30, 2.0, 2.0])
    logits[3, 256:260] = 0.5
    settings = [(1.0, top_k, 1.0, 0.0)] * 4
    assert_that_of_sorting(logits, settings, [BELOW_ONE] * 4)
    assert_that_of_sorting(logits, settings, [0.0] * 4)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("top_k", [50.0, math.inf])
def test_a_row_that_is_not_finite_gets_an_id(damage, top_k):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits[1] = -math.inf
    logits[1, 7] = damage
    settings, uniforms = [(0.8, top_k, 0.9, 0.1)] * 3, [0.2, 0.5, 0.9]
    first, id, last = drawn(logits, settings, uniforms)
    assert 0 <= id < 300
    assert [first, last] == by_sorting(logits[::2], settings[::2], uniforms[::2])


@pytest.mark.parametrize("largest", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("top_k", [50.0, 200.0, math.inf])
def test_a_wrong_largest_logit_breaks_nothing(largest, top_k):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 5
    logits[0, 5], logits[0, 6] = math.nan, math.inf
    settings = torch.tensor([[1.0], [top_k], [0.9], [0.0]])
    assert 0 <= fast.draw(logits, torch.tensor([largest]), settings, torch.tensor([0.5])).item() < 300


def test_rows_may_have_any_stride():
    numbers = random.Random(3)
    logits = torch.stack([some_logits(numbers, 400) for _ in range(5)])
    settings, uniforms = [some_settings(numbers) for _ in logits], some_uniforms(numbers, len(logits))
    wide, apart = torch.full((5, 450), math.nan), torch.full((4, 9), math.nan)
    wide[:, 20:420], apart[:, 2:7] = logits, torch.tensor(settings).T
    found = fast.draw(wide[:, 20:420], logits.amax(-1), apart[:, 2:7], torch.tensor(uniforms))
    assert found.tolist() == by_sorting(logits, settings, uniforms)


def test_one_row_takes_one_thread(monkeypatch):
    teams = []
    monkeypatch.setattr(of_c, "run", lambda call, team=None: teams.append(team))
    for rows in (1, 2):
        logits = torch.zeros(rows, 70_000)
        fast.draw(logits, logits[:, 0], torch.ones(4, rows), torch.zeros(rows))
    assert teams == [1, None]


def test_float64_is_left_to_the_reference(monkeypatch):
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    logits = torch.tensor([[1.0, 3.0, 2.0]]).double()
    given = logits, logits.amax(-1), torch.ones(4, 1).double(), torch.zeros(1).double()
    assert refusal("draw", *given) == "float64 (C takes bfloat16 and float32)"
    assert kernels.draw(*given).tolist() == torchs.draw(*given).tolist() == [1]
    recorded, given = c_backend.RecordedCalls(), [each.float() for each in given]
    with recorded.record():  # nothing but C can be recorded
        id = kernels.draw(*given)
    recorded.replay()
    assert id.tolist() == [1]
