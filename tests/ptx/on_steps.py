"""The work of test_steps.py in a process in which Triton compiles: sequences of kernels, with dependent launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from support.models import tiny_model

from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.benchmarks.offline.ptx.device import device
from qwenkern.benchmarks.offline.ptx.steps import Ran, recorded
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.kernels.triton_if_any import gdc_launch_dependents, gdc_wait
from qwenkern.sampling import Drawing

HOPPER = DEVICES["sm_90"]
LENGTHS = (70, 9)


class _Direct:
    """Runs the step when asked to."""

    def capture(self, function):
        return function, torch.zeros(1)


def decode_steps(late_kernel: str = "") -> list[Ran]:
    """Two decode steps of a small model that draws its own tokens: what its launches touched. A kernel may be made to
    wait at its end."""
    model = tiny_model(dtype=torch.bfloat16)
    step = CapturedStep(model.module, model.cache, len(LENGTHS), Drawing(), _Direct())
    batch = step._batch
    for pages in model.cache.pages:
        for tensor in pages.tensors:
            tensor.normal_()
    batch.lengths.copy_(torch.tensor(LENGTHS))
    batch.positions.copy_(batch.lengths - 1)
    batch.block_tables[0, :2], batch.block_tables[1, 0] = torch.tensor([0, 1]), 2
    batch.ids.copy_(torch.tensor([5, 77]))
    step._moves.fill_(1)
    model.cache.rope.reach(128)

    def late(name: str, ptx: str) -> str:
        if name != late_kernel:
            return ptx
        assert ptx.count("griddepcontrol.wait;") == 1
        return ptx.replace("griddepcontrol.wait;", "").replace("ret;", "griddepcontrol.wait; ret;")

    with torch.inference_mode(), recorded(HOPPER, 0, late) as steps:
        step.replay()
        step.replay()
    return steps.ran


@triton.jit
def _kernel(out_ptr, x_ptr, early_ptr, START_EARLY: tl.constexpr, WRITE_EARLY: tl.constexpr):
    """out = x + early, of which early is read before the wait."""
    at = tl.arange(0, 32)
    if START_EARLY:
        gdc_launch_dependents()
    early = tl.load(early_ptr + at)
    if WRITE_EARLY:
        tl.store(out_ptr + at, early)
    gdc_wait()
    if not START_EARLY:
        gdc_launch_dependents()
    tl.store(out_ptr + at, tl.load(x_ptr + at) + early)


def sequence(*launches: tuple[str, str, str, bool, bool] | tuple[str]) -> list[str]:
    """What is wrong with launches (out, x, early, START_EARLY, WRITE_EARLY) on tensors by their names, between which
    torch may add one to a tensor."""
    tensors = {name: torch.zeros(32) for name in "abcdefw"}
    with recorded(HOPPER, 0) as step:
        for launch in launches:
            if len(launch) == 1:
                tensors[launch[0]].add_(1)
            else:
                out, x, early, *how = launch
                _kernel[(1,)](tensors[out], tensors[x], tensors[early], *how, launch_pdl=True, num_warps=1)
    return step.hazards()


def alone(settled: tuple[str, ...]) -> list[float]:
    """One launch, without a sequence to judge what it reads early."""
    out, x, early = (torch.full((32,), value) for value in (0.0, 1.0, 2.0))
    with device(HOPPER, 0, settled=settled):
        _kernel[(1,)](out, x, early, False, False, launch_pdl=True, num_warps=1)
    return out.tolist()
