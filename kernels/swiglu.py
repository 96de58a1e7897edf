"""SwiGLU over the packed projection.

    out = round(round(silu(gate)) * up)

gate_up [T, 2 F] of any row stride, the gate in the first half; out [T, F]. silu in float32, rounded where transformers
rounds it. Bytes moved: 3 T F elements.

    program (t, p):  columns p * BLOCK .. of row t
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import reference, tuning
from .checks import check_tensor
from .dispatch import op, pdl_options, runs_on_triton
from .language import cast, round_to, silu, wait_for_inputs

tuning.SPACES["swiglu"] = {"BLOCK": (256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)}


@tuning.remember
def _config(device: tuning.Device, rows: int, columns: int) -> dict[str, Any]:
    """Wide blocks where there are many rows, and narrow ones to give few rows to many multiprocessors."""
    block = 2048
    while block > 256 and rows * triton.cdiv(columns, block) < 2 * device.num_sms:
        block //= 2
    return tuning.lookup(
        "swiglu", device, {"rows": rows, "columns": columns}, {"BLOCK": block, "num_warps": block // 256}
    )


@triton.jit
def _swiglu_kernel(
    out_ptr,  # [T, F]
    gate_up_ptr,  # [T, 2 F]
    columns,
    gate_up_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    dtype = gate_up_ptr.dtype.element_ty

    wait_for_inputs(PDL)
    gate = tl.load(gate_up_ptr + row * gate_up_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_stride + columns + column, mask=mask, other=0.0).to(tl.float32)
    out = round_to(silu(gate), dtype) * up
    tl.store(out_ptr + row * columns + column, cast(out, dtype), mask=mask)


def _launch_swiglu(out: Tensor, gate_up: Tensor) -> None:
    """out [T, F], gate_up [T, 2 F]."""
    rows, columns = out.shape
    config = _config(tuning.device_of(out), rows, columns)
    grid = (rows, triton.cdiv(columns, config["BLOCK"]))
    _swiglu_kernel[grid](out, gate_up, columns, gate_up.stride(0), **config, **pdl_options(out))


def _fake_swiglu(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@op(fake=_fake_swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202) of gate_up [..., 2 F], gate in the first half: [..., F].

    float32, bfloat16 or float16, the last dimension contiguous. silu is rounded to the dtype before the product."""
    check_tensor("swiglu", "gate_up", gate_up, ("...", "2 F"))
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: gate_up's last dimension must be even, and is {gate_up.shape[-1]}")
    if not runs_on_triton(gate_up):
        return reference.swiglu(gate_up)
    out = _fake_swiglu(gate_up)
    _launch_swiglu(out.view(-1, out.shape[-1]), gate_up.reshape(-1, gate_up.shape[-1]))
    return out
