"""Draws one token id for each row of logits.

    token:        a      b     c     d   ...     in descending order of their logits, of equal ones the lower id first
    weights:   ├──────┼─────┼────┼──┼─┼┼┤        exp((logit - largest) / temperature)
    top_k:     ├─────────────────────┤
    top_p:     ├────────────────┤                each filter keeps a beginning of this order, so its sum says all
    min_p:     ├───────────────────┤
    uniform:   ├─────────┼──────┤                a part of the smallest sum: here it falls on b

The weights are whole numbers, multiples of 2**-40. So their sums do not depend on the order of adding, and neither does
the token: it is the same whether the vocabulary is sorted or not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BELOW_ONE = 1 - 2**-24  # a number closer to 1 rounds to 1 in float32, and would draw an excluded token
NOT_FINITE = -1  # in place of a token id if the largest logit of the row is NaN or infinite
_SCALE = 2.0**40  # 2**22 tokens of the largest weight stay below 2**62
_NO_KEY = -(2**63)  # below all keys
_BINS = 2048
_BINS_PER_UNIT = 64  # of a logit


def or_not_finite(ids: Tensor, largest: Tensor) -> Tensor:
    """Token ids [R], and NOT_FINITE where the largest logit of the row [R] is NaN or infinite."""
    return torch.where(largest.abs() < math.inf, ids, NOT_FINITE)


def draw(logits: Tensor, settings: Tensor | None, uniforms: Tensor | None, candidates: int) -> Tensor:
    """Draws one token id for each row of logits [R, V] float32 from its ``candidates`` most likely tokens: ids [R].

    ``settings`` is float32, [4, R] or more: temperature, top_k, top_p, min_p. A temperature is above 0, and a greedy
    row has top_k 1. ``uniforms`` is [R] float32, each in [0, BELOW_ONE]. With one candidate, both may be None. On a GPU
    nothing here waits for the device, so a CUDA graph can capture it. A row that is not finite gets an arbitrary id."""
    if candidates == 1:
        return logits.argmax(-1)
    assert settings is not None, "a choice among several tokens takes settings"
    assert uniforms is not None, "and a random number for each row"
    if candidates == logits.shape[-1] and not logits.is_cuda:
        return _drawn_without_sorting(logits, settings, uniforms)
    temperature, top_k, top_p, min_p = settings[:4, :, None]
    values, ids = most_likely(logits, candidates)
    weights, kept = _weights(values, values[:, :1], temperature, min_p)
    sums = weights.cumsum(-1)
    last = sums.shape[-1] - 1
    total = sums.gather(-1, (top_k - 1).clamp(max=last).long())
    enough = (sums <= _before_part(top_p, total)).sum(-1, keepdim=True)
    total = torch.minimum(total, sums.gather(-1, enough.clamp(max=last)))
    total = torch.minimum(total, kept)
    chosen = (sums <= _drawn_part(uniforms, total)).sum(-1, keepdim=True)
    return ids.gather(-1, chosen.clamp(max=last)).squeeze(-1)


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest ``count`` logits of each row [R, V] float32, in descending order, and their ids, [R, count] each. Of
    equal ones the lower id comes first. NaN comes before all others."""
    if logits.is_cuda:
        ids = _ids(_keys(logits).topk(count).values)
        return logits.gather(-1, ids), ids
    values, ids = logits.topk(min(count + 1, logits.shape[-1]))
    if (values[:, 1:] < values[:, :-1]).all():
        return values[:, :count], ids[:, :count]
    ids = _ids(_keys(logits).topk(count).values)  # topk has equal ones in any order
    return logits.gather(-1, ids), ids


def _keys(logits: Tensor) -> Tensor:
    """Whole numbers in the order of the tokens, no two the same in a row: [R, V] int64."""
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - torch.arange(logits.shape[-1], device=logits.device))


