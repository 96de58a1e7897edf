"""RMSNorm, with or without the addition to the residual stream before it.

    residual' = round(residual + x)                            (add_rms_norm; in rms_norm it is x itself)
    out = round(round(residual' * rsqrt(mean(residual'^2) + eps)) * weight)

x, residual, out and residual' are [T, H] with any row stride. Between the roundings everything is float32. The
roundings are those of transformers' Qwen2RMSNorm. Bytes moved: 2 T H elements, or 4 T H with the addition, and H of the
weight.

    program p:  rows p * ROWS .. p * ROWS + ROWS - 1, each whole in registers
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, round_to, wait_for_inputs
from . import tuning
from .backend import TRITON, pdl_options
from .launching import cdiv, next_power_of_2, planned

MAX_HIDDEN = 32768  # a row must fit in a program's registers


tuning.SPACES["rms_norm"] = {"ROWS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8, 16)}


@tuning.remember
def _config(device: tuning.Device, hidden: int, rows: int) -> dict[str, Any]:
    """A program has several narrow rows if at least 4 programs per multiprocessor remain."""
    block = next_power_of_2(hidden)
    together = max(1, min(4096 // block, rows // (4 * device.num_sms)))
    together = 1 << (together.bit_length() - 1)
    heuristic = {"ROWS": together, "num_warps": min(16, max(1, block * together // 512))}
    return tuning.lookup("rms_norm", device, {"hidden": hidden, "rows": rows}, heuristic)


@planned
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    out_ptr,  # [T, H]
    new_residual_ptr,  # [T, H], or None
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H], or None
    weight_ptr,  # [H]
    num_rows,
    hidden,
    out_stride,
    new_residual_stride,
    x_stride,
    residual_stride,
    eps,
    BLOCK_H: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_H)[None, :]
    mask = (rows < num_rows) & (columns < hidden)
    dtype = x_ptr.dtype.element_ty

    wait_for_inputs(PDL)  # before the weight is read, too: in a user's graph an optimiser may have just written it
    weight = tl.load(weight_ptr + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        x = round_to(x + residual, dtype)

    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / hidden + eps)
    out = round_to(x * scale, dtype) * weight

    if residual_ptr is not None:
        tl.store(new_residual_ptr + rows * new_residual_stride + columns, cast(x, dtype), mask=mask)
    tl.store(out_ptr + rows * out_stride + columns, cast(out, dtype), mask=mask)


def _launch_rms_norm(
    out: Tensor, new_residual: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> None:
    """All tensors are [..., H], contiguous or of two dimensions, except the weight [H]."""
    hidden = x.shape[-1]
    num_rows = x.numel() // hidden
    config = _config(tuning.device_of(x), hidden, num_rows)
    _rms_norm_kernel[(cdiv(num_rows, config["ROWS"]),)](
        out,
        new_residual,
        x,
        residual,
        weight,
        num_rows,
        hidden,
        hidden,
        0 if new_residual is None else hidden,
        _row_stride(x),
        0 if residual is None else _row_stride(residual),
        eps,
        BLOCK_H=next_power_of_2(hidden),
        **config,
        **pdl_options(x),
    )


def _rows(x: Tensor) -> Tensor:
    """x [..., H] as the launcher takes it. No view is made if x already has that shape, because a view costs 2 us."""
    return x if x.dim() == 2 or x.is_contiguous() else x.reshape(-1, x.shape[-1])


def _row_stride(x: Tensor) -> int:
    return x.shape[-1] if x.is_contiguous() else x.stride()[0]


def _refuses(x: Tensor, *rest: object, **keywords: object) -> str | None:
    return f"rows of {x.shape[-1]} (at most {MAX_HIDDEN})" if x.shape[-1] > MAX_HIDDEN else None


@TRITON.implements(_refuses)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_rms_norm(out, None, _rows(x), None, weight, eps)
    return out


@TRITON.implements(_refuses)
def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm(x, weight, eps), x
    out, new_residual = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch_rms_norm(out, new_residual, _rows(x), _rows(residual), weight, eps)
    return out, new_residual
