"""The work of test_foreign.py in a process in which Triton compiles: a matrix product from outside of this project,
with bulk copies, mbarriers and warp groups, whole or without a piece of its PTX."""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.offline.ptx.device import device
from qwenkern.benchmarks.offline.ptx.faults import Fault


@triton.jit
def _of_maps(a, b, c, M, N, K, BLOCK: tl.constexpr, WARP_SPECIALIZE: tl.constexpr):
    """c [M, N] = a [M, K] times b [K, N] or b [N, K] transposed, by maps that the host makes."""
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BLOCK):
        total = tl.dot(a.load([row, k]), b.load([k, column]), total)
    c.store([row, column], total.to(tl.bfloat16))


@triton.jit
def _of_pointers(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK: tl.constexpr, WARP_SPECIALIZE: tl.constexpr):
    """The same by maps that the kernel makes, with b [N, K]; some warps may copy, and others multiply."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK, BLOCK])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK, BLOCK])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    row, column = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in tl.range(0, K, BLOCK, warp_specialize=WARP_SPECIALIZE):
        total = tl.dot(a.load([row, k]), b.load([column, k]).T, total)
    c.store([row, column], total.to(tl.bfloat16))


@triton.jit
def _batched(a_ptr, b_ptr, c_ptr, BATCH: tl.constexpr, COLUMNS: tl.constexpr):
    """c [BATCH, 16, COLUMNS] = a [BATCH, 16, 16] times b [BATCH, 16, COLUMNS]."""
    member, row, place = tl.arange(0, BATCH)[:, None, None], tl.arange(0, 16), tl.arange(0, COLUMNS)[None, None, :]
    a = tl.load(a_ptr + (member * 16 + row[None, :, None]) * 16 + row[None, None, :])
    b = tl.load(b_ptr + (member * 16 + row[None, :, None]) * COLUMNS + place)
    tl.store(c_ptr + (member * 16 + row[None, :, None]) * COLUMNS + place, tl.dot(a, b))


def batched(members: int, columns: int, seed: int = 1) -> list[int]:
    """The members of a batch whose product is wrong, where a warp computes all of them."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-4, 5, (members, 16, size), generator=generator).bfloat16() for size in (16, columns))
    c = torch.full((members, 16, columns), float("nan"))
    with device(DEVICES["sm_90"], seed):
        _batched[(1,)](a, b, c, BATCH=members, COLUMNS=columns, num_warps=1)
    return [each for each in range(members) if not torch.equal(c[each], a[each].float() @ b[each].float())]


def product(kernel: str, seed: int = 1, without: str = "") -> str:
    """What is wrong with it, or an empty string."""
    torch.manual_seed(seed)
    a, b = torch.randn(104, 200).bfloat16(), torch.randn(200, 104).bfloat16()
    c = torch.full((104, 104), float("nan"), dtype=torch.bfloat16)
    try:
        with device(DEVICES["sm_90"], seed, lambda name, ptx: re.sub(without, "", ptx, count=1, flags=re.S)):
            options = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}
            if kernel == "of maps":
                maps = [TensorDescriptor.from_tensor(each, [64, 64]) for each in (a, b, c)]
                _of_maps[(2, 2)](*maps, 104, 104, 200, WARP_SPECIALIZE=False, **options)
            else:
                special = kernel == "warp specialized"
                _of_pointers[(2, 2)](a, b.T.contiguous(), c, 104, 104, 200, WARP_SPECIALIZE=special, **options)
    except Fault as fault:
        return str(fault)
    exact = a.double() @ b.double()
    return "" if torch.allclose(c.double(), exact, atol=1e-3, rtol=2**-8) else "wrong numbers"
