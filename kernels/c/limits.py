"""The limits of the C ops, read from the library (limits.c), and the sizes of their scratch memory in floats."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from .calls import LAYOUT

NAMES = tuple(field.name for field in LAYOUT.structs["limits"])


def of_library(library: ctypes.CDLL) -> Any:
    """The values of the struct ``limits`` of calls.h, as attributes of the same names."""
    numbers = (ctypes.c_long * len(NAMES)).in_dll(library, "LIMITS")
    return SimpleNamespace(**dict(zip(NAMES, numbers, strict=True)))


def linear_scratch(limits: Any, num_tokens: int, in_features: int, threads: int) -> int:
    """Scratch of a linear: x as operands, and for many tokens also the sums and panels of each thread."""
    operands = num_tokens * in_features
    if num_tokens <= limits.max_few_tokens:
        return operands
    return operands + threads * (num_tokens + limits.panel_depth) * limits.panel_columns


def decode_splits(limits: Any, most_tokens: int) -> int:
    """The number of splits of a sequence with ``most_tokens`` cached tokens."""
    return -(-most_tokens // limits.decode_split)


def decode_scratch(num_sequences: int, num_q_heads: int, splits: int, head_dim: int) -> int:
    """Scratch of decode_attention: for each split and query head a weighted sum of values, a total and a maximum."""
    return num_sequences * num_q_heads * splits * (head_dim + 2)


def prefill_scratch(limits: Any, lengths: list[int], num_kv_heads: int, head_dim: int) -> int:
    """Scratch of prefill_attention: the packed keys and values of each block of cached tokens and key-value head."""
    blocks = sum(-(-length // limits.prefill_block) for length in lengths)
    return 2 * blocks * num_kv_heads * head_dim * limits.prefill_block


def draw_scratch(limits: Any, rows: int, vocabulary: int) -> int:
    """Scratch of draw: the largest logit of each run of logits."""
    return rows * -(-vocabulary // limits.draw_run)
