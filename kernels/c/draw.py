"""The draw of token ids in C. kernels/draw.py says what is computed; draw.c has the loops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import build, limits
from .backend import C
from .calls import make
from .recorded_calls import run, scratch
from .rows import team_of


@C.implements()
def draw(logits: Tensor, largest: Tensor, settings: Tensor, uniforms: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    out = logits.new_empty(rows, dtype=torch.int64)
    run(
        make.draw(
            out=out,
            scratch=scratch(limits.draw_scratch(build.prepared().limits, rows, vocabulary)),
            logits=logits,
            largest=largest,
            settings=settings,
            uniforms=uniforms,
            num_rows=rows,
            vocabulary=vocabulary,
            logits_stride=logits.stride(0),
            settings_stride=settings.stride(0),
        ),
        team_of(logits.numel()) if rows > 1 else 1,  # a row is one task
    )
    return out
