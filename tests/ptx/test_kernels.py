"""The kernels' own tests on the PTX that Triton compiles for several GPUs, without having them. Other tests show that
the runner notices a missing piece of a kernel.

All of it runs in a second process, in which Triton compiles (on_ptx.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import test_decode_attention
import test_linear
import test_lm_head
import test_prefill_attention
import test_qkv_rope
import test_rms_norm
import test_rms_norm_backward
import test_rope
import test_swiglu
import test_swiglu_backward
import torch
from ptx import on_ptx
from ptx.compiling import compiling_process
from ptx.on_ptx import Removal

from qwenkern import kernels

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED, SEEDS = 1, 2
# Their code differs: kernels are launched dependently from sm_90 on, and store matrices; sm_120 has pairs of float32.
ALL = ("sm_80", "sm_90", "sm_120")
HOPPER = ("sm_90",)

TESTS: list[tuple[tuple[str, ...], Callable[..., None], dict[str, Any]]] = [
    (HOPPER, test_linear.test_programs_share_a_tile, {"tokens": 1}),  # split K, in two launches
    (ALL, test_linear.test_norm_linear, {"n": 97, "k": 896, "tokens": 7, "dtype": BF16}),
    (ALL, test_linear.test_norm_linear, {"n": 97, "k": 896, "tokens": 2, "dtype": F32}),
    (ALL, test_linear.test_odd_sizes, {"n": 17, "k": 257}),
    (ALL, test_linear.test_odd_sizes, {"n": 5, "k": 7}),
    (ALL, test_linear.test_linear_with_bias_and_addend, {"tokens": 16, "dtype": F16}),
    (ALL, test_linear.test_norm_swiglu_linear, {"tokens": 5, "dtype": BF16}),
    (HOPPER, test_linear.test_strided_rows, {}),
    (ALL, test_decode_attention.test_heads_of_the_family, {"heads": (16, 2, 128)}),
    (ALL, test_decode_attention.test_heads_of_the_family, {"heads": (14, 2, 64)}),
    (HOPPER, test_decode_attention.test_several_splits_a_program, {}),
    (HOPPER, test_decode_attention.test_bits_are_batch_invariant, {}),
    (HOPPER, test_decode_attention.test_rows_of_one_sequence_are_as_one_by_one, {}),
    (ALL, test_decode_attention.test_one_split, {"length": 40, "spare_pages": 0}),
    (HOPPER, test_decode_attention.test_ragged_lengths, {"page_size": 64, "dtype": F32}),
    (ALL, test_lm_head.test_lm_head, {"tokens": 5, "dtype": BF16}),
    (ALL, test_lm_head.test_top_k, {"tokens": 5, "vocabulary": 40, "k": 2}),
    (ALL, test_lm_head.test_top_k, {"tokens": 1, "vocabulary": 403, "k": 16}),
    (ALL, test_qkv_rope.test_norm_qkv_rope, {"tokens": 7, "heads": (5, 3, 32), "dtype": BF16}),
    (ALL, test_qkv_rope.test_v_is_not_rotated, {}),
    (ALL, test_rope.test_rope_and_cache, {"tokens": 7, "heads": (5, 3, 32), "dtype": BF16}),
    (ALL, test_rope.test_apply_rope, {"heads": (5, 3, 32), "dtype": F16}),
    (ALL, test_rms_norm.test_rms_norm, {"rows": 7, "hidden": 896, "dtype": BF16}),
    (ALL, test_rms_norm.test_add_rms_norm, {"rows": 7, "hidden": 77, "dtype": F16}),
    (ALL, test_rms_norm_backward.test_add_rms_norm, {"rows": 7, "hidden": 77, "dtype": BF16}),
    (ALL, test_rms_norm_backward.test_many_programs, {"rows": 259}),
    (ALL, test_swiglu.test_swiglu, {"columns": 257, "rows": 7, "dtype": BF16}),
    (ALL, test_swiglu_backward.test_swiglu_backward, {"columns": 257, "rows": 7, "dtype": BF16}),
    (ALL, test_prefill_attention.test_ragged_batch, {}),
    (ALL, test_prefill_attention.test_cached_prefixes, {"page_size": 16, "prefix": 1, "dtype": F32}),
    (ALL, test_prefill_attention.test_heads_of_the_family, {"heads": (3, 3, 32)}),
]


# Which kernels of on_ptx.KERNELS are run without each of their pieces in turn, where
MUTATED = {"o_proj": ALL, "split_k": HOPPER, "decode_attention": ALL, "combine": HOPPER}


def cases() -> Iterator[Any]:
    for keys, test, parameters in TESTS:
        values = [str(value).removeprefix("torch.") for value in parameters.values()]
        name = "-".join([f"{test.__module__}.{test.__name__}".replace("test_", ""), *values])
        for key in keys:
            yield pytest.param(key, test, parameters, id=f"{key}-{name}-seed{SEED}", marks=group(key))


def group(key: str) -> pytest.MarkDecorator:
    """One process compiles for an architecture, and keeps what it has compiled."""
    return pytest.mark.xdist_group(f"ptx {key}")


on_all = pytest.mark.parametrize("key", [pytest.param(key, marks=group(key)) for key in ALL])


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with compiling_process() as process:
        yield process


@pytest.mark.parametrize(("key", "test", "parameters"), list(cases()))
def test_a_kernel_passes_its_test(process, key, test, parameters):
    """CTAs and warps in an order by the seed, and none of what the runner reports."""
    process.submit(on_ptx.run, key, SEED, test, parameters).result()


@on_all
@pytest.mark.parametrize("op", ["linear", "norm_linear", "norm_swiglu_linear", "lm_head"])
def test_bits_are_batch_invariant(process, key, op):
    assert process.submit(on_ptx.counts_with_other_bits, key, SEED, op, (1, 2, 3, 5, 8)).result() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "kernel"),
    [pytest.param(key, kernel, marks=group(key)) for kernel, keys in MUTATED.items() for key in keys],
)
def test_what_is_missing_is_noticed(process, key, kernel):
    """Each barrier, each wait, each guard, and the sizes of the copies that a line makes, taken out one at a time. What
    nothing shows to be missing is not needed, for a reason that is known; such barriers may all be missing at once."""
    removals = process.submit(on_ptx.whole, key, kernel).result()
    unnoticed = process.submit(on_ptx.unnoticed, key, kernel, removals, SEEDS).result()
    assert [each for each in unnoticed if not why_needless(each)] == []
    barriers = [each for each in unnoticed if each.piece == "barrier"]
    for seed in range(SEEDS):
        assert process.submit(on_ptx.without, key, kernel, seed, barriers).result() == ""
    expected = {"barrier", "guard"}
    expected |= {"wait for copies", "sizes of copies"} if kernel != "combine" else set()
    expected |= {"wait for the kernel before"} if key != "sm_80" else set()
    assert {each.piece for each in removals if each not in unnoticed} == expected


# What these lines do where it is of no use does no harm either.
HARMLESS = {
    "k = LOAD_K(pages, kv_head, this_page, token": "a tile lies within a page; scores beyond the end are replaced",
    "return sequence if PAGE_SIZE is None else tl.load(table": "the index is clamped to the sequence's pages",
    "acc += tl.load(parts_ptr + other * part + at": "behind all parts but the last lies the next one; it is not stored",
    "tl.store(arrivals_ptr + tile, 0)": "all threads store a zero there",
    "tl.store(out_ptr + head * HEAD_DIM + column, cast(out": "other threads store the same values there",
}


def why_needless(removal: Removal) -> str | None:
    """The reason why nothing is wrong without it, if there is one."""
    if removal.piece == "barrier" and removal.between_first_copies:
        return "it stands between the first asynchronous copies, each to a place of its own, and no warp reads"
    if removal.piece in ("guard", "sizes of copies"):
        lines = [text for each in removal.source for text in lines_at(*each.split(":"))]
        return next((why for beginning, why in HARMLESS.items() for text in lines if text.startswith(beginning)), None)
    return None


def lines_at(name: str, number: str) -> list[str]:
    """That line of each file of the name: PTX says no folder of what was inlined."""
    files = [file.read_text(encoding="utf-8").splitlines() for file in Path(kernels.__file__).parent.rglob(name)]
    return [text[int(number) - 1].strip() for text in files if int(number) <= len(text)]
