"""The draw against sorting with whole numbers in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch

from qwenkern.sampling import BELOW_ONE, draw
from qwenkern.sampling.draw import most_likely


def sorted_draw(logits, temperature, top_k, top_p, min_p, uniform):
    """The definition in words of the docs: sort, filter, then walk until the weights pass the random number."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    scaled = (logits[order] - logits[order[0]]) / torch.tensor(temperature)
    portions = scaled.exp()
    weights = [int(portion * 2.0**40) for portion in portions.tolist()]
    kept = len(order) if math.isinf(top_k) else min(len(order), int(top_k))
    total = sum(weights[:kept])
    if top_p < 1:
        before = 0
        for place in range(kept):
            if place and before >= float(torch.tensor(top_p)) * total:
                kept = place
                break
            before += weights[place]
    kept = min(kept, int((portions >= torch.tensor(min_p)).sum()))
    target = int(uniform * sum(weights[:kept]))
    passed = 0
    for place in range(kept):
        passed += weights[place]
        if passed > target:
            return order[place]
    raise AssertionError("the weights did not reach the target")


def some_logits(numbers, vocabulary):
    """Of several kinds: a wide range, few different values, all the same, and tokens that are forbidden."""
    generator = torch.Generator().manual_seed(numbers.randrange(2**31))
    logits = torch.randn(vocabulary, generator=generator) * numbers.choice([0.01, 1.0, 3.0, 30.0])
    kind = numbers.randrange(5)
    if kind == 1:
        logits = logits.bfloat16().float()
    elif kind == 2:
        logits = (logits * 2).round() / 2
    elif kind == 3:
        logits = torch.full_like(logits, -2.5)
    elif kind == 4:
        logits[torch.rand(vocabulary, generator=generator) < 0.9] = -math.inf
        logits[numbers.randrange(vocabulary)] = 1.0
    return logits


def some_settings(numbers, most=math.inf):
    top_k = numbers.choice([1, 2, 5, 20, 64, 100, 1000, math.inf])
    return (
        numbers.choice([1e-6, 0.2, 0.7, 1.0, 2.0, 100.0]),
        min(top_k, most),
        numbers.choice([1e-6, 0.1, 0.5, 0.8, 0.99, math.inf]),
        numbers.choice([0.0, 0.0, 0.01, 0.5, 1.0]),
    )


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("candidates", [64, 700])
def test_a_draw_is_that_of_sorting(candidates, seed):
    numbers = random.Random(f"{seed}/{candidates}")
    logits = torch.stack([some_logits(numbers, 700) for _ in range(16)])
    settings = [some_settings(numbers, most=64 if candidates == 64 else math.inf) for _ in logits]
    uniforms = torch.tensor([numbers.choice([0.0, BELOW_ONE, numbers.random()]) for _ in logits]).clamp(max=BELOW_ONE)
    found = draw(logits, torch.tensor(settings).T.contiguous(), uniforms, candidates).tolist()
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


def test_of_equal_largest_logits_the_lowest_id_is_greedy():
    logits = torch.zeros(1, 500)
    logits[0, [480, 17, 63]] = 2.0
    settings = torch.tensor([[1.0], [1.0], [math.inf], [0.0]])
    assert draw(logits, settings, torch.tensor([0.999]), 500).tolist() == draw(logits, None, None, 1).tolist() == [17]
