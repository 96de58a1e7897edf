"""The Triton backend: CUDA devices, and a CPU through Triton's interpreter where TRITON_INTERPRET=1 is set.

A file has the name of the contract whose ops it implements. few_tokens.py holds the Triton functions that the linear
kernels share. tuning.py chooses the configuration of a launch, and tuned/<device>/<op>.json holds measured
configurations.
"""

from ..discovery import import_files
from ..triton_if_any import INSTALLED

if INSTALLED:
    import_files(__name__, __path__)
