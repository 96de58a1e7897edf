"""Integer formats with a scale and a zero point for each group of values; a group's size is a multiple of 32. They
serve GPTQ, AWQ and compressed-tensors files, and weights that are quantised at load. grouped.py defines the layout."""

from __future__ import annotations

from .grouped import Grouped


class Int4(Grouped):
    format = "int4"
    bits, group, zero = 4, None, None


class Int8(Grouped):
    format = "int8"
    bits, group, zero = 8, None, None
