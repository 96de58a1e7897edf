"""Triton's launches on a device that is not there: compiled for it, and run here.

    with device(DEVICES["sm_90"], seed=1):
        out = kernels.linear(x, weight)  # of tensors on the CPU

Needs a process in which Triton compiles, that is, one without TRITON_INTERPRET."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from qwenkern.benchmarks.offline import machine_code
from qwenkern.kernels.triton import tuning

from . import tensor_maps
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
        maps = iter(compiled.metadata.tensordesc_meta or ())
        values = [
            value for name, type_ in compiled.src.signature.items() for value in _parameters(given[name], type_, maps)
        ]
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
    parameters, grid = kernel.program.parameters, (*grid, 1, 1)[:3]
    scratch = torch.zeros(compiled.metadata.global_scratch_size * math.prod(grid), dtype=torch.uint8)
    storages = _Storages([*values, scratch])
    bits = [storages.bits(value) for value in values]
    spare = len(parameters) - len(bits)  # Triton's own memory: for maps that a kernel makes, and for its profiler
    if not 0 <= spare <= 2:
        raise Unknown(f"{len(bits)} arguments of {kernel.program.name}, which has {len(parameters)} parameters")
    Launch(
        kernel,
        grid,
        dict(zip(parameters, bits + [storages.bits(scratch), 0][:spare], strict=True)),
        storages.memory,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        is_dependent,
    ).run(seed)
    storages.take_back()


@dataclass
class _Map:
    """A tensor descriptor as the kernel takes it, and Triton's choices for it."""

    descriptor: TensorDescriptor
    choices: dict[str, Any]

    def encode(self, start: int) -> bytes:
        """The innermost dimension is the last of the descriptor's, and the first of a map's."""
        given, size = self.descriptor, self.descriptor.base.element_size()
        return tensor_maps.encode(
            start,
            given.shape[::-1],
            [stride * size for stride in given.strides[-2::-1]],
            self.choices["block_size"][::-1],
            self.choices["elem_type"],
            self.choices["swizzle"],
            int(given.padding == "nan"),
        )


def _parameters(value: Any, type_: Any, maps: Iterator[dict[str, Any]]) -> Iterator[Any]:
    """What a kernel has parameters for, of an argument and its type in Triton's signature: not for constants, and for
    each field of a tuple. ``maps``: Triton's choices for descriptors, none where it makes pointers of them."""
    if isinstance(type_, tuple):
        for each in zip(value, type_, strict=True):
            yield from _parameters(*each, maps)
    elif isinstance(value, TensorDescriptor):
        if choices := next(maps, None):
            yield _Map(value, choices)
        else:
            yield from (value.base, *value.shape, *value.strides, value.padding == "nan")
            if hasattr(value, "round_f32_to_tf32"):  # from Triton 3.7 on
                yield value.round_f32_to_tf32
        yield from (*value.shape, *value.strides)
    elif type_ != "constexpr":
        yield value


class _Storages:
    """The memory of some tensors, each of which may be part of a storage: only its elements may be touched. And that of
    tensor maps."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._of: dict[int, tuple[int, Tensor]] = {}  # by address here: which buffer, and its bytes
        valid: list[Tensor] = []
        maps = [value for value in values if isinstance(value, _Map)]
        for tensor in [value for value in values if isinstance(value, Tensor)] + [
            each.descriptor.base for each in maps
        ]:
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
        buffers = [(whole.numpy(), mine.numpy()) for (_, whole), mine in zip(self._of.values(), valid, strict=True)]
        self._map_of = {id(each): len(buffers) + at for at, each in enumerate(maps)}
        empty = np.zeros(tensor_maps.SIZE, np.uint8), np.ones(tensor_maps.SIZE, np.bool_)
        self.memory = GlobalMemory(buffers + [empty] * len(maps))
        for each in maps:
            data = each.encode(self._address(each.descriptor.base))
            self.memory.contents(self._map_of[id(each)])[:] = np.frombuffer(data, np.uint8)

    def bits(self, value: Any) -> int:
        """Of a parameter."""
        if isinstance(value, Tensor):
            return self._address(value)
        if isinstance(value, _Map):
            return self.memory.address(self._map_of[id(value)])
        return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)

    def _address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return self.memory.address(self._of[storage][0]) + int(tensor.data_ptr() - storage)

    def take_back(self) -> None:
        for buffer, whole in self._of.values():
            whole.copy_(torch.from_numpy(self.memory.contents(buffer)))
