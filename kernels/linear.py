"""Linear layers, fused with the ops before and after them in the graph.

    linear              out = round(x W' (+ bias));  with an addend: out = round(out + addend)
    norm_linear         out = rms_norm(x) W' (+ bias)
    norm_swiglu_linear  out = silu(rms_norm(x) G') * (rms_norm(x) U')

x is [T, K], W is [N, K]. G and U, [F, K] each, are packed as one weight [2 F, K]. The norm rounds as rms_norm does.
Products are summed in float32. Bytes moved: the weight, T K elements of x, and T N of out and of the addend.

A residual stream takes no op of its own. The projection at the end of a sub-layer adds the stream to its product:
x = linear(y, weight, addend=x). The next norm then reads one tensor.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .checks import check_device, check_tensor
from .contract import Steps, op
from .rms_norm import normed
from .swiglu import gated
from .weights import Weight, check_weight


@op()
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> Steps[Tensor]:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]. Returns a new tensor [T, N].

    All tensors have one dtype (float32, bfloat16 or float16). Rows may have any stride. The weight is a tensor, or a
    Weight of another format (weights/).

    The sum of product and bias is rounded to the dtype, and so is its sum with the addend, as in transformers. There is
    one exception: for more than 16 tokens (48 with a quantised weight) without a bias, Triton's backend calls
    torch.addmm, which adds the addend in float32 and rounds once."""
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
    x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None
) -> Steps[Tensor]:
    """Runs rms_norm of x [T, K], then linear with weight [N, K] and bias [N]. Returns [T, N]."""
    check_normed("norm_linear", x, norm_weight, weight)
    if bias is not None:
        check_tensor("norm_linear", "bias", bias, (weight.shape[0],), like=x)
        check_device("norm_linear", x=x, bias=bias)
    yield
    return normed_product(x, norm_weight, eps, weight, bias)


@op()
def norm_swiglu_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Steps[Tensor]:
    """Runs rms_norm of x [T, K], then linear with the packed weight [2 F, K] (gate rows, then up rows), then
    silu(gate) * up. Returns [T, F].

    For up to 16 tokens (48 with a quantised weight), Triton keeps gate and up in float32 and rounds only out."""
    check_normed("norm_swiglu_linear", x, norm_weight, weight)
    if weight.shape[0] % 2:
        raise ValueError(f"norm_swiglu_linear: weight must have an even number of rows, and has {weight.shape[0]}")
    yield
    return gated(*normed_product(x, norm_weight, eps, weight).chunk(2, dim=-1))


def normed_product(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The reference of norm_linear, without its checks."""
    return F.linear(normed(x, norm_weight, eps), weight.dequantise(), bias)


def check_normed(name: str, x: Tensor, norm_weight: Tensor, weight: Weight) -> None:
    """Raises ValueError or TypeError unless these are valid arguments of a linear layer with a norm before it."""
    check_tensor(name, "x", x, ("T", "K"))
    check_tensor(name, "norm_weight", norm_weight, (x.shape[1],), like=x)
    check_weight(name, "weight", weight, x)
    check_device(name, x=x, norm_weight=norm_weight, weight=weight)
