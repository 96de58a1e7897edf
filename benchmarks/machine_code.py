"""Compiles the kernels that an op launches for a GPU that is not there, and reads the machine code back.

``launches(device, call)`` runs ``call`` on meta tensors: no memory, no GPU, every kernel that a launcher starts is
compiled for ``device`` with the very arguments it would get. ``read(kernel)`` then says what the assembler made of it.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwenkern.kernels import tuning

# Multiprocessors and shared memory a program may use, by NVIDIA's CUDA C++ programming guide, table of technical
# specifications per compute capability, and the cards' data sheets.
DEVICES = {
    "sm_80": tuning.Device("NVIDIA A100-SXM4-80GB", "cuda", 80, 108, 163 * 1024),
    "sm_86": tuning.Device("NVIDIA GeForce RTX 3090", "cuda", 86, 82, 99 * 1024),
    "sm_89": tuning.Device("NVIDIA GeForce RTX 4090", "cuda", 89, 128, 99 * 1024),
    "sm_90": tuning.Device("NVIDIA H100 80GB HBM3", "cuda", 90, 132, 227 * 1024),
    "sm_100": tuning.Device("NVIDIA B200", "cuda", 100, 148, 227 * 1024),
    "sm_120": tuning.Device("NVIDIA GeForce RTX 5090", "cuda", 120, 170, 99 * 1024),
    "gfx942": tuning.Device("AMD Instinct MI300X", "hip", 0, 304, 64 * 1024),
}


@dataclass(frozen=True)
class Launch:
    """One kernel that an op would start."""

    name: str
    grid: tuple[int, ...]
    kernel: CompiledKernel
    pdl: bool


@dataclass
class Code:
    """What the assembler made of a kernel. Loads and stores are counted by width in bits, as they stand in the code."""

    registers: int
    stack: int  # bytes a thread
    spills: int  # loads and stores of local memory
    shared: int  # bytes a program
    warps: int
    loads: Counter[int] = field(
        default_factory=Counter
    )  # from global memory, to registers or straight to shared memory
    stores: Counter[int] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)  # tensor-core instructions by name
    waits: int = 0  # programmatic dependent launch: griddepcontrol.wait
    sass: str = ""


class _OfflineDriver:
    """Stands in for the driver of a card that is not there. Triton keeps its compiled kernels by device number."""

    def __init__(self, key: str) -> None:
        self.number = list(DEVICES).index(key)
        device = DEVICES[key]
        arch: Any = device.capability if device.backend == "cuda" else key
        self.target = GPUTarget(device.backend, arch, 32 if device.backend == "cuda" else 64)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def launches(key: str, call: Callable[[], Any]) -> list[Launch]:
    """Every kernel that ``call`` starts, compiled for ``DEVICES[key]``, in order."""
    found: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **keywords)
        found.append(Launch(self.__name__, tuple(grid), kernel, bool(keywords.get("launch_pdl"))))
        return kernel

    with tuning.offline(DEVICES[key]), _active(key), mock.patch.object(JITFunction, "run", record):
        call()
    return found


@contextlib.contextmanager
def _active(key: str) -> Iterator[None]:
    with mock.patch.object(driver, "_active", _OfflineDriver(key)):
        yield


# opcode, with its predicate before it and its modifiers behind: `@P0 LDG.E.128.CONSTANT R4, ...`
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)", re.M)
_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}


def read(kernel: CompiledKernel) -> Code:
    """Disassembles an NVIDIA kernel with the tools that Triton's package carries."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    code = Code(registers, stack, 0, kernel.metadata.shared, kernel.metadata.num_warps, sass=sass)
    for opcode, modifiers in _INSTRUCTION.findall(sass):
        width = next((_NARROW[word] for word in modifiers.split(".") if word in _NARROW), 32)
        if opcode in ("LDG", "LDGSTS"):
            code.loads[width] += 1
        elif opcode == "STG":
            code.stores[width] += 1
        elif opcode in ("LDL", "STL"):
            code.spills += 1
        elif "MMA" in opcode:
            code.matrix[opcode] += 1
        elif opcode == "ACQBULK":
            code.waits += 1
    return code


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
