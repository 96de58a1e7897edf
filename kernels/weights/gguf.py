"""The block formats of GGUF files, in the layout of grouped.py. ggml's ggml-common.h defines their values. Weights of
these formats are repacked when a file is loaded, without a change of any value.

    values of a block   32: q4_0 q4_1 q5_0 q5_1 q8_0        256: q2_k q3_k q4_k q5_k q6_k

The packed sub-scales of 256 values are widened to bytes, and the codes of q2_k and q3_k to 4 bits. The others take at
most 3 % more bytes than the file."""

from __future__ import annotations

from .grouped import Grouped


class Q4_0(Grouped):
    format = "q4_0"
    bits, zero = 4, 8


class Q4_1(Grouped):
    format = "q4_1"
    bits, has_minima = 4, True


class Q5_0(Grouped):
    format = "q5_0"
    bits, zero = 5, 16


class Q5_1(Grouped):
    format = "q5_1"
    bits, has_minima = 5, True


class Q8_0(Grouped):
    format = "q8_0"
    bits, zero = 8, 128


class Q2_K(Grouped):
    format = "q2_k"
    bits, levels, group, super_scales, has_minima = 4, 4, 16, True, True


class Q3_K(Grouped):
    format = "q3_k"
    bits, levels, zero, group, super_scales, signed_sub_scales = 4, 8, 4, 16, True, True


class Q4_K(Grouped):
    format = "q4_k"
    bits, super_scales, has_minima = 4, True, True


class Q5_K(Grouped):
    format = "q5_k"
    bits, super_scales, has_minima = 5, True, True


class Q6_K(Grouped):
    format = "q6_k"
    bits, zero, group, super_scales, signed_sub_scales = 6, 32, 16, True, True
