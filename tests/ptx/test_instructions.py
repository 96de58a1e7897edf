"""Each instruction of the PTX runner against NVIDIA's PTX ISA: with integers, exact fractions, struct or torch, or lane
by lane."""

from __future__ import annotations

import itertools
import math
import operator
import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.tiny_ptx import compute, run

from qwenkern.benchmarks.offline.ptx.faults import Unknown
from qwenkern.benchmarks.offline.ptx.values import LANES, TYPES

TIMES = 3  # sets of operands an instruction
SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")


def limits(t: str) -> tuple[int, int]:
    bits = int(t[1:])
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if t[0] == "s" else (0, 2**bits - 1)


def wrapped(value: int, t: str) -> int:
    """The whole number of this type that has the same low bits."""
    low, high = limits(t)
    return (value - low) % (high - low + 1) + low


def integers(t: str, seed: int) -> list[int]:
    """Of any size, and the extreme ones."""
    low, high = limits(t)
    draw = random.Random(f"{t} {seed}")
    special = [low, low + 1, high, high - 1, 0, 1, 2, high // 2]
    return [
        draw.choice(special) if draw.random() < 0.3 else wrapped(draw.getrandbits(draw.randint(1, 64)), t)
        for _ in range(LANES)
    ]


def towards_zero(x: int, y: int) -> int:
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
INTEGER = {
    "add": lambda x, y, t: x + y,
    "sub": lambda x, y, t: x - y,
    "mul.lo": lambda x, y, t: x * y,
    "min": lambda x, y, t: min(x, y),
    "max": lambda x, y, t: max(x, y),
    "div": lambda x, y, t: towards_zero(x, y),
    "rem": lambda x, y, t: x - towards_zero(x, y) * y,
}


@pytest.mark.parametrize("t", [*SIGNED, *UNSIGNED])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_arithmetic(name, t):
    for seed in range(TIMES):
        x, y = integers(t, seed), integers(t, seed + 100)
        if name in ("div", "rem"):
            y = [each or 1 for each in y]
        expected = [wrapped(INTEGER[name](a, b, t), t) for a, b in zip(x, y, strict=True)]
        assert compute(f"{name}.{t}", t, (t, x), (t, y)).tolist() == expected


@pytest.mark.parametrize("t", WIDE)
def test_products_of_twice_the_width(t):
    for seed in range(TIMES):
        x, y, z = integers(t, seed), integers(t, seed + 100), integers(WIDE[t], seed)
        products = [a * b for a, b in zip(x, y, strict=True)]
        assert compute(f"mul.wide.{t}", WIDE[t], (t, x), (t, y)).tolist() == products
        assert compute(f"mul.hi.{t}", t, (t, x), (t, y)).tolist() == [each >> int(t[1:]) for each in products]
        sums = [wrapped(product + c, WIDE[t]) for product, c in zip(products, z, strict=True)]
        assert compute(f"mad.wide.{t}", WIDE[t], (t, x), (t, y), (WIDE[t], z)).tolist() == sums
        low = [wrapped(product + c, t) for product, c in zip(products, y, strict=True)]
        assert compute(f"mad.lo.{t}", t, (t, x), (t, y), (t, y)).tolist() == low


@pytest.mark.parametrize("t", SIGNED)
def test_signs(t):
    x = integers(t, 0)
    assert compute(f"neg.{t}", t, (t, x)).tolist() == [wrapped(-each, t) for each in x]
    assert compute(f"abs.{t}", t, (t, x)).tolist() == [wrapped(abs(each), t) for each in x]


COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
COMPARE |= {"ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}


@pytest.mark.parametrize("t", [*SIGNED, *UNSIGNED])
def test_integer_comparison(t):
    x, y = integers(t, 0), integers(t, 1)
    y[::4] = x[::4]
    for name, compare in COMPARE.items():
        if t[0] == "u" or name not in ("lo", "ls", "hi", "hs"):
            found = compute(f"setp.{name}.{t}", "pred", (t, x), (t, y)).tolist()
            assert found == [compare(a, b) for a, b in zip(x, y, strict=True)], name


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_bits(bits):
    t, b, s = f"u{bits}", f"b{bits}", f"s{bits}"
    for seed in range(TIMES):
        x, y = integers(t, seed), integers(t, seed + 100)
        for name, compare in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
            assert compute(f"{name}.{b}", t, (t, x), (t, y)).tolist() == list(map(compare, x, y))
        assert compute(f"not.{b}", t, (t, x)).tolist() == [wrapped(~each, t) for each in x]
        amounts = [random.Random(seed).choice([0, 1, bits - 1, bits, bits + 1, 255, 2**32 - 1]) for _ in x]
        by = [min(each, bits) for each in amounts]  # what is beyond the width counts as the width
        left = [wrapped(each << n, t) for each, n in zip(x, by, strict=True)]
        assert compute(f"shl.{b}", t, (t, x), ("u32", amounts)).tolist() == left
        right = [each >> n for each, n in zip(x, by, strict=True)]
        assert compute(f"shr.{t}", t, (t, x), ("u32", amounts)).tolist() == right
        assert compute(f"shr.{b}", t, (t, x), ("u32", amounts)).tolist() == right
        signed = [wrapped(each, s) for each in x]
        filled = [each >> n for each, n in zip(signed, by, strict=True)]
        assert compute(f"shr.{s}", s, (s, signed), ("u32", amounts)).tolist() == filled


def test_permuted_bytes():
    """Byte by byte, as the specification has it."""
    for seed in range(TIMES):
        x, y, selector = (integers("u32", seed + 100 * i) for i in range(3))
        expected = []
        for a, b, chosen in zip(x, y, selector, strict=True):
            each = a.to_bytes(4, "little") + b.to_bytes(4, "little")
            nibbles = [chosen >> 4 * place & 15 for place in range(4)]
            picked = [each[n & 7] if n < 8 else 255 * (each[n & 7] > 127) for n in nibbles]
            expected.append(int.from_bytes(bytes(picked), "little"))
        assert compute("prmt.b32", "u32", ("u32", x), ("u32", y), ("u32", selector)).tolist() == expected


@pytest.mark.parametrize(
    ("table", "of"),
    [
        (0xEA, lambda a, b, c: a & b | c),
        (0x6A, lambda a, b, c: (a & b) ^ c),
        (0xCA, lambda a, b, c: a & b | ~a & c),
        (0x01, lambda a, b, c: ~(a | b | c)),
    ],
)
def test_three_bits_at_a_time(table, of):
    for seed in range(TIMES):
        a, b, c = (integers("u32", seed + 100 * i) for i in range(3))
        expected = [of(*each) & 0xFFFFFFFF for each in zip(a, b, c, strict=True)]
        given = ("u32", [table] * len(a))
        assert compute("lop3.b32", "u32", ("u32", a), ("u32", b), ("u32", c), given).tolist() == expected


@pytest.mark.parametrize("t", ["s32", "u32"])
def test_bit_fields(t):
    """Bit by bit, as the specification has it."""
    for seed in range(TIMES * 3):
        draw = random.Random(seed)
        x = integers(t, seed)
        position, length = ([draw.choice([0, 1, 5, 31, 32, 40, 255, 256 + 3]) for _ in x] for _ in range(2))
        expected = []
        for a, p, n in zip(x, position, length, strict=True):
            a, p, n = a & 0xFFFFFFFF, p & 0xFF, n & 0xFF
            sign = 0 if t == "u32" or n == 0 else a >> min(p + n - 1, 31) & 1
            bits = [a >> (p + i) & 1 if i < n and p + i <= 31 else sign for i in range(32)]
            expected.append(wrapped(sum(bit << i for i, bit in enumerate(bits)), t))
        assert compute(f"bfe.{t}", t, (t, x), ("u32", position), ("u32", length)).tolist() == expected


def test_predicates_and_selection():
    p, q = ([bool(at & bit) for at in range(LANES)] for bit in (1, 2))
    for name, of in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        assert compute(f"{name}.pred", "pred", ("pred", p), ("pred", q)).tolist() == list(map(of, p, q))
    assert compute("not.pred", "pred", ("pred", p)).tolist() == [not each for each in p]
    for t in ("b16", "b32", "b64", "f32"):
        x, y = range(LANES), range(100, 100 + LANES)
        found = compute(f"selp.{t}", t, (t, x), (t, y), ("pred", p)).tolist()
        assert found == [a if c else b for a, b, c in zip(x, y, p, strict=True)]


INTEGERS = [f"{sign}{bits}" for bits in (8, 16, 32, 64) for sign in "su"]


@pytest.mark.parametrize("to", INTEGERS)
def test_integers_of_other_widths(to):
    for of in INTEGERS:
        x = integers(of, 0)
        assert compute(f"cvt.{to}.{of}", to, (of, x)).tolist() == [wrapped(each, to) for each in x]
        low, high = limits(to)
        assert compute(f"cvt.sat.{to}.{of}", to, (of, x)).tolist() == [min(max(each, low), high) for each in x]


def test_a_register_may_be_wider_than_what_is_converted():
    """Source: cut off. Destination: filled with the sign, or zeros."""
    x = np.array(integers("s64", 0), np.int64)
    body = "mad.wide.u32 %rd1, %r0, 8, %rd0; ld.global.b64 %rd2, [%rd1]; "
    for t, expected in {"s8": x.astype(np.int8).astype(np.int64), "u16": x.astype(np.uint16).astype(np.int64)}.items():
        (found,) = run(f"{body} cvt.{t}.s64 %rd3, %rd2; st.global.b64 [%rd1], %rd3;", x)
        assert found.tolist() == expected.tolist()
        (found,) = run(f"{body} cvt.s64.{t} %rd3, %rd2; st.global.b64 [%rd1], %rd3;", x)
        assert found.tolist() == expected.tolist()


# Floating point: exact fractions, rounded once


def rounded(x: Fraction, precision: int, lowest: int, highest: int) -> float:
    """To nearest even, with ``precision`` bits; 2**lowest is the least subnormal, 2**(highest + 1) infinite."""
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = math.floor(math.log2(size.numerator) - math.log2(size.denominator))
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    while Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, lowest)
    steps = size / unit
    whole = steps.numerator // steps.denominator
    rest = steps - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    result = whole * unit
    if result >= Fraction(2) ** (highest + 1):
        return math.copysign(math.inf, x)
    return math.copysign(float(result), x)


FORMATS = {"f32": (24, -149, 127), "bf16": (8, -133, 127), "f16": (11, -24, 15)}


def test_the_reference_rounds_as_torch_and_struct_do():
    draw = random.Random(0)
    for _ in range(2000):
        x = math.ldexp(draw.uniform(-1, 1), draw.randint(-160, 127))
        assert rounded(Fraction(x), *FORMATS["f32"]) == torch.tensor(x, dtype=torch.float64).float().item()
        y = torch.tensor(x, dtype=torch.float32)
        assert rounded(Fraction(y.item()), *FORMATS["bf16"]) == y.bfloat16().item()
    for _ in range(2000):
        x = math.ldexp(draw.uniform(-1, 1), draw.randint(-30, 15))
        assert rounded(Fraction(x), *FORMATS["f16"]) == struct.unpack("e", struct.pack("e", x))[0]


def bits_of(t: str, values: list[float]) -> np.ndarray:
    """As the runner keeps them."""
    if t == "bf16":
        return torch.tensor(values, dtype=torch.float64).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return np.array(values, TYPES[t].dtype)


def values_of(t: str, bits: np.ndarray) -> list[float]:
    if t == "bf16":
        return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).tolist()
    return bits.tolist()


