"""Changes the logits before a token is drawn: penalties, biases, and end ids that are not allowed yet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .parameters import SampledSequence


def penalise(row: Tensor, sequence: SampledSequence) -> None:
    """Applies penalties and biases and forbids early end ids, in place, on one row of logits [V]."""
    params = sequence.params
    penalty = params.repetition_penalty
    if penalty is not None and penalty != 1.0:
        seen = ids_like(set(sequence.prompt_ids) | set(sequence.output_ids), row)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(sequence.output_ids)
        often = torch.tensor(list(counts.values()), **options_like(row))
        row[ids_like(counts, row)] -= params.presence_penalty + params.frequency_penalty * often
    if params.logit_bias:
        row[ids_like(params.logit_bias, row)] += torch.tensor(list(params.logit_bias.values()), **options_like(row))
    if len(sequence.output_ids) < params.min_tokens:
        row[ids_like(sequence.end_ids, row)] = -math.inf


def choice_errors(logits: Tensor, sequences: Sequence[SampledSequence], changed: list[int]) -> dict[int, RequestError]:
    """An error for each changed row whose logits are now all -inf, or include NaN or +inf."""
    tops = logits[changed].amax(-1).tolist()
    return {
        index: _choice_error(sequences[index], top)
        for index, top in zip(changed, tops, strict=True)
        if not math.isfinite(top)
    }


def _choice_error(sequence: SampledSequence, top: float) -> RequestError:
    params = sequence.params
    if top == -math.inf:
        is_early = len(sequence.output_ids) < params.min_tokens
        by = " and ".join(["logit_bias"] * bool(params.logit_bias) + ["min_tokens"] * is_early)
        return RequestError(f"every token is forbidden by {by}; expected at least one that may be drawn")
    return RequestError(
        f"repetition_penalty {params.repetition_penalty} makes a logit {top}; expected a value that keeps it finite"
    )


def options_like(logits: Tensor) -> dict[str, Any]:
    """Keywords of torch.tensor, which otherwise follows torch's default dtype and device."""
    return {"dtype": logits.dtype, "device": logits.device}


def ids_like(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)
