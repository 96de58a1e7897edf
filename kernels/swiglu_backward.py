"""The gradients of SwiGLU, over the packed projection or over two.

    grad_gate = round(grad * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))))
    grad_up   = round(grad * round(silu(gate)))

grad, gate and up [T, F] of any row stride; the gradients, too, [T, F], for swiglu the halves of one [T, 2 F]. silu is
computed again, for a quarter of the bytes that keeping it would cost. Everything in float32 between the roundings.
Bytes moved: 5 T F elements.

    program (t, p):  columns p * BLOCK .. of row t
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference, tuning
from .checks import check_device, check_tensor
from .dispatch import op, pdl_options, runs_on_triton
from .language import cast, round_to, silu, wait_for_inputs
from .triton_if_any import tl, triton

for _op in ("swiglu", "swiglu_backward"):
    tuning.SPACES[_op] = {"BLOCK": (256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)}


@tuning.remember
def config(op: str, device: tuning.Device, rows: int, columns: int) -> dict[str, Any]:
    """Wide blocks where there are many rows, and narrow ones to give few rows to many multiprocessors."""
    block = 2048
    while block > 256 and rows * triton.cdiv(columns, block) < 2 * device.num_sms:
        block //= 2
    heuristic = {"BLOCK": block, "num_warps": block // 256}
    return tuning.lookup(op, device, {"rows": rows, "columns": columns}, heuristic)


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
    """All [T, F]; the gradients to be written have one row stride."""
    rows, columns = grad.shape
    chosen = config("swiglu_backward", tuning.device_of(grad), rows, columns)
    _swiglu_backward_kernel[(rows, triton.cdiv(columns, chosen["BLOCK"]))](
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


def _fake_swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


@op(fake=_fake_swiglu_backward)
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of swiglu's gate_up [..., 2 F], packed like it, from that of its result, grad [..., F].

    float32, bfloat16 or float16, the last dimensions contiguous."""
    check_tensor("swiglu_backward", "gate_up", gate_up, ("...", "2 F"))
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu_backward: gate_up's last dimension must be even, and is {gate_up.shape[-1]}")
    check_tensor("swiglu_backward", "grad", grad, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), like=gate_up)
    check_device("swiglu_backward", grad=grad, gate_up=gate_up)
    if not runs_on_triton(gate_up):
        return reference.swiglu_backward(grad, gate_up)
    out = _fake_swiglu_backward(grad, gate_up)
    halves = (half for each in (out, gate_up) for half in each.reshape(-1, each.shape[-1]).chunk(2, dim=-1))
    grad_gate, grad_up, gate, up = halves
    _launch_swiglu_backward(grad_gate, grad_up, grad.reshape(-1, grad.shape[-1]), gate, up)
    return out


def _fake_silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty_like(gate, memory_format=torch.contiguous_format) for _ in range(2))
    return grad_gate, grad_up


@op(fake=_fake_silu_mul_backward)
def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of silu_mul's gate and up, from that of its result, all [..., F].

    float32, bfloat16 or float16, the last dimensions contiguous."""
    check_tensor("silu_mul_backward", "gate", gate, ("...", "F"))
    check_tensor("silu_mul_backward", "up", up, tuple(gate.shape), like=gate)
    check_tensor("silu_mul_backward", "grad", grad, tuple(gate.shape), like=gate)
    check_device("silu_mul_backward", grad=grad, gate=gate, up=up)
    if not runs_on_triton(gate):
        return reference.silu_mul_backward(grad, gate, up)
    outs = _fake_silu_mul_backward(grad, gate, up)
    _launch_swiglu_backward(*(each.reshape(-1, each.shape[-1]) for each in (*outs, grad, gate, up)))
    return outs


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.qwenkern.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


def _silu_mul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.qwenkern.silu_mul_backward(grad.contiguous(), *ctx.saved_tensors)


swiglu_gradient = (_save_inputs, _swiglu_gradient)
silu_mul_gradient = (_save_inputs, _silu_mul_gradient)
