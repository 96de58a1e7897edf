"""Linear layers in C, with their prologue (the norm) and their epilogue. kernels/linear.py says what each op computes.

linear.h has the picture. linear_few_tokens.c and linear_many_tokens.c have the two forms of the product."""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import Weight
from . import build, threads
from .backend import C
from .calls import make
from .limits import linear_scratch
from .recorded_calls import run, scratch
from .weights import NO_WEIGHT, refuses_weight, weight_struct


def refuses_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> str | None:
    return refuses_product(x, weight)


@C.implements(refuses_linear)
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    return product(x, None, 0.0, weight, bias=bias, addend=addend)


def refuses_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None
) -> str | None:
    return refuses_product(x, weight)


@C.implements(refuses_norm_linear)
def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
    return product(x, norm_weight, eps, weight, bias=bias)


def refuses_norm_swiglu_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> str | None:
    return refuses_product(x, weight)


@C.implements(refuses_norm_swiglu_linear)
def norm_swiglu_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    middle = len(weight) // 2
    gate, up = weight.rows(0, middle), weight.rows(middle, len(weight))
    return product(x, norm_weight, eps, gate, up=up)


def refuses_product(x: Tensor, weight: Weight) -> str | None:
    """The reason why C does not multiply x [T, K] by this weight, or None."""
    if reason := refuses_weight(weight) or build.refuses_dtype(x.dtype):
        return reason
    here = build.prepared()
    if x.shape[1] % here.limits.in_features_multiple:
        return f"rows of {x.shape[1]} values (a multiple of {here.limits.in_features_multiple})"
    if len(x) > here.limits.max_few_tokens and not (here.multiplies and x.dtype == torch.bfloat16):
        return f"{len(x)} tokens, which torch multiplies faster on this processor"
    return None


def product(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Weight,
    *,
    up: Weight | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]: a new tensor [T, N].

    With ``norm_weight`` [K], x is first normalised. With ``up`` [N, K], out is silu(x weight^T) * (x up^T)."""
    (num_tokens, in_features), out_features = x.shape, len(weight)
    here = build.prepared()
    out = x.new_empty(num_tokens, out_features, dtype=out_dtype)
    run(
        make.linear(
            out=out,
            scratch=scratch(linear_scratch(here.limits, num_tokens, in_features, threads.count())),
            x=x,
            norm_weight=norm_weight,
            weight=weight_struct(weight),
            up=NO_WEIGHT if up is None else weight_struct(up),
            bias=bias,
            addend=addend,
            num_tokens=num_tokens,
            out_features=out_features,
            in_features=in_features,
            x_stride=x.stride(0),
            addend_stride=0 if addend is None else addend.stride(0),
            out_is_float=out_dtype == torch.float32,
            prefetch_distance=here.prefetch_distance,
            eps=eps,
        )
    )
    return out
