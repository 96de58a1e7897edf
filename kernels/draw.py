"""Draws a token id for each row of logits.

    token:        a      b     c     d   ...     in descending order of their logits, of equal ones the lower id first
    weights:   ├──────┼─────┼────┼──┼─┼┼┤        exp((logit - largest) / temperature)
    top_k:     ├─────────────────────┤
    top_p:     ├────────────────┤                each filter keeps a beginning of this order, so its sum says all
    min_p:     ├───────────────────┤
    uniform:   ├─────────┼──────┤                a part of the smallest sum: here it falls on b

The weights are whole numbers, multiples of 2**-40. So their sums do not depend on the order of adding, and neither does
the token: nobody has to sort the vocabulary. Bytes moved: 4 R V of logits, a few times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_device, check_tensor, wide
from .contract import Steps, op

SCALE = 2.0**40  # of weights; 2**22 tokens of the largest weight stay below 2**62
INTERVALS_PER_UNIT = 64  # of -log(weight)
INTERVALS = 2048  # at least 40 log(2) units: a smaller weight is 0
_FEW = 64  # candidates that are sorted
_RUN = 128  # logits whose largest is found first
_NO_KEY = -(2**63)  # below all keys


def _fake(logits: Tensor, largest: Tensor, settings: Tensor, uniforms: Tensor) -> Tensor:
    return logits.new_empty(len(logits), dtype=torch.int64)


@op(fake=_fake)
def draw(logits: Tensor, largest: Tensor, settings: Tensor, uniforms: Tensor) -> Steps[Tensor]:
    """A token id for each row of logits [R, V] float32: ids [R] int64.

    largest [R] is each row's largest logit. settings is [4, R]: temperature (above 0), top_k (1 is greedy, infinity is
    all), top_p (1 or more is all) and min_p (0 is all). uniforms [R] are from 0 to 1 - 2^-24. All are float32.

    The weight of a token is exp((logit - largest) / temperature), a multiple of 2^-40, rounded down. In descending
    order of the logits, of equal ones the lower id first, each row keeps the shortest of: the first top_k tokens, the
    first whose weights reach the part top_p of those, and those whose weight is at least min_p. It draws the first
    token at which the sum of the weights exceeds the part ``uniform`` of what is kept. Where the largest logit is
    infinite or NaN, the id is any of the vocabulary's."""
    check_tensor("draw", "logits", logits, ("R", "V"), dtypes=(torch.float32, torch.float64))
    rows = logits.shape[0]
    check_tensor("draw", "largest", largest, (rows,), like=logits)
    check_tensor("draw", "settings", settings, (4, rows), like=logits)
    check_tensor("draw", "uniforms", uniforms, (rows,), like=logits)
    check_device("draw", logits=logits, largest=largest, settings=settings, uniforms=uniforms)
    yield
    most = int(settings[1].max().clamp(max=logits.shape[-1]))
    drawn = _drawn_from_few if most <= _FEW else _drawn_without_sorting
    return drawn(logits, largest[:, None], settings[..., None], uniforms[:, None]).squeeze(-1)


