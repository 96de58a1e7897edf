"""C as a backend of CPUs. The ops register in the files named like their contracts; ops.py has them all."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Backend
from . import build

FLOATS = (torch.float32, torch.float16, torch.float64)


def _refuses(x: Tensor) -> str | None:
    """Of an op's first tensor, which may be of integers."""
    return build.refuses_dtype(x.dtype) if x.dtype in FLOATS else None


def _invariant_tokens() -> int:
    return build.prepared().limits.max_few_tokens


C = Backend("c", lambda kind: kind == "cpu", _refuses, build.prepare, _invariant_tokens, is_recorded=True)
