"""Triton's launches on a device that is not there: compiled for it, and run here.

    with device(DEVICES["sm_90"], seed=1):
        out = kernels.linear(x, weight)  # of tensors on the CPU

Needs a process in which Triton compiles, that is, one without TRITON_INTERPRET."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from qwenkern.benchmarks.offline import machine_code
from qwenkern.kernels.triton import tuning

from .faults import Unknown
from .launch import Kernel, Launch
from .memory import GlobalMemory

Change = Callable[[str, str], str]  # from a kernel's name and PTX to the PTX that is run instead


@contextlib.contextmanager
def device(this: tuning.Device, seed: int, change: Change = lambda name, ptx: ptx) -> Iterator[None]:
    """While it lasts, kernels run as on this device: CPU tensors are its memory. From sm_90 on they are launched
    dependently, as in a captured graph."""
    compile_ = JITFunction.run
    kernels: dict[str, Kernel] = {}
    launches = 0

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        nonlocal launches
        with machine_code._active(this):
            compiled = compile_(self, *args, grid=grid, warmup=True, **keywords)
        if compiled.hash not in kernels:
            kernels[compiled.hash] = Kernel(change(self.__name__, compiled.asm["ptx"]))
        given = dict(zip(self.arg_names, args, strict=False)) | keywords
        values = [value for name, type_ in compiled.src.signature.items() for value in _parameters(given[name], type_)]
        launches += 1
        _launch(compiled, kernels[compiled.hash], grid, values, bool(keywords.get("launch_pdl")), seed + launches)
        return compiled

    with (
        tuning.offline(this),
        mock.patch.object(tuning, "INTERPRETER", this),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield


def _launch(
    compiled: CompiledKernel, kernel: Kernel, grid: Any, values: Sequence[Any], is_dependent: bool, seed: int
) -> None:
    storages = _Storages([value for value in values if isinstance(value, Tensor)])
    parameters = kernel.program.parameters
    bits = [storages.address(value) if isinstance(value, Tensor) else _bits(value) for value in values]
    spare = len(parameters) - len(bits)  # Triton's own scratch memory, of which these kernels have none
    if not 0 <= spare <= 2:
        raise Unknown(f"{len(bits)} arguments of {kernel.program.name}, which has {len(parameters)} parameters")
    Launch(
        kernel,
        (*grid, 1, 1)[:3],
        dict(zip(parameters, bits + [0] * spare, strict=True)),
        storages.memory,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        is_dependent,
    ).run(seed)
    storages.take_back()


def _parameters(value: Any, type_: Any) -> Iterator[Any]:
    """What a kernel has parameters for, of an argument and its type in Triton's signature: not for constants, and for
    each field of a tuple."""
    if isinstance(type_, tuple):
        for each in zip(value, type_, strict=True):
            yield from _parameters(*each)
    elif type_ != "constexpr":
        yield value


def _bits(value: float | int) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)


class _Storages:
    """The memory of some tensors, each of which may be part of a storage: only its elements may be touched."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._of: dict[int, tuple[int, Tensor]] = {}  # by address here: which buffer, and its bytes
        valid: list[Tensor] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            assert storage.data_ptr() % 16 == 0, "Triton was told so"
            if storage.data_ptr() not in self._of:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
                self._of[storage.data_ptr()] = len(valid), whole
                valid.append(torch.zeros(storage.nbytes(), dtype=torch.bool))
            size = tensor.element_size()
            strides = [stride * size for stride in tensor.stride()]
            mine = valid[self._of[storage.data_ptr()][0]]
            mine.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
        self.memory = GlobalMemory(
            [(whole.numpy(), mine.numpy()) for (_, whole), mine in zip(self._of.values(), valid, strict=True)]
        )

    def address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return self.memory.address(self._of[storage][0]) + int(tensor.data_ptr() - storage)

    def take_back(self) -> None:
        for buffer, whole in self._of.values():
            whole.copy_(torch.from_numpy(self.memory.contents(buffer)))