def floats(t: str, seed: int, count: int = LANES) -> list[float]:
    """Few bits set, so that sums and products come near the middle of two results; some near the limits."""
    draw = random.Random(f"{t} {seed}")
    precision, lowest, highest = FORMATS[t]
    found = []
    for _ in range(count):
        bits = 1 + sum(2.0 ** -draw.randint(1, precision - 1) for _ in range(draw.randint(0, 3)))
        exponent = draw.choice([draw.randint(-precision, precision), draw.randint(lowest, highest)])
        found.append(rounded(Fraction(draw.choice((1, -1)) * bits) * Fraction(2) ** exponent, *FORMATS[t]))
    return [each if math.isfinite(each) else 1.0 for each in found]


FLOAT = {
    "add": (2, lambda x, y: x + y),
    "sub": (2, lambda x, y: x - y),
    "mul": (2, lambda x, y: x * y),
    "fma.rn": (3, lambda x, y, z: x * y + z),
}


@pytest.mark.parametrize("t", FORMATS)
@pytest.mark.parametrize("name", FLOAT)
def test_one_rounding(name, t):
    count, of = FLOAT[name]
    for seed in range(10):
        sources = [floats(t, 10 * seed + at) for at in range(count)]
        operands = [(t, bits_of(t, each)) for each in sources]
        found = values_of(t, compute(f"{name}.{t}", t, *operands))
        expected = [rounded(of(*map(Fraction, each)), *FORMATS[t]) for each in zip(*sources, strict=True)]
        assert found == expected
        packed = {"f32": "f32x2", "bf16": "bf16x2", "f16": "f16x2"}[t]
        pairs = [(packed, np.stack((bits, np.roll(bits, 3)), 1).reshape(-1)) for _, bits in operands]
        halves = compute(f"{name}.{packed}", packed, *pairs).reshape(LANES, 2)
        assert values_of(t, np.ascontiguousarray(halves[:, 0])) == expected
        assert values_of(t, np.roll(halves[:, 1], -3)) == expected


