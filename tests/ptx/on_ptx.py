"""The work of test_kernels.py in a process in which Triton compiles: kernels on the PTX runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import test_dequantise
import test_linear
import test_weights
import torch
from support.references import random

from qwenkern import kernels as ops
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.offline.ptx.device import device
from qwenkern.benchmarks.offline.ptx.faults import Fault
from qwenkern.kernels.weights import FORMATS

CPU = torch.device("cpu")
# No kernel of a step writes these, so kernels may read them before their wait. test_steps.py holds a step against it.
SETTLED = ("weight", "norm_weight_ptr", "bias_ptr", "lengths_ptr", "block_tables_ptr")


def run(key: str, seed: int, test: Callable[..., None], parameters: dict[str, Any]) -> None:
    """A kernel's own test."""
    with device(DEVICES[key], seed, settled=SETTLED):
        test(ops, CPU, **parameters)


def counts_with_other_bits_over_quantised(key: str, form: str, op: str, k: int, counts: tuple[int, ...]) -> list[int]:
    """The same over a weight [32, k] in this format."""
    weight = FORMATS[form].allocate(32, k, torch.bfloat16, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    weight.copy_(random(32, k, dtype=torch.bfloat16, device=CPU, seed=1, scale=k**-0.5))
    x = random(16, k, dtype=torch.bfloat16, device=CPU, seed=2)
    norm_weight = test_linear._norm_weight(k, x.dtype, CPU)

    def tokens(count: int) -> torch.Tensor:
        if op == "linear":
            return ops.linear(x[:count], weight)
        return getattr(ops, op)(x[:count], norm_weight, 1e-6, weight)

    with device(DEVICES[key], 1, settled=SETTLED):
        together = tokens(16)
        assert torch.isfinite(together).all()
        return [count for count in counts if not torch.equal(tokens(count), together[:count])]


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


def counts_with_other_bits_of(form: str, key: str, seed: int, counts: tuple[int, ...]) -> list[int]:
    """The same over weights of a quantised format."""
    x = random(16, test_weights.COLUMNS, dtype=torch.bfloat16, device=CPU)
    weight = test_weights.made(form, rows=32)
    with device(DEVICES[key], seed, settled=SETTLED):
        together = ops.linear(x, weight)
        assert torch.isfinite(together).all()
        return [count for count in counts if not torch.equal(ops.linear(x[:count], weight), together[:count])]


def fault_of_ids(key: str, ids: list[int]) -> str:
    """What the runner reports when rows of a table of 48 are asked for, or an empty string."""
    weight = test_dequantise.random_bits("int4", 48, 64, torch.bfloat16)
    out = torch.empty(len(ids), 64, dtype=torch.bfloat16)
    try:
        with device(DEVICES[key], 0, settled=SETTLED):
            ops.triton.dequantise.dequantise_ids(out, weight, torch.tensor(ids))
    except Fault as fault:
        return str(fault)
    assert torch.equal(out, weight.dequantise()[ids])
    return ""
