"""Which backend runs each op on this machine, and why the others do not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..benchmarks.ops.cases import CASES, Size
from ..config import Config
from ..kernels.dispatch import refusals

MODEL = "qwen2.5-3b"


def served(dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, str, str, str]]:
    """(op, tokens, backend that runs it, why the others do not), for the ops of Qwen2.5-3B on a GPU if there is one,
    else on the CPU. Tensors of these sizes are described, not allocated."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Config.from_name(MODEL)
    by_outcome: dict[tuple[str, str, str], set[int]] = {}
    for case in CASES:
        for tokens in case.tokens:
            with FakeTensorMode(allow_non_fake_inputs=True):
                inputs = case.inputs(config, Size(tokens, dtype=dtype, device=device))
            first = next(each for each in inputs if isinstance(each, Tensor))
            found = refusals(case.op, first, *inputs)
            runs = next((name for name, reason in found.items() if reason is None), "torch")
            others = "; ".join(f"{name} {reason}" for name, reason in found.items() if reason and name != runs)
            by_outcome.setdefault((case.op, runs, others), set()).add(tokens)
    rows = [
        (op, ", ".join(map(str, sorted(tokens))), runs, others) for (op, runs, others), tokens in by_outcome.items()
    ]
    return sorted(rows)
