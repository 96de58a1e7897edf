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
def cast(x, dtype: tl.constexpr):
    """x, which is float32, in another dtype, rounded to nearest even.

    Triton's interpreter truncates when it converts to bfloat16, and loses the carry when it rounds to e4m3. So under
    the interpreter the bits are rounded here first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    if INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFFF + ((bits >> 20) & 1)
        wide = (bits & -1048576).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # below 2 ** -6, e4m3 has multiples of 2 ** -9: the spacing at 24576
        x = tl.where(tl.abs(x) < 0.015625, small, wide)
    return x.to(dtype)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """x rounded to a value that dtype can hold, and returned in float32."""
    return cast(x, dtype).to(tl.float32)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """For programmatic dependent launch: lets the next kernel of the stream start, then waits until the kernel before
    this one has written its results.

    The code before this call overlaps with the kernel before. It may prefetch weights into the L2 cache; it must not
    read what an earlier kernel may write."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """Lets the next kernel of the stream start, before this one calls wait_for_inputs."""
    if PDL:
        gdc_launch_dependents()


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
