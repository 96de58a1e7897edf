"""The Triton backend: its devices, what all its ops refuse, and the options of every launch."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from ..dispatch import Backend, launches_dependently
from ..pages import Pages
from ..triton_if_any import INTERPRETED
from ..weights import Weight
from . import tuning
from .few_tokens import MAX_TOKENS
from .launching import hash_functions


def _serves(kind: str) -> bool:
    return kind == "cuda" or tuning.is_offline() or (INTERPRETED and kind == "cpu")


OLDEST = 80  # compute capability; on older GPUs Triton uses no matrix instructions, and tiles exceed shared memory


def _refuses(x: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "float64"
    device = tuning.device_of(x)
    if device.backend == "cuda" and device.capability < OLDEST:
        return f"tensors on sm_{device.capability} (from sm_{OLDEST})"
    return None if x.numel() else "tensors without elements"


def _invariant_tokens() -> int:
    return MAX_TOKENS


def _prepare() -> None:
    if not INTERPRETED:
        ensure_cache()
        hash_functions()


@functools.cache
def ensure_cache() -> tempfile.TemporaryDirectory | None:
    """Makes sure that Triton can write compiled kernels. Its cache folder is below the user's home, or TRITON_CACHE_DIR
    names it. If that folder is not writable, every launch would fail. Then a temporary folder of this process takes its
    place, and a warning says so."""
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return None
        reason = "it cannot be written to"
    except OSError as error:
        reason = error.strerror or str(error)
    place = tempfile.TemporaryDirectory(prefix="qwenkern-triton-")
    warnings.warn(f"qwenkern: Triton keeps no compiled kernels in {folder}: {reason}", stacklevel=3)
    triton.knobs.cache.dir = place.name
    return place


def refuses_format(what: str, value: Weight | Pages, piece: Callable | None) -> str | None:
    """The reason why no kernel takes weights or pages of this format here, or None. ``piece`` is the format's function
    that the kernel would call."""
    if piece is None:
        return f"{what} of the format {value.format}"
    if value.triton_capability:
        device = tuning.device_of(value.tensors[0])
        if device.backend == "cuda" and device.capability < value.triton_capability:
            return f"{what} of the format {value.format} on sm_{device.capability} (from sm_{value.triton_capability})"
    return None


MAX_PROGRAMS = 65535  # along the second and the third axis of a grid
_WITHOUT_PDL = {"PDL": False}
_WITH_PDL = {"PDL": True, "launch_pdl": True}


def pdl_options(x: Tensor) -> dict[str, bool]:
    """Launch options for programmatic dependent launch (PDL). It is on from sm_90, and only inside a captured graph:
    in an eager launch its cost on the host outweighs the gain."""
    device = tuning.device_of(x)
    if INTERPRETED or device.backend != "cuda" or device.capability < 90:
        return _WITHOUT_PDL
    dependent = launches_dependently()
    if dependent is None:
        dependent = tuning.is_offline() or torch.cuda.is_current_stream_capturing()
    return _WITH_PDL if dependent else _WITHOUT_PDL


TRITON = Backend("triton", _serves, _refuses, _prepare, _invariant_tokens)
