"""Floating point (sections 9.7.3 single precision, 9.7.4 half precision, 9.7.5 mixed precision, 9.7.6 comparison) and
conversions (9.7.9.22).

Each result is rounded once, to nearest even, as .rn requires. ptxas may fuse add and mul without .rn; the runner does
not. The approximations ex2, lg2, rsqrt, rcp and div.full are rounded from float64 here; the specification allows errors
of one or two units in the last place. Payloads of NaN are not those of a GPU."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from .table import define
from .values import F32, F64, TYPES, U16, U32, U64, Array, flush, odd_sum, to_bf16, to_f16, to_f32, widen

Compute = Callable[..., Array]
TINY = np.finfo(F32).tiny


def _flushing(compute: Compute) -> Compute:
    """.ftz"""
    return lambda *sources: flush(compute(*map(flush, sources)))


def fma_f32(x: Array, y: Array, z: Array) -> Array:
    """x * y + z. The product is exact in float64, but the sum is rounded there. Rounding it again to float32 can be
    wrong only if the sum looks like a tie or is subnormal in float32. Such sums are computed again with odd_sum."""
    product = x.astype(F64) * y
    total = product + z
    looks_like_tie = total.view(U64) & U64(0x1FFFFFFF) == U64(0x10000000)
    if np.count_nonzero(looks_like_tie | ((np.abs(total) < TINY) & (total != 0))):
        total = odd_sum(product, z.astype(F64))
    return to_f32(total)


def _wide_bf16(x: Array) -> Array:
    return widen(x).astype(F64)


def _wide(x: Array) -> Array:
    return x.astype(F64)


def _half(wide: Compute, narrow: Compute) -> dict[str, Compute]:
    """Arithmetic with operands of two bytes. A product of two is exact in float64."""
    return {
        "add": lambda x, y: narrow(odd_sum(wide(x), wide(y))),
        "sub": lambda x, y: narrow(odd_sum(wide(x), -wide(y))),
        "mul": lambda x, y: narrow(wide(x) * wide(y)),
        "fma.rn": lambda x, y, z: narrow(odd_sum(wide(x) * wide(y), wide(z))),
    }


def minimum(x: Array, y: Array) -> Array:
    """9.7.3.11: the minimum of a number and NaN is the number; -0 is less than +0."""
    return np.where(x == y, (x.view(U32) | y.view(U32)).view(F32), np.fmin(x, y))


def maximum(x: Array, y: Array) -> Array:
    return np.where(x == y, (x.view(U32) & y.view(U32)).view(F32), np.fmax(x, y))


def _unordered(x: Array, y: Array) -> Array:
    return np.isnan(x) | np.isnan(y)


COMPARISONS: dict[str, Compute] = {
    "eq": operator.eq,
    "ne": lambda x, y: (x < y) | (x > y),  # ordered: false if one of them is NaN
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "equ": lambda x, y: (x == y) | _unordered(x, y),
    "neu": operator.ne,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~_unordered(x, y),
    "nan": _unordered,
}
for name, compare in COMPARISONS.items():
    define(f"setp.{name}.f32", compare, "pred", "f32", "f32")
    define(f"setp.{name}.ftz.f32", lambda x, y, of=compare: of(flush(x), flush(y)), "pred", "f32", "f32")

ARITHMETIC: dict[str, Compute] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
for name, compute in ARITHMETIC.items():
    for rounding in ("", ".rn"):
        define(f"{name}{rounding}.f32", compute, "f32", "f32", "f32")
        define(f"{name}{rounding}.ftz.f32", _flushing(compute), "f32", "f32", "f32")
        define(f"{name}{rounding}.f32x2", compute, "f32x2", "f32x2", "f32x2")
define("fma.rn.f32", fma_f32, "f32", "f32", "f32", "f32")
define("fma.rn.ftz.f32", _flushing(fma_f32), "f32", "f32", "f32", "f32")
define("fma.rn.f32x2", fma_f32, "f32x2", "f32x2", "f32x2", "f32x2")
for name, compute in {"min": minimum, "max": maximum}.items():
    define(f"{name}.f32", compute, "f32", "f32", "f32")
    define(f"{name}.ftz.f32", _flushing(compute), "f32", "f32", "f32")
    define(f"{name}.f32", lambda x, y, z, of=compute: of(of(x, y), z), "f32", "f32", "f32", "f32")

UNARY: dict[str, Compute] = {
    "neg": operator.neg,
    "abs": np.abs,
    "ex2.approx": lambda x: to_f32(np.exp2(_wide(x))),
    "lg2.approx": lambda x: to_f32(np.log2(_wide(x))),
    "rsqrt.approx": lambda x: to_f32(1 / np.sqrt(_wide(x))),
    "rcp.approx": lambda x: to_f32(1 / _wide(x)),
}
for name, compute in UNARY.items():
    define(f"{name}.f32", compute, "f32", "f32")
    define(f"{name}.ftz.f32", _flushing(compute), "f32", "f32")
for name in ("div.full", "div.approx", "div.rn"):
    define(f"{name}.f32", lambda x, y: to_f32(_wide(x) / y), "f32", "f32", "f32")

for kind, wide, narrow in (("bf16", _wide_bf16, to_bf16), ("f16", _wide, to_f16)):
    for name, compute in _half(wide, narrow).items():
        count = 3 if name == "fma.rn" else 2
        for t in (kind, f"{kind}x2"):
            define(f"{name}.{t}", compute, t, *[t] * count)
            if count == 2:
                define(f"{name}.rn.{t}", compute, t, t, t)
    # 9.7.5: operands of two bytes, and one of four
    define(f"add.rn.f32.{kind}", lambda x, z, wide=wide: to_f32(odd_sum(wide(x), _wide(z))), "f32", kind, "f32")
    define(f"sub.rn.f32.{kind}", lambda x, z, wide=wide: to_f32(odd_sum(wide(x), -_wide(z))), "f32", kind, "f32")
    define(
        f"fma.rn.f32.{kind}",
        lambda x, y, z, wide=wide: to_f32(odd_sum(wide(x) * wide(y), _wide(z))),
        "f32",
        kind,
        kind,
        "f32",
    )


def _saturated(x: Array, result: np.dtype) -> Array:
    """.sat: an integer out of range becomes the nearest one."""
    to, of = np.iinfo(result), np.iinfo(x.dtype)
    return x.clip(max(to.min, of.min), min(to.max, of.max)).astype(result)


def _to_integer(x: Array, result: np.dtype) -> Array:
    """Converts integers in float64. Those out of range become the nearest one; NaN becomes 0, or 1 << 63 in 64 bits."""
    limits = np.iinfo(result)
    highest = float(2 ** (limits.bits - (limits.min < 0)))
    below, above = x <= float(limits.min), x >= highest
    whole = np.where(below | above | np.isnan(x), 0, x).astype(result)
    whole = np.where(below, limits.min, np.where(above, limits.max, whole)).astype(result)
    nan = np.uint64(1 << 63).astype(result) if limits.bits == 64 else result.type(0)
    return np.where(np.isnan(x), nan, whole)


WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
INTEGERS = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "su"]
for t in INTEGERS:
    dtype = np.dtype(TYPES[t].dtype)
    for other in INTEGERS:
        define(f"cvt.{t}.{other}", lambda x, to=dtype: x.astype(to), t, other, wider=True)
        define(f"cvt.sat.{t}.{other}", lambda x, to=dtype: _saturated(x, to), t, other, wider=True)
    define(f"cvt.rn.f32.{t}", to_f32, "f32", t, wider=True)
    for name, whole in WHOLE.items():
        for ftz, flushed in (("", _wide), (".ftz", lambda x: _wide(flush(x)))):
            define(
                f"cvt.{name}{ftz}.{t}.f32",
                lambda x, to=dtype, whole=whole, flushed=flushed: _to_integer(whole(flushed(x)), to),
                t,
                "f32",
                wider=True,
            )
    define(f"cvt.rn.f64.{t}", _wide, "f64", t, wider=True)
    for name, whole in WHOLE.items():
        define(f"cvt.{name}.{t}.f64", lambda x, to=dtype, of=whole: _to_integer(of(x), to), t, "f64", wider=True)
for name, whole in WHOLE.items():
    define(f"cvt.{name}.f64.f64", whole, "f64", "f64")
define("cvt.f64.f32", _wide, "f64", "f32")
define("mul.f64", operator.mul, "f64", "f64", "f64")
define("cvt.f32.f16", to_f32, "f32", "f16")
define("cvt.f32.bf16", widen, "f32", "bf16")
define("cvt.rn.f16.f32", to_f16, "f16", "f32")
define("cvt.rn.bf16.f32", to_bf16, "bf16", "f32")


def _packed(narrow: Compute) -> Compute:
    """The first source is the upper half."""
    return lambda high, low: np.stack((narrow(low), narrow(high)), axis=1).reshape(-1)


define("cvt.rn.f16x2.f32", _packed(to_f16), "f16x2", "f32", "f32")
define("cvt.rn.bf16x2.f32", _packed(to_bf16), "bf16x2", "f32", "f32")
assert U16 is TYPES["bf16"].dtype
