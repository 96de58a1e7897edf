"""The PTX runner notices what is missing in a kernel: each barrier, wait, fence and guard of each kernel of a decode step
and of prefill is taken out in turn. What nothing shows to be missing is not needed, for a reason that stands here."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from ptx import on_pieces
from ptx.compiling import compiling_process
from ptx.on_pieces import Removal
from ptx.test_kernels import ALL, HOPPER, group

from qwenkern import kernels

SEEDS = 2
# Where each kernel of on_pieces.KERNELS is run without its pieces; with --ptx-all everywhere.
MUTATED = {
    "o_proj": ALL,
    "split_k": HOPPER,
    "gate_up": (),
    "qkv_rope": (),
    "decode_attention": ALL,
    "combine": HOPPER,
    "prefill_attention": HOPPER,
    "lm_head": HOPPER,
    "top_k": (),
    "rms_norm": ALL,
    "rope": ALL,
    "swiglu": ALL,
}

# What these lines do where it is of no use does no harm either.
HARMLESS = {
    "k = LOAD_K(pages, kv_head, this_page, token": "a tile lies within a page; scores beyond the end are replaced",
    "return sequence if PAGE_SIZE is None else tl.load(table": "the index is clamped to the sequence's pages",
    "acc += tl.load(parts_ptr + other * part + at": "behind all parts but the last lies the next one; it is not stored",
    "tl.store(arrivals_ptr + tile, 0)": "all threads store a zero there",
    "tl.store(out_ptr + head * HEAD_DIM + column, cast(out": "other threads store the same values there",
    "gate = tl.load(gate_ptr": "behind a row of gate lies that of up; what is computed there is not stored",
    "tl.store(values_ptr + token * TOP_K": "all threads store the same value there",
    "tl.store(ids_ptr + token * TOP_K": "all threads store the same value there",
}
# Barriers of Triton's, behind which no warp touches what another one has touched before
BARRIERS: dict[str, str] = {}


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with compiling_process() as process:
        yield process


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        chosen = dict.fromkeys(MUTATED, ALL) if metafunc.config.getoption("ptx_all") else MUTATED
        values = [pytest.param(key, kernel, marks=group(key)) for kernel, keys in chosen.items() for key in keys]
        metafunc.parametrize(("key", "kernel"), values)


@pytest.mark.slow
def test_what_is_missing_is_noticed(process, key, kernel):
    """Each piece taken out alone, but the sizes of the copies that a line makes together. Barriers that are not needed
    may all be missing at once."""
    removals = process.submit(on_pieces.whole, key, kernel).result()
    unnoticed = process.submit(on_pieces.unnoticed, key, kernel, removals, SEEDS).result()
    assert [each for each in unnoticed if not why_needless(kernel, each)] == []
    barriers = [each for each in unnoticed if each.piece == "barrier"]
    for seed in range(SEEDS):
        assert process.submit(on_pieces.without, key, kernel, seed, barriers).result() == ""
    noticed = {each.piece for each in removals if each not in unnoticed and not each.holds}
    assert key == "sm_80" or "wait for the kernel before" in noticed
    assert "guard" in noticed
    assert {each.piece for each in removals} - noticed <= {"barrier"}


def why_needless(kernel: str, removal: Removal) -> str | None:
    """The reason why nothing is wrong without it, if there is one. A guard that holds for every lane is not asked
    about."""
    if removal.piece == "barrier":
        if removal.between_first_copies:
            return "it stands between the first asynchronous copies, each to a place of its own, and no warp reads"
        return BARRIERS.get(kernel)
    lines = [text for each in removal.source for text in lines_at(*each.split(":"))]
    if removal.piece == "fence between proxies":
        return next((why for beginning, why in FENCES.items() for text in lines if text.startswith(beginning)), None)
    if removal.piece in ("guard", "sizes of copies"):
        return next((why for beginning, why in HARMLESS.items() for text in lines if text.startswith(beginning)), None)
    return None


def lines_at(name: str, number: str) -> list[str]:
    """That line of each file of the name: PTX says no folder of what was inlined."""
    files = [file.read_text(encoding="utf-8").splitlines() for file in Path(kernels.__file__).parent.rglob(name)]
    return [text[int(number) - 1].strip() for text in files if int(number) <= len(text)]
