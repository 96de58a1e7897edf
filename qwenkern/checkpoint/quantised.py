"""Finds the quantised matrices among the tensors of a safetensors checkpoint, and loads them.

Each kind of checkpoint is a module with PARTS, the names of a matrix's tensors, and two functions: ``plan`` checks the
headers, ``load`` makes the matrix."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from qwenkern.config import Config
from qwenkern.errors import CheckpointError
from qwenkern.kernels import Weight

from . import awq, compressed_tensors, gptq, own
from .adjacent import Adjacent
from .packing import EMBEDDING, HEAD, slots
from .parts import Part, Read, Stored

logger = logging.getLogger(__name__)

_METHODS: dict[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "qwenkern": own,
}
# Ends of names that no dense checkpoint has.
_FOREIGN = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "scales": "GPTQ or AWQ",
    "g_idx": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale": "compressed-tensors or fp8",
    "weight_scale_inv": "fp8 with blocks",
    "weight_zero_point": "compressed-tensors",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "q_weight": "EXL2",
    "codebooks": "AQLM",
    "codes": "qwenkern",
}


@dataclass(frozen=True)
class Quantised:
    """The quantised matrices of a checkpoint.

    matrices: by the name that a dense one would have. plans: the weights that matrices become, on the meta device,
    except matrices that become dense. rest: all other tensors that are needed."""

    matrices: Mapping[str, Stored] = field(default_factory=dict)
    plans: Mapping[str, Weight] = field(default_factory=dict)
    rest: Mapping[str, Part] = field(default_factory=dict)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors and matrices that the checkpoint yields."""
        of_matrices = {name: (each.rows, each.columns) for name, each in self.matrices.items()}
        return {name: part.shape for name, part in self.rest.items()} | of_matrices

    def load(self, name: str, read: Read, dtype: torch.dtype, allocated: Adjacent | None) -> Weight | Tensor:
        """A matrix in qwenkern's layout, or a dense one if ``allocated`` is None. ``read`` takes the name of a tensor.
        Raises CheckpointError."""
        stored = self.matrices[name]
        if "bias" in stored.parts and read(f"{stored.module}.bias").any():
            raise stored.wrong("bias", "has values other than 0", "no bias in this layer of a Qwen2.5 model")
        its = _of_module(stored, read)
        if stored.quantization.method == "qwenkern":
            weight = own.load(stored, its, dtype)
            return weight if allocated else weight.dequantise()
        to = allocated(name) if allocated and name in self.plans else None
        found: Weight | Tensor = _METHODS[stored.quantization.method].load(stored, its, dtype, to)
        return found

    def warn(self, path: Path, dtype: torch.dtype, is_asked: bool) -> None:
        """Logs which parts of the configuration are ignored. Warns of the memory of matrices that become dense, unless
        the user has requested dense ones."""
        for note in {note for each in self.matrices.values() for note in each.quantization.notes}:
            logger.info("%s", note)
        dense = [each for name, each in self.matrices.items() if name not in self.plans]
        if dense and not is_asked:
            stored = sum(_num_bytes(part) for each in dense for part in each.parts.values())
            size = sum(each.rows * each.columns for each in dense) * dtype.itemsize
            logger.warning(
                "%s: %d of %d quantised matrices (such as %s) are dequantised to %s, because their groups or sizes "
                "have no quantised format here: they take %.0f MB instead of about %.0f, and longer to read",
                path, len(dense), len(self.matrices), dense[0].module, dtype, size / 1e6, stored / 1e6,
            )  # fmt: skip


def find(parts: Mapping[str, Part], config: Config, read: Read) -> Quantised:
    """The quantised matrices among the tensors of a checkpoint, after all checks of their headers.

    Raises CheckpointError if the tensors do not match the configuration's quantisation."""
    what = config.quantization
    modules = dict(_modules(parts, config))
    used = {f"{module}.{part}" for module, parts_of in modules.items() for part in parts_of}
    rest = {name: part for name, part in parts.items() if name not in used}
    for name, part in rest.items():
        if kind := _FOREIGN.get(name.rpartition(".")[2]):
            raise CheckpointError(
                f"{part.file}: tensor {name[:200]} is quantised by {kind}; the configuration says "
                f"{what or 'nothing of quantised weights (no quantization_config)'}; expected one of the two for all"
            )
    if what is None:
        return Quantised(rest=rest)
    if not modules:
        raise CheckpointError(f"{config.source}: says {what}; expected quantised tensors, found only dense ones")
    if missing := [module for module in what.formats if module not in modules]:
        raise CheckpointError(
            f"{config.source}: gives {missing[0]} the format {what.formats[missing[0]]!r}; expected its tensors in the "
            "weight files, which lack them"
        )
    rest = {name: part for name, part in rest.items() if name.rpartition(".")[2] not in compressed_tensors.IGNORED}
    matrices = {f"{module}.weight": _stored(module, its, config) for module, its in modules.items()}
    plans = {}
    for name, stored in matrices.items():
        if plan := _METHODS[what.method].plan(stored, _of_module(stored, read)):
            plans[name] = plan
    return Quantised(matrices, plans, rest)


def _modules(parts: Mapping[str, Part], config: Config) -> Iterator[tuple[str, dict[str, Part]]]:
    """Yields each module that has a quantised matrix, and the tensors of the matrix."""
    what = config.quantization
    if what is None:
        return
    names = own.PARTS if what.method == "qwenkern" else _METHODS[what.method].PARTS
    found: dict[str, dict[str, Part]] = {}
    for name, part in parts.items():
        module, _, last = name.rpartition(".")
        codes = what.method == "compressed-tensors" and last == "weight" and part.dtype in compressed_tensors.CODES
        if last in names or codes:
            found.setdefault(module, {})[last] = part
    table = slots(config) if found else {}
    for module, its in found.items():
        if (dense := f"{module}.weight") in parts:
            its["weight"] = parts[dense]
        if (bias := f"{module}.bias") in parts and bias not in table:  # AutoGPTQ gives all layers one, of zeros
            its["bias"] = parts[bias]
        yield module, its


def _stored(module: str, parts: dict[str, Part], config: Config) -> Stored:
    """The matrix of a module. Raises CheckpointError for an unknown module, or if the configuration says that the
    module is not quantised."""
    what, table = config.quantization, slots(config)
    assert what is not None
    file = next(iter(parts.values())).file
    name = f"{module}.weight"
    slot = table.get(EMBEDDING if name == HEAD and HEAD not in table else name)
    if slot is None or len(slot.shape) != 2:
        raise CheckpointError(f"{file}: unknown module {module[:200]}; expected those of a Qwen2.5 model")
    if what.ignores(module):
        raise CheckpointError(f"{file}: {module} is quantised; expected a dense one, because {config.source} says so")
    return Stored(module, *slot.shape, parts, what)


def _of_module(stored: Stored, read: Read) -> Read:
    return lambda part: read(f"{stored.module}.{part}")


def _num_bytes(part: Part) -> int:
    return math.prod(part.shape) * {"I32": 4, "F32": 4, "I64": 8, "I8": 1, "F8_E4M3": 1, "U8": 1}.get(part.dtype, 2)
