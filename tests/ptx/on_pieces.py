"""The work of test_pieces.py in a process in which Triton compiles: a small call of each kernel, whole or without a
piece of its PTX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import test_decode_attention
import test_linear
import test_lm_head
import test_prefill_attention
import test_qkv_rope
import test_rms_norm
import test_rope
import test_swiglu
import torch
from ptx.on_ptx import CPU, SETTLED
from support.references import assert_matches_reference

from qwenkern import kernels as ops
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.offline.ptx import launch
from qwenkern.benchmarks.offline.ptx.device import device
from qwenkern.benchmarks.offline.ptx.faults import Fault
from qwenkern.benchmarks.offline.ptx.parse import Instruction, Program, parse
from qwenkern.benchmarks.offline.ptx.table import decode
from qwenkern.benchmarks.offline.ptx.warp import Step, Stop, Warp
from qwenkern.kernels.triton import tuning

BF16 = torch.bfloat16


def o_proj() -> None:
    """Eight tiles along K, more than are in flight. The last tile has one row, and of four columns three are tokens."""
    x, weight, _ = test_linear._inputs(3, 17, 4096, BF16, CPU)
    with tuning.trying("linear", {"SPLIT_K": 1}):
        assert_matches_reference(ops, "linear", x, weight)


def split_k() -> None:
    """Four programs a tile, twice, since they count each other."""
    x, weight, _ = test_linear._inputs(3, 17, 4096, BF16, CPU)
    with ops.dependent_launches({}):  # with counters of its own: a run without a piece may leave any number
        for _ in range(2):
            assert_matches_reference(ops, "linear", x, weight)


def gate_up() -> None:
    test_linear.test_norm_swiglu_linear(ops, CPU, tokens=5, dtype=BF16)


def qkv_rope() -> None:
    test_qkv_rope.test_norm_qkv_rope(ops, CPU, tokens=7, heads=(5, 3, 32), dtype=BF16)


def decode_attention() -> None:
    """One program a sequence takes its one or two splits of up to four tiles, more than are in flight."""
    inputs = test_decode_attention._inputs([500, 130, 1, 1], (3, 1, 64), BF16, CPU)
    with tuning.trying("decode_attention", {"NUM_SPLITS": 2}):
        assert_matches_reference(ops, "decode_attention", *inputs)


def prefill_attention() -> None:
    """Four tiles of keys, more than are in flight. One query tile has 72 rows, another one has one."""
    inputs = test_prefill_attention._inputs([(72, 250), (1, 40)], (2, 1, 64), BF16, CPU)
    assert_matches_reference(ops, "prefill_attention", *inputs)


def lm_head() -> None:
    test_lm_head.test_top_k(ops, CPU, tokens=5, vocabulary=40, k=2)


def rms_norm() -> None:
    test_rms_norm.test_add_rms_norm(ops, CPU, rows=3, hidden=77, dtype=BF16)


def rope() -> None:
    test_rope.test_rope_and_cache(ops, CPU, tokens=7, heads=(5, 3, 32), dtype=BF16)


def swiglu() -> None:
    test_swiglu.test_swiglu(ops, CPU, columns=257, rows=3, dtype=BF16)


KERNELS: dict[str, tuple[Callable[[], None], str]] = {
    "o_proj": (o_proj, "_linear_kernel"),
    "split_k": (split_k, "_linear_kernel"),
    "gate_up": (gate_up, "_linear_kernel"),
    "qkv_rope": (qkv_rope, "_norm_qkv_rope_kernel"),
    "decode_attention": (decode_attention, "_decode_attention_kernel"),
    "combine": (decode_attention, "_combine_kernel"),
    "prefill_attention": (prefill_attention, "_prefill_attention_kernel"),
    "lm_head": (lm_head, "_lm_head_kernel"),
    "top_k": (lm_head, "_top_k_kernel"),
    "rms_norm": (rms_norm, "_rms_norm_kernel"),
    "rope": (rope, "_rope_kernel"),
    "swiglu": (swiglu, "_swiglu_kernel"),
}
PIECES = {
    "barrier": r"bar\.sync\s+\d+(, \d+)?;",
    "wait for copies": r"cp\.async\.wait_group\s+\d+;",
    "wait for products": r"wgmma\.wait_group\.sync\.aligned \d+;",
    "fence of products": r"wgmma\.fence\.sync\.aligned;",
    "fence between proxies": r"fence\.proxy\.async\S*;",
    "wait for the kernel before": r"griddepcontrol\.wait;",
    "guard": r"@!?%p\d+ (?=ld\.global|st\.global|atom)",
    "sizes of copies": r"(?<=, 0x[48]), %r\d+(?=;)|(?<=, 0x10), %r\d+(?=;)",  # zero where nothing is to be read
}


class Removal(NamedTuple):
    piece: str
    number: int  # of its kind, in the order of the text
    source: tuple[str, ...]  # "dense.py:36", and where that was inlined, "decode_attention.py:135"
    between_first_copies: bool  # in a straight line, and before any wait for them
    holds: bool  # a guard that is true for every lane
    spans: tuple[tuple[int, int], ...]


_texts: dict[tuple[str, str], str] = {}  # of the kernel that a call launches first, by device and kernel


def whole(key: str, kernel: str) -> list[Removal]:
    """Runs it, and says what may be taken out."""
    texts = []

    def keep(name: str, ptx: str) -> str:
        if name == KERNELS[kernel][1]:
            texts.append(ptx)
        return ptx

    _guards.clear()
    with mock.patch.object(launch, "decode", _noting), device(_small(key, kernel), 0, keep, SETTLED):
        KERNELS[kernel][0]()
    _texts[key, kernel] = texts[0]
    failed = next(failed for name, failed in _guards if name == parse(texts[0]).name)
    return list(_removals(texts[0], failed))


def _removals(ptx: str, failed: list[bool]) -> Iterator[Removal]:
    """Each piece of its own, but the sizes of all copies that a line makes together. ``failed``: guards ever false."""
    copies: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for piece, pattern in PIECES.items():
        for number, found in enumerate(re.finditer(pattern, ptx)):
            before = ptx[: found.start()]
            location = re.findall(r"\.loc\s.*//(.*)", before)[-1]
            source = tuple(re.findall(r"[^\s:]+\.py:\d+", location))
            if piece == "sizes of copies":
                copies.setdefault(source, []).append(found.span())
                continue
            block = re.split(r"^\$L__BB\w+:", before, flags=re.M)[-1]
            between_first_copies = "commit_group" in block and "wait_group" not in before
            holds = piece == "guard" and not failed[number]
            yield Removal(piece, number, source, between_first_copies, holds, (found.span(),))
    for number, (source, spans) in enumerate(copies.items()):
        yield Removal("sizes of copies", number, source, False, False, tuple(spans))


_guards: list[tuple[str, list[bool]]] = []  # of each program, its name, and for each guard whether it was ever false


def _noting(instruction: Instruction, program: Program) -> Step:
    """The runner's decode, which also notes whether guards are ever false."""
    step, guard = decode(instruction, program), instruction.guard
    if instruction is program.instructions[0]:
        _guards.append((program.name, []))
    if not guard or not re.match(r"ld\.global|st\.global|atom", instruction.opcode):
        return step
    failed = _guards[-1][1]
    at = len(failed)
    failed.append(False)

    def noted(warp: Warp) -> Stop | None:
        predicate = warp.registers[guard.register.slot]
        failed[at] |= predicate is not None and not (predicate ^ guard.negated).all()
        return step(warp)

    return noted


def without(key: str, kernel: str, seed: int, removed: list[Removal]) -> str:
    """What shows that these pieces are missing, or an empty string."""

    def cut(name: str, ptx: str) -> str:
        if ptx == _texts[key, kernel]:
            for start, end in sorted((span for each in removed for span in each.spans), reverse=True):
                ptx = ptx[:start] + ptx[end:]
        return ptx

    try:
        with device(_small(key, kernel), seed, cut, SETTLED):
            KERNELS[kernel][0]()
    except (Fault, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unnoticed(key: str, kernel: str, removals: list[Removal], seeds: int) -> list[Removal]:
    """The pieces that can be missing in any of so many orders."""
    return [
        each
        for each in removals
        if not each.holds and not any(without(key, kernel, seed, [each]) for seed in range(seeds))
    ]


def _small(key: str, kernel: str) -> tuning.Device:
    """Attention gives programs several splits where there are more than the device has room for."""
    return replace(DEVICES[key], num_sms=1) if kernel in ("decode_attention", "combine") else DEVICES[key]
