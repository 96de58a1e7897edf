"""Integer formats with a scale and a zero point for each group of any multiple of 32 values: those of GPTQ, AWQ and
compressed-tensors, and of weights that are quantised as they load. The layout is that of grouped.py."""

from __future__ import annotations

from .grouped import Grouped


class Int4(Grouped):
    format = "int4"
    bits, group, zero = 4, None, None


class Int8(Grouped):
    format = "int8"
    bits, group, zero = 8, None, None
