"""The gradients of RMSNorm, with or without the addition to the residual stream before it.

    r         = rsqrt(mean(x^2) + eps),  xhat = x * r,  g = grad * weight
    grad_x    = round(r * (g - xhat * mean(g * xhat)) + grad_residual)          (rms_norm: without grad_residual)
    grad_w    = round(sum over rows of grad * round(xhat))

grad, grad_residual and x are [T, H] with any row stride; x is the rows that were normalised. r is computed again, so
the forward pass saves only x and the weight. Between the roundings everything is float32. Bytes moved: 4 T H elements
(rms_norm: 3 T H) and 2 H, and 8 P H bytes for the partial sums of grad_w of P programs.

    program p:  rows p * rows_each .. (p + 1) * rows_each - 1, one after another, each whole in registers; the sum of
                their contributions to grad_w goes to row p of parts [P, H]
    then, in a second kernel, program c:  columns c * BLOCK .. of parts, summed in the order of the rows

The order of every sum is fixed, so equal inputs give equal bits.
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

MAX_HIDDEN = 16384  # a row and its sum lie in a program's registers: no spills up to 8192, some at 16384

tuning.SPACES["rms_norm_backward"] = {"rows_each": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4, 8, 16)}


@tuning.remember
def _config(device: tuning.Device, hidden: int, rows: int) -> dict[str, Any]:
    """As many programs as the GPU holds at a time, but at least 4 rows per program, because a program's partial sum
    costs as much as 2 rows."""
    block = next_power_of_2(hidden)
    programs = device.num_sms * max(1, 8192 // block)
    heuristic = {"rows_each": max(4, cdiv(rows, programs)), "num_warps": min(16, max(1, block // 512))}
    return tuning.lookup("rms_norm_backward", device, {"hidden": hidden, "rows": rows}, heuristic)


@planned
@triton.jit
def _rms_norm_backward_kernel(
    grad_x_ptr,  # [T, H]
    parts_ptr,  # [P, H] float32
    grad_ptr,  # [T, H]
    grad_residual_ptr,  # [T, H], or None
    x_ptr,  # [T, H]
    weight_ptr,  # [H]
    num_rows,
    rows_each,
    hidden,
    grad_stride,
    grad_residual_stride,
    x_stride,
    eps,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_each
    columns = tl.arange(0, BLOCK_H)
    mask = columns < hidden
    dtype = x_ptr.dtype.element_ty

    wait_for_inputs(PDL)  # before the weight is read, too: an optimiser's kernel may have just written it
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    part = tl.zeros([BLOCK_H], tl.float32)
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)

        scale = tl.rsqrt(tl.sum(x * x) / hidden + eps)
        normed = x * scale
        part += grad * round_to(normed, dtype)
        scaled = grad * weight
        grad_x = scale * (scaled - normed * (tl.sum(scaled * normed) / hidden))
        if grad_residual_ptr is not None:
            residual = tl.load(grad_residual_ptr + row * grad_residual_stride + columns, mask=mask, other=0.0)
            grad_x += residual.to(tl.float32)

        tl.store(grad_x_ptr + row * hidden + columns, cast(grad_x, dtype), mask=mask)
    tl.store(parts_ptr + program * hidden + columns, part, mask=mask)


@planned
@triton.jit
def _sum_parts_kernel(
    out_ptr,  # [H]
    parts_ptr,  # [P, H] float32
    num_parts,
    hidden,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_P)[:, None]
    columns = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_P, BLOCK_H], tl.float32)

    wait_for_inputs(PDL)
    for start in range(0, num_parts, BLOCK_P):
        part = (start + rows).to(tl.int64)
        mask = (part < num_parts) & (columns < hidden)[None, :]
        total += tl.load(parts_ptr + part * hidden + columns[None, :], mask=mask, other=0.0)

    tl.store(out_ptr + columns, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=columns < hidden)


def _launch_rms_norm_backward(
    grad_x: Tensor, parts: Tensor, grad: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> None:
    """All tensors are [T, H], except parts [P, H] and the weight [H]. grad_x is dense."""
    num_rows, hidden = x.shape
    config = _config(tuning.device_of(x), hidden, num_rows)
    _rms_norm_backward_kernel[(len(parts),)](
        grad_x,
        parts,
        grad,
        grad_residual,
        x,
        weight,
        num_rows,
        config["rows_each"],
        hidden,
        grad.stride(0),
        0 if grad_residual is None else grad_residual.stride(0),
        x.stride(0),
        eps,
        BLOCK_H=next_power_of_2(hidden),
        num_warps=config["num_warps"],
        **pdl_options(x),
    )


def _launch_sum_parts(out: Tensor, parts: Tensor) -> None:
    """Sums the rows of parts [P, H] into out [H]."""
    num_parts, hidden = parts.shape
    block = 32  # columns: 32 float32 of a row are one cache line
    _sum_parts_kernel[(cdiv(hidden, block),)](
        out, parts, num_parts, hidden, BLOCK_P=64, BLOCK_H=block, num_warps=4, **pdl_options(parts)
    )


def _refuses(grad: Tensor, *rest: object, **keywords: object) -> str | None:
    return f"rows of {grad.shape[-1]} (at most {MAX_HIDDEN})" if grad.shape[-1] > MAX_HIDDEN else None


@TRITON.implements(_refuses)
def rms_norm_backward(
    grad: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = x.shape[-1]
    grad_x, grad_weight = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight)
    grad, x = grad.reshape(-1, hidden), x.reshape(-1, hidden)
    if grad_residual is not None:
        grad_residual = grad_residual.reshape(-1, hidden)
    config = _config(tuning.device_of(x), hidden, len(x))
    parts = x.new_empty(cdiv(len(x), config["rows_each"]), hidden, dtype=torch.float32)
    _launch_rms_norm_backward(grad_x.view(-1, hidden), parts, grad, grad_residual, x, weight, eps)
    _launch_sum_parts(grad_weight, parts)
    return grad_x, grad_weight
