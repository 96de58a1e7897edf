"""The Triton backend: CUDA devices, and a CPU through Triton's interpreter where TRITON_INTERPRET=1 is set.

A file has the name of the contract whose ops it implements. few_tokens.py holds the Triton functions that the linear
kernels share. tuning.py chooses the configuration of a launch, and tuned/<device>/<op>.json holds measured
configurations.
"""

from ..triton_if_any import INSTALLED

if INSTALLED:
    from . import attention as attention
    from . import decode_attention as decode_attention
    from . import linear as linear
    from . import lm_head as lm_head
    from . import prefill_attention as prefill_attention
    from . import qkv_rope as qkv_rope
    from . import rms_norm as rms_norm
    from . import rms_norm_backward as rms_norm_backward
    from . import rope as rope
    from . import swiglu as swiglu
    from . import swiglu_backward as swiglu_backward
