"""Layers around the ops, with which Hugging Face's `kernels` library replaces a model's own layers.

This folder is a repository for its LocalLayerRepository (metadata.json says so). The layers have no state. The library
calls `forward` with the replaced module as `self`, and with that module's arguments:

    RMSNorm        transformers' layer of that name: a `weight` [H] and `variance_epsilon`
    SiluAndMul     silu of the first half times the second
    RotaryPosEmb   transformers' function `rotary_pos_emb`

If an op would refuse the arguments, such as a weight of another dtype, torch computes what the replaced module
computes.

On a CPU a call into C costs more than a few tokens save. RMSNorm is faster than transformers' layer at any number of
tokens. RotaryPosEmb is faster from about 64 tokens on, and slower below.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .rms_norm import normed, rms_norm
from .rope import apply_rope, rotated
from .swiglu import gated, swiglu


class RMSNorm(nn.Module):
    """x [..., H] divided by its root mean square over the last dimension, times the weight."""

    can_torch_compile = True
    has_backward = rms_norm.has_gradient

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        suits = hidden_states.dtype == self.weight.dtype and _is_plain(hidden_states)
        return (rms_norm if suits else normed)(hidden_states, self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    """silu(gate) * up. x is [..., 2 F], with gate in the first half and up in the second. Returns [..., F]."""

    can_torch_compile = True
    has_backward = swiglu.has_gradient

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x) if _is_plain(x) else gated(*x.chunk(2, dim=-1))


class RotaryPosEmb(nn.Module):
    """q and k after rotary position embedding.

    q and k are [B, heads, T, D], or with ``unsqueeze_dim`` 2 [B, T, heads, D]. cos and sin are [B or 1, T, D], with
    equal halves. The rotation is computed in float32 and rounded once."""

    can_torch_compile = True
    has_backward = apply_rope.has_gradient

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"rotary_pos_emb: unsqueeze_dim must be 1 or 2, and is {unsqueeze_dim}")
        if q.dtype != torch.float64:
            cos, sin = cos.float(), sin.float()
        if unsqueeze_dim == 1:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        num_tokens = q.shape[0] * q.shape[1]
        flat = [x.reshape(num_tokens, *x.shape[2:]) for x in (q, k)]
        suits = q.dtype == k.dtype and all(map(_is_plain, flat))
        cos_sin, positions = angles(cos, sin, num_tokens)
        turned = (apply_rope if suits else rotated)(flat[0], flat[1], cos_sin, positions)
        q, k = (out.view(x.shape) for out, x in zip(turned, (q, k), strict=True))
        return (q.transpose(1, 2), k.transpose(1, 2)) if unsqueeze_dim == 1 else (q, k)


def angles(cos: Tensor, sin: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Converts transformers' cos and sin [B or 1, T, D], whose halves are equal, to what apply_rope takes: cos_sin
    [rows, D] and positions [num_tokens]. cos_sin is float32, or float64 if cos and sin are."""
    half = cos.shape[-1] // 2
    cos_sin = torch.cat((cos.narrow(-1, 0, half), sin.narrow(-1, 0, half)), dim=-1).flatten(0, -2)
    cos_sin = cos_sin if cos_sin.dtype == torch.float64 else cos_sin.float()
    positions = torch.arange(num_tokens, device=cos.device)
    rows = cos_sin.shape[0]
    if rows == num_tokens and not torch.compiler.is_compiling():  # sizes may be symbolic
        return cos_sin, positions
    return cos_sin, positions % rows  # with B = 1 in cos, all sequences use the same rows


def _is_plain(x: Tensor) -> bool:
    """Whether the ops take a tensor's dtype and layout."""
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return x.dtype in floats and x.stride(-1) == 1 and x.numel() > 0
