"""The PTX runner reports what is missing in a kernel: each barrier, wait, fence and guard of each kernel of a step is
taken out, one at a time. If no run fails without a piece, this file has the reason why the kernel does not need it."""

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
    "gate_up": HOPPER,
    "qkv_rope": HOPPER,
    "decode_attention": ALL,
    "combine": HOPPER,
    "prefill_attention": HOPPER,
    "lm_head": HOPPER,
    "top_k": HOPPER,
    "rms_norm": ALL,
    "rope": ALL,
    "swiglu": ALL,
}

# What is not noticed, and why it is not needed. Of guards and of the sizes of copies: what these lines do where it is
# of no use does no harm either.
HARMLESS = {
    "k = LOAD_K(pages, kv_head, this_page, token": "a tile lies within a page; scores beyond the end are replaced",
    "v = LOAD_V(pages, kv_head, this_page, token": "behind the last tile comes a page of the sequence; nobody reads it",
    "early = LOAD(weight, ROWS": "behind a row lies the next one, times zeros of x; behind the last row, it shows",
    "return sequence if PAGE_SIZE is None else tl.load(table": "the index is clamped to the sequence's pages",
    "page = tl.load(table + tl.minimum(tile // PAGE_SIZE, last))": "the index is clamped to the sequence's pages",
    "tl.store(arrivals_ptr + ": "all threads store a zero there",
    "tl.store(parts + split * part, products)": "several threads store the same values there",
    "tl.store(out_ptr + head * HEAD_DIM + column, cast(out": "other threads store the same values there",
    "gate = tl.load(gate_ptr": "behind a row of gate lies that of up; what is computed there is not stored",
    "tl.store(values_ptr + token * TOP_K": "all threads store the same value there",
    "tl.store(ids_ptr + token * TOP_K": "all threads store the same value there",
    "STORE_K(rope.pages, slot": "what lies beyond the last token has its slot and its values",
    "STORE_V(rope.pages, slot": "what lies beyond the last token has its slot and its values",
}
REASONS = {
    "barrier": "Triton stands one before each new use of shared memory. All that are not needed may be missing.",
    "fence between proxies": "Triton makes one ahead of a loop and one in it. Without both, a product reads a store.",
    "wait for copies": "behind a loop, where the last groups are empty or have been waited for",
}


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
    """Each piece taken out alone, but the sizes of the copies that a line makes together. A guard that holds for every
    lane of the call stays. The barriers that are not needed may all be missing at once; not so the fences."""
    removals = process.submit(on_pieces.whole, key, kernel).result()
    unnoticed = process.submit(on_pieces.unnoticed, key, kernel, removals, SEEDS).result()
    assert [each for each in unnoticed if not why_needless(each)] == []
    barriers = [each for each in unnoticed if each.piece == "barrier"]
    for seed in range(SEEDS):
        assert process.submit(on_pieces.without, key, kernel, seed, barriers).result() == ""
    if fences := [each for each in removals if each.piece == "fence between proxies"]:
        assert "no fence.proxy.async" in process.submit(on_pieces.without, key, kernel, 0, fences).result()
    noticed = {each.piece for each in removals if each not in unnoticed and not each.holds}
    assert noticed >= {each.piece for each in removals} - {"barrier", "fence between proxies", "guard"}


def why_needless(removal: Removal) -> str | None:
    """The reason why nothing is wrong without it, if there is one."""
    lines = [text for each in removal.source for text in lines_at(*each.split(":"))]
    if removal.piece == "wait for copies" and not lines[0].startswith("for "):
        return None
    if removal.piece in ("guard", "sizes of copies"):
        return next((why for beginning, why in HARMLESS.items() for text in lines if text.startswith(beginning)), None)
    return REASONS.get(removal.piece)


def lines_at(name: str, number: str) -> list[str]:
    """That line of each file of the name: PTX says no folder of what was inlined."""
    files = [file.read_text(encoding="utf-8").splitlines() for file in Path(kernels.__file__).parent.rglob(name)]
    return [text[int(number) - 1].strip() for text in files if int(number) <= len(text)]
