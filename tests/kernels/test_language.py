"""The pieces that kernels share, on numbers that are told apart by a bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from qwenkern.kernels.language import cast


@triton.jit
def _cast_kernel(out_ptr, x_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, cast(tl.load(x_ptr + at), DTYPE).to(tl.float32))


@pytest.mark.parametrize(
    ("dtype", "theirs", "largest"),
    [(torch.bfloat16, tl.bfloat16, 1e30), (torch.float16, tl.float16, 6e4), (torch.float8_e4m3fn, tl.float8e4nv, 448)],
    ids=str,
)
def test_a_cast_rounds_to_nearest_even(device, dtype, theirs, largest):
    """Numbers of all sizes, down to what a dtype has no full precision for, and ties."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9) and dtype.itemsize == 1:
        pytest.skip("has no e4m3")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8192, generator=generator) * 2.0 ** torch.randint(-12, 8, (8192,), generator=generator)
    bits = {torch.bfloat16: 0xFFFF, torch.float16: 0x1FFF, torch.float8_e4m3fn: 0xFFFFF}[dtype]
    x[:2048] = ((x[:2048].view(torch.int32) & ~bits) | (bits + 1) // 2).view(torch.float32)  # halfway
    x = x.clamp(-largest, largest).to(device)
    out = torch.full_like(x, float("nan"))
    _cast_kernel[(1,)](out, x, theirs, 8192)
    assert torch.equal(out, x.to(dtype).float())
