"""The C ops compiled for Arm and run by qemu-user, behind the interface of the compiled library.

The program emulated.c and this one share a file in memory. A run copies the storage of each tensor into it, once for
all views, and copies back what the op may write. It finds more errors than a native run:

- Before and after each tensor lies a guard page, which may be neither read nor written.
- NaN fills the space between the guard pages and the tensor. It must be unchanged, and it spreads if it is read.
- Outputs and scratch memory are NaN before the op, so missing writes are found.
- Inputs that an op only reads must be unchanged.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from qwenkern.kernels.c import build, compiler, targets
from qwenkern.kernels.c.call import OPS, Call

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

# For each target of another machine: a processor that has its instructions and, where qemu knows such a one, no more.
PROCESSORS = {"armv8.6-bf16": "max", "armv8.2-dotprod": "neoverse-n1"}

# How many of its tensors, the first ones, an op writes.
WRITES = {
    **{"embedding": 1, "rope_and_cache": 3, "few_tokens": 3, "many_tokens": 3, "decode_attention": 2},
    **{"prefill_attention": 2, "apply_rope": 2, "add_rms_norm": 2, "silu_mul": 1},
}
CONSTANTS = ("ahead", "block_columns", "chunk")  # that Python reads from the library
UPDATES = {("rope_and_cache", 1), ("rope_and_cache", 2)}  # written in part: pages of the cache
PAGE, LINE = mmap.PAGESIZE, 64  # a storage starts at a multiple of LINE, as torch's do
SIZE, DATA = 1 << 30, 1 << 20  # bytes of the file, and where tensors start in it
NAN = 0xFF  # each byte of it, in bfloat16 and in float32
# Products [tokens, k] x [k, n] of more terms are left to the processor that the tests run on. What is left has every
# number of tokens up to 16 with each n and k, more tokens in whole and broken groups, 100 of them (two parts) with the
# smallest n and k, and a k of several parts with up to 21.
PRODUCTS = 1 << 24
PATIENCE = 300  # seconds that a run may take


def use(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test on an emulated target. Without emulation it is skipped, unless QWENKERN_REQUIRE_ARM=1."""
    sizes = getattr(request.node, "callspec", None)
    if sizes and prod(sizes.params.get(size, 1) for size in ("tokens", "n", "k")) > PRODUCTS:
        pytest.skip("takes long when emulated; smaller products take the same paths")
    target = next(target for target in targets.TARGETS if target.name == name)
    library = emulated(target)
    if isinstance(library, str):
        (pytest.fail if os.environ.get("QWENKERN_REQUIRE_ARM") == "1" else pytest.skip)(f"{name}: {library}")
    library.watch(monkeypatch)
    monkeypatch.setattr(targets, "usable", lambda: [target])
    monkeypatch.setattr(build, "_load", lambda *_, **__: build.Loaded(library, target, "emulated"))


def emulated(target: targets.Target) -> Emulated | str:
    """The library of a target in PROCESSORS, started once and kept, or why there is none here."""
    missing = [program for program in (COMPILER, EMULATOR, "cc") if not shutil.which(program)]
    return f"needs {' and '.join(missing)}" if missing else _started(target)


@functools.cache
def _started(target: targets.Target) -> Emulated:
    return Emulated(target)


class Header(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in (*CONSTANTS, "threads", "calls", "guards", "fault"))


