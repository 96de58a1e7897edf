"""Compiles kernels for a device that need not be present. Ops on meta tensors compile and launch nothing.

with compiling(device):
    kernels.rms_norm(x, weight, eps)   # on meta tensors; then Triton's cache has the kernel
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import tuning


class OfflineDriver:
    """Stands in for the driver of a GPU. Triton keeps compiled kernels by device number."""

    def __init__(self, device: tuning.Device) -> None:
        self.number = f"offline {device.name}"
        arch: Any = device.capability if device.backend == "cuda" else "gfx942"
        self.target = GPUTarget(device.backend, arch, 32 if device.backend == "cuda" else 64)

    def get_current_device(self) -> str:
        return self.number

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def active(device: tuning.Device) -> Iterator[None]:
    """In this context Triton compiles for the device."""
    before, driver._active = driver._active, OfflineDriver(device)
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def compiling(device: tuning.Device, share: int = 0, shares: int = 1) -> Iterator[list[str]]:
    """In this context ops on meta tensors compile the kernels that they would launch, and keep them in Triton's cache.
    Several processes can divide the work: each compiles every ``shares``-th kernel, starting with number ``share``.
    Yields a list, to which the names of the kernels that were compiled or found in the cache are added."""
    run, seen, compiled = JITFunction.run, set(), list[str]()

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        _, specialization, options = self.device_caches[driver.active.get_current_device()][-1](*args, **constants)
        key = self.__name__, str(specialization), str(options)
        if key in seen:
            return
        seen.add(key)
        if (len(seen) - 1) % shares == share:
            run(self, *args, grid=grid, warmup=True, **constants)
            compiled.append(self.__name__)

    with tuning.offline(device), active(device):
        JITFunction.run = compile_only
        try:
            yield compiled
        finally:
            JITFunction.run = run