@pytest.mark.parametrize("t", FORMATS)
def test_almost_the_middle(t):
    """The product is halfway between two results, and what is added tips it either way, however little it is: two
    roundings, of float64 and then of the result, would lose it."""
    precision, lowest, _ = FORMATS[t]
    half = 2.0 ** -(precision // 2)
    x = 1 + half  # x x = 1 + 2 half + half^2
    rest = [sign * 2.0**exponent for exponent in range(lowest, lowest + 16) for sign in (1, -1)]
    found = values_of(t, compute(f"fma.rn.{t}", t, *[(t, bits_of(t, each)) for each in ([x] * 32, [x] * 32, rest)]))
    assert found == [rounded(Fraction(x) ** 2 + Fraction(each), *FORMATS[t]) for each in rest]
    if precision % 2 == 0:
        assert len(set(found)) == 2


def test_almost_the_middle_of_subnormal_numbers():
    """The sum has more bits than float64, and there looks like the middle of two float32."""
    x, y, z = (2.0**-75 * (1 + 2.0**-23), 2.0**-75 * (1 - 2.0**-23), 2.0**-127 + 2.0**-149)
    assert x * y + z == z + 2.0**-150
    assert compute("fma.rn.f32", "f32", *[("f32", [each] * LANES) for each in (x, y, z)]).tolist() == [z] * LANES


@pytest.mark.parametrize("t", ["bf16", "f16"])
def test_mixed_precision(t):
    for seed in range(10):
        x, y, z = floats(t, seed), floats(t, seed + 50), floats("f32", seed)
        first, second, third = (t, bits_of(t, x)), (t, bits_of(t, y)), ("f32", bits_of("f32", z))
        exact = [tuple(map(Fraction, each)) for each in zip(x, y, z, strict=True)]
        for name, operands, of in (
            ("fma", (first, second, third), lambda a, b, c: a * b + c),
            ("add", (first, third), lambda a, b, c: a + c),
            ("sub", (first, third), lambda a, b, c: a - c),
        ):
            found = compute(f"{name}.rn.f32.{t}", "f32", *operands).tolist()
            assert found == [rounded(of(*each), *FORMATS["f32"]) for each in exact], name


NAN, INF = math.nan, math.inf
TINY = 2.0**-140
SPECIAL = [0.0, -0.0, 1.0, -1.0, TINY, -TINY, INF, -INF, NAN]


def pairs() -> tuple[list[float], list[float]]:
    every = [*itertools.product(SPECIAL, repeat=2)]
    every += [(0.0, 0.0)] * (-len(every) % LANES)
    x, y = zip(*every, strict=True)
    return list(x), list(y)


def by_lanes(opcode: str, result: str, *sources: tuple[str, list[float]]) -> list:
    """Of any multiple of 32 operands."""
    found = []
    for start in range(0, len(sources[0][1]), LANES):
        part = [(t, bits_of(t, values[start : start + LANES])) for t, values in sources]
        found += compute(opcode, result, *part).tolist()
    return found


ORDERED = {name: COMPARE[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}


def test_comparison_with_nan():
    """Ordered ones, and so ne, do not hold with NaN; unordered ones do."""
    x, y = pairs()
    for name, compare in ORDERED.items():
        unordered = [math.isnan(a) or math.isnan(b) for a, b in zip(x, y, strict=True)]
        holds = [compare(a, b) for a, b in zip(x, y, strict=True)]
        found = by_lanes(f"setp.{name}.f32", "pred", ("f32", x), ("f32", y))
        assert found == [a and not b for a, b in zip(holds, unordered, strict=True)], name
        found = by_lanes(f"setp.{name}u.f32", "pred", ("f32", x), ("f32", y))
        assert found == [a or b for a, b in zip(holds, unordered, strict=True)], name
        flat = [0.0 if abs(each) == TINY else each for each in x], [0.0 if abs(each) == TINY else each for each in y]
        found = by_lanes(f"setp.{name}.ftz.f32", "pred", ("f32", x), ("f32", y))
        assert found == by_lanes(f"setp.{name}.f32", "pred", *(("f32", each) for each in flat)), name
    assert by_lanes("setp.nan.f32", "pred", ("f32", x), ("f32", y)) == unordered
    assert by_lanes("setp.num.f32", "pred", ("f32", x), ("f32", y)) == [not each for each in unordered]


@pytest.mark.parametrize(("name", "of"), [("min", min), ("max", max)])
def test_least_and_greatest(name, of):
    """Of NaN and a number the number, and -0 is less than +0."""
    x, y = pairs()
    found = by_lanes(f"{name}.f32", "f32", ("f32", x), ("f32", y))
    for a, b, out in zip(x, y, found, strict=True):
        numbers = [each for each in (a, b) if not math.isnan(each)]
        expected = of(numbers, key=lambda each: (each, math.copysign(1, each))) if numbers else NAN
        assert struct.pack("f", out) == struct.pack("f", expected) or (math.isnan(out) and math.isnan(expected))
    three = by_lanes(f"{name}.f32", "f32", ("f32", x), ("f32", y), ("f32", x))
    assert np.array_equal(three, found, equal_nan=True)


def test_subnormal_numbers_are_flushed():
    x = [TINY, -TINY, 2.0**-126, 1.0] * 8
    assert compute("add.ftz.f32", "f32", ("f32", x), ("f32", [0.0] * 32)).tolist() == [0.0, 0.0, 2.0**-126, 1.0] * 8
    small = compute("mul.ftz.f32", "f32", ("f32", [-(2.0**-126)] * 32), ("f32", [0.5] * 32))
    assert (small == 0).all()
    assert np.signbit(small).all()
    assert (
        compute("fma.rn.ftz.f32", "f32", *[("f32", [2.0**-70] * 32)] * 2, ("f32", [TINY] * 32)).tolist() == [0.0] * 32
    )


@pytest.mark.parametrize(
    ("name", "of", "x"),
    [
        ("ex2.approx", lambda x: 2.0**x, np.linspace(-100, 100, 64)),
        ("ex2.approx.ftz", lambda x: 2.0**x, np.linspace(-100, 100, 64)),
        ("lg2.approx", math.log2, np.geomspace(3, 1e30, 64)),
        ("rsqrt.approx.ftz", lambda x: 1 / math.sqrt(x), np.geomspace(1e-30, 1e30, 64)),
        ("rcp.approx", lambda x: 1 / x, np.geomspace(1e-30, 1e30, 64)),
    ],
)
def test_approximations(name, of, x):
    """Within half a unit in the last place, where the specification allows one or two."""
    for part in np.split(x.astype(np.float32), 2):
        found = compute(f"{name}.f32", "f32", ("f32", part))
        exact = np.array([of(float(each)) for each in part])
        assert (np.abs(found - exact) <= 0.5001 * np.spacing(exact.astype(np.float32)).astype(np.float64)).all()


def test_approximations_at_their_limits():
    x = [-INF, INF, -200.0, 0.0] * 8
    assert compute("ex2.approx.f32", "f32", ("f32", x)).tolist() == [0.0, INF, 0.0, 1.0] * 8
    assert compute("ex2.approx.f32", "f32", ("f32", [-140.0] * 32)).tolist() == [2.0**-140] * 32
    assert compute("ex2.approx.ftz.f32", "f32", ("f32", [-140.0] * 32)).tolist() == [0.0] * 32
    assert compute("lg2.approx.f32", "f32", ("f32", [0.0, INF] * 16)).tolist() == [-INF, INF] * 16
    assert np.isnan(compute("lg2.approx.f32", "f32", ("f32", [-1.0] * 32))).all()
    assert compute("rsqrt.approx.f32", "f32", ("f32", [0.0, -0.0, INF, 4.0] * 8)).tolist() == [INF, -INF, 0.0, 0.5] * 8
    assert (
        compute("div.full.f32", "f32", ("f32", [1.0, 7.0] * 16), ("f32", [0.0, 2.0] * 16)).tolist() == [INF, 3.5] * 16
    )
    third = compute("div.rn.f32", "f32", ("f32", [1.0] * 32), ("f32", [3.0] * 32))
    assert third.tolist() == [np.float32(1) / np.float32(3)] * 32


def test_float64():
    """As Python's own numbers, which are float64."""
    x = floats("f32", 0, 32)
    x = [each if math.isfinite(each) and abs(each) < 1e15 else 2.5 for each in x]
    assert compute("cvt.f64.f32", "f64", ("f32", x)).tolist() == np.array(x, np.float32).tolist()
    large = integers("s64", 3)
    assert compute("cvt.rn.f64.s64", "f64", ("s64", large)).tolist() == [float(each) for each in large]
    y = [each / 3 for each in x]
    assert compute("mul.f64", "f64", ("f64", x), ("f64", y)).tolist() == [a * b for a, b in zip(x, y, strict=True)]
    for name, of in (("rzi", math.trunc), ("rpi", math.ceil), ("rmi", math.floor), ("rni", round)):
        assert compute(f"cvt.{name}.f64.f64", "f64", ("f64", y)).tolist() == [float(of(each)) for each in y]
        assert compute(f"cvt.{name}.s64.f64", "s64", ("f64", y)).tolist() == [of(each) for each in y]


@pytest.mark.parametrize("t", ["b32", "b64"])
def test_ones_are_counted(t):
    x = [each % 2 ** int(t[1:]) for each in integers("u64", 5)]
    assert compute(f"popc.{t}", "u32", (t, x)).tolist() == [each.bit_count() for each in x]


def test_signs_of_floats():
    assert str(compute("neg.f32", "f32", ("f32", [0.0, -0.0, 2.0, -INF] * 8)).tolist()[:4]) == "[-0.0, 0.0, -2.0, inf]"
    assert str(compute("abs.f32", "f32", ("f32", [0.0, -0.0, -2.0, -INF] * 8)).tolist()[:4]) == "[0.0, 0.0, 2.0, inf]"


MIDDLE = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0, 65520.0, 3.3961e38, -(2.0**-25)]


def test_to_two_bytes():
    x = torch.tensor([*floats("f32", 0, 120), *MIDDLE, *SPECIAL[:8], *floats("f32", 1, 24)], dtype=torch.float32)
    for part in x.split(LANES):
        values = part.numpy()
        bf16 = compute("cvt.rn.bf16.f32", "bf16", ("f32", values))
        assert bf16.view(np.int16).tolist() == part.bfloat16().view(torch.int16).tolist()
        f16 = compute("cvt.rn.f16.f32", "f16", ("f32", values))
        assert f16.view(np.int16).tolist() == part.half().view(torch.int16).tolist()
        for t, halves in (("bf16x2", bf16), ("f16x2", f16)):
            both = compute(f"cvt.rn.{t}.f32", t, ("f32", np.roll(values, 1)), ("f32", values)).reshape(LANES, 2)
            assert np.array_equal(both[:, 0], halves)  # the second source is the lower half
            assert np.array_equal(both[:, 1], np.roll(halves, 1))
        assert compute("cvt.f32.bf16", "f32", ("bf16", bf16)).tolist() == part.bfloat16().float().tolist()
        assert compute("cvt.f32.f16", "f32", ("f16", f16)).tolist() == part.half().float().tolist()
    assert (compute("cvt.rn.bf16.f32", "bf16", ("f32", [NAN] * 32)) == 0x7FFF).all()
    assert np.isnan(compute("cvt.rn.f16.f32", "f16", ("f32", [NAN] * 32))).all()


ROUNDINGS = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


@pytest.mark.parametrize("t", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_floats_and_integers(t):
    low, high = limits(t)
    x = [0.5, 1.5, 2.5, -0.5, -1.5, 126.7, 255.5, 1e30, -1e30, INF, -INF, *(float(each) for each in (low, high)), TINY]
    x = [*x, *floats("f32", 0, LANES - len(x))]
    x = np.array(x, np.float32).tolist()
    for name, of in ROUNDINGS.items():
        found = compute(f"cvt.{name}.{t}.f32", t, ("f32", x)).tolist()
        whole = [of(each) if math.isfinite(each) else (high + 1 if each > 0 else low - 1) for each in x]
        assert found == [min(max(each, low), high) for each in whole], name
    nan = {"s64": low, "u64": 2**63}.get(t, 0)
    assert compute(f"cvt.rzi.{t}.f32", t, ("f32", [NAN] * 32)).tolist() == [nan] * 32
    assert compute(f"cvt.rpi.ftz.{t}.f32", t, ("f32", [TINY] * 32)).tolist() == [0] * 32
    whole = integers(t, 3)
    assert compute(f"cvt.rn.f32.{t}", "f32", (t, whole)).tolist() == [
        rounded(Fraction(each), *FORMATS["f32"]) for each in whole
    ]


@pytest.mark.parametrize(
    "text",
    [
        "bfind.u32 %r1, %r0",
        "add.sat.s32 %r1, %r0, %r0",
        "add.s32 %r1, %r0, %r0, %r0",
        "add.s32 %rd9, %r0, %r0",
        "ld.volatile.global.b32 %r1, [%rd0]",
        "ld.b32 %r1, [%rd0]",
        "atom.global.gpu.acq_rel.cas.b32 %r1, [%rd0], %r0, %r0",
        "bar.arrive 1, 64",
        "bar.sync 0, 48",
        "bar.sync %r0",
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1,%r2,%r3,%r4}, %rd1, %rd2, 1",
        "mbarrier.arrive.shared.b64 %rd1, [%r0]",
        "fence.acq_rel.gpu",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r9}, {%r1,%r2,%r3,%r4}",
        "mov.u32 %r1, %smid",
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b8 {%r1,%r2}, [%r0]",
        "cp.async.bulk.prefetch.L2.global [%rd0], 16",
        "griddepcontrol.other",
        "shfl.sync.bfly.b32 %r1|%p1, %r0, 1, 31, -1",
        "bra nowhere",
    ],
)
def test_what_is_not_implemented_is_named(text):
    with pytest.raises(Unknown) as raised:
        run(f"{text};", np.zeros(LANES, np.int32))
    assert text.split()[0].rstrip(";") in str(raised.value) or "%" in str(raised.value)
