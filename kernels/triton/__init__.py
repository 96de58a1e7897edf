"""The Triton backend: CUDA devices, and with TRITON_INTERPRET=1 a CPU through Triton's interpreter.

Files are named like the contracts whose ops they implement. few_tokens.py is the inside of the linears; tuning.py says
from where a launch has its configuration, and tuned/<device>/<op>.json holds what was measured.
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
