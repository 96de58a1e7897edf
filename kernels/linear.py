"""Linear layers, fused with the ops before and after them in the graph.

    linear              out = x W' (+ bias) (+ addend)
    norm_linear         residual' = round(residual + x);  out = rms_norm(residual') W' (+ bias)
    norm_swiglu_linear  residual' = round(residual + x);  out = silu(rms_norm(residual') G') * (rms_norm(residual') U')

x is [T, K], W is [N, K]. G and U, [F, K] each, are packed as one weight [2 F, K]. The norm rounds as rms_norm does.
Products are summed in float32. Bytes moved: the weight, T K elements of x (and of residual and residual'), and T N of
out.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import check_device, check_tensor
from .contract import Steps, op
from .rms_norm import add_normed
from .swiglu import gated
from .weights import Weight, check_weight


@op()
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> Steps[Tensor]:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]. Returns [T, N].

    All tensors have one dtype (float32, bfloat16 or float16). Rows may have any stride. The weight is a tensor, or a
    Weight of another format (weights/)."""
    check_tensor("linear", "x", x, ("T", "K"))
    check_weight("linear", "weight", weight, x)
    if bias is not None:
        check_tensor("linear", "bias", bias, (weight.shape[0],), like=x)
    if addend is not None:
        check_tensor("linear", "addend", addend, (x.shape[0], weight.shape[0]), like=x)
    check_device("linear", x=x, weight=weight, bias=bias, addend=addend)
    yield
    out = F.linear(x, weight.dequantise(), bias)
    return out if addend is None else addend + out


@op()
def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None
) -> Steps[tuple[Tensor, Tensor]]:
    """Runs add_rms_norm of x and residual [T, K], then linear with weight [N, K]. Returns (out [T, N], new residual
    [T, K]).

    With ``residual=None`` x starts a residual stream: the new residual is x itself."""
    check_normed("norm_linear", x, residual, norm_weight, weight)
    if bias is not None:
        check_tensor("norm_linear", "bias", bias, (weight.shape[0],), like=x)
        check_device("norm_linear", x=x, bias=bias)
    yield
    return normed_product(x, residual, norm_weight, eps, weight, bias)


@op()
def norm_swiglu_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight
) -> Steps[tuple[Tensor, Tensor]]:
    """Runs add_rms_norm of x and residual [T, K], then linear with the packed weight [2 F, K] (gate rows, then up
    rows), then silu(gate) * up. Returns (out [T, F], new residual [T, K]).

    For up to 16 tokens, Triton keeps gate and up in float32 and rounds only out."""
    check_normed("norm_swiglu_linear", x, residual, norm_weight, weight)
    if weight.shape[0] % 2:
        raise ValueError(f"norm_swiglu_linear: weight must have an even number of rows, and has {weight.shape[0]}")
    yield
    gate_up, residual = normed_product(x, residual, norm_weight, eps, weight)
    return gated(*gate_up.chunk(2, dim=-1)), residual


def normed_product(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference of norm_linear, without its checks."""
    normed, residual = add_normed(x, residual, norm_weight, eps)
    return F.linear(normed, weight.dequantise(), bias), residual


def check_normed(name: str, x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Weight) -> None:
    """Raises ValueError or TypeError unless these are valid arguments of a linear layer with a norm before it."""
    check_tensor(name, "x", x, ("T", "K"))
    if residual is not None:
        check_tensor(name, "residual", residual, tuple(x.shape), like=x)
    check_tensor(name, "norm_weight", norm_weight, (x.shape[1],), like=x)
    check_weight(name, "weight", weight, x)
    check_device(name, x=x, residual=residual, norm_weight=norm_weight, weight=weight)