@dataclass
class Block:
    """A storage, and where it lies in the file; [start, end) are the pages that it has there."""

    of: str
    address: int
    size: int
    start: int
    is_written: bool

    @property
    def end(self) -> int:
        return self.start + -(-self.size // PAGE) * PAGE

    @property
    def at(self) -> int:
        return self.end - -(-self.size // LINE) * LINE


class Emulated(ctypes.CDLL):
    """In place of the compiled library: `run`, and its CONSTANTS.

    Calls have pointers only, so ``watch`` must have noted the tensors that a call was made of."""

    def __init__(self, target: targets.Target) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._program = [EMULATOR, "-cpu", PROCESSORS[target.name], str(Path(self._folder.name, "program"))]
        flags = [flag for flag in compiler.FLAGS if flag not in ("-shared", "-fPIC")]
        sources = [*map(str, compiler.SOURCES.glob("*.c")), str(Path(__file__).with_suffix(".c"))]
        command = [COMPILER, *flags, "-static", *target.flags, f"-I{compiler.SOURCES}", *sources, "-lm"]
        subprocess.run([*command, "-o", self._program[-1]], check=True)
        self._file = os.memfd_create("tensors")
        os.truncate(self._file, SIZE)
        self._memory = mmap.mmap(self._file, SIZE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._header = Header.from_buffer(self._memory)
        self._storages: dict[int, tuple[int, int, bool]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._start()
        constants = str(Path(self._folder.name, "constants.so"))  # in_dll reads them from a library of this processor
        text = "".join(f"long {name} = {getattr(self._header, name)};" for name in CONSTANTS)
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", constants], input=text, text=True, check=True)
        super().__init__(constants)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Notes the storages of tensors from which calls are made."""
        make = Call.of

        def of(op: str, tensors: Sequence[Tensor | None], *args: Any, **keywords: Any) -> Call:
            for tensor in tensors:
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    whole = tensor.numel() * tensor.element_size() == storage.nbytes()
                    self._storages[tensor.data_ptr()] = storage.data_ptr(), storage.nbytes(), whole
            return make(op, tensors, *args, **keywords)

        monkeypatch.setattr(Call, "of", of)

    def run(self, calls: Any, count: int, threads: int) -> None:
        """As `run` in step.c. AssertionError: an op touched what it may not."""
        address = ctypes.cast(calls, ctypes.c_void_p).value
        packed = (Call * count).from_buffer_copy(ctypes.string_at(address, count * ctypes.sizeof(Call)))
        blocks = self._lay_out(packed)
        guards = [DATA, *(block.end for block in blocks)]
        written = bytes(packed) + bytes((ctypes.c_long * len(guards))(*guards))
        first = ctypes.sizeof(Header)
        assert first + len(written) <= DATA
        self._memory[first : first + len(written)] = written
        self._header.ahead = ctypes.c_long.in_dll(self, "ahead").value
        self._header.threads, self._header.calls, self._header.guards = threads, count, len(guards)
        self._start()
        self._process.stdin.write(b"r")
        if self._answer() == b"f":
            raise AssertionError(_fault(self._header.fault, blocks))
        for block in blocks:
            self._take_back(block)

    def _lay_out(self, calls: ctypes.Array[Call]) -> list[Block]:
        """Copies the storages into the file, and puts their places there into the calls."""
        blocks: dict[int, Block] = {}
        start = DATA + PAGE
        for call in calls:
            op = OPS[call.op]
            for place, pointer in enumerate(call.tensors):
                if pointer is None:
                    continue
                address, size, is_whole = self._storages[pointer]
                writes = place < WRITES[op]
                if address not in blocks:
                    block = blocks[address] = Block(f"tensor {place} of {op}", address, size, start, writes)
                    assert block.end < SIZE, "too many tensors for the file"
                    ctypes.memset(self._base + block.start, NAN, block.end - block.start)
                    if not (writes and is_whole and (op, place) not in UPDATES):
                        ctypes.memmove(self._base + block.at, address, size)
                    start = block.end + PAGE
                blocks[address].is_written |= writes
                call.tensors[place] = blocks[address].at + pointer - address
        return list(blocks.values())

    def _take_back(self, block: Block) -> None:
        around = self._memory[block.start : block.at] + self._memory[block.at + block.size : block.end]
        assert not around.strip(bytes([NAN])), f"written to outside of {block.of}, of {block.size} bytes"
        if block.is_written:
            ctypes.memmove(block.address, self._base + block.at, block.size)
        else:
            same = ctypes.string_at(block.address, block.size) == self._memory[block.at : block.at + block.size]
            assert same, f"{block.of} was written to"

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        command = [*self._program, str(self._file), str(SIZE), str(PAGE)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        self._process = subprocess.Popen(command, pass_fds=[self._file], **pipes)
        assert self._answer() == b"r"

    def _answer(self) -> bytes:
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        answer = self._process.stdout.read(1) if ready else b""
        if answer != b"d" and answer != b"r":  # the next run starts another one
            self._process.kill()
            status = self._process.wait()
            assert answer == b"f", f"the emulated program ended with {status}" if ready else f"no end in {PATIENCE} s"
        return answer


def _fault(at: int, blocks: Sequence[Block]) -> str:
    near = min(blocks, key=lambda block: max(block.at - at, at - block.at - block.size))
    return f"touched byte {at - near.at} of {near.of}, which has {near.size} bytes"
