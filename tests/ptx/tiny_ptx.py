"""Small PTX programs, for tests of the runner itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwenkern.benchmarks.offline.ptx.launch import Grid, Kernel, Launch
from qwenkern.benchmarks.offline.ptx.memory import GlobalMemory
from qwenkern.benchmarks.offline.ptx.values import LANES, TYPES

SHARED = ".extern .shared .align 16 .b8 smem[];"


def run(
    body: str,
    *buffers: ArrayLike,
    valid: Sequence[ArrayLike] | None = None,
    grid: Grid = (1, 1, 1),
    num_warps: int = 1,
    shared_bytes: int = 0,
    is_dependent: bool = False,
    seed: int = 0,
) -> list[NDArray]:
    """Runs a body, with %tid.x in %r0 and the address of buffer i in %rd<i>, and returns the buffers. Registers are
    %p<99>, %rs<99>, %r<99> and %rd<99>. ``valid``: which bytes of each buffer may be touched; otherwise all."""
    flat = [np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in buffers]
    touchable = [np.ones(len(each), bool) for each in flat] if valid is None else [np.asarray(each) for each in valid]
    memory = GlobalMemory(list(zip(flat, touchable, strict=True)))
    parameters = {f"buffer_{at}": memory.address(at) for at in range(len(flat))}
    lines = [SHARED, ".visible .entry tiny(", ",\n".join(f".param .u64 {name}" for name in parameters), ")\n{"]
    lines += [f".reg .{type_} %{name}<99>;" for name, type_ in (("p", "pred"), ("rs", "b16"), ("r", "b32"))]
    lines += [".reg .b64 %rd<99>;", "mov.u32 %r0, %tid.x;"]
    lines += [f"ld.param.b64 %rd{at}, [{name}];" for at, name in enumerate(parameters)]
    kernel = Kernel("\n".join([*lines, body, "ret;", "}"]))
    Launch(kernel, grid, parameters, memory, shared_bytes, num_warps, is_dependent).run(seed)
    return [
        memory.contents(at).copy().view(np.asarray(each).dtype).reshape(np.shape(each))
        for at, each in enumerate(buffers)
    ]


_PREFIX = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}


def compute(opcode: str, result: str, *sources: tuple[str, ArrayLike]) -> NDArray:
    """What one instruction makes of operands of these PTX types, with a value a lane, or two in packed types."""
    lines, buffers, operands = [], [], []
    for at, (name, values) in enumerate(sources):
        kept = TYPES["u16" if name == "pred" else name]
        buffers.append(np.asarray(values, kept.dtype))
        assert 8 * buffers[-1].nbytes == LANES * kept.bits
        operands.append(f"{_PREFIX[kept.bits]}{20 + at}")
        lines.append(f"mad.wide.u32 %rd{40 + at}, %r0, {kept.bits // 8}, %rd{at};")
        lines.append(f"ld.global.b{kept.bits} {operands[-1]}, [%rd{40 + at}];")
        if name == "pred":
            lines.append(f"setp.ne.b16 %p{20 + at}, {operands[-1]}, 0;")
            operands[-1] = f"%p{20 + at}"
    kept = TYPES["u16" if result == "pred" else result]
    buffers.append(np.zeros(LANES * kept.bits // 8, np.uint8).view(kept.dtype))
    to = f"{_PREFIX[kept.bits]}90"
    lines.append(f"{opcode} {', '.join(['%p90' if result == 'pred' else to, *operands])};")
    if result == "pred":
        lines.append(f"selp.b16 {to}, 1, 0, %p90;")
    lines.append(f"mad.wide.u32 %rd60, %r0, {kept.bits // 8}, %rd{len(sources)};")
    lines.append(f"st.global.b{kept.bits} [%rd60], {to};")
    done = run("\n".join(lines), *buffers)[-1]
    return done != 0 if result == "pred" else done
