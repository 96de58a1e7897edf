"""Keys and values as whole numbers from -127 to 127, with a scale for each token and head (scaled.py).

    k[t, h, d] = k_pages[t, h, d] * k_scales[t, h] * channels[h, d]
    v[t, h, d] = v_pages[t, h, d] * v_scales[t, h]

Qwen2.5 adds large biases to a few channels of k: up to 160 in the demo model, where the others stay below 10. With one
step for all channels of a head, the others would lose most of their bits. So k is divided by ``channels`` before it is
rounded, and q is multiplied by ``channels``. They follow from the bias (``adapt``) and are powers of two, so the
division and the product are exact. The rotary embedding mixes channels d and d + D/2, so both have the same factor.

On the demo model this reduces the mean KL divergence from 2.3e-2 to 9e-4 (docs/generation.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..language import cast
from ..triton_if_any import tl, triton
from . import dense
from .scaled import ScaledPages, store_heads, values_of_v

TYPICAL = 6.0  # the size of a channel without a bias; from 4 to 8 the KL divergence of the demo is the same
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: x + _ROUND has x, rounded to a whole number, in its low bits
_BITS_OF_ROUND = tl.constexpr(0x4B400000)


@triton.jit
def _values(codes):
    """Codes in float32, by an addition, because GPUs add faster than they convert."""
    return (codes.to(tl.int32) + _BITS_OF_ROUND).to(tl.float32, bitcast=True) - _ROUND


@triton.jit
def _load_k(pages, kv_head, page, token, column, mask):
    return _values(dense._load_k(pages, kv_head, page, token, column, mask)).to(pages.like.dtype.element_ty)


@triton.jit
def _load_v(pages, kv_head, page, token, column, mask):
    v = _values(dense._load_v(pages, kv_head, page, token, column, mask))
    return values_of_v(v, pages.like.dtype.element_ty)


@triton.jit
def _query(pages, kv_head, q, column):
    channels = tl.load(pages.like + kv_head * q.shape[1] + column).to(tl.float32)
    return cast(q.to(tl.float32) * channels, q.dtype)


@triton.jit
def _codes(x):
    return (x + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _store_k(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    channel = pages.like + kv_head * HEAD_DIM + column
    of_low = tl.load(channel, mask=mask, other=1.0).to(tl.float32)
    of_high = tl.load(channel + HEAD_DIM // 2, mask=mask, other=1.0).to(tl.float32)
    low, high = tl.div_rn(low.to(tl.float32), of_low), tl.div_rn(high.to(tl.float32), of_high)
    store_heads(pages.k, pages.k_scales, slot, kv_head, num_kv_heads, column, low, high, mask, _codes, 127.0, HEAD_DIM)


@triton.jit
def _store_v(pages, slot, kv_head, num_kv_heads, column, low, high, mask, HEAD_DIM: tl.constexpr):
    store_heads(pages.v, pages.v_scales, slot, kv_head, num_kv_heads, column, low, high, mask, _codes, 127.0, HEAD_DIM)


class Int8Pages(ScaledPages):
    """The tensors of ScaledPages. The last one is ``channels`` [Hkv, D]: powers of two, 1 before ``adapt``."""

    format = "int8"
    names = ("k_pages", "v_pages", "k_scales", "v_scales", "channels")
    code, largest = torch.int8, 127.0
    triton_load_k, triton_load_v = _load_k, _load_v
    triton_store_k, triton_store_v = _store_k, _store_v
    triton_query = _query
    __slots__ = ()

    @classmethod
    def _like(cls, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.ones(shape[2:], dtype=dtype, device=device)

    def _like_shape(self) -> tuple[int, ...]:
        return self.k.shape[2:]

    @staticmethod
    def _encode(x: Tensor) -> Tensor:
        return x.round().to(torch.int8)

    def adapt(self, bias: Tensor) -> None:
        """Estimates the size of a channel from its bias, which the rotary embedding mixes with that of channel
        d +- D/2, and from TYPICAL. The smallest channel of a head gets the factor 1."""
        turning = bias.float().unflatten(-1, (2, -1)).square().sum(-2).sqrt() + TYPICAL
        channels = torch.exp2((turning / turning.amin(-1, keepdim=True)).log2().round())
        self.like.copy_(torch.cat((channels, channels), -1))

    def store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        super().store(slots, k / self.like, v)

    def gather(self, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        k, v = self._gathered(block_table, length)
        return (k * self.like[:, None]).to(self.dtype), v.to(self.dtype)
