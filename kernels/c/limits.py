"""What the C ops take, as the library says it (limits.c), and the scratch memory that they ask for, in floats."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from .calls import LAYOUT

NAMES = tuple(field.name for field in LAYOUT.structs["limits"])


def of_library(library: ctypes.CDLL) -> Any:
    """The fields of ``limits`` in calls.h."""
    numbers = (ctypes.c_long * len(NAMES)).in_dll(library, "LIMITS")
    return SimpleNamespace(**dict(zip(NAMES, numbers, strict=True)))


def linear_scratch(limits: Any, num_tokens: int, in_features: int, threads: int) -> int:
    """x as operands, and for many tokens sums and panels of each thread."""
    operands = num_tokens * in_features
    if num_tokens <= limits.max_few_tokens:
        return operands
    return operands + threads * (num_tokens + limits.panel_depth) * limits.panel_columns


def decode_splits(limits: Any, most_tokens: int) -> int:
    """Of a sequence with so many cached tokens."""
    return -(-most_tokens // limits.decode_split)


def decode_scratch(num_sequences: int, num_q_heads: int, splits: int, head_dim: int) -> int:
    """What each split leaves of each query head: a sum of values, a total, a maximum."""
    return num_sequences * num_q_heads * splits * (head_dim + 2)


def prefill_scratch(limits: Any, lengths: list[int], num_kv_heads: int, head_dim: int) -> int:
    """The packed keys and values of every block of cached tokens of every head."""
    blocks = sum(-(-length // limits.prefill_block) for length in lengths)
    return 2 * blocks * num_kv_heads * head_dim * limits.prefill_block
