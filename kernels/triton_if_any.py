"""Triton, or where it is not installed, what lets the files of kernels be imported all the same: no kernel is launched
then, and the ops run in C or in torch. C needs torch and a compiler only."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    INSTALLED = INTERPRETED = False

    class _Absent:
        """In the place of both modules: what files name while they are imported, and nothing else."""

        __version__ = None

        def jit(self, function: Callable | None = None, **_: Any) -> Any:
            return self.jit if function is None else function

        def constexpr(self, value: Any) -> Any:
            return value

    triton = tl = _Absent()
    gdc_launch_dependents = gdc_wait = None
else:
    INSTALLED = True
    INTERPRETED = triton.knobs.runtime.interpret


@functools.cache
def ensure_cache() -> tempfile.TemporaryDirectory | None:
    """Sees to a folder that Triton can compile into. Its own lies below the user's home or where TRITON_CACHE_DIR says;
    where that cannot be written to, which would end the launch, it is one of this process."""
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return None
        reason = "it cannot be written to"
    except OSError as error:
        reason = error.strerror
    place = tempfile.TemporaryDirectory(prefix="qwenkern-triton-")
    warnings.warn(f"qwenkern: Triton keeps no compiled kernels in {folder}: {reason}", stacklevel=3)
    triton.knobs.cache.dir = place.name
    return place


__all__ = ["INSTALLED", "INTERPRETED", "ensure_cache", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]
