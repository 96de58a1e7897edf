"""The draw against sorting with integers in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.draws import some_logits, some_settings, sorted_draw

from qwenkern import kernels as ops
from qwenkern.kernels import most_likely
from qwenkern.sampling import BELOW_ONE, draw


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("most", [64, math.inf])
def test_a_draw_is_that_of_sorting(most, seed):
    numbers = random.Random(f"{seed}/{most}")
    logits = torch.stack([some_logits(numbers, 700) for _ in range(16)])
    settings = [some_settings(numbers, most) for _ in logits]
    uniforms = torch.tensor([numbers.choice([0.0, BELOW_ONE, numbers.random()]) for _ in logits]).clamp(max=BELOW_ONE)
    found = ops.draw(logits, logits.amax(-1), torch.tensor(settings).T.contiguous(), uniforms).tolist()
    expected = [sorted_draw(*row) for row in zip(logits, *zip(*settings, strict=True), uniforms.tolist(), strict=True)]
    assert found == expected


@pytest.mark.parametrize("count", [1, 3, 20])
def test_of_equal_logits_the_lower_id_comes_first(count):
    numbers = random.Random(count)
    logits = torch.stack([some_logits(numbers, 200) for _ in range(40)])
    logits[0, :50], logits[0, 25:30] = -0.0, 0.0
    values, ids = most_likely(logits, count)
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(ids, expected.indices[:, :count])


@pytest.mark.parametrize("values", [10**6, 3000])  # with 3,000, some of the largest are equal
@pytest.mark.parametrize("count", [1, 20, 64])
def test_the_most_likely_of_a_large_vocabulary(count, values):
    numbers = random.Random(f"{count}/{values}")
    rows = [[numbers.randint(-values, values) / 7 for _ in range(128 * 300)] for _ in range(6)]
    rows[0][77], rows[1][30_000] = math.inf, math.nan
    rows[2][:40] = [values] * 40  # the largest are neighbours
    for logits in (torch.tensor(rows[:3]), torch.tensor(rows[3:])):
        found, ids = most_likely(logits, count)
        expected = logits.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(found.nan_to_num(1e9), expected.values[:, :count].nan_to_num(1e9))
        assert torch.equal(ids, expected.indices[:, :count])


@pytest.mark.parametrize("size", [500, 128, 1280])
def test_the_largest_logit_is_greedy_of_equal_ones_the_lowest_id(size):
    numbers = random.Random(size)
    rows = [[numbers.randint(-90, 3) / 3 for _ in range(size)] for _ in range(50)]
    rows[0][-1], rows[1] = 5.0, [-1.0] * size
    logits = torch.tensor(rows)
    assert draw(logits, logits.amax(-1), None, None).tolist() == [row.index(max(row)) for row in rows]


def test_of_equal_largest_logits_the_lowest_id_is_greedy():
    logits = torch.zeros(1, 500)
    logits[0, [480, 17, 63]] = 2.0
    settings = torch.tensor([[1.0], [1.0], [math.inf], [0.0]])
    largest, uniforms = torch.tensor([2.0]), torch.tensor([0.999])
    assert draw(logits, largest, settings, uniforms).tolist() == draw(logits, largest, None, None).tolist() == [17]
