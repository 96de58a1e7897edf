"""Converts the arguments of a Triton launch to the parameters of its kernel, and makes the memory they point into."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tensor_maps
from .faults import Unknown
from .memory import GlobalMemory
from .values import Array


@dataclass
class Map:
    """A tensor descriptor that the kernel takes, and Triton's choices for it."""

    descriptor: TensorDescriptor
    choices: dict[str, Any]

    def encode(self, start: int) -> bytes:
        """The bytes of the tensor map. The innermost dimension is the last one of a descriptor, the first of a map."""
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


@dataclass
class Parameter:
    name: str  # the argument that the parameter is, or is a part of
    value: Any


def parameters(compiled: CompiledKernel, given: Mapping[str, Any]) -> list[Parameter]:
    """The parameters of a kernel, from the arguments of a launch by name."""
    maps = iter(compiled.metadata.tensordesc_meta or ())
    return [
        Parameter(name, value)
        for name, type_ in compiled.src.signature.items()
        for value in _values(given[name], type_, maps)
    ]


def _values(value: Any, type_: Any, maps: Iterator[dict[str, Any]]) -> Iterator[Any]:
    """The parameters of one argument, by its type in Triton's signature: none for a constant, one for each field of a
    tuple. ``maps`` has Triton's choices for descriptors; it is empty if Triton makes pointers of them."""
    if isinstance(type_, tuple):
        for each in zip(value, type_, strict=True):
            yield from _values(*each, maps)
    elif isinstance(value, TensorDescriptor):
        if choices := next(maps, None):
            yield Map(value, choices)
        else:
            yield from (value.base, *value.shape, *value.strides, value.padding == "nan")
            if hasattr(value, "round_f32_to_tf32"):  # from Triton 3.7 on
                yield value.round_f32_to_tf32
        yield from (*value.shape, *value.strides)
    elif type_ != "constexpr":
        yield value


class Storages:
    """The memory that parameters point into, of tensor maps, and of a kernel's own ``scratch``. A tensor may be part of
    a storage: a kernel may touch only the elements of tensors.

    Elements of meta tensors are zeros, or the value that ``fill`` has for the argument's name."""

    def __init__(self, given: Sequence[Parameter], scratch: int, fill: Mapping[str, float] | None = None) -> None:
        self.names: list[str] = []  # for each buffer, the first argument that points into it
        self._of: dict[Any, int] = {}  # buffer by storage
        self._tensors: list[Tensor] = []  # all bytes of each storage
        buffers: list[tuple[Array | int, Array | None]] = []
        for each in given:
            tensor = each.value.descriptor.base if isinstance(each.value, Map) else each.value
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if _key(tensor) not in self._of:
                    self._of[_key(tensor)] = len(buffers)
                    self.names.append(each.name)
                    self._tensors.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
                    buffers.append(_buffer(tensor, (fill or {}).get(each.name)))
                _touch(tensor, buffers[self._of[_key(tensor)]][1])
        maps = [each.value for each in given if isinstance(each.value, Map)]
        self._maps = {id(each): len(buffers) + at for at, each in enumerate(maps)}
        self._scratch = len(buffers) + len(maps)
        self.memory = GlobalMemory([*buffers, *[(tensor_maps.SIZE, None)] * len(maps), (scratch, None)])
        for map_ in maps:
            data = map_.encode(self._address(map_.descriptor.base))
            self.memory.contents(self._maps[id(map_)])[:] = np.frombuffer(data, np.uint8)

    def bits(self, given: Sequence[Parameter], names: Sequence[str]) -> dict[str, int]:
        """The bits of the kernel's parameters, by name. After the given parameters Triton has some of its own: for
        tensor maps that the kernel makes, and for its profiler."""
        bits = [self._bits(each.value) for each in given]
        spare = len(names) - len(bits)
        if not 0 <= spare <= 2:
            raise Unknown(f"{len(bits)} arguments of a kernel with {len(names)} parameters")
        return dict(zip(names, bits + [self.memory.address(self._scratch), 0][:spare], strict=True))

    def start(self, buffer: int) -> int:
        """The address of the storage on this machine."""
        return self._tensors[buffer].data_ptr()

    def take_back(self) -> None:
        """Copies the memory that the kernel has written back to the tensors."""
        for buffer, whole in enumerate(self._tensors):
            whole.copy_(torch.from_numpy(self.memory.contents(buffer)))

    def _bits(self, value: Any) -> int:
        if isinstance(value, Tensor):
            return self._address(value)
        if isinstance(value, Map):
            return self.memory.address(self._maps[id(value)])
        return struct.unpack("<I", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)

    def _address(self, tensor: Tensor) -> int:
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return self.memory.address(self._of[_key(tensor)]) + offset


def _key(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()
    return storage._cdata if tensor.is_meta else storage.data_ptr()


def _buffer(tensor: Tensor, fill: float | None) -> tuple[Array | int, Array | None]:
    """A storage's bytes, and which of them may be touched: none so far; of a meta tensor, all."""
    size = tensor.untyped_storage().nbytes()
    if tensor.is_meta:
        if fill is None:
            return size, None
        return torch.full((size // tensor.element_size(),), fill, dtype=tensor.dtype).view(torch.uint8).numpy(), None
    storage = tensor.untyped_storage()
    assert storage.data_ptr() % 16 == 0, "Triton was told so"
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy(), np.zeros(size, np.bool_)


def _touch(tensor: Tensor, valid: Array | None) -> None:
    """Marks the elements of a tensor as memory that may be touched."""
    if valid is None:
        return
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    mine = torch.from_numpy(valid)
    mine.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