def most_likely(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest ``count`` logits of each row [R, V] float32, in descending order, and their ids, [R, count] each. Of
    equal ones the lower id comes first. NaN comes before all others. A CUDA graph can capture it."""
    if logits.is_cpu:
        values, ids = _topk(logits, min(count + 1, logits.shape[-1]))
        if (values[:, 1:] < values[:, :-1]).all():
            return values[:, :count], ids[:, :count]
    ids = _ids(_keys(logits).topk(count).values)  # topk has equal ones in any order
    return logits.gather(-1, ids), ids


def _topk(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """logits.topk(count) of rows [R, V] on a CPU. Looks at runs of logits with the largest maxima only, because torch's
    topk takes much longer for a logit than amax. Of equal logits, the last may be of any run."""
    runs = logits.shape[-1] // _RUN
    if logits.shape[-1] % _RUN or runs < 4 * count or not logits.is_contiguous():
        return logits.topk(count)
    parts = logits.view(len(logits), runs, _RUN)
    run = parts.amax(-1).topk(count).indices
    values, at = parts.take_along_dim(run[..., None], 1).flatten(1).topk(count)
    return values, run.gather(1, at // _RUN) * _RUN + at % _RUN


def _drawn_from_few(logits: Tensor, largest: Tensor, settings: Tensor, uniforms: Tensor) -> Tensor:
    """The draw where no row keeps more than _FEW tokens."""
    temperature, top_k, top_p, min_p = settings
    values, ids = most_likely(logits, min(_FEW, logits.shape[-1]))
    weights, total = _weights(values, largest, temperature, min_p)
    sums = weights.cumsum(-1)
    last = sums.shape[-1] - 1
    by_count = sums.gather(-1, (top_k - 1).clamp(max=last).long())
    total = torch.minimum(total, by_count)
    enough = (sums <= _before_part(top_p, by_count)).sum(-1, keepdim=True)
    total = torch.minimum(total, sums.gather(-1, enough.clamp(max=last)))
    chosen = (sums <= _drawn_part(uniforms, total)).sum(-1, keepdim=True)
    return ids.gather(-1, chosen.clamp(max=last))


def _drawn_without_sorting(logits: Tensor, largest: Tensor, settings: Tensor, uniforms: Tensor) -> Tensor:
    """Counts and weights are summed for each of many intervals of weights. Only the intervals in which a sum ends are
    sorted."""
    temperature, top_k, top_p, min_p = settings
    last = logits.shape[-1] - 1
    weights, kept = _weights(logits, largest, temperature, min_p)
    intervals = _Intervals(logits, largest, temperature, weights)
    total = weights.sum(-1, keepdim=True)
    if (top_k <= last).any():
        _, total = intervals.find(torch.ones_like(weights), (top_k - 1).clamp(max=last).long())
    if (top_p < 1).any():
        _, by_weight = intervals.find(weights, _before_part(top_p, total))
        total = torch.minimum(total, by_weight)
    return intervals.find(weights, _drawn_part(uniforms, torch.minimum(total, kept)))[0]


def _keys(logits: Tensor) -> Tensor:
    """Whole numbers in the order of the tokens, no two the same in a row: [R, V] int64."""
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - torch.arange(logits.shape[-1], device=logits.device))


def _ids(keys: Tensor) -> Tensor:
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _weights(logits: Tensor, largest: Tensor, temperature: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of logits [R, C] as whole numbers, int64, and the sum of those that min_p keeps, [R, 1]."""
    # Subtracting the largest before the division avoids overflow.
    weights = ((wide(logits) - largest) / temperature).exp()
    whole = (weights * SCALE).long()
    return whole, whole.masked_fill(weights < min_p, 0).sum(-1, keepdim=True)


def _before_part(top_p: Tensor, total: Tensor) -> Tensor:
    """The largest whole number below this part of sums [R, 1] int64. The first sum above it is at least the part."""
    whole = total.double()
    return torch.minimum(top_p.double() * whole, whole).ceil().long() - 1


def _drawn_part(uniforms: Tensor, total: Tensor) -> Tensor:
    """The numbers [R, 1] as a part of sums [R, 1] int64, rounded down: less than the sum."""
    return (uniforms.double() * total.double()).long()


class _Intervals:
    """The tokens of each row, by intervals of their weights."""

    def __init__(self, logits: Tensor, largest: Tensor, temperature: Tensor, weights: Tensor) -> None:
        places = (largest - logits) / temperature * INTERVALS_PER_UNIT
        self._of = places.nan_to_num(nan=0.0, posinf=INTERVALS).clamp(0, INTERVALS - 1).long()
        self._keys, self._weights = _keys(logits), weights
        self._weight_sums = self._sums(weights)

    def find(self, measure: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The token in each row at which the sum of ``measure`` [R, V], in descending order of the logits, first
        exceeds ``target`` [R, 1]: its id, and the sum of the weights up to it, both [R, 1]."""
        sums = self._weight_sums if measure is self._weights else self._sums(measure)
        interval = (sums <= target).sum(-1, keepdim=True).clamp(max=INTERVALS - 1)
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
        empty = torch.zeros(len(measure), INTERVALS, dtype=torch.int64, device=measure.device)
        return empty.scatter_add_(-1, self._of, measure).cumsum(-1)

    @staticmethod
    def _before(sums: Tensor, interval: Tensor) -> Tensor:
        return torch.where(interval > 0, sums.gather(-1, (interval - 1).clamp(min=0)), 0)
