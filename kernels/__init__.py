"""The ops of the graph: tensors and numbers in, tensors out."""

if __name__ == "kernels":
    raise ImportError(
        "this folder is the package qwenkern.kernels, and the bare name `kernels` belongs to another library: "
        "write `from qwenkern import kernels`"
    )

from .linear import linear, norm_linear, norm_swiglu_linear
from .lm_head import lm_head, lm_head_top_k
from .reference import decode_attention, prefill_attention
from .rms_norm import add_rms_norm, rms_norm
from .rope import apply_rope, rope_and_cache
from .swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "apply_rope",
    "decode_attention",
    "linear",
    "lm_head",
    "lm_head_top_k",
    "norm_linear",
    "norm_swiglu_linear",
    "prefill_attention",
    "rms_norm",
    "rope_and_cache",
    "swiglu",
]
