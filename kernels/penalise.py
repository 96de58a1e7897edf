"""Applies each sequence's penalties, biases and mask to its logits.

A row of logits finds its sequence's tensors by a slot number, so one captured step serves changing sequences. Bytes
moved: 16 R V, and R V / 8 of the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_device, check_range, check_tensor
from .contract import Steps, op

SEEN, IS_END, ONCE = 1, 2, 4  # summands of a number in the history


@op()
def penalise(
    logits: Tensor, slots: Tensor, settings: Tensor, history: Tensor, bias: Tensor, allowed: Tensor
) -> Steps[Tensor]:
    """Logits [R, V] float32 after these steps, in this order, each rounded to float32:

    1. The token was seen: a logit above 0 is divided by the repetition penalty (Keskar et al. 2019, arXiv:1909.05858),
       any other logit is multiplied by it.
    2. The output has the token n > 0 times: presence + frequency * n is subtracted.
    3. The token's bias is added.
    4. The token ends the text, and the number of early tokens left is above 0: the logit becomes -inf.
    5. The mask does not allow the token: the logit becomes -inf.

    settings is [4, R] float32: repetition penalty (above 0), presence penalty, frequency penalty, early tokens left
    (the text may not end before them). Row r reads row slots[r] (int64) of three tensors: history [S, V] int32 is
    4 n + 2 (if the token ends the text) + 1 (if it was seen); bias [S, V] is float32; allowed [S, ceil(V / 32)] is
    int32, and bit t % 32 of word t // 32 allows token t. On a GPU the values of slots are not checked."""
    name = "penalise"
    check_tensor(name, "logits", logits, ("R", "V"), dtypes=(torch.float32, torch.float64))
    rows, vocabulary = logits.shape
    check_tensor(name, "slots", slots, (rows,), dtypes=(torch.int64,))
    check_tensor(name, "settings", settings, (4, rows), like=logits)
    check_tensor(name, "history", history, ("S", vocabulary), dtypes=(torch.int32,), dense=True)
    check_tensor(name, "bias", bias, (len(history), vocabulary), like=logits, dense=True)
    words = -(-vocabulary // 32)
    check_tensor(name, "allowed", allowed, (len(history), words), dtypes=(torch.int32,), dense=True)
    check_device(name, logits=logits, slots=slots, settings=settings, history=history, bias=bias, allowed=allowed)
    check_range(name, "slots", slots, 0, len(history))
    yield
    repetition, presence, frequency, early = settings[..., None]
    seen, token = history[slots], torch.arange(vocabulary, device=logits.device)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    out = torch.where((seen & ~IS_END) > 0, repeated, logits)
    counts = seen >> 2
    out = torch.where(counts > 0, out - (presence + frequency * counts), out)
    out = out + bias[slots]
    is_allowed = (allowed[slots][:, token >> 5] >> (token & 31)) & 1
    is_early = ((seen & IS_END) > 0) & (early > 0)
    return out.masked_fill(is_early | (is_allowed == 0), -math.inf)
