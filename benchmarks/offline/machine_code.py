"""Compiles the kernels that an op launches, without a GPU, and reads the machine code.

``launches(device, call)`` runs ``call`` on meta tensors. Every kernel that a launcher starts is compiled for ``device``
with the arguments of the launch. ``read(kernel)`` returns facts of its machine code.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from qwenkern.kernels.triton import tuning
from qwenkern.kernels.triton.offline import active
from qwenkern.kernels.weights.fp8_products import Fp8Numbers
from qwenkern.kernels.weights.group_products import GroupNumbers

# The number of SMs and the shared memory of a CTA: from the cards' data sheets, and from the CUDA C++ programming
# guide's table of technical specifications by compute capability.
DEVICES = {
    "sm_80": tuning.Device("NVIDIA A100-SXM4-80GB", "cuda", 80, 108, 163 * 1024),
    "sm_86": tuning.Device("NVIDIA GeForce RTX 3090", "cuda", 86, 82, 99 * 1024),
    "sm_89": tuning.Device("NVIDIA GeForce RTX 4090", "cuda", 89, 128, 99 * 1024),
    "sm_90": tuning.Device("NVIDIA H100 80GB HBM3", "cuda", 90, 132, 227 * 1024),
    "sm_100": tuning.Device("NVIDIA B200", "cuda", 100, 148, 227 * 1024),
    "sm_120": tuning.Device("NVIDIA GeForce RTX 5090", "cuda", 120, 170, 99 * 1024),
    "gfx942": tuning.Device("AMD Instinct MI300X", "hip", 0, 304, 64 * 1024),
}
# The most warps and CTAs of an SM, and its shared memory in KiB, from the same table.
RESIDENT = {
    "sm_80": (64, 32, 164),
    "sm_86": (48, 16, 100),
    "sm_89": (48, 24, 100),
    "sm_90": (64, 32, 228),
    "sm_100": (64, 32, 228),
    "sm_120": (48, 24, 100),
}


REGISTERS = 65536  # registers of an SM


@dataclass(frozen=True)
class Tile:
    """The work of a CTA of a few-token linear in one iteration of its loop."""

    form: GroupNumbers | Fp8Numbers | None  # the format of the weights that it unpacks
    rows: int
    depth: int  # values of K
    tokens: int
    streams_x: bool  # x is read block by block
    has_norm: bool
    loops: bool = True  # False: the CTA has one tile, loaded before the wait, and no loop


@dataclass(frozen=True)
class Launch:
    """One kernel that an op would start."""

    name: str
    grid: tuple[int, ...]
    kernel: CompiledKernel
    pdl: bool
    tile: Tile | None = None  # only of a few-token linear


@dataclass(frozen=True)
class Access:
    """The loads or stores of global memory of one line of a kernel."""

    kind: str  # "load" or "store"
    name: str  # the name of the loaded value in the kernel
    line: str  # "file.py:12"
    tile: int  # bytes that a CTA moves at once at this line
    width: int  # bits of the narrowest instruction
    element: int = 0  # bits of a value


@dataclass
class Code:
    """Facts of a kernel's machine code."""

    registers: int
    stack: int  # bytes per thread
    spills: int  # loads and stores of local memory
    shared: int  # bytes per CTA
    warps: int
    accesses: list[Access] = field(default_factory=list)
    matrix: dict[str, int] = field(default_factory=dict)  # tensor-core instructions by name
    waits: int = 0  # instructions griddepcontrol.wait, for programmatic dependent launch
    releases: int = 0  # instructions griddepcontrol.launch_dependents
    clashes: int = 0  # kinds of tiles in shared memory whose rows lie in the same banks
    turn: int = 0  # instructions of the largest loop that has matrix products; of the kernel if there is no such loop
    unpacking: int = 0  # those of ``turn`` that take codes out of words: masks, shifts and permutations of bytes

    @property
    def held(self) -> int:
        """The registers that a CTA occupies. A warp gets registers in units of 256."""
        return self.warps * -(-self.registers * 32 // 256) * 256


def launches(key: str, call: Callable[[], Any]) -> list[Launch]:
    """Every kernel that ``call`` starts, compiled for ``DEVICES[key]``, in order."""
    return launches_on(DEVICES[key], call)


def launches_on(device: tuning.Device, call: Callable[[], Any]) -> list[Launch]:
    """The same for any device."""
    found: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **keywords)
        given = dict(zip(self.arg_names, args, strict=False)) | keywords
        found.append(Launch(self.__name__, tuple(grid), kernel, bool(keywords.get("launch_pdl")), _tile(given)))
        return kernel

    with tuning.offline(device), active(device), mock.patch.object(JITFunction, "run", record):
        call()
    return found


def _tile(given: dict[str, Any]) -> Tile | None:
    if not {"FORM", "BLOCK_N", "BLOCK_K"} <= given.keys():
        return None
    form = given["FORM"] if isinstance(given["FORM"], (GroupNumbers, Fp8Numbers)) else None
    rows, depth, tokens = given["BLOCK_N"], given["BLOCK_K"], given["BLOCK_T"]
    streams = not given["RESIDENT"]
    loops = streams or given["LOOPS"] or not given["AHEAD"]
    return Tile(form, rows, depth, tokens, streams, given["norm_weight_ptr"] is not None, loops)


