"""transformers: its models on our kernels (patch.py), and its weights in our model (share.py).

transformers is imported when a function is called, not before."""

from .patch import apply_qwenkern, register_attention, revert

__all__ = ["apply_qwenkern", "register_attention", "revert"]
