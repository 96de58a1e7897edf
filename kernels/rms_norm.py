"""RMSNorm, with or without the addition to the residual stream before it, and its gradients.

    residual' = round(residual + x)                            (add_rms_norm; in rms_norm it is x itself)
    out = round(round(residual' * rsqrt(mean(residual'^2) + eps)) * weight)

Between the roundings everything is float32. The roundings are those of transformers' Qwen2RMSNorm. Bytes moved for T
rows of H elements: 2 T H elements, or 4 T H with the addition, and H of the weight.

    r         = rsqrt(mean(x^2) + eps),  xhat = x * r,  g = grad * weight
    grad_x    = round(r * (g - xhat * mean(g * xhat)) + grad_residual)          (rms_norm: without grad_residual)
    grad_w    = round(sum over rows of grad * round(xhat))

In the gradients x is the row that was normalised. r is computed again, so the forward pass saves only x and the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_tensor, wide
from .contract import Steps, op


@op()
def rms_norm_backward(
    grad: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Steps[tuple[Tensor, Tensor]]:
    """The gradients of rms_norm, or with grad_residual those of add_rms_norm: (of x, [..., H]; of the weight, [H]).

    grad [..., H] is the gradient of the normed rows. grad_residual [..., H] is the gradient of the new residual.
    x [..., H] is the row that was normalised; for add_rms_norm that is the new residual, and its gradient is that of
    both summands. All are float32, bfloat16 or float16, with contiguous last dimensions. The gradient of x is computed
    in float32 and rounded once. The gradient of the weight sums, in float32, grad times the quotient rounded as in the
    op. The result is deterministic: no sum uses atomics."""
    name = "rms_norm_backward"
    check_tensor(name, "x", x, ("...", "H"))
    check_tensor(name, "grad", grad, tuple(x.shape), like=x)
    if grad_residual is not None:
        check_tensor(name, "grad_residual", grad_residual, tuple(x.shape), like=x)
    check_tensor(name, "weight", weight, (x.shape[-1],), like=x)
    check_device(name, grad=grad, grad_residual=grad_residual, x=x, weight=weight)
    yield
    wide_x, wide_grad = wide(x), wide(grad)
    scale = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)
    normed, scaled = wide_x * scale, wide_grad * weight
    grad_x = scale * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if grad_residual is not None:
        grad_x = grad_x + grad_residual
    grad_weight = (wide_grad * normed.to(x.dtype)).reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _rms_norm_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.qwenkern.rms_norm_backward(grad.contiguous(), None, *ctx.saved_tensors, ctx.eps), None


@op(gradient=(_save_rows, _rms_norm_gradient))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Steps[Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467).

    x [..., H] is float32, bfloat16 or float16, with a contiguous last dimension. weight [H] has the same dtype. Returns
    a contiguous tensor of x's shape. The quotient is rounded to the dtype before it is multiplied by the weight."""
    check_tensor("rms_norm", "x", x, ("...", "H"))
    check_tensor("rms_norm", "weight", weight, (x.shape[-1],), like=x)
    check_device("rms_norm", x=x, weight=weight)
    yield
    return normed(x, weight, eps)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves the new residual, which the graph keeps alive in any case, and neither summand."""
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)  # the gradient of an unused output is None, not zeros


def _add_rms_norm_gradient(ctx: Any, grad: Tensor | None, grad_residual: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_weight = None
    if grad is not None:
        grad_residual = None if grad_residual is None else grad_residual.contiguous()
        grad_residual, grad_weight = torch.ops.qwenkern.rms_norm_backward(
            grad.contiguous(), grad_residual, *ctx.saved_tensors, ctx.eps
        )
    return grad_residual, grad_residual if ctx.needs_input_grad[1] else None, grad_weight, None


@op(gradient=(_save_sum, _add_rms_norm_gradient))
def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Steps[tuple[Tensor, Tensor]]:
    """Adds x [..., H] to the residual stream and normalises the sum. Returns (normed, new residual), both of x's shape.

    The sum is rounded to the dtype before the mean of its squares is taken. With ``residual=None`` x starts a residual
    stream: the new residual is x itself."""
    check_tensor("add_rms_norm", "x", x, ("...", "H"))
    if residual is not None:
        check_tensor("add_rms_norm", "residual", residual, tuple(x.shape), like=x)
    check_tensor("add_rms_norm", "weight", weight, (x.shape[-1],), like=x)
    check_device("add_rms_norm", x=x, residual=residual, weight=weight)
    yield
    if residual is not None:
        x = residual + x
    return normed(x, weight, eps), x


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference of rms_norm, without its checks."""
    wide_x = wide(x)
    return (wide_x * torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
