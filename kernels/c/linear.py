"""Linear layers in C, with their prologue (the norm) and their epilogue. kernels/linear.py says what each op computes.

linear.h has the picture. linear_few_tokens.c and linear_many_tokens.c have the two implementations of the product with
a dense weight; linear_grouped.c has that with a quantised weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..environment import CPU_ACTIVATIONS
from ..weights import Grouped, Stack, Weight
from . import build, threads
from .backend import C
from .calls import make
from .limits import linear_scratch
from .recorded_calls import run, scratch
from .swiglu import silu_mul
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
    if isinstance(weight, Stack) or (isinstance(weight, Grouped) and middle % TILE_ROWS):
        return silu_mul(*product(x, norm_weight, eps, weight).chunk(2, dim=-1))
    gate, up = weight.rows(0, middle), weight.rows(middle, len(weight))
    return product(x, norm_weight, eps, gate, up=up)


# How many bytes in advance codes are prefetched for several tokens. A processor that prefetches well enough for one
# token may not do so while it multiplies a tile with the other tokens.
BETWEEN_TOKENS = 4096
TILE_ROWS = 16  # rows of a tile; a quantised weight can be cut only between tiles


def refuses_product(x: Tensor, weight: Weight) -> str | None:
    """The reason why C does not multiply x [T, K] by this weight, or None."""
    if isinstance(weight, Stack):
        return next(filter(None, (refuses_product(x, part) for part in weight.parts)), None)
    if reason := refuses_weight(weight) or build.refuses_dtype(x.dtype):
        return reason
    if isinstance(weight, Grouped):
        return None
    here = build.prepared()
    if x.shape[1] % here.limits.in_features_multiple:
        return f"rows of {x.shape[1]} values (a multiple of {here.limits.in_features_multiple})"
    if len(x) > here.limits.max_few_tokens and not (here.multiplies and x.dtype == torch.bfloat16):
        dtype = str(x.dtype).removeprefix("torch.")
        return f"{len(x)} tokens of {dtype}, which torch multiplies faster on this processor"
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
    """x [T, K] times weight [N, K] transposed, plus bias [N], plus addend [T, N]: a new tensor [T, N] of x's dtype or
    ``out_dtype``.

    With ``norm_weight`` [K], x is first normalised. With ``up`` [N, K], out is silu(x weight^T) * (x up^T)."""
    out = x.new_empty(len(x), len(weight), dtype=out_dtype)
    if not isinstance(weight, Stack):
        _multiply(out, x, norm_weight, eps, weight, up, bias, addend)
        return out
    start = 0
    for part in weight.parts:
        columns = slice(start, start := start + len(part))
        beside = None if bias is None else bias[columns], None if addend is None else addend[:, columns]
        _multiply(out[:, columns], x, norm_weight, eps, part, up, *beside)
    return out


def _multiply(
    out: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Weight,
    up: Weight | None,
    bias: Tensor | None,
    addend: Tensor | None,
) -> None:
    """``product`` with a weight of one format, into out [T, N], whose rows may have any stride."""
    num_tokens, in_features = x.shape
    here = build.prepared()
    distance = here.prefetch_distance
    if isinstance(weight, Grouped):
        distance = here.prefetch_of_codes[8 if weight.bits == 8 else 4]
        if num_tokens > 1:
            distance = max(distance, BETWEEN_TOKENS)
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
            out_features=out.shape[1],
            in_features=in_features,
            x_stride=x.stride(0),
            addend_stride=0 if addend is None else addend.stride(0),
            out_stride=out.stride(0),
            out_is_float=out.dtype == torch.float32,
            planes=1 if CPU_ACTIVATIONS.get() == "int8" else 2,
            prefetch_distance=distance,
            eps=eps,
        )
    )
