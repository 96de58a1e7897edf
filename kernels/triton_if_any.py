"""Triton, or a stand-in where Triton is not installed. With the stand-in, files with kernels can be imported, but no
kernel is launched. The ops run in C, which needs only torch and a C compiler, or in torch."""

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
        """Stands in for both modules. It has only the names that files use while they are imported."""

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
