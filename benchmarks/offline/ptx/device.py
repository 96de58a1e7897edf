"""Runs Triton's launches as on a device that is not present: compiled for the device, and run by this runner.

    with device(DEVICES["sm_90"], seed=1):
        out = kernels.linear(x, weight)  # of tensors on the CPU

The process must run without TRITON_INTERPRET, so that Triton compiles."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import _disable_current_modes
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.offline import active

from .arguments import Storages, parameters
from .launch import Kernel, Launch

Change = Callable[[str, str], str]  # takes a kernel's name and PTX, and returns the PTX that is run
Watch = Callable[[str, Launch, Storages], AbstractContextManager[None]]  # entered for each launch, by the kernel's name


@contextlib.contextmanager
def device(
    this: tuning.Device,
    seed: int,
    change: Change = lambda name, ptx: ptx,
    settled: Collection[str] = (),
    watch: Watch = lambda name, launch, storages: contextlib.nullcontext(),
) -> Iterator[None]:
    """In this context kernels run as on this device: CPU tensors are its memory. From sm_90 on they are launched with
    dependent launch, as in a captured graph. Before the wait they may read only the arguments named in ``settled``,
    which no kernel that may still run writes (steps.py checks this for a sequence of launches)."""
    compile_ = JITFunction.run
    kernels: dict[str, Kernel] = {}
    launches = 0

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        nonlocal launches
        with active(this):
            compiled = compile_(self, *args, grid=grid, warmup=True, **keywords)
        if compiled.hash not in kernels:
            kernels[compiled.hash] = Kernel(change(self.__name__, compiled.asm["ptx"]))
        kernel, places = kernels[compiled.hash], (*grid, 1, 1)[:3]
        given = parameters(compiled, dict(zip(self.arg_names, args, strict=False)) | keywords)
        storages = Storages(given, compiled.metadata.global_scratch_size * math.prod(places))
        storages.memory.settle([buffer for buffer, name in enumerate(storages.names) if name in settled])
        launch = Launch(
            kernel,
            places,
            storages.bits(given, list(kernel.program.parameters)),
            storages.memory,
            compiled.metadata.shared,
            compiled.metadata.num_warps,
            bool(keywords.get("launch_pdl")),
        )
        launches += 1
        with watch(self.__name__, launch, storages):
            launch.run(seed + launches)
        storages.take_back()
        return compiled

    def undisturbed(self: JITFunction, *args: Any, **keywords: Any) -> CompiledKernel:
        with _disable_current_modes():  # the caller's torch modes must not see the operations here
            return run(self, *args, **keywords)

    with (
        tuning.offline(this),
        mock.patch.object(tuning, "INTERPRETER", this),
        mock.patch.object(JITFunction, "run", undisturbed),
    ):
        yield
