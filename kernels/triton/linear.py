"""The ops of ../linear.py. For few tokens (1 to 16) each op is one kernel; few_tokens.py has the picture. More tokens
run rms_norm, torch's matrix product and swiglu one after the other.

The epilogue computes in float32, and out is rounded once.

If N gives too few programs, SPLIT_K of them divide the K of a tile. Each writes a float32 partial sum, and the last to
arrive adds the partial sums in a fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..language import cast, silu, wait_for_inputs
from ..rms_norm import add_rms_norm
from ..swiglu import swiglu
from ..weights import Weight
from . import tuning
from .backend import TRITON, pdl_options, refuses_format
from .few_tokens import MAX_HIDDEN, MAX_TOKENS, accumulate, config, padded, row_scales
from .launching import planned


@planned
@triton.jit
def _linear_kernel(
    out_ptr,  # [T, N]
    new_residual_ptr,  # [T, K], or None
    x_ptr,  # [T, K]
    residual_ptr,  # [T, K], added before the norm, or None
    norm_weight_ptr,  # [K], or None: no norm
    weight,  # the named tuple of its format: [N, K], or with GATED [2 N, K], gate rows then up rows
    bias_ptr,  # [N], or None
    addend_ptr,  # [T, N], added to the product, or None
    parts_ptr,  # [SPLIT_K, T, N] float32, or None
    arrivals_ptr,  # [number of tiles] int32, zero before and after the kernel; or None
    num_tokens,
    n_size,
    k_size,
    new_residual_stride,
    x_stride,
    residual_stride,
    addend_stride,
    eps,
    LOAD: tl.constexpr,  # of the weights' format
    PREFETCH: tl.constexpr,
    SKIP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # Rows beyond the last read the last row again; their results are not stored.
    rows = tl.minimum(tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), n_size - 1)
    k_per_split = tl.cdiv(tl.cdiv(k_size, BLOCK_K), SPLIT_K) * BLOCK_K
    k_start = split * k_per_split
    k_end = tl.minimum(k_size, k_start + k_per_split)
    # Prefetch weights before the wait: they arrive while the kernel before finishes and the norm is computed.
    PREFETCH(weight, rows, k_start, k_end, PREFETCH_LINES)
    up = weight
    if GATED:
        up = SKIP(weight, n_size)
        PREFETCH(up, rows, k_start, k_end, PREFETCH_LINES)

    wait_for_inputs(PDL)
    scales = tl.zeros([BLOCK_T], tl.float32)
    if norm_weight_ptr is not None:
        scales = row_scales(
            new_residual_ptr, x_ptr, residual_ptr, num_tokens, k_size, new_residual_stride, x_stride, residual_stride,
            eps, tile * SPLIT_K + split, tl.num_programs(0) * SPLIT_K, BLOCK_T, BLOCK_ROW,
        )  # fmt: skip
    acc, acc_up = accumulate(
        x_ptr, residual_ptr, norm_weight_ptr, scales, weight, up, rows, num_tokens, k_start, k_end,
        x_stride, residual_stride, LOAD, GATED, BLOCK_T, BLOCK_N, BLOCK_K, SLICES, EVEN_K,
    )  # fmt: skip

    tokens = tl.arange(0, BLOCK_T)[None, :]
    rows = (tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    mask = (tokens < num_tokens) & (rows < n_size)
    at = tokens * n_size + rows
    last = True
    if SPLIT_K > 1:
        part = num_tokens * n_size
        tl.store(parts_ptr + split * part + at, acc, mask=mask)
        tl.debug_barrier()  # all threads have written their partial sums before one counts the arrival
        last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        if SPLIT_K > 1:
            acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for other in range(SPLIT_K):
                acc += tl.load(parts_ptr + other * part + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(arrivals_ptr + tile, 0)
        if GATED:
            acc = silu(acc) * acc_up
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + rows, mask=rows < n_size, other=0.0).to(tl.float32)
        if addend_ptr is not None:
            acc += tl.load(addend_ptr + tokens * addend_stride + rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, cast(acc, out_ptr.dtype.element_ty), mask=mask)


def _launch_linear(
    name: str,
    out: Tensor,
    new_residual: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    addend: Tensor | None,
    eps: float,
    gated: bool = False,
) -> None:
    (num_tokens, k_size), n_size = x.shape, out.shape[1]
    device = tuning.device_of(x)
    block_t = padded(num_tokens, device)
    chosen = config(
        name, device, n_size, k_size, block_t, x.element_size(), streams=2 if gated else 1, splits_k=not gated
    )
    tiles, split_k = triton.cdiv(n_size, chosen["BLOCK_N"]), chosen["SPLIT_K"]
    _linear_kernel[(tiles, split_k)](
        out,
        new_residual,
        x,
        residual,
        norm_weight,
        weight.triton_arguments(),
        bias,
        addend,
        x.new_empty((split_k, num_tokens, n_size), dtype=torch.float32) if split_k > 1 else None,
        _arrivals(x.device, tiles) if split_k > 1 else None,
        num_tokens,
        n_size,
        k_size,
        0 if new_residual is None else new_residual.stride(0),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if addend is None else addend.stride(0),
        eps,
        LOAD=weight.triton_load,
        PREFETCH=weight.triton_prefetch,
        SKIP=weight.triton_skip,
        GATED=gated,
        BLOCK_T=block_t,
        BLOCK_ROW=triton.next_power_of_2(k_size),
        SLICES=chosen["num_warps"],
        EVEN_K=k_size % chosen["BLOCK_K"] == 0,
        **chosen,
        **pdl_options(x),
    )


_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def _arrivals(device: torch.device, tiles: int) -> Tensor:
    """Counters, one a tile, of the programs that have finished it. Kernels of one stream use the same counters in
    turn."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, triton.next_power_of_2(max(tiles, 1024)))
    if key in _counters:
        return _counters[key]
    zeros = torch.zeros(key[2], dtype=torch.int32, device=device)
    if stream and torch.cuda.is_current_stream_capturing():
        return zeros  # for this graph only, which fills them with zeros at each replay
    return _counters.setdefault(key, zeros)


