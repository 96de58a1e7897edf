"""SwiGLU of a packed gate_up or of separate gate and up.

    out = round(round(silu(gate)) * up)

gate and up are [T, F] with any row stride; in swiglu they are the halves of gate_up [T, 2 F]. out is [T, F]. silu is
computed in float32 and rounded where transformers rounds it. Bytes moved: 3 T F elements.

    program (t, p):  columns p * BLOCK .. of row t
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, round_to, silu, wait_for_inputs
from . import tuning
from .backend import TRITON, pdl_options
from .launching import cdiv, planned
from .swiglu_backward import config


@planned
@triton.jit
def _swiglu_kernel(
    out_ptr,  # [T, F]
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    columns,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    dtype = gate_ptr.dtype.element_ty

    wait_for_inputs(PDL)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    out = round_to(silu(gate), dtype) * up
    tl.store(out_ptr + row * columns + column, cast(out, dtype), mask=mask)


def _launch_swiglu(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """All tensors are [T, F]."""
    rows, columns = out.shape
    chosen = config("swiglu", tuning.device_of(out), rows, columns)
    grid = (rows, cdiv(columns, chosen["BLOCK"]))
    _swiglu_kernel[grid](out, gate, up, columns, gate.stride(0), up.stride(0), **chosen, **pdl_options(out))


@TRITON.implements()
def swiglu(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
    _launch_swiglu(out.view(-1, out.shape[-1]), *gate_up.reshape(-1, gate_up.shape[-1]).chunk(2, dim=-1))
    return out


@TRITON.implements()
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch_swiglu(*(each.reshape(-1, each.shape[-1]) for each in (out, gate, up)))
    return out
