"""What test_kernels.py has done in a process in which Triton compiles: kernels on the PTX runner, whole or with a piece
taken out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import test_decode_attention
import test_linear
import torch
from support.references import assert_matches_reference, random

from qwenkern import kernels as ops
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.offline.ptx.device import device
from qwenkern.benchmarks.offline.ptx.faults import Fault
from qwenkern.kernels.triton import tuning

CPU = torch.device("cpu")
# No kernel of a step writes these, so kernels may read them before their wait. test_steps.py holds a step against it.
SETTLED = ("weight", "norm_weight_ptr", "bias_ptr", "lengths_ptr", "block_tables_ptr")


def run(key: str, seed: int, test: Callable[..., None], parameters: dict[str, Any]) -> None:
    """A kernel's own test."""
    with device(DEVICES[key], seed, settled=SETTLED):
        test(ops, CPU, **parameters)


def counts_with_other_bits(key: str, seed: int, op: str, counts: tuple[int, ...]) -> list[int]:
    """How many tokens of 16, for which an op gives them other bits than among 16."""
    x, weight, bias = test_linear._inputs(16, 34, 896, torch.bfloat16, CPU)
    norm_weight = test_linear._norm_weight(896, x.dtype, CPU)
    addend = random(16, 34, dtype=x.dtype, device=CPU, seed=5)

    def tokens(count: int) -> torch.Tensor:
        if op == "linear":
            return ops.linear(x[:count], weight, bias, addend[:count])
        return getattr(ops, op)(x[:count], norm_weight, 1e-6, weight)

    with device(DEVICES[key], seed, settled=SETTLED):
        together = tokens(16)
        assert torch.isfinite(together).all()
        return [count for count in counts if not torch.equal(tokens(count), together[:count])]


# Pieces taken out


def o_proj() -> None:
    """Eight tiles along K, more than are in flight. The last tile has one row, and of four columns three are tokens."""
    x, _, weight, _ = test_linear._inputs(3, 17, 4096, torch.bfloat16, CPU)
    with tuning.trying("linear", {"SPLIT_K": 1}):
        assert_matches_reference(ops, "linear", x, weight)


def split_k() -> None:
    """Four programs a tile, twice, since they count each other."""
    x, _, weight, _ = test_linear._inputs(3, 17, 4096, torch.bfloat16, CPU)
    with ops.dependent_launches({}):
        for _ in range(2):
            assert_matches_reference(ops, "linear", x, weight)


def decode_attention() -> None:
    """One program a sequence takes its one or two splits of up to four tiles, more than are in flight."""
    inputs = test_decode_attention._inputs([500, 130, 1, 1], (3, 1, 64), torch.bfloat16, CPU)
    with tuning.trying("decode_attention", {"NUM_SPLITS": 2}):
        assert_matches_reference(ops, "decode_attention", *inputs)


KERNELS: dict[str, tuple[Callable[[], None], str]] = {
    "o_proj": (o_proj, "_linear_kernel"),
    "split_k": (split_k, "_linear_kernel"),
    "decode_attention": (decode_attention, "_decode_attention_kernel"),
    "combine": (decode_attention, "_combine_kernel"),
}
PIECES = {
    "barrier": r"bar\.sync\s+0;",
    "wait for copies": r"cp\.async\.wait_group\s+\d+;",
    "wait for the kernel before": r"griddepcontrol\.wait;",
    "guard": r"@!?%p\d+ (?=ld\.global|st\.global|atom)",
    "sizes of copies": r"(?<=, 0x[48]), %r\d+(?=;)|(?<=, 0x10), %r\d+(?=;)",  # zero where nothing is to be read
}


class Removal(NamedTuple):
    piece: str
    number: int  # of its kind, in the order of the text
    source: tuple[str, ...]  # "dense.py:36", and where that was inlined, "decode_attention.py:135"
    between_first_copies: bool  # in a straight line, and before any wait for them
    spans: tuple[tuple[int, int], ...]


def _removals(ptx: str) -> Iterator[Removal]:
    """Each piece of its own, but the sizes of all copies that a line makes together."""
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
            yield Removal(piece, number, source, between_first_copies, (found.span(),))
    for number, (source, spans) in enumerate(copies.items()):
        yield Removal("sizes of copies", number, source, False, tuple(spans))


def whole(key: str, kernel: str) -> list[Removal]:
    """Runs it, and says what may be taken out."""
    texts = []

    def keep(name: str, ptx: str) -> str:
        if name == KERNELS[kernel][1]:
            texts.append(ptx)
        return ptx

    with device(_small(key, kernel), 0, keep, SETTLED):
        KERNELS[kernel][0]()
    (text,) = texts
    return list(_removals(text))


def without(key: str, kernel: str, seed: int, removed: list[Removal]) -> str:
    """What shows that these pieces are missing, or an empty string."""

    def cut(name: str, ptx: str) -> str:
        if name == KERNELS[kernel][1]:
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
    return [each for each in removals if not any(without(key, kernel, seed, [each]) for seed in range(seeds))]


def _small(key: str, kernel: str) -> tuning.Device:
    """Attention gives programs several splits where there are more than the device has room for."""
    return replace(DEVICES[key], num_sms=1) if kernel in ("decode_attention", "combine") else DEVICES[key]
