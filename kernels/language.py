"""Triton functions that several kernels share."""

from __future__ import annotations

from . import triton_if_any
from .triton_if_any import gdc_launch_dependents, gdc_wait, tl, triton

INTERPRETED = tl.constexpr(triton_if_any.INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """a [M, K] times b [K, N], added to acc [M, N] float32. Products of float32 operands are exact float32 products,
    not TF32.

    Triton's interpreter multiplies the bit patterns of bfloat16, so under it both operands are converted to float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def precise_dot(a, b, acc):
    """a [M, K] times b [K, N], added to acc [M, N] float32, for operands of any dtype.

    `dot` of float32 adds K products one after another, so its error grows with K. `precise_dot` adds each half or
    quarter of the products, and then these sums in a tree."""
    if a.dtype == tl.float32 and a.shape[1] > 16:
        PARTS: tl.constexpr = 2 if a.shape[1] == 32 else 4  # type: ignore[annotation-unchecked]
        rows = a.reshape(a.shape[0], PARTS, a.shape[1] // PARTS).permute(1, 0, 2)
        columns = b.reshape(PARTS, a.shape[1] // PARTS, b.shape[1])
        return acc + tl.sum(dot(rows, columns, tl.zeros([PARTS, a.shape[0], b.shape[1]], tl.float32)), axis=0)
    else:
        return dot(a, b, acc)


# The error of a GPU's approximations is up to 2 ** -22 (PTX ISA: ex2.approx, lg2.approx, div.full), as much as four
# roundings of float32. It does not matter if the result is rounded to two bytes. If the result stays float32
# (``dtype``), these functions have an error of about one rounding.


@triton.jit
def exp2(x, dtype: tl.constexpr):
    """2 ** x for a float32 x of at most 127; 0 below -126.5."""
    if dtype == tl.float32:
        x = tl.where(x < -127.0, -127.0, x)  # keeps NaN
        shifted = x + 12582912.0  # 1.5 * 2 ** 23: the sum has x, rounded to a whole number, in its low bits
        f = x - (shifted - 12582912.0)  # below: the Taylor series of 2 ** f; the next term is below 2 ** -27
        y = 1.525273380405984e-5 * f + 1.540353039338161e-4
        y = ((y * f + 1.3333558146428443e-3) * f + 9.618129107628477e-3) * f + 5.550410866482158e-2
        y = ((y * f + 0.24022650695910072) * f + 0.6931471805599453) * f + 1.0
        return y * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    else:
        return tl.exp2(x)


@triton.jit
def log2(x, dtype: tl.constexpr):
    """The logarithm of a float32 x that is positive, finite, and not subnormal."""
    if dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # minus the bits of sqrt(1/2)
        exponent = bits >> 23
        m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)  # sqrt(1/2) to sqrt(2)
        s = tl.div_rn(m - 1.0, m + 1.0)
        z = s * s  # below: the series of log(m) = 2 artanh(s); the next term is below 2 ** -29
        y = ((0.2222222222222222 * z + 0.2857142857142857) * z + 0.4) * z + 0.6666666666666666
        return exponent.to(tl.float32) + 1.4426950408889634 * (y * z * s + 2.0 * s)
    else:
        return tl.log2(x)


@triton.jit
def divide(x, y, dtype: tl.constexpr):
    if dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def cast(x, dtype: tl.constexpr):
    """A float32 x in another dtype, rounded to nearest even.

    Triton's interpreter truncates when it converts to bfloat16, and loses the carry when it rounds to e4m3. So under
    the interpreter this function rounds the bits first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        wide = (bits & -1048576).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # below 2 ** -6, e4m3's numbers are 2 ** -9 apart, as float32's at 24576
        x = tl.where(tl.abs(x) < 0.015625, small, wide)
    return x.to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x rounded to a value that dtype can hold, and returned in float32."""
    return cast(x, dtype).to(tl.float32)


@triton.jit
def block_of(BLOCK_K: tl.constexpr, SLICES: tl.constexpr):
    """The indices along K within a block, [SLICES, 1, BLOCK_K / SLICES]."""
    width: tl.constexpr = BLOCK_K // SLICES
    return tl.arange(0, SLICES)[:, None, None] * width + tl.arange(0, width)[None, None, :]


@triton.jit
def masked_or(x, MASK: tl.constexpr, bits):
    """x & MASK | bits, of int32. Written with the operators, it becomes two instructions if MASK and bits are
    constants; lop3 is one."""
    if INTERPRETED or not tl.target_info.is_cuda():
        return x & MASK | bits
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [x, MASK, bits], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def masked_xor(x, MASK: tl.constexpr, bits):
    """(x & MASK) ^ bits, of int32."""
    if INTERPRETED or not tl.target_info.is_cuda():
        return x & MASK ^ bits
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x6A;", "=r,r,r,r", [x, MASK, bits], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def masked_else(x, MASK: tl.constexpr, other):
    """int32 with the bits of x where MASK has ones, and those of other where it has zeros."""
    if INTERPRETED or not tl.target_info.is_cuda():
        return x & MASK | other & ~MASK
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xE2;", "=r,r,r,r", [x, MASK, other], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def subtract_bf16x2(a, b):
    """a - b of pairs of bfloat16 in int32. The differences must be exact in bfloat16."""
    if INTERPRETED or not tl.target_info.is_cuda():
        low = (a << 16).to(tl.float32, bitcast=True) - (b << 16).to(tl.float32, bitcast=True)
        high = (a & -65536).to(tl.float32, bitcast=True) - (b & -65536).to(tl.float32, bitcast=True)
        return ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | high.to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $2, $3, $1;", "=r,r,r,r", [a, b, -0x407F4080], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def scaled_bf16x2(a, SCALE: tl.constexpr):
    """a times SCALE, both pairs of bfloat16 in int32. SCALE has the same power of two twice: the products are exact."""
    if INTERPRETED or not tl.target_info.is_cuda():
        scale = tl.full([1], SCALE & -65536, tl.int32).to(tl.float32, bitcast=True)
        low = (a << 16).to(tl.float32, bitcast=True) * scale
        high = (a & -65536).to(tl.float32, bitcast=True) * scale
        return ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | high.to(tl.int32, bitcast=True)
    else:  # the third operand is -0, which keeps the sign of a product that is zero
        return tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, SCALE, -0x7FFF8000], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """For programmatic dependent launch: lets the next kernel start when all programs of this one have called it."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """For programmatic dependent launch: waits until the previous kernel has written its results.

    The code before this call overlaps with the previous kernel. That code may read weights, which no kernel writes. It
    must not read what an earlier kernel may write."""
    if PDL:
        gdc_wait()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    launch_dependents(PDL)
    wait(PDL)


@triton.jit
def prefetch(pointers, mask):
    """Prefetches the cache lines at these pointers into the L2 cache (sm_80 and newer), without waiting for them."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [pointers, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def trap_unless(condition):
    """Ends the kernel with a device error, as torch's own kernels do, unless the condition is true for all elements."""
    if INTERPRETED or not tl.target_info.is_cuda():
        tl.device_assert(condition)
    else:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.eq.b32 p, $1, 0; @p trap; mov.u32 $0, 0; }",
            "=r,r",
            [condition.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
