"""Integers, predicates, and bits (sections 9.7.1 integer arithmetic, 9.7.6 comparison and selection, 9.7.8 logic and
shift)."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from .faults import Fault
from .table import define
from .values import TYPES, U32, Array

SIGNED, UNSIGNED, BITS = ("s16", "s32", "s64"), ("u16", "u32", "u64"), ("b16", "b32", "b64")
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _wide(x: Array) -> Array:
    return x.astype(TYPES[WIDER[f"{'s' if x.dtype.kind == 'i' else 'u'}{8 * x.dtype.itemsize}"]].dtype)


def mul_wide(x: Array, y: Array) -> Array:
    return _wide(x) * _wide(y)


def mad_wide(x: Array, y: Array, z: Array) -> Array:
    return mul_wide(x, y) + z


def mul_hi(x: Array, y: Array) -> Array:
    if x.dtype.itemsize == 8:
        return np.array([int(each) * int(other) >> 64 for each, other in zip(x, y, strict=True)], x.dtype)
    product = mul_wide(x, y)
    return (product >> product.dtype.type(8 * x.dtype.itemsize)).astype(x.dtype)


def mad_lo(x: Array, y: Array, z: Array) -> Array:
    return x * y + z


def div(x: Array, y: Array) -> Array:
    """Integer division, rounded towards zero; numpy rounds down."""
    if np.count_nonzero(y) != y.size:
        raise Fault("division of integers by zero")
    quotient = x // y
    return quotient + ((x % y != 0) & ((x < 0) != (y < 0)))


def rem(x: Array, y: Array) -> Array:
    """The remainder, with the sign of x."""
    return x - div(x, y) * y


def bfe(x: Array, position: Array, length: Array) -> Array:
    """9.7.1.19: extracts ``length`` bits of x from bit ``position`` on (the low 8 bits of these two count). The upper
    bits of a signed result are the sign: the last bit of the field within x."""
    at, size = (each.astype(np.int64) & 0xFF for each in (position, length))
    bits = x.astype(np.int64) & 0xFFFFFFFF
    inside = np.minimum(size, np.maximum(32 - at, 0))
    field = (bits >> np.minimum(at, 32)) & ((1 << inside) - 1)
    if x.dtype.kind == "i":
        sign = (bits >> np.minimum(at + size - 1, 31)) & 1 & (size > 0)
        field |= -sign << np.minimum(inside, 32)
    return (field & 0xFFFFFFFF).astype(U32).view(x.dtype)


def shl(x: Array, amount: Array) -> Array:
    """9.7.8.8: an amount beyond the width counts as the width."""
    bits = 8 * x.dtype.itemsize
    return np.where(amount < bits, x << np.minimum(amount, bits - 1).astype(x.dtype), x.dtype.type(0))


def shr(x: Array, amount: Array) -> Array:
    """9.7.8.9: an amount beyond the width counts as the width; signed integers are filled with their sign."""
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(amount, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(amount < bits, shifted, x.dtype.type(0))


def prmt(x: Array, y: Array, selector: Array) -> Array:
    """9.7.9.7: four bits of the selector choose each byte of the result: the index of one of the eight bytes of x and
    y; plus 8, all bits of the result are the sign of that byte."""
    pair = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(x)
    for place in range(4):
        choice = selector >> U32(4 * place) & U32(15)
        byte = (pair >> (8 * (choice & U32(7))).astype(np.uint64) & np.uint64(0xFF)).astype(U32)
        byte = np.where(choice & U32(8), (byte >> U32(7)) * U32(0xFF), byte)
        result |= byte << U32(8 * place)
    return result


def lop3(x: Array, y: Array, z: Array, table: Array) -> Array:
    """9.7.8.6: the bits of x, y and z at a place are the index of a bit of the table, which is the result's bit."""
    result = np.zeros_like(x)
    for number in range(8):
        chosen = [each if number >> 2 - place & 1 else ~each for place, each in enumerate((x, y, z))]
        result |= chosen[0] & chosen[1] & chosen[2] & -(table >> U32(number) & U32(1))
    return result


for t in (*SIGNED, *UNSIGNED):
    define(f"add.{t}", operator.add, t, t, t)
    define(f"sub.{t}", operator.sub, t, t, t)
    define(f"mul.lo.{t}", operator.mul, t, t, t)
    define(f"mad.lo.{t}", mad_lo, t, t, t, t)
    define(f"div.{t}", div, t, t, t)
    define(f"rem.{t}", rem, t, t, t)
    define(f"min.{t}", np.minimum, t, t, t)
    define(f"max.{t}", np.maximum, t, t, t)
    define(f"mul.hi.{t}", mul_hi, t, t, t)
    if t in WIDER:
        define(f"mul.wide.{t}", mul_wide, WIDER[t], t, t)
        define(f"mad.wide.{t}", mad_wide, WIDER[t], t, t, WIDER[t])
for t in SIGNED:
    define(f"neg.{t}", operator.neg, t, t)
    define(f"abs.{t}", np.abs, t, t)
for t in ("s32", "u32"):
    define(f"bfe.{t}", bfe, t, t, "u32", "u32")
define("prmt.b32", prmt, "u32", "u32", "u32", "u32")
define("lop3.b32", lop3, "u32", "u32", "u32", "u32", "u32")

for t in ("b32", "b64"):
    define(
        f"popc.{t}", lambda x: np.unpackbits(x.view(np.uint8).reshape(len(x), -1), axis=1).sum(1).astype(U32), "u32", t
    )

for t in (*SIGNED, *UNSIGNED, *BITS):
    define(f"setp.eq.{t}", operator.eq, "pred", t, t)
    define(f"setp.ne.{t}", operator.ne, "pred", t, t)
ORDER: dict[str, Callable[..., Array]] = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
for name, compare in ORDER.items():
    for t in (*SIGNED, *UNSIGNED):
        define(f"setp.{name}.{t}", compare, "pred", t, t)
for name, other in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
    for t in UNSIGNED:
        define(f"setp.{name}.{t}", ORDER[other], "pred", t, t)

for t in ("pred", *BITS):
    define(f"and.{t}", operator.and_, t, t, t)
    define(f"or.{t}", operator.or_, t, t, t)
    define(f"xor.{t}", operator.xor, t, t, t)
    define(f"not.{t}", np.invert, t, t)
for t in BITS:
    define(f"shl.{t}", shl, t, t, "u32")
for t in (*SIGNED, *UNSIGNED, *BITS):
    define(f"shr.{t}", shr, t, t, "u32")

# Generic addresses of global memory and of parameters are the addresses themselves (section 5, cvta).
for _space in ("global", "param"):
    define(f"cvta.{_space}.u64", lambda x: x, "u64", "u64")
    define(f"cvta.to.{_space}.u64", lambda x: x, "u64", "u64")
