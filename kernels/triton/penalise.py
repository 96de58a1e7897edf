"""Applies each sequence's penalties, biases and mask to its logits.

out = (penalised(logit) by history) + bias, or -inf        each operation rounded to float32, as in torch

program (r, p):  tokens p * BLOCK .. of row r, and of slot slots[r] of history, bias and allowed
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..language import wait_for_inputs
from . import tuning
from .backend import TRITON, pdl_options
from .launching import planned

tuning.SPACES["penalise"] = {"BLOCK": (512, 1024, 2048), "num_warps": (2, 4, 8)}


@tuning.remember
def _config(device: tuning.Device, rows: int, vocabulary: int) -> dict[str, Any]:
    return tuning.lookup("penalise", device, {"rows": rows, "columns": vocabulary}, {"BLOCK": 1024, "num_warps": 4})


@planned
@triton.jit
def _penalise_kernel(
    out_ptr,  # [R, V] float32
    logits_ptr,  # [R, V] float32
    slots_ptr,  # [R] int64
    settings_ptr,  # [4, R] float32: repetition, presence, frequency, early tokens left
    history_ptr,  # [S, V] int32
    bias_ptr,  # [S, V] float32
    allowed_ptr,  # [S, words] int32
    vocabulary,
    words,
    logits_stride,
    settings_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = token < vocabulary

    wait_for_inputs(PDL)
    slot = tl.load(slots_ptr + row)
    repetition = tl.load(settings_ptr + row)
    presence = tl.load(settings_ptr + settings_stride + row)
    frequency = tl.load(settings_ptr + 2 * settings_stride + row)
    early = tl.load(settings_ptr + 3 * settings_stride + row)
    logit = tl.load(logits_ptr + row * logits_stride + token, mask=mask, other=0.0)
    history = tl.load(history_ptr + slot * vocabulary + token, mask=mask, other=0)
    bias = tl.load(bias_ptr + slot * vocabulary + token, mask=mask, other=0.0)
    word = tl.program_id(1) * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    allowed = tl.load(allowed_ptr + slot * words + word, mask=word < words, other=0)

    repeated = tl.where(logit > 0, tl.math.div_rn(logit, repetition), logit * repetition)
    logit = tl.where((history & ~2) > 0, repeated, logit)
    count = history >> 2
    logit = tl.where(count > 0, logit - (presence + frequency * count.to(tl.float32)), logit)
    logit += bias
    is_early_end = (history & tl.where(early > 0, 2, 0)) > 0
    is_allowed = tl.reshape((allowed[:, None] >> tl.arange(0, 32)[None, :]) & 1, [BLOCK]) > 0
    tl.store(out_ptr + row * vocabulary + token, tl.where(is_allowed & ~is_early_end, logit, float("-inf")), mask=mask)


@TRITON.implements()
def penalise(logits: Tensor, slots: Tensor, settings: Tensor, history: Tensor, bias: Tensor, allowed: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    out = logits.new_empty(rows, vocabulary)
    chosen = _config(tuning.device_of(logits), rows, vocabulary)
    _penalise_kernel[(rows, triton.cdiv(vocabulary, chosen["BLOCK"]))](
        out,
        logits,
        slots,
        settings,
        history,
        bias,
        allowed,
        vocabulary,
        allowed.shape[1],
        logits.stride(0),
        settings.stride(0),
        **chosen,
        enable_fp_fusion=False,  # a product and a sum are each rounded
        **pdl_options(logits),
    )
    return out
