"""A strict reader of the GGUF container, versions 2 and 3, little endian, over a memory map.

Format: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    magic "GGUF" | u32 version | u64 tensors | u64 key-values
    key-values:  string key | u32 type | value         string: u64 length | UTF-8
    tensors:     string name | u32 n | n x u64 dims, fastest first | u32 type | u64 offset
    padding to general.alignment | data, offsets counted from here

The gguf library's GGUFReader is not used, for two reasons. First, it takes 12.9 s for a file with Qwen2.5's vocabulary,
because it makes several Python objects for each of 303,323 strings; this reader takes 0.13 s. Second, it trusts the
file. This reader compares every length with the remaining bytes before it reads or allocates anything."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from qwenkern.errors import CheckpointError
from qwenkern.reading import refuse_pointer

_FORMATS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_MIN_KEY_VALUE = 8 + 4 + 1  # bytes of the shortest key-value: an empty key, a type, one byte
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8
_MAX_DIMS = 4
# Limits far above any model: Qwen2.5's header has 6 MB, with arrays of 151,936 elements, and at most 963 tensors.
_MAX_HEADER, _MAX_ELEMENTS, _MAX_ENTRIES, _MAX_NAME = 1 << 26, 1 << 21, 1 << 16, 64
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """shape: slowest dimension first, as in torch. offset: of the first byte, from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Container:
    """metadata: key -> int, float, bool, str or a list of one of these types. tensors: by name, in the file's order."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data: mmap.mmap

    def blocks(self, tensor: TensorInfo) -> np.ndarray:
        """The stored bytes of a tensor: a read-only uint8 view of the mapped file."""
        return np.frombuffer(self.data, np.uint8, tensor.num_bytes, tensor.offset)


def read_container(path: Path) -> Container:
    """Maps the file, and reads and checks its header. Raises CheckpointError, which names the file and the position in
    it."""
    try:
        refuse_pointer(path)
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    header = _Header(data, str(path))
    num_tensors = header.start()
    return Container(header.metadata, header.read_tensors(num_tensors), data)


class _Header:
    """Reads the header from its beginning to its end; ``at`` is the position."""

    def __init__(self, data: mmap.mmap, source: str) -> None:
        self.data, self.size, self.at, self.source = data, len(data), 0, source
        self.end = min(self.size, _MAX_HEADER)  # the header ends before this
        self.metadata: dict[str, Any] = {}
        self.alignment = _DEFAULT_ALIGNMENT

    def start(self) -> int:
        """Reads up to the tensors, and returns their number."""
        self.need(24, "the header")
        if self.data[:4] != b"GGUF":
            self.fail(f"begins with {self.data[:4]!r}; expected b'GGUF'")
        version = struct.unpack_from("<I", self.data, 4)[0]
        if version not in (2, 3):
            big_endian = " (a big-endian file)" if version and version & 0xFFFF == 0 else ""
            self.fail(f"has GGUF version {version}{big_endian}; expected 2 or 3, little endian")
        num_tensors, num_key_values = struct.unpack_from("<QQ", self.data, 8)
        self.at = 24
        self.need(num_key_values * _MIN_KEY_VALUE + num_tensors * _MIN_TENSOR, "its key-values and tensors")
        if max(num_tensors, num_key_values) > _MAX_ENTRIES:
            self.fail(f"has {num_tensors} tensors and {num_key_values} key-values; expected at most {_MAX_ENTRIES}")
        for _ in range(num_key_values):
            self.read_key_value()
        return num_tensors

    def read_key_value(self) -> None:
        key = self.string("a key")
        if key in self.metadata:
            self.fail(f"key {key!r} occurs twice")
        kind = self.value_type(key)
        if key == "general.alignment" and kind != GGUFValueType.UINT32:
            self.fail(f"general.alignment has type {kind.name}; expected UINT32")
        value: Any = self.array(key) if kind == GGUFValueType.ARRAY else self.values(kind, 1, key)[0]
        self.metadata[key] = value
        if key == "general.alignment":
            if value == 0 or value & (value - 1):
                self.fail(f"general.alignment is {value}; expected a power of two")
            self.alignment = value

    def array(self, key: str) -> list[Any]:
        kind = self.value_type(key)
        if kind == GGUFValueType.ARRAY:
            self.fail(f"key {key!r} holds an array of arrays; expected an array of numbers, bools or strings")
        count = self.number("<Q", key)
        if count > _MAX_ELEMENTS:
            self.fail(f"key {key!r} holds an array of {count} elements; expected at most {_MAX_ELEMENTS}")
        return self.values(kind, count, key)

    def values(self, kind: GGUFValueType, count: int, key: str) -> list[Any]:
        what = f"the value of {key!r}"
        if kind == GGUFValueType.STRING:
            return self.strings(count, what)
        item = np.dtype(_FORMATS[kind])
        self.need(count * item.itemsize, what)
        numbers = np.frombuffer(self.data, item, count, self.at).tolist()
        self.at += count * item.itemsize
        if kind != GGUFValueType.BOOL:
            return numbers
        if count and max(numbers) > 1:
            self.fail(f"{what} has a bool of {max(numbers)}; expected 0 or 1")
        return list(map(bool, numbers))

    def strings(self, count: int, what: str) -> list[str]:
        self.need(8 * count, what)
        # This loop runs 303,323 times for a vocabulary, so it uses local names and one check of the bounds per string.
        data, at, size, length_at = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + length_at(data, at)[0]
                if at > size:
                    self.at = begin - 8
                    self.fail(
                        f"{what}: a string of {at - begin} bytes does not fit into the remaining {size - begin}"
                        f"{self.of_a_header()}"
                    )
                found.append(str(data[begin:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.source}: {what}: the string at byte {begin} is not UTF-8: {error}") from error
        except struct.error as error:
            raise CheckpointError(
                f"{self.source}: ends at byte {size}, inside {what}; the file is truncated"
            ) from error
        self.at = at
        return found

    def read_tensors(self, count: int) -> dict[str, TensorInfo]:
        described = [self.read_tensor_info() for _ in range(count)]
        origin = -(-self.at // self.alignment) * self.alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in described:
            if name in tensors:
                self.fail(f"tensor {name} occurs twice")
            block_size, type_size = GGML_QUANT_SIZES[kind]
            if shape[-1] % block_size:
                self.fail(f"tensor {name} has rows of {shape[-1]}; {kind.name} needs a multiple of {block_size}")
            num_bytes = math.prod(shape) // block_size * type_size
            if offset % self.alignment:
                self.fail(f"tensor {name} begins at offset {offset}; expected a multiple of {self.alignment}")
            if origin + offset + num_bytes > self.size:
                self.fail(
                    f"tensor {name} of {num_bytes} bytes at {origin + offset} does not fit in the file of {self.size}; "
                    "the file is truncated"
                )
            tensors[name] = TensorInfo(name, shape, kind, origin + offset, num_bytes)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in pairwise(ordered):
            end = before.offset + before.num_bytes
            if end > after.offset:
                self.fail(f"tensors {before.name} and {after.name} overlap at byte {after.offset}")
            if -(-end // self.alignment) * self.alignment != after.offset:  # llama.cpp has this rule, too
                self.fail(
                    f"tensor {before.name} {list(before.shape)} of {before.kind.name} takes {before.num_bytes} bytes "
                    f"from {before.offset} on; expected the next, {after.name}, at the next multiple of "
                    f"{self.alignment}, and it begins at {after.offset}"
                )
        return tensors

    def read_tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self.string("a tensor's name")
        if len(name) > _MAX_NAME:
            self.fail(f"a tensor's name has {len(name)} characters; expected at most {_MAX_NAME}")
        n_dims = self.number("<I", name)
        if not 1 <= n_dims <= _MAX_DIMS:
            self.fail(f"tensor {name} has {n_dims} dimensions; expected 1 to {_MAX_DIMS}")
        self.need(8 * n_dims, name)
        shape = tuple(reversed([self.number("<Q", name) for _ in range(n_dims)]))
        if min(shape) < 1 or max(shape) >= 1 << 63:
            self.fail(f"tensor {name} has shape {shape}; expected positive 63-bit dimensions")
        kind = self.number("<I", name)
        if kind not in GGMLQuantizationType._value2member_map_:
            self.fail(f"tensor {name} has unknown type {kind}")
        return name, shape, GGMLQuantizationType(kind), self.number("<Q", name)

    def value_type(self, key: str) -> GGUFValueType:
        kind = self.number("<I", key)
        if kind not in GGUFValueType._value2member_map_:
            self.fail(f"key {key!r} has unknown value type {kind}")
        return GGUFValueType(kind)

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def number(self, code: str, what: str) -> int:
        self.need(struct.calcsize(code), what)
        value = struct.unpack_from(code, self.data, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            self.fail(f"{what} needs {count} bytes, {self.size - self.at} are left; the file is truncated or damaged")
        if count > self.end - self.at:
            self.fail(f"{what} needs {count} bytes, {self.end - self.at} are left{self.of_a_header()}")

    def of_a_header(self) -> str:
        return f" of the {_MAX_HEADER} that a header may have" if self.end < self.size else ""

    def fail(self, message: str) -> NoReturn:
        shortened = message if len(message) <= 500 else message[:500] + "..."
        raise CheckpointError(f"{self.source}: {shortened} (header read up to byte {self.at})")