def occupancy(key: str, code: Code) -> int:
    """The number of CTAs that an SM of ``DEVICES[key]`` holds at a time. Each CTA takes 1 KiB of shared memory more
    than it requests."""
    warps, programs, shared = RESIDENT[key]
    return min(programs, warps // code.warps, REGISTERS // code.held, shared * 1024 // (code.shared + 1024))


# opcode, with its predicate before it and its modifiers behind: `@P0 LDG.E.128.CONSTANT R4, ...`
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(.*)", re.M)
_UNPACKING = ("LOP3", "SHF", "PRMT")


def read(kernel: CompiledKernel) -> Code:
    """The facts of a compiled kernel. For NVIDIA it uses the tools in Triton's package."""
    if "cubin" not in kernel.asm:
        return _read_amd(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        sass = _cuobjdump("--dump-sass", file.name)
    opcodes = Counter(opcode for _, opcode, _ in _INSTRUCTION.findall(sass))
    turn = loop(sass)
    registers, stack = (int(_search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return Code(
        registers=registers,
        stack=stack,
        spills=opcodes["LDL"] + opcodes["STL"],
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        accesses=accesses(kernel.asm["ttgir"], kernel.asm["ptx"]),
        matrix={name: count for name, count in opcodes.items() if name.endswith("MMA")},
        waits=opcodes["ACQBULK"],
        releases=opcodes["PREEXIT"],
        clashes=len(_CLASH.findall(kernel.asm["ttgir"])),
        turn=len(turn),
        unpacking=sum(opcode in _UNPACKING for opcode in turn),
    )


def loop(sass: str) -> list[str]:
    """The opcodes of the largest loop that has matrix products; of the whole kernel if there is no such loop."""
    instructions = [(int(at, 16), opcode, rest) for at, opcode, rest in _INSTRUCTION.findall(sass)]
    found: list[str] = []
    for at, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        if target and int(target[1], 16) < at:
            body = [each for place, each, _ in instructions if int(target[1], 16) <= place <= at]
            if any(each.endswith("MMA") for each in body):
                found = max(found, body, key=len)
    return found or [opcode for _, opcode, _ in instructions]


def _search(pattern: str, text: str) -> re.Match[str]:
    if found := re.search(pattern, text):
        return found
    raise ValueError(f"no {pattern!r} in {text[:200]!r}")


def _read_amd(kernel: CompiledKernel) -> Code:
    text = kernel.asm["amdgcn"]
    registers, spills, stack = (
        int(_search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    matrix = dict(Counter(re.findall(r"\b(v_mfma_\w+)", text)))
    return Code(registers, stack, spills, kernel.metadata.shared, kernel.metadata.num_warps, matrix=matrix)


# `%weight_85 = ttg.async_copy_global_to_local ... : tensor<16x512x!tt.ptr<bf16>, ... loc(#loc228)`
_TILE = re.compile(
    r"^\s*(?:%(\w+) = )?(?:tt\.load|ttg\.async_copy_global_to_local|(tt\.store))\b.*?"
    r": tensor<([\dx]+)x!tt\.ptr<\D+(\d+)>.*loc\((#loc\d*)\)$",
    re.M,
)
# A batch of tiles stored row by row, with the same row of all tiles together, but swizzled by the tile. Triton chooses
# this layout if each thread loads from all tiles, and never from two rows of one tile.
_CLASH = re.compile(r"ttg\.swizzled_shared<\{[^}]*maxPhase = [248], order = \[2, 0, 1\]")
_LOCATION = re.compile(r"^(#loc\d*) = loc\((.*)\)$", re.M)
_FILE = re.compile(r"([^/\"]+\.py)\":(\d+)")
# `.loc 3 149 25 // few_tokens.py:149:25 @[ ... ]`, `ld.global.v4.b32`, `cp.async.cg.shared.global [ ], [ ], 0x10`
_PTX = re.compile(
    r"\.loc\s.*//\s*([^\s:]+\.py:\d+)"
    r"|\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)\s"
    r"|\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, (0x[0-9a-f]+)"
)


def accesses(ttgir: str, ptx: str) -> list[Access]:
    """The tiles that a kernel moves, by line, without scalars. The sizes come from TTGIR, the last representation of
    Triton in which a load is one operation. The instructions come from PTX."""
    locations = dict(_LOCATION.findall(ttgir))
    tiles: dict[tuple[str, str], tuple[str, int, int]] = {}
    for name, store, shape, bits, location in _TILE.findall(ttgir):
        key = ("store" if store else "load", _line(location, locations))
        size = math.prod(int(side) for side in shape.split("x")) * int(bits) // 8
        tiles[key] = (re.sub(r"_\d+$", "", name), max(size, tiles.get(key, ("", 0, 0))[1]), int(bits))
    widths: dict[tuple[str, str], int] = {}
    line = ""
    for at, kind, vector, bits, copied in _PTX.findall(ptx):
        if at:
            line = at
            continue
        key = ("store" if kind == "st" else "load", line)
        width = int(copied, 16) * 8 if copied else int(vector or 1) * int(bits)
        widths[key] = min(width, widths.get(key, width))
    return [
        Access(kind, name, line, tile, widths.get((kind, line), 0), element)
        for (kind, line), (name, tile, element) in sorted(tiles.items(), key=lambda item: item[0])
    ]


def _line(location: str, locations: dict[str, str]) -> str:
    """The innermost file and line of a location, which may be named or inlined."""
    text = locations[location]
    while not (found := _FILE.search(text)):
        text = locations[_search(r"#loc\d*", text)[0]]
    return f"{found[1]}:{found[2]}"


def _cuobjdump(option: str, file: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
