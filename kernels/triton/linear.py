"""The ops of ../linear.py. For few tokens (1 to 16) each op is one kernel; few_tokens.py has the picture. For more
tokens, rms_norm, a product (many_tokens.py) and swiglu run one after the other.

The epilogue computes in float32. out is rounded once, or with an addend twice: before and after the addition.

A tile of gate_up has the same number of rows of gate and of up, so that one program has both values of an output:

    weight [2 F, K]     ░░ program 0   ▒▒ program 1 ...   │   ░░ program 0   ▒▒ program 1 ...
                        0              gate               F              up                2 F

If N gives too few programs, SPLIT_K of them divide the K of a tile. Each writes a float32 partial sum, and the last to
arrive adds the partial sums in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, round_to, silu
from ..rms_norm import rms_norm
from ..swiglu import swiglu
from ..weights import Stack, Weight
from .arrivals import arrivals
from .backend import TRITON, refuses_format
from .few_tokens import MAX_HIDDEN, multiply, reads_nothing
from .launching import planned
from .many_tokens import few_enough, product, slices
from .tiling import tiling


class LinearArguments(NamedTuple):
    out: Any  # [T, N]
    bias: Any  # [N], or None
    addend: Any  # [T, N], added to the rounded product, or None
    addend_stride: Any
    n_size: Any


@triton.jit
def _rows(args, tile, places, BLOCK_N: tl.constexpr):
    # The rows beyond the last one read the last row again; their results are not stored.
    return tl.minimum(tl.cast(tile, tl.int64) * BLOCK_N + places, args.n_size - 1)


@triton.jit
def _bias_and_addend(args, tile, tokens, num_tokens, BLOCK_N: tl.constexpr):
    rows = _rows(args, tile, tl.arange(0, BLOCK_N), BLOCK_N)[:, None]
    bias = tl.zeros([BLOCK_N, 1], tl.float32)
    if args.bias is not None:
        bias = tl.load(args.bias + rows).to(tl.float32)
    addend = tl.zeros([BLOCK_N, 1], tl.float32)
    if args.addend is not None:
        at = tl.minimum(tokens, num_tokens - 1)[None, :] * args.addend_stride + rows
        addend = tl.load(args.addend + at).to(tl.float32)
    return bias, addend


@triton.jit
def _store(args, out, first, tokens, num_tokens):
    """Writes the values of some rows, beginning with ``first``, and all tokens."""
    rows = (first + tl.arange(0, out.shape[0]))[:, None]
    mask = (tokens[None, :] < num_tokens) & (rows < args.n_size)
    tl.store(args.out + tokens[None, :] * args.n_size + rows, cast(out, args.out.dtype.element_ty), mask=mask)


@triton.jit
def _finish_linear(args, tile, products, inputs, tokens, num_tokens):
    if args.bias is not None:
        products += inputs[0]
    if args.addend is not None:
        products = round_to(products, args.out.dtype.element_ty) + inputs[1]
    _store(args, products, tl.cast(tile, tl.int64) * products.shape[0], tokens, num_tokens)


@triton.jit
def _gate_and_up_rows(args, tile, places, BLOCK_N: tl.constexpr):
    half: tl.constexpr = BLOCK_N // 2
    row = tl.minimum(tl.cast(tile, tl.int64) * half + places % half, args.n_size - 1)
    return row + places // half * args.n_size


@triton.jit
def _finish_gated(args, tile, products, inputs, tokens, num_tokens):
    half: tl.constexpr = products.shape[0] // 2
    gate, up = tl.split(tl.permute(tl.reshape(products, [2, half, products.shape[1]]), [1, 2, 0]))
    _store(args, silu(gate) * up, tl.cast(tile, tl.int64) * half, tokens, num_tokens)


@planned
@triton.jit
def _linear_kernel(
    args,  # LinearArguments
    x_ptr,  # [T, K]
    norm_weight_ptr,  # [K], or None: no norm
    weight,  # the named tuple of its format: [N, K], or with GATED [2 N, K], gate rows then up rows
    parts_ptr,  # [SPLIT_K, tiles, BLOCK_N, BLOCK_T] float32, or None
    arrivals_ptr,  # [tiles] int32, zero before and after the kernel; or None
    num_tokens,
    num_tiles,
    k_size,
    x_stride,
    eps,
    LOAD: tl.constexpr,  # this and the next five are of the weight's format
    LOAD_GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    MULTIPLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    FORM: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    LOOPS: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    rows: tl.constexpr = _gate_and_up_rows if GATED else _rows
    before: tl.constexpr = reads_nothing if GATED else _bias_and_addend
    epilogue: tl.constexpr = _finish_gated if GATED else _finish_linear
    multiply(
        args, x_ptr, norm_weight_ptr, weight, parts_ptr, arrivals_ptr, num_tokens, num_tiles, k_size, x_stride, eps,
        LOAD, LOAD_GROUPS, OPERAND, MULTIPLY, PREFETCH, FORM, rows, before, epilogue, BLOCK_T, BLOCK_ROW, BLOCK_N,
        BLOCK_K, AHEAD, SPLIT_K, SLICES, EVEN_K, RESIDENT, LOOPS, PREFETCH_LINES, STAGES, PDL,
    )  # fmt: skip


def _launch_linear(
    name: str,
    out: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    addend: Tensor | None,
    eps: float,
    gated: bool = False,
) -> None:
    num_tokens, k_size = x.shape
    tiles, programs, constants = tiling(name, x, weight)
    split_k, parts = constants["SPLIT_K"], None
    if split_k > 1:
        parts = x.new_empty((split_k, tiles, constants["BLOCK_N"], constants["BLOCK_T"]), dtype=torch.float32)
    _linear_kernel[(programs, split_k)](
        LinearArguments(out, bias, addend, 0 if addend is None else addend.stride(0), out.shape[1]),
        x,
        norm_weight,
        weight.triton_arguments(),
        parts,
        arrivals(x, tiles) if split_k > 1 else None,
        num_tokens,
        tiles,
        k_size,
        x.stride(0),
        eps,
        GATED=gated,
        **constants,
    )


def refuses_weight(weight: Weight) -> str | None:
    for part in parts_of(weight):
        if reason := refuses_format("weights", part, part.triton_load) or part.triton_refuses():
            return reason
    return None


def parts_of(weight: Weight) -> tuple[Weight, ...]:
    """The weights of one format that a weight consists of, one below the other."""
    return weight.parts if isinstance(weight, Stack) else (weight,)


def refuses_norm(x: Tensor, weight: Weight) -> str | None:
    """The reason why no kernel runs a linear layer with a norm before it, or None."""
    if x.shape[1] > MAX_HIDDEN:
        return f"a norm over {x.shape[1]} (at most {MAX_HIDDEN})"
    return refuses_weight(weight)


@TRITON.implements(lambda x, weight, *rest, **keywords: refuses_weight(weight))
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    if not few_enough(x, weight):
        return product(x, weight, bias, addend)
    if isinstance(weight, Stack):
        out = _by_parts(lambda part, bias: linear(x, part, bias), weight, bias)
        return out if addend is None else addend + out
    out = x.new_empty(len(x), len(weight))
    for x_slice, out_slice, addend_slice in slices(x, out, addend):
        _launch_linear("linear", out_slice, x_slice, None, weight, bias, addend_slice, 0.0)
    return out


@TRITON.implements(lambda x, norm_weight, eps, weight, bias=None: refuses_norm(x, weight))
def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None) -> Tensor:
    if not few_enough(x, weight):
        return product(rms_norm(x, norm_weight, eps), weight, bias)
    if isinstance(weight, Stack):
        return _by_parts(lambda part, bias: norm_linear(x, norm_weight, eps, part, bias), weight, bias)
    out = x.new_empty(len(x), len(weight))
    for x_slice, out_slice in slices(x, out):
        _launch_linear("norm_linear", out_slice, x_slice, norm_weight, weight, bias, None, eps)
    return out


def _by_parts(run: Callable[[Weight, Tensor | None], Tensor], weight: Stack, bias: Tensor | None) -> Tensor:
    """Runs the op for each part of a weight, and concatenates the results."""
    sizes = [len(part) for part in weight.parts]
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return torch.cat([run(part, each) for part, each in zip(weight.parts, biases, strict=True)], dim=1)


@TRITON.implements(lambda x, norm_weight, eps, weight: refuses_norm(x, weight))
def norm_swiglu_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    if isinstance(weight, Stack) or len(weight) // 2 % weight.row_tile or not few_enough(x, weight):
        return swiglu(norm_linear(x, norm_weight, eps, weight))
    out = x.new_empty(len(x), len(weight) // 2)
    for x_slice, out_slice in slices(x, out):
        _launch_linear("norm_swiglu_linear", out_slice, x_slice, norm_weight, weight, None, None, eps, gated=True)
    return out
