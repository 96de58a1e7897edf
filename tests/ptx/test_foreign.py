"""A kernel from outside of this project runs on the PTX runner, which reports each piece that is taken out of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from ptx import on_foreign
from ptx.compiling import compiling_process

pytestmark = pytest.mark.xdist_group("ptx sm_90")
KERNELS = ("of maps", "of pointers", "warp specialized")


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with compiling_process() as process:
        yield process


TRITONS = pytest.mark.xfail(
    strict=True,
    reason="Triton 3.7 spaces the sums of a thread's members by its columns, of which the instruction has two: "
    "with one, the sums of two members lie in the same registers. When this passes, tiling.py may use one column",
)


@pytest.mark.parametrize(("members", "columns"), [(1, 1), (2, 2), (4, 8), pytest.param(2, 1, marks=TRITONS)])
def test_a_warp_that_multiplies_several_members_of_a_batch(process, members, columns):
    """What the few-token kernels over quantised weights do."""
    assert process.submit(on_foreign.batched, members, columns).result() == []


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_is_right(process, kernel, seed):
    assert process.submit(on_foreign.product, kernel, seed).result() == ""


@pytest.mark.parametrize(
    ("kernel", "piece", "fault"),
    [
        ("of maps", r"waitLoop:.*?bra\.uni waitLoop;", "copy may still write"),
        ("of maps", r"wgmma\.wait_group\S* 0;", "a product may still write"),
        ("of maps", r"fence\.proxy\.async\S*;", "no fence.proxy.async stands between"),
        ("of maps", r"wgmma\.fence\S*;", "no wgmma.fence stands before"),
        ("of maps", r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", "deadlock"),
        ("of maps", r"cp\.async\.bulk\.wait_group\.read\s+0;", "its bulk copy may still read shared memory"),
        ("of pointers", r"@%p\d+ fence\.proxy\.tensormap[^;]*;", "no fence.proxy.tensormap"),
        ("warp specialized", r"@%p\d+ mbarrier\.arrive\.shared[^;]*;", "deadlock"),
        ("warp specialized", r"waitLoop:.*?bra\.uni waitLoop;", "may still|since the last barrier"),
    ],
)
def test_what_is_missing_is_found(process, kernel, piece, fault):
    found = process.submit(on_foreign.product, kernel, 1, piece).result()
    assert re.search(fault, found), found
