"""The C functions as a backend: which tensors each takes, and the calls."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend
from ..linear import norm_linear as norm_linear_op
from ..pages import DensePages, Pages
from ..rope import rope_and_cache as rope_and_cache_op
from ..weights import Dense, Weight
from . import ops
from .build import library

FLOATS = (torch.float32, torch.float16, torch.float64)


def _refuses(x: Tensor) -> str | None:
    if x.dtype in FLOATS:
        return f"{str(x.dtype).removeprefix('torch.')} (C computes in bfloat16)"
    return None if library() is not None else "anything, for the C functions could not be compiled or loaded"


C = Backend("c", lambda kind: kind == "cpu", _refuses, invariant_tokens=ops.MAX_TOKENS)


def _refuses_linear(x: Tensor, weight: Weight) -> str | None:
    if not isinstance(weight, Dense):
        return f"weights of the format {weight.format}"
    return None if ops.takes_linear(x) else f"rows of {x.shape[1]} values, or so many tokens"


def _refuses_pages(q: Tensor, pages: Pages) -> str | None:
    if not isinstance(pages, DensePages):
        return f"pages of the format {pages.format}"
    return None if ops.takes_heads(q, pages.k) else f"heads of {pages.head_dim}"


def _refuses_embedding(ids: Tensor, weight: Weight) -> str | None:
    return None if isinstance(weight, Dense) and ops.takes_rows(weight.tensor) else "such a table"


@C.implements(_refuses_embedding)
def embedding(ids: Tensor, weight: Weight) -> Tensor:
    return ops.embedding(ids, weight.dequantise())


@C.implements(lambda x, *rest, **keywords: None if ops.takes_norm(x) else "such rows")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, weight, eps)


@C.implements(lambda x, *rest, **keywords: None if ops.takes_norm(x) else "such rows")
def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if residual is None:
        return ops.rms_norm(x, weight, eps), x
    return ops.add_rms_norm(x, residual, weight, eps)


@C.implements(lambda gate_up: None if ops.takes_gate(gate_up) else "such rows")
def swiglu(gate_up: Tensor) -> Tensor:
    return ops.swiglu(gate_up)


@C.implements(lambda gate, up: None if ops.takes_gate(gate) else "such rows")
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return ops.silu_mul(gate, up)


@C.implements(lambda q, *rest, **keywords: None if ops.takes_rope(q) else f"heads of {q.shape[2]}")
def apply_rope(
    q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    return ops.apply_rope(q, k, cos_sin, positions, inverse)


@C.implements(lambda qkv, positions, cos_sin, pages, slots: _refuses_pages(qkv, pages))
def rope_and_cache(qkv: Tensor, positions: Tensor, cos_sin: Tensor, pages: Pages, slots: Tensor) -> Tensor:
    return ops.rope_and_cache(qkv, positions, cos_sin, *pages.tensors, slots)


@C.implements(lambda x, weight, bias=None, residual=None: _refuses_linear(x, weight))
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight.dequantise(), bias=bias, addend=residual)[0]


@C.implements(lambda x, residual, norm_weight, eps, weight, bias=None: _refuses_linear(x, weight))
def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return ops.linear(x, weight.dequantise(), residual=residual, norm_weight=norm_weight, eps=eps, bias=bias)


@C.implements(lambda x, residual, norm_weight, eps, weight: _refuses_linear(x, weight))
def norm_swiglu_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight
) -> tuple[Tensor, Tensor]:
    gate, up = weight.dequantise().chunk(2)
    return ops.linear(x, gate, residual=residual, norm_weight=norm_weight, eps=eps, up=up)


@C.implements(lambda x, residual, norm_weight, eps, weight: _refuses_linear(x, weight))
def lm_head(x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Weight) -> Tensor:
    return ops.linear(
        x, weight.dequantise(), residual=residual, norm_weight=norm_weight, eps=eps, out_dtype=torch.float32
    )[0]


@C.implements()
def norm_qkv_rope(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Weight,
    bias: Tensor | None,
    positions: Tensor,
    cos_sin: Tensor,
    pages: Pages,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """As the two ops that it is made of."""
    qkv, residual = norm_linear_op(x, residual, norm_weight, eps, weight, bias)
    return rope_and_cache_op(qkv, positions, cos_sin, pages, slots), residual


@C.implements(lambda q, pages, *rest, **keywords: _refuses_pages(q, pages))
def decode_attention(q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    return ops.decode_attention(q, *pages.tensors, block_tables, lengths, scale)


def _refuses_prefill(q: Tensor, pages: Pages, *rest: object, **keywords: object) -> str | None:
    return _refuses_pages(q, pages) or (None if ops.takes_prefill(q, pages.tensors[0]) else "torch is faster")


@C.implements(_refuses_prefill)
def prefill_attention(
    q: Tensor, pages: Pages, block_tables: Tensor, lengths: Tensor, query_starts: Tensor, scale: float
) -> Tensor:
    return ops.prefill_attention(q, *pages.tensors, block_tables, lengths, query_starts, scale)
