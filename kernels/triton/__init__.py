"""The Triton backend: CUDA devices, and with TRITON_INTERPRET=1 a CPU through Triton's interpreter.

Files are named like the contracts whose ops they implement. few_tokens.py is the inside of the linears; tuning.py says
from where a launch has its configuration, and tuned/<device>/<op>.json holds what was measured.
"""

from ..discovery import import_files
from ..triton_if_any import INSTALLED

if INSTALLED:
    import_files(__name__, __path__)
