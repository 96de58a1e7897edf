"""The draw on Triton, against sorting with integers in Python."""

from __future__ import annotations

import math
import random

import pytest
import torch
from support.draws import some_logits, some_settings, sorted_draw
from support.mutations import Mutation
from support.references import guard, guarded_allocations

BELOW_ONE = 1 - 2**-24


@pytest.mark.parametrize("vocabulary", [700, 5000])
@pytest.mark.parametrize("seed", range(4))
def test_a_draw_is_that_of_sorting(ops, device, vocabulary, seed):
    numbers = random.Random(f"{seed}/{vocabulary}")
    logits = torch.stack([some_logits(numbers, vocabulary) for _ in range(6)])
    settings = [some_settings(numbers) for _ in logits]
    uniforms = [min(BELOW_ONE, numbers.choice([0.0, BELOW_ONE, numbers.random()])) for _ in logits]
    assert _drawn(ops, device, logits, settings, uniforms) == _sorted(logits, settings, uniforms)


def test_many_equal_logits(ops, device):
    """More than a program looks at together, in one interval; the places of the equal ones count."""
    logits = torch.full((6, 5000), -3.0)
    logits[:, ::2] = 1.5
    logits[:, 4000] = 1.505
    settings = [
        (1.0, math.inf, math.inf, 0.0),
        (1.0, 1800, 0.9, 0.0),
        (1.0, 3, 1.0, 0.0),
        (0.5, 20, 0.3, 0.9),
        (2.0, 4000, 0.7, 0.0),
    ]
    settings.append((1.0, math.inf, math.inf, 0.999))
    uniforms = [0.7, 0.99, 0.5, 0.4, 0.93, 0.99]
    assert _drawn(ops, device, logits, settings, uniforms) == _sorted(logits, settings, uniforms)


def test_many_different_logits_in_one_interval(ops, device):
    logits = torch.randperm(5000, generator=torch.Generator().manual_seed(1)).expand(3, -1) * 2e-6
    settings = [(1.0, math.inf, math.inf, 0.0), (1.0, 3000, 0.9, 0.0), (1.0, 4500, 0.5, 0.999)]
    uniforms = [0.73, 0.91, 0.4]
    assert _drawn(ops, device, logits, settings, uniforms) == _sorted(logits, settings, uniforms)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gets_an_id(ops, device, damage):
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    logits[1] = -math.inf
    logits[1, 7] = damage
    settings, uniforms = [(0.8, 50.0, 0.9, 0.1)] * 3, [0.2, 0.5, 0.9]
    first, id, last = _drawn(ops, device, logits, settings, uniforms)
    assert 0 <= id < 300
    assert [first, last] == _sorted(logits[::2], settings[::2], uniforms[::2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"largest": torch.ones(3)}, r"draw: largest must have shape \[2\], and has \[3\]"),
        ({"settings": torch.ones(5, 2)}, r"draw: settings must have shape \[4, 2\], and has \[5, 2\]"),
        ({"uniforms": torch.ones(2, 1)}, r"draw: uniforms must have shape \[2\], and has \[2, 1\]"),
        ({"logits": torch.ones(0, 9)}, r"draw: logits is empty, with shape \[0, 9\]"),
    ],
    ids=str,
)
def test_wrong_arguments(ops, change, message):
    given = {
        "logits": torch.ones(2, 9),
        "largest": torch.ones(2),
        "settings": torch.ones(4, 2),
        "uniforms": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        ops.draw(**given | change)


def _drawn(ops, device, logits, settings, uniforms):
    given = [logits, logits.amax(-1), torch.tensor(settings).T.contiguous(), torch.tensor(uniforms)]
    given = [guard(each.to(device), 5 if each is logits else 0) for each in given]
    with guarded_allocations():
        return ops.draw(*given).tolist()


def _sorted(logits, settings, uniforms):
    rows = zip(logits, *zip(*settings, strict=True), torch.tensor(uniforms).tolist(), strict=True)
    return [sorted_draw(*row) for row in rows]


CASE = {"vocabulary": 700, "seed": 0}
MUTATIONS = [
    Mutation(
        "min_p is ignored",
        "triton/draw.py",
        "tl.where(part < min_p, 0, weight)",
        "weight",
        test_many_equal_logits,
        {},
    ),
    Mutation(
        "one token more", "triton/draw.py", "top_k.to(tl.int64) - 1", "top_k.to(tl.int64)", test_many_equal_logits, {}
    ),
    Mutation("top_p is ignored", "triton/draw.py", "if top_p < 1:", "if top_p < 0:", test_many_equal_logits, {}),
    Mutation(
        "a tile only",
        "triton/draw.py",
        "total = before\n        for tile in range(start, end, BLOCK)",
        "total = before\n        for tile in range(start, start + 1, BLOCK)",
        test_many_different_logits_in_one_interval,
        {},
    ),
    Mutation(
        "the last of equal ones", "triton/draw.py", "(ids <= middle)", "(ids >= middle)", test_many_equal_logits, {}
    ),
    Mutation(
        "the next token",
        "triton/draw.py",
        "end - 1, token, mask",
        "end - 1, token + 1, mask",
        test_many_equal_logits,
        {},
    ),
]
