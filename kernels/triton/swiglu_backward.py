"""The gradients of SwiGLU of a packed gate_up or of separate gate and up.

    grad_gate = round(grad * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))))
    grad_up   = round(grad * round(silu(gate)))

grad, gate and up are [T, F] with any row stride. The gradients are [T, F] each; in swiglu_backward they are the halves
of one [T, 2 F]. silu is computed again, which moves a quarter of the bytes that saving it would. Between the roundings
everything is float32. Bytes moved: 5 T F elements.

    program (t, p):  columns p * BLOCK .. of row t
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, round_to, silu, wait_for_inputs
from . import tuning
from .backend import TRITON, pdl_options
from .launching import cdiv, planned

for _op in ("swiglu", "swiglu_backward"):
    tuning.SPACES[_op] = {"BLOCK": (256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)}


@tuning.remember
def config(op: str, device: tuning.Device, rows: int, columns: int) -> dict[str, Any]:
    """Wide blocks for many rows; narrower blocks if a few rows must fill all multiprocessors."""
    block = 2048
    while block > 256 and rows * cdiv(columns, block) < 2 * device.num_sms:
        block //= 2
    heuristic = {"BLOCK": block, "num_warps": block // 256}
    return tuning.lookup(op, device, {"rows": rows, "columns": columns}, heuristic)


@planned
@triton.jit
def _swiglu_backward_kernel(
    grad_gate_ptr,  # [T, F]
    grad_up_ptr,  # [T, F]
    grad_ptr,  # [T, F]
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    columns,
    out_stride,  # of both gradients
    grad_stride,
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
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)

    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_gate = grad * up * slope
    grad_up = grad * round_to(silu(gate), dtype)

    tl.store(grad_gate_ptr + row * out_stride + column, cast(grad_gate, dtype), mask=mask)
    tl.store(grad_up_ptr + row * out_stride + column, cast(grad_up, dtype), mask=mask)


def _launch_swiglu_backward(grad_gate: Tensor, grad_up: Tensor, grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """All tensors are [T, F]. grad_gate and grad_up have the same row stride."""
    rows, columns = grad.shape
    chosen = config("swiglu_backward", tuning.device_of(grad), rows, columns)
    _swiglu_backward_kernel[(rows, cdiv(columns, chosen["BLOCK"]))](
        grad_gate,
        grad_up,
        grad,
        gate,
        up,
        columns,
        grad_gate.stride(0),
        grad.stride(0),
        gate.stride(0),
        up.stride(0),
        **chosen,
        **pdl_options(grad),
    )


@TRITON.implements()
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    out = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    halves = (half for each in (out, gate_up) for half in each.reshape(-1, each.shape[-1]).chunk(2, dim=-1))
    grad_gate, grad_up, gate, up = halves
    _launch_swiglu_backward(grad_gate, grad_up, grad.reshape(-1, grad.shape[-1]), gate, up)
    return out


@TRITON.implements()
def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    _launch_swiglu_backward(*(each.reshape(-1, each.shape[-1]) for each in (grad_gate, grad_up, grad, gate, up)))
    return grad_gate, grad_up
