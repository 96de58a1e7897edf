"""RMSNorm in C, with or without a residual. kernels/rms_norm.py says what each op computes; norm.h has the loops."""

from __future__ import annotations

import torch
from torch import Tensor

from . import build
from .backend import C
from .calls import make
from .recorded_calls import run
from .rows import rows, team_of


def refuses_rms_norm(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return _refuses(x)


@C.implements(refuses_rms_norm)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _norm(out, None, x, None, weight, eps)
    return out


def refuses_add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> str | None:
    return _refuses(x)


@C.implements(refuses_add_rms_norm)
def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm(x, weight, eps), x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_residual = torch.empty_like(out)
    _norm(out, new_residual, x, residual, weight, eps)
    return out, new_residual


def _refuses(x: Tensor) -> str | None:
    multiple = build.prepared().limits.norm_multiple
    return f"rows of {x.shape[-1]} values (a multiple of {multiple})" if x.shape[-1] % multiple else None


def _norm(
    out: Tensor, new_residual: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> None:
    x, residual = rows(x), None if residual is None else rows(residual)
    num_tokens, row_size = x.shape
    run(
        make.add_rms_norm(
            out=out,
            new_residual=new_residual,
            x=x,
            residual=residual,
            norm_weight=weight,
            num_tokens=num_tokens,
            row_size=row_size,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            eps=eps,
        ),
        team_of(x.numel()),
    )
