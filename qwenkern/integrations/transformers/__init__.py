"""transformers' models on qwenkern's kernels (patch.py), and qwenkern's model on transformers' weights (share.py).

transformers is imported only when a function is called."""

from .patch import apply_qwenkern, register_attention, revert

__all__ = ["apply_qwenkern", "register_attention", "revert"]