def refuses_weight(weight: Weight) -> str | None:
    return refuses_format("weights", weight, weight.triton_load)


def refuses_norm(x: Tensor, weight: Weight) -> str | None:
    """The reason why no kernel runs a linear layer with a norm before it, or None."""
    if x.shape[1] > MAX_HIDDEN:
        return f"a norm over {x.shape[1]} (at most {MAX_HIDDEN})"
    return refuses_weight(weight)


def new_residual_like(x: Tensor, residual: Tensor | None) -> Tensor | None:
    return None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)


@TRITON.implements(lambda x, weight, *rest, **keywords: refuses_weight(weight))
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, addend: Tensor | None = None) -> Tensor:
    if len(x) > MAX_TOKENS:
        out = F.linear(x, weight.dequantise(), bias)
        return out if addend is None else addend + out
    out = x.new_empty(len(x), len(weight))
    _launch_linear("linear", out, None, x, None, None, weight, bias, addend, 0.0)
    return out


@TRITON.implements(lambda x, residual, norm_weight, eps, weight, bias=None: refuses_norm(x, weight))
def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if len(x) > MAX_TOKENS:
        normed, residual = add_rms_norm(x, residual, norm_weight, eps)
        return F.linear(normed, weight.dequantise(), bias), residual
    out, new_residual = x.new_empty(len(x), len(weight)), new_residual_like(x, residual)
    _launch_linear("norm_linear", out, new_residual, x, residual, norm_weight, weight, bias, None, eps)
    return out, x if new_residual is None else new_residual


@TRITON.implements(lambda x, residual, norm_weight, eps, weight: refuses_norm(x, weight))
def norm_swiglu_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight
) -> tuple[Tensor, Tensor]:
    if len(x) > MAX_TOKENS:
        normed, residual = add_rms_norm(x, residual, norm_weight, eps)
        return swiglu(F.linear(normed, weight.dequantise())), residual
    out, new_residual = x.new_empty(len(x), len(weight) // 2), new_residual_like(x, residual)
    _launch_linear("norm_swiglu_linear", out, new_residual, x, residual, norm_weight, weight, None, None, eps, True)
    return out, x if new_residual is None else new_residual
