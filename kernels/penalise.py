"""Changes logits by what a sequence's tokens, biases and masks say.

Rows of logits find their sequence's tensors by slots, so that a captured step serves sequences that come and go. Bytes
moved: 16 R V and R V / 8 of the mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_device, check_range, check_tensor
from .contract import Steps, op

SEEN, IS_END, ONCE = 1, 2, 4  # parts of a number of the history


@op()
def penalise(
    logits: Tensor, slots: Tensor, settings: Tensor, history: Tensor, bias: Tensor, allowed: Tensor
) -> Steps[Tensor]:
    """Logits [R, V] float32 after these steps, in this order, each rounded to float32:

    1. A token that was seen: a logit above 0 is divided by the repetition penalty (Keskar et al. 2019,
       arXiv:1909.05858), another multiplied by it.
    2. One that the output has n > 0 times: less presence + frequency * n.
    3. Plus its bias.
    4. -inf for an end of the text while the number of early tokens is above 0.
    5. -inf where the mask does not allow it.

    settings is [4, R] float32: repetition penalty (above 0), presence penalty, frequency penalty, early tokens left.
    Row r reads the slot slots[r] (int64) of: history [S, V] int32, 4 n + 2 (an end) + 1 (seen); bias [S, V] float32;
    allowed [S, ceil(V / 32)] int32, whose bit t % 32 of word t // 32 allows token t. On a GPU slots are not checked."""
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
