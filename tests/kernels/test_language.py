"""The functions that kernels share, on numbers where a single bit matters."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from support.references import random
from support.tolerances import assert_as_close_as

from qwenkern.kernels.language import cast, divide, exp2, log2, precise_dot


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


@triton.jit
def _functions_kernel(exp2_ptr, log2_ptr, ratio_ptr, x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(exp2_ptr + at, exp2(x, tl.float32))
    tl.store(log2_ptr + at, log2(y, tl.float32))
    tl.store(ratio_ptr + at, divide(x, y, tl.float32))


def test_functions_for_float32_are_as_close_as_torch(device):
    """Of differences from a largest score, and of sums of exponentials."""
    generator = torch.Generator().manual_seed(0)
    x = -torch.rand(4096, generator=generator) * 2.0 ** torch.randint(-8, 7, (4096,), generator=generator)
    y = 1 + torch.rand(4096, generator=generator) * 2.0 ** torch.randint(-8, 13, (4096,), generator=generator)
    x[:4], y[:3] = torch.tensor([0.0, -1.0, -126.0, -0.5]), torch.tensor([1.0, 2.0, 1.4142135])
    x, y = x.to(device), y.to(device)
    outs = [torch.full_like(x, float("nan")) for _ in range(3)]
    _functions_kernel[(1,)](*outs, x, y, 4096)
    peers = x.cpu().exp2(), y.cpu().log2(), x.cpu() / y.cpu()
    truths = x.double().exp2(), y.double().log2(), x.double() / y.double()
    for out, peer, truth in zip(outs, peers, truths, strict=True):
        scale = truth.cpu().abs().clamp(min=1e-30)  # small values are held to their own size
        assert_as_close_as((out.cpu().double() / scale).float(), (peer.double() / scale).float(), truth.cpu() / scale)


def test_two_to_what_is_not_a_usual_number(device):
    x = torch.tensor([float("-inf"), float("nan"), -1e30, -127.0, -126.0, 127.0, 0.0, -0.0] * 2, device=device)
    out = torch.full_like(x, float("nan"))
    _functions_kernel[(1,)](out, torch.empty_like(x), torch.empty_like(x), x, torch.ones_like(x), 16)
    expected = torch.tensor([0.0, float("nan"), 0.0, 0.0, 2.0**-126, 2.0**127, 1.0, 1.0] * 2, device=device)
    assert torch.equal(out.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@triton.jit
def _precise_dot_kernel(out_ptr, a_ptr, b_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a, b = tl.load(a_ptr + m * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, precise_dot(a, b, tl.zeros([M, N], tl.float32)))


@pytest.mark.parametrize("k", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_precise_dot(device, dtype, k):
    a, b = random(16, k, dtype=dtype, device=device), random(k, 32, dtype=dtype, device=device, seed=1)
    out = torch.full((16, 32), float("nan"), device=device)
    _precise_dot_kernel[(1,)](out, a, b, 16, 32, k)
    assert_as_close_as(out, (a.cpu().float() @ b.cpu().float()).to(device), a.double() @ b.double())
