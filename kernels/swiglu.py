"""SwiGLU, over the packed projection or over two.

    out = round(round(silu(gate)) * up)

gate and up [T, F] of any row stride (swiglu: the halves of gate_up [T, 2 F]); out [T, F]. silu in float32, rounded
where transformers rounds it. Bytes moved: 3 T F elements.

    program (t, p):  columns p * BLOCK .. of row t
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import c as c_backend
from . import reference, tuning
from .checks import check_device, check_tensor
from .dispatch import op, pdl_options, runs_on_triton
from .language import cast, round_to, silu, wait_for_inputs
from .swiglu_backward import config, silu_mul_gradient, swiglu_gradient
from .triton_if_any import tl, triton


@triton.jit
def _swiglu_kernel(
    out_ptr,  # [T, F]
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    columns,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    dtype = gate_ptr.dtype.element_ty

    wait_for_inputs(PDL)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    out = round_to(silu(gate), dtype) * up
    tl.store(out_ptr + row * columns + column, cast(out, dtype), mask=mask)


def _launch_swiglu(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """All [T, F]."""
    rows, columns = out.shape
    chosen = config("swiglu", tuning.device_of(out), rows, columns)
    grid = (rows, triton.cdiv(columns, chosen["BLOCK"]))
    _swiglu_kernel[grid](out, gate, up, columns, gate.stride(0), up.stride(0), **chosen, **pdl_options(out))


def _fake_swiglu(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@op(fake=_fake_swiglu, gradient=swiglu_gradient)
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of gate_up [..., 2 F], gate in the first half: [..., F].

    float32, bfloat16 or float16, the last dimension contiguous. silu is rounded to the dtype before the product."""
    check_tensor("swiglu", "gate_up", gate_up, ("...", "2 F"))
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up's last dimension must be even, and is {gate_up.shape[-1]}")
    if not runs_on_triton(gate_up):
        in_c = c_backend.takes(c_backend.refuses_swiglu, gate_up)
        return (c_backend if in_c else reference).swiglu(gate_up)
    out = _fake_swiglu(gate_up)
    _launch_swiglu(out.view(-1, out.shape[-1]), *gate_up.reshape(-1, gate_up.shape[-1]).chunk(2, dim=-1))
    return out


def _fake_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@op(fake=_fake_silu_mul, gradient=silu_mul_gradient)
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of two tensors [..., F] of one shape: [..., F].

    float32, bfloat16 or float16, the last dimension contiguous. silu is rounded to the dtype before the product."""
    check_tensor("silu_mul", "gate", gate, ("...", "F"))
    check_tensor("silu_mul", "up", up, tuple(gate.shape), like=gate)
    check_device("silu_mul", gate=gate, up=up)
    if not runs_on_triton(gate):
        in_c = c_backend.takes(c_backend.refuses_silu_mul, gate, up)
        return (c_backend if in_c else reference).silu_mul(gate, up)
    out = _fake_silu_mul(gate, up)
    _launch_swiglu(*(each.reshape(-1, each.shape[-1]) for each in (out, gate, up)))
    return out
