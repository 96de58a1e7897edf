"""Draws by sorting, and logits and settings for draws."""

from __future__ import annotations

import math

import torch


def sorted_draw(logits, temperature, top_k, top_p, min_p, uniform):
    """The definition in the docs: sort, filter, then add weights until their sum exceeds the random number."""
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
    """Logits of several kinds: a wide range, few different values, all equal, and forbidden tokens."""
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
