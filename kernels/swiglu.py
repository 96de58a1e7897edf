"""SwiGLU, over the packed projection or over two, and its gradients.

    out       = round(round(silu(gate)) * up)
    grad_gate = round(grad * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))))
    grad_up   = round(grad * round(silu(gate)))

Everything in float32 between the roundings, which are those of transformers. Bytes moved, of T rows of F elements:
3 T F elements forwards, 5 T F backwards, where silu is computed again for a quarter of the bytes that keeping it would
cost.
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
    """The gradient of swiglu's gate_up [..., 2 F], packed like it, from that of its result, grad [..., F].

    float32, bfloat16 or float16, the last dimensions contiguous."""
    _check_packed("swiglu_backward", gate_up)
    check_tensor("swiglu_backward", "grad", grad, (*gate_up.shape[:-1], gate_up.shape[-1] // 2), like=gate_up)
    check_device("swiglu_backward", grad=grad, gate_up=gate_up)
    yield
    return torch.cat(_gradients(grad, *gate_up.chunk(2, dim=-1)), dim=-1)


@op()
def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    """The gradients of silu_mul's gate and up, from that of its result, all [..., F].

    float32, bfloat16 or float16, the last dimensions contiguous. That of gate is computed in float32 and rounded once;
    that of up is grad times silu, rounded as in the op."""
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
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of gate_up [..., 2 F], gate in the first half: [..., F].

    float32, bfloat16 or float16, the last dimension contiguous. silu is rounded to the dtype before the product."""
    _check_packed("swiglu", gate_up)
    yield
    return gated(*gate_up.chunk(2, dim=-1))


@op(gradient=(_save_inputs, _silu_mul_gradient))
def silu_mul(gate: Tensor, up: Tensor) -> Steps[Tensor]:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of two tensors [..., F] of one shape: [..., F].

    float32, bfloat16 or float16, the last dimension contiguous. silu is rounded to the dtype before the product."""
    check_tensor("silu_mul", "gate", gate, ("...", "F"))
    check_tensor("silu_mul", "up", up, tuple(gate.shape), like=gate)
    check_device("silu_mul", gate=gate, up=up)
    yield
    return gated(gate, up)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu_mul's reference, without checks."""
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