def _ids(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _weights(logits: Tensor, largest: Tensor, temperature: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of logits [R, C] as whole numbers, int64, and the sum of those that min_p keeps, [R, 1]."""
    # Subtracting the largest before the division avoids overflow.
    weights = ((logits - largest) / temperature).exp()
    whole = (weights * _SCALE).long()
    return whole, whole.masked_fill(weights < min_p, 0).sum(-1, keepdim=True)


def _before_part(top_p: Tensor, total: Tensor) -> Tensor:
    """The largest whole number below this part of sums [R, 1] int64. The first sum above it is at least the part."""
    whole = total.double()
    return torch.minimum(top_p.double() * whole, whole).ceil().long() - 1


def _drawn_part(uniforms: Tensor, total: Tensor) -> Tensor:
    """The numbers [R] as a part of sums [R, 1] int64, rounded down: less than the sum."""
    return (uniforms.double()[:, None] * total.double()).long()


def _drawn_without_sorting(logits: Tensor, settings: Tensor, uniforms: Tensor) -> Tensor:
    """Counts and weights are summed for each of many intervals of logits. Only the intervals in which a sum ends are
    sorted. This reads values, so it would wait for a GPU."""
    temperature, top_k, top_p, min_p = settings[:4, :, None]
    largest = logits.amax(-1, keepdim=True)
    weights, kept = _weights(logits, largest, temperature, min_p)
    intervals = _Intervals(logits, largest, weights)
    total = weights.sum(-1, keepdim=True)
    if (top_k < logits.shape[-1]).any():
        _, by_count = intervals.find(torch.ones_like(weights), (top_k - 1).clamp(max=logits.shape[-1] - 1).long())
        total = torch.minimum(total, by_count)
    if (top_p < 1).any():
        _, by_weight = intervals.find(weights, _before_part(top_p, total))
        total = torch.minimum(total, by_weight)
    total = torch.minimum(total, kept)
    ids, _ = intervals.find(weights, _drawn_part(uniforms, total))
    return ids.squeeze(-1)


class _Intervals:
    """The tokens of each row, by intervals of their logits."""

    def __init__(self, logits: Tensor, largest: Tensor, weights: Tensor) -> None:
        places = ((largest - logits) * _BINS_PER_UNIT).nan_to_num(nan=0.0, posinf=_BINS).clamp(0, _BINS - 1)
        self._keys, self._weights, self._of = _keys(logits), weights, places.long()
        self._weight_sums = self._sums(weights)

    def find(self, measure: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The token in each row at which the sum of ``measure`` [R, V], in descending order of the logits, first
        exceeds ``target`` [R, 1]: its id, and the sum of the weights up to it, both [R, 1]."""
        sums = self._weight_sums if measure is self._weights else self._sums(measure)
        interval = (sums <= target).sum(-1, keepdim=True).clamp(max=_BINS - 1)
        is_there = self._of == interval
        most = max(1, int(is_there.sum(-1).max()))
        keys = self._keys.masked_fill(~is_there, _NO_KEY).topk(most).values
        inside, ids = keys > _NO_KEY, _ids(keys).clamp(max=measure.shape[-1] - 1)
        sums = self._before(sums, interval) + (measure.gather(-1, ids) * inside).cumsum(-1)
        place = (sums <= target).sum(-1, keepdim=True).clamp(max=most - 1)
        weights = self._before(self._weight_sums, interval) + (self._weights.gather(-1, ids) * inside).cumsum(-1)
        return ids.gather(-1, place), weights.gather(-1, place)

    def _sums(self, measure: Tensor) -> Tensor:
        """The sum of a measure of the tokens up to the end of each interval."""
        empty = torch.zeros(len(measure), _BINS, dtype=torch.int64, device=measure.device)
        return empty.scatter_add_(-1, self._of, measure).cumsum(-1)

    @staticmethod
    def _before(sums: Tensor, interval: Tensor) -> Tensor:
        return torch.where(interval > 0, sums.gather(-1, (interval - 1).clamp(min=0)), 0)
