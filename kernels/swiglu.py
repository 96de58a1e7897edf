"""SwiGLU of a packed gate_up or of separate gate and up, and its gradients.

    out       = round(round(silu(gate)) * up)
    grad_gate = round(grad * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))))
    grad_up   = round(grad * round(silu(gate)))

Between the roundings everything is float32. The roundings are those of transformers. Bytes moved for T rows of F
elements: 3 T F elements in the forward pass, 5 T F in the backward pass. The backward pass computes silu again, which
moves a quarter of the bytes that saving it would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_device, check_tensor, wide
from .contract import Steps, op


@op()
def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Steps[Tensor]:
    """The gradient of swiglu's gate_up [..., 2 F], packed in the same way, from the gradient of its result, grad
    [..., F].

    float32, bfloat16 or float16, with contiguous last dimensions."""
    _check_packed("swiglu_backward", gate_up)
    check_tensor("swiglu_backward", "grad", grad, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), like=gate_up)
    check_device("swiglu_backward", grad=grad, gate_up=gate_up)
    yield
    return torch.cat(_gradients(grad, *gate_up.chunk(2, dim=-1)), dim=-1)


@op()
def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    """The gradients of silu_mul's gate and up, from the gradient of its result. All are [..., F].

    float32, bfloat16 or float16, with contiguous last dimensions. The gradient of gate is computed in float32 and
    rounded once. The gradient of up is grad times silu(gate), which is rounded as in the op."""
    check_tensor("silu_mul_backward", "gate", gate, ("...", "F"))
    check_tensor("silu_mul_backward", "up", up, tuple(gate.shape), like=gate)
    check_tensor("silu_mul_backward", "grad", grad, tuple(gate.shape), like=gate)
    check_device("silu_mul_backward", grad=grad, gate=gate, up=up)
    yield
    return _gradients(grad, gate, up)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.qwenkern.swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


def _silu_mul_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.qwenkern.silu_mul_backward(grad.contiguous(), *ctx.saved_tensors)


@op(gradient=(_save_inputs, _swiglu_gradient))
def swiglu(gate_up: Tensor) -> Steps[Tensor]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of gate_up [..., 2 F], with gate in the first half. Returns
    [..., F].

    float32, bfloat16 or float16, with a contiguous last dimension. silu(gate) is rounded to the dtype before it is
    multiplied by up."""
    _check_packed("swiglu", gate_up)
    yield
    return gated(*gate_up.chunk(2, dim=-1))


@op(gradient=(_save_inputs, _silu_mul_gradient))
def silu_mul(gate: Tensor, up: Tensor) -> Steps[Tensor]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of two tensors [..., F] of equal shape. Returns [..., F].

    float32, bfloat16 or float16, with contiguous last dimensions. silu(gate) is rounded to the dtype before it is
    multiplied by up."""
    check_tensor("silu_mul", "gate", gate, ("...", "F"))
    check_tensor("silu_mul", "up", up, tuple(gate.shape), like=gate)
    check_device("silu_mul", gate=gate, up=up)
    yield
    return gated(gate, up)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """The reference of silu_mul, without its checks."""
    return F.silu(gate) * up


def _gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    wide_gate = wide(gate)
    sigmoid = torch.sigmoid(wide_gate)
    slope = sigmoid * (1 + wide_gate * (1 - sigmoid))
    return (wide(grad) * wide(up) * slope).to(gate.dtype), grad * F.silu(gate)


def _check_packed(name: str, gate_up: Tensor) -> None:
    check_tensor(name, "gate_up", gate_up, ("...", "2 F"))
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{name}: gate_up's last dimension must be even, and is {gate_up.shape[-1]}")
