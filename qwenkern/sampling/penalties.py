"""Changes the logits before a token is drawn: applies penalties and biases, and forbids early end ids."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from .parameters import SampledSequence


def penalise(row: Tensor, sequence: SampledSequence) -> None:
    """Applies penalties and biases and forbids early end ids, in place, on one row of logits [V].

    All operations are on float32 tensors. So on_device.py, which applies them to all tokens of many rows, gives the
    same bits."""
    params = sequence.params
    penalty = params.repetition_penalty
    repeats = penalty is not None and penalty != 1.0
    if repeats or params.presence_penalty or params.frequency_penalty:
        ids, counts = sequence.history.of(sequence.prompt_ids, sequence.output_ids)
        ids, counts = ids.to(row.device), counts.to(row.device)
        scores = row[ids]
        if repeats:
            factor = torch.tensor(penalty, **options_like(row))
            scores = torch.where(scores > 0, scores / factor, scores * factor)
        if params.presence_penalty or params.frequency_penalty:
            less = params.presence_penalty + params.frequency_penalty * counts
            scores = torch.where(counts > 0, scores - less, scores)
        row[ids] = scores
    if params.logit_bias:
        ids, values = params.biases
        row[ids.to(row.device)] += values.to(**options_like(row))
    if len(sequence.output_ids) < params.min_tokens:
        row[ids_like(sequence.end_ids, row)] = -math.inf


def choice_error(sequence: SampledSequence, largest: float) -> RequestError:
    """The error for a sequence whose largest logit is infinite or NaN after its penalties and biases."""
    params = sequence.params
    if largest == -math.inf:
        is_early = len(sequence.output_ids) < params.min_tokens
        names = {"logit_bias": params.logit_bias, "min_tokens": is_early, "the grammar": sequence.matcher}
        by = " and ".join(name for name, is_given in names.items() if is_given)
        return RequestError(f"every token is forbidden by {by}; expected at least one that may be drawn")
    return RequestError(
        f"repetition_penalty {params.repetition_penalty} makes a logit {largest}; expected a value that keeps it finite"
    )


def options_like(logits: Tensor) -> dict[str, Any]:
    """Keywords of torch.tensor, which otherwise follows torch's default dtype and device."""
    return {"dtype": logits.dtype, "device": logits.device}


def ids_like(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=like.device)
