"""The ops that C implements. Each is registered with the backend in the file named like its contract."""

from .attention import decode_attention, prefill_attention
from .embedding import embedding
from .linear import linear, norm_linear, norm_swiglu_linear
from .lm_head import lm_head
from .qkv_rope import norm_qkv_rope
from .rms_norm import add_rms_norm, rms_norm
from .rope import apply_rope, rope_and_cache
from .swiglu import silu_mul, swiglu

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
    "embedding",
    "linear",
    "lm_head",
    "norm_linear",
    "norm_qkv_rope",
    "norm_swiglu_linear",
    "prefill_attention",
    "rms_norm",
    "rope_and_cache",
    "silu_mul",
    "swiglu",
]
