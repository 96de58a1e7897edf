"""The tensors of a safetensors checkpoint, as described in its headers, and the tensors of a quantised matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from qwenkern.errors import CheckpointError
from qwenkern.quantization_config import MATRIX, ROW, Quantization

FLOATS = ("F16", "BF16", "F32")
Read = Callable[[str], Tensor]  # from a tensor's full name to its values


class Part(NamedTuple):
    """A tensor in a file."""

    file: Path
    dtype: str  # as in safetensors, such as "I32"
    shape: tuple[int, ...]
    start: int  # its first byte in the file


@dataclass(frozen=True)
class Stored:
    """A quantised matrix [rows, columns] of a checkpoint: the name of its module, and its tensors by the last part of
    their names."""

    module: str
    rows: int
    columns: int
    parts: Mapping[str, Part]
    quantization: Quantization

    @property
    def name(self) -> str:
        """The name that a dense matrix would have."""
        return f"{self.module}.weight"

    def groups(self) -> int:
        """The number of groups in a row. Raises CheckpointError if the groups do not divide the columns."""
        size = self.quantization.group_size
        if size in (ROW, MATRIX):
            return 1
        if self.columns % size:
            raise CheckpointError(
                f"{next(iter(self.parts.values())).file}: {self.module} has {self.columns} columns; the configuration "
                f"says {self.quantization}; expected groups that divide them"
            )
        return self.columns // size

    def words(self, values: int) -> int:
        """The number of 32-bit words of ``values`` codes. Raises CheckpointError if the last word would not be full."""
        bits = values * self.quantization.bits
        if bits % 32:
            raise CheckpointError(
                f"{next(iter(self.parts.values())).file}: {self.module} is [{self.rows}, {self.columns}]; the "
                f"configuration says {self.quantization}, whose words hold {32 // self.quantization.bits} codes; "
                "expected whole words"
            )
        return bits // 32

    def only(self, *parts: str) -> None:
        """Raises CheckpointError if the matrix has tensors other than these and a bias."""
        if other := sorted(self.parts.keys() - {*parts, "bias"}):
            raise CheckpointError(
                f"{self.parts[other[0]].file}: {self.module} has {', '.join(sorted(self.parts))}; expected "
                f"{', '.join(parts)} and no {other[0]}, because the configuration says {self.quantization}"
            )

    def require(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> Part:
        """Returns a tensor's description. Raises CheckpointError unless the matrix has this tensor, with one of these
        dtypes and shapes."""
        if part not in self.parts:
            other = next(iter(self.parts.values()))
            raise CheckpointError(
                f"{other.file}: {self.module} has {', '.join(sorted(self.parts))} and no {part}; expected it, because "
                f"the configuration says {self.quantization}"
            )
        found = self.parts[part]
        where = f"{found.file}: tensor {self.module}.{part}"
        for kind, value, allowed in (("dtype", found.dtype, dtypes), ("shape", found.shape, shapes)):
            if value not in allowed:
                raise CheckpointError(
                    f"{where} has {kind} {value}; expected {' or '.join(map(str, allowed))} for a matrix "
                    f"[{self.rows}, {self.columns}], because the configuration says {self.quantization}"
                )
        return found

    def wrong(self, part: str, found: str, expected: str) -> CheckpointError:
        """The error for wrong values in one of the tensors."""
        return CheckpointError(f"{self.parts[part].file}: tensor {self.module}.{part} {found}; expected {expected}")
