"""The C backend of CPUs. A file named like a contract registers the contract's ops; ops.py lists these files."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Backend
from . import build


def _refuses(x: Tensor) -> str | None:
    """The reason why no op takes this tensor as its first one, or None. The tensor may have integers."""
    return build.refuses_dtype(x.dtype) if x.is_floating_point() and x.dtype not in build.DTYPES else None


def _invariant_tokens() -> int:
    return build.prepared().limits.max_few_tokens


C = Backend("c", lambda kind: kind == "cpu", _refuses, build.prepare, _invariant_tokens, is_recorded=True)
