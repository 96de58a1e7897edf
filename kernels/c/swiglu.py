"""SwiGLU in C, of one packed tensor or of two. kernels/swiglu.py says what each op computes; swiglu.c has the loop."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import C
from .calls import make
from .recorded_calls import run
from .rows import rows, team_of


@C.implements()
def swiglu(gate_up: Tensor) -> Tensor:
    return silu_mul(*gate_up.chunk(2, dim=-1))


@C.implements()
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, up = rows(gate), rows(up)
    num_tokens, row_size = gate.shape
    run(
        make.silu_mul(
            out=out,
            gate=gate,
            up=up,
            num_tokens=num_tokens,
            row_size=row_size,
            gate_stride=gate.stride(0),
            up_stride=up.stride(0),
        ),
        team_of(gate.numel()),
    )
    return out
