"""PTX's types as numpy's, 32 lanes at a time (section 5.2), and results that are rounded once.

A register is kept as unsigned bits, a predicate as bool. bfloat16 has no numpy type: its values stay bits, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LANES = 32
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64


@dataclass(frozen=True)
class Type:
    name: str
    dtype: type[np.generic]  # of an element
    bits: int  # of a lane: a packed type has two elements

    @property
    def is_packed(self) -> bool:
        return 8 * np.dtype(self.dtype).itemsize < self.bits

    @property
    def stored(self) -> type[np.generic]:
        """The numpy type in which a register of this width is kept."""
        return STORED[self.bits]


STORED: dict[int, type[np.generic]] = {1: np.bool_, 8: U8, 16: U16, 32: U32, 64: U64}
PRED = Type("pred", np.bool_, 1)
_UNSIGNED = [Type(f"u{bits}", STORED[bits], bits) for bits in (8, 16, 32, 64)]
_SIGNED = [Type(f"s{8 * dtype().itemsize}", dtype, 8 * dtype().itemsize) for dtype in (np.int8, np.int16, np.int32)]
_SIGNED.append(Type("s64", np.int64, 64))
_UNTYPED = [Type(f"b{bits}", STORED[bits], bits) for bits in (8, 16, 32, 64)]
_FLOATS = [Type("f16", F16, 16), Type("bf16", U16, 16), Type("f32", F32, 32), Type("f64", F64, 64)]
_PACKED = [Type("f16x2", F16, 32), Type("bf16x2", U16, 32), Type("f32x2", F32, 64)]
TYPES = {each.name: each for each in (PRED, *_UNSIGNED, *_SIGNED, *_UNTYPED, *_FLOATS, *_PACKED)}


def constant(bits: int, type_: Type) -> Array:
    """The same bits in all lanes, as elements of a type. Integers may be negative."""
    if type_ is PRED:
        return np.full(LANES, bits != 0)
    return np.full(LANES, bits & ((1 << type_.bits) - 1), type_.stored).view(type_.dtype)


def widen(bits: Array) -> Array:
    """bfloat16's bits in float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def odd_sum(x: Array, y: Array) -> Array:
    """x + y in float64, rounded to odd: if the sum is not exact, the neighbour whose last bit is odd. A second rounding
    to a format of 51 bits or fewer then gives the rounded exact sum (Boldo and Melquiond 2008, Emulation of FMA and
    correctly rounded sums). The error of the sum is exact by Knuth's two-sum."""
    total = x + y
    moved = total - x
    return _to_odd(total, (x - (total - moved)) + (y - moved))


def _to_odd(rounded: Array, error: Array) -> Array:
    """Rounds ``rounded`` + ``error``, an exact sum whose nearest number is ``rounded``, to odd: float32 or float64 with
    an odd last bit, unless the sum is exact or not finite."""
    integers = np.int64 if rounded.dtype == F64 else np.int32
    bits: Array = rounded.view(integers)
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(rounded) & (bits & 1 == 0)
    away = np.signbit(error) == np.signbit(rounded)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).astype(integers).view(rounded.dtype)


def to_f32(x: Array) -> Array:
    return x.astype(F32)


def to_f16(x: Array) -> Array:
    return x.astype(F16)


def to_bf16(x: Array) -> Array:
    """float32 or float64, rounded once to nearest even, as bits. NaN becomes 0x7FFF (section 9.7.9.22)."""
    narrow = x.astype(F32)
    if x.dtype == F64:
        exact = np.where(np.isfinite(narrow), narrow.astype(F64), x)
        narrow = _to_odd(narrow, x - exact)
    bits = narrow.view(U32).astype(U64)
    rounded = (bits + U64(0x7FFF) + ((bits >> U64(16)) & U64(1))) >> U64(16)
    return np.where(np.isnan(narrow), U16(0x7FFF), rounded.astype(U16))


def flush(x: Array) -> Array:
    """.ftz: subnormal float32 become zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)
