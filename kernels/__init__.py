"""The ops of the model's graph: each takes tensors and numbers and returns tensors. dispatch.py chooses the
backend."""

if __name__ == "kernels":  # imported as `kernels`, the name of Hugging Face's library: see namesake.py
    from .namesake import hand_over

    hand_over()
else:
    # isort: off
    # The contracts come first, because the backends register implementations of them.
    from .attention import attention, decode_attention, prefill_attention
    from .attention import waits_for_host as waits_for_host
    from .dispatch import dependent_launches as dependent_launches
    from .dispatch import invariant_tokens as invariant_tokens
    from .dispatch import prepare as prepare
    from .draw import draw
    from .draw import most_likely as most_likely
    from .embedding import embedding
    from .linear import linear, norm_linear, norm_swiglu_linear
    from .lm_head import lm_head, lm_head_top_k
    from .pages import Pages
    from .penalise import penalise
    from .qkv_rope import norm_qkv_rope
    from .rms_norm import add_rms_norm, rms_norm, rms_norm_backward
    from .rope import apply_rope, rope_and_cache
    from .swiglu import silu_mul, silu_mul_backward, swiglu, swiglu_backward
    from .weights import Weight

    # dispatch.py tries the backends in the order of these imports.
    from . import triton as triton
    from .c import ops as ops

    from . import layers as layers
    # isort: on

__all__ = [
    "Pages",
    "Weight",
    "add_rms_norm",
    "apply_rope",
    "attention",
    "decode_attention",
    "draw",
    "embedding",
    "linear",
    "lm_head",
    "lm_head_top_k",
    "norm_linear",
    "norm_qkv_rope",
    "norm_swiglu_linear",
    "penalise",
    "prefill_attention",
    "rms_norm",
    "rms_norm_backward",
    "rope_and_cache",
    "silu_mul",
    "silu_mul_backward",
    "swiglu",
    "swiglu_backward",
]
