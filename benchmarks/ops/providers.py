"""The providers of an op: our kernel, its torch reference, and other libraries that are installed. With quantised
weights or pages, "dense" is our kernel on the dequantised ones.

A provider makes a function for a case. The function takes the case's inputs and returns what the op returns. The
provider returns None if it does not implement the op. Other libraries are imported only when they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenkern import kernels
from qwenkern.benchmarks.ops.cases import Case
from qwenkern.kernels import reference
from qwenkern.kernels.pages import DensePages

Function = Callable[..., Any]


@dataclass(frozen=True)
class Provider:
    name: str
    function: Callable[[Case], Function | None]
    same: bool = True  # computes exactly the op, so that its result can be checked
    gpu_only: bool = False
    takes_formats: bool = False  # False: the provider gets quantised matrices and pages dequantised
    only_quantised: bool = False  # left out if nothing is quantised, because it would repeat another provider


def _ours(case: Case) -> Function:
    return getattr(kernels, case.op)


def _eager(case: Case) -> Function:
    return getattr(reference, case.op)


def _compiled(case: Case) -> Function | None:
    if case.op in ("decode_attention", "prefill_attention"):  # they loop over lengths on the host
        return None
    torch.compiler.reset()
    return torch.compile(getattr(reference, case.op), dynamic=False)


def _library(case: Case) -> Function | None:
    """The vendor's matrix product without the fused ops: a lower limit of the time, not the same op."""
    found: dict[str, Function] = {
        "linear": lambda x, weight, bias, addend: F.linear(x, weight),
        "norm_linear": lambda x, norm, eps, weight, bias: F.linear(x, weight, bias),
        "norm_swiglu_linear": lambda x, norm, eps, weight: F.linear(x, weight),
        "lm_head": lambda x, norm, eps, weight: F.linear(x, weight),
    }
    return found.get(case.op)


def _sdpa(case: Case) -> Function | None:
    """torch's attention on the pages in their order in memory: the same work without block tables, on other tokens."""
    if case.op == "decode_attention":
        return _dense_decode
    return _dense_prefill if case.op == "prefill_attention" else None


def _dense_decode(q: Tensor, pages: DensePages, tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    k, v = (each.view(len(q), -1, *each.shape[2:]).transpose(1, 2) for each in pages.tensors)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale, enable_gqa=True)[:, :, 0]


def _dense_prefill(
    q: Tensor, pages: DensePages, tables: Tensor, lengths: Tensor, starts: Tensor, scale: float
) -> Tensor:
    k, v = (each.flatten(0, 1)[: len(q)].transpose(0, 1)[None] for each in pages.tensors)
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _flex(case: Case) -> Function | None:
    """torch's FlexAttention, compiled, on the pages in their order in memory."""
    if case.op != "prefill_attention":
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def prefill(q: Tensor, pages: DensePages, tables: Tensor, lengths: Tensor, starts: Tensor, scale: float) -> Tensor:
        if len(q) not in masks:
            masks[len(q)] = create_block_mask(lambda b, h, row, key: row >= key, None, None, len(q), len(q), q.device)
        k, v = (each.flatten(0, 1)[: len(q)].transpose(0, 1)[None] for each in pages.tensors)
        out = compiled(q.transpose(0, 1)[None], k, v, block_mask=masks[len(q)], scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return prefill


def _flash_attn(case: Case) -> Function | None:
    """FlashAttention on the pages in their order in memory."""
    from flash_attn import flash_attn_func

    def prefill(q: Tensor, pages: DensePages, tables: Tensor, lengths: Tensor, starts: Tensor, scale: float) -> Tensor:
        k, v = (each.flatten(0, 1)[: len(q)][None] for each in pages.tensors)
        return flash_attn_func(q[None], k, v, softmax_scale=scale, causal=True)[0]

    return prefill if case.op == "prefill_attention" else None


def _transformers(case: Case) -> Function | None:
    """The functions of transformers' modules, in eager mode."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, apply_rotary_pos_emb

    @functools.cache  # one module per weight, because making it is not part of the op
    def norm(weight: Tensor, eps: float) -> Qwen2RMSNorm:
        module = Qwen2RMSNorm(len(weight), eps)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(weight, eps)(x)

    def apply_rope(
        q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        cos, sin = (torch.cat((half, half), -1)[None].to(q.dtype) for half in cos_sin[positions].chunk(2, -1))
        sin = -sin if inverse else sin
        q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    found: dict[str, Function] = {"rms_norm": rms_norm, "apply_rope": apply_rope}
    return found.get(case.op)


def _liger(case: Case) -> Function | None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    def swiglu(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous())

    found: dict[str, Function] = {"rms_norm": rms_norm, "swiglu": swiglu}
    return found.get(case.op)


def _flashinfer(case: Case) -> Function | None:
    import flashinfer

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.clone(), residual.clone()  # it works in place
        flashinfer.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    found: dict[str, Function] = {
        "rms_norm": lambda x, weight, eps: flashinfer.rmsnorm(x, weight, eps),
        "add_rms_norm": add_rms_norm,
        "swiglu": lambda gate_up: flashinfer.silu_and_mul(gate_up),
    }
    return found.get(case.op)


def _quack(case: Case) -> Function | None:
    import quack

    return {"rms_norm": lambda x, weight, eps: quack.rmsnorm(x, weight, eps=eps)}.get(case.op)


PROVIDERS = [
    Provider("qwenkern", _ours, takes_formats=True),
    Provider("dense", _ours, only_quantised=True),
    Provider("eager", _eager),
    Provider("compile", _compiled),
    Provider("library", _library, same=False),
    Provider("sdpa", _sdpa, same=False),
    Provider("flex", _flex, same=False, gpu_only=True),
    Provider("flash-attn", _flash_attn, same=False, gpu_only=True),
    Provider("transformers", _transformers),
    Provider("liger", _liger),
    Provider("flashinfer", _flashinfer),
    Provider("quack", _quack),
]
