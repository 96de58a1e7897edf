"""Triton, or where it is not installed, what lets the files of kernels be imported all the same: no kernel is launched
then, and the ops run in C or in torch. C needs torch and a compiler only."""

from __future__ import annotations

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


__all__ = ["INSTALLED", "INTERPRETED", "gdc_launch_dependents", "gdc_wait", "tl", "triton"]
