"""The C ops compiled for another processor and run by qemu-user, behind the interface of the compiled library.

The program emulated.c and this one share a file in memory. A run copies the storage of each tensor into it, once for
all views, and copies back what the op may write. It finds more errors than a native run:

- a page that may be neither read nor written lies behind each tensor and before it;
- up to its first and last byte lies NaN, which must be there still afterwards, and which spreads where it is read;
- outputs and scratch memory are NaN before the op, so what it leaves out is seen;
- what an op only reads, which calls.h has as const, must not have changed.

qemu-user runs Arm's targets and AVX2. It has neither AVX-512 nor AVX-VNNI: where the processor lacks one of them, the
tests of those targets would need Intel's SDE (`sde64 -spr -- program`), and are skipped; test_inner_loops.py still
compiles them and reads their machine code.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from c import objects

from qwenkern.kernels.c import build, compiler, targets
from qwenkern.kernels.c.calls import CALL_BYTES, FIELDS, FIRST_FIELD, OPS, make
from qwenkern.kernels.c.limits import NAMES


class Emulator(NamedTuple):
    """How a target is compiled and run on a machine of another kind."""

    compiler: str
    program: str
    processor: str  # that has the target's instructions and, where qemu knows such a one, no more


ARM, X86 = ("aarch64-linux-gnu-gcc", "qemu-aarch64"), ("x86_64-linux-gnu-gcc", "qemu-x86_64")
EMULATORS = {
    "armv8.6-bf16": Emulator(*ARM, "max"),
    "armv8.2-dotprod": Emulator(*ARM, "neoverse-n1"),
    "x86-64-v3": Emulator(*X86, "Haswell"),
}
PAGE, LINE = mmap.PAGESIZE, 64  # a storage starts at a multiple of LINE, as torch's do
SIZE, DATA = 1 << 30, 1 << 20  # bytes of the file, and where tensors start in it
WORD = struct.calcsize("P")
NAN = 0xFF  # each byte of it, in bfloat16 and in float32
# Products [tokens, k] x [k, n] of more terms are left to the processor that the tests run on. What is left has every
# number of tokens up to 16 with each n and k, more tokens in whole and broken groups, 100 of them (two parts) with the
# smallest n and k, and a k of several parts with up to 21.
PRODUCTS = 1 << 24
PATIENCE = 300  # seconds that a run may take
_RUNNING: dict[str, Emulated] = {}


def use(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a test run on an emulated target. It is skipped where that cannot be, unless QWENKERN_REQUIRE_ARM=1."""
    skip_large(request)
    target = next(target for target in targets.TARGETS if target.name == name)
    library = emulated(target, request.getfixturevalue("tmp_path_factory"))
    if isinstance(library, str):
        required = os.environ.get("QWENKERN_REQUIRE_ARM") == "1" and target.machine == "aarch64"
        (pytest.fail if required else pytest.skip)(f"{name}: {library}")
    library.watch(monkeypatch)
    monkeypatch.setattr(targets, "usable", lambda: [target])
    loaded = build.Loaded(library, target, "emulated", library.limits)
    monkeypatch.setattr(build, "_load", lambda *_, **__: loaded)


def skip_large(request: pytest.FixtureRequest) -> None:
    sizes = getattr(request.node, "callspec", None)
    if sizes and prod(sizes.params.get(size, 1) for size in ("tokens", "n", "k")) > PRODUCTS:
        pytest.skip("takes long without fast loops; smaller products take the same paths")


def emulated(target: targets.Target, factory: pytest.TempPathFactory) -> Emulated | str:
    """The library of a target in EMULATORS, started once and kept, or why there is none here."""
    if target.name not in EMULATORS:
        lacks = ", ".join(sorted(target.needs - targets.features()))
        return f"this processor lacks {lacks}, and so does qemu-user: Intel's SDE would be needed"
    found = EMULATORS[target.name]
    programs = (compiler_for(target), found.program)
    missing = [program for program in programs if not shutil.which(program)]
    return f"needs {' and '.join(missing)}" if missing else _started(target, factory)


def compiler_for(target: targets.Target) -> str:
    """That of this machine where the target is of its kind, else a cross compiler."""
    return compiler.command()[0] if target.machine == targets.machine() else EMULATORS[target.name].compiler


def is_emulated() -> bool:
    return isinstance(build.prepared().library, Emulated)


def _started(target: targets.Target, factory: pytest.TempPathFactory) -> Emulated:
    if target.name not in _RUNNING:
        _RUNNING[target.name] = Emulated(target, objects.compiled([compiler_for(target)], target, factory))
    return _RUNNING[target.name]


class Header(ctypes.Structure):
    """As `header` in emulated.c."""

    _fields_ = tuple((name, ctypes.c_long) for name in (*NAMES, "threads", "calls", "guards", "pointers", "fault"))


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


class Emulated:
    """In place of the compiled library: `run`. And its limits.

    Calls have pointers only, so ``watch`` must have noted the tensors that a call was made of."""

    def __init__(self, target: targets.Target, compiled: list[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        found, program = EMULATORS[target.name], str(Path(self._folder.name, "program"))
        self._program = [found.program, "-cpu", found.processor, program]
        flags = [flag for flag in compiler.FLAGS if flag not in ("-shared", "-fPIC")]
        source = str(Path(__file__).with_suffix(".c"))
        command = [compiler_for(target), *flags, "-static", *target.flags, f"-I{compiler.SOURCES}", source, *compiled]
        subprocess.run([*command, "-lm", "-o", program], check=True)
        self._file = os.memfd_create("tensors")
        os.truncate(self._file, SIZE)
        self._memory = mmap.mmap(self._file, SIZE)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._header = Header.from_buffer(self._memory)
        self._storages: dict[int, tuple[int, int, bool]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._start()
        self.limits = SimpleNamespace(**{name: getattr(self._header, name) for name in NAMES})

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Notes the storages of tensors from which calls are made."""

        def noting(op: str) -> Any:
            maker = getattr(make, op)

            def made(**fields: Any) -> Any:
                call = maker(**fields)
                for tensor in call[2]:
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        whole = tensor.numel() * tensor.element_size() == storage.nbytes()
                        self._storages[tensor.data_ptr()] = storage.data_ptr(), storage.nbytes(), whole
                return call

            return made

        for op in OPS:
            monkeypatch.setattr(make, op, noting(op))

    def run(self, calls: bytes, count: int, threads: int) -> None:
        """As `run` in team.c. AssertionError: an op touched what it may not."""
        packed = bytearray(calls)
        assert len(packed) == count * CALL_BYTES
        blocks, pointers = self._lay_out(packed)
        guards = [DATA, *(block.end for block in blocks)]
        written = bytes(packed) + struct.pack(f"@{len(guards) + len(pointers)}l", *guards, *pointers)
        first = ctypes.sizeof(Header)
        assert first + len(written) <= DATA
        self._memory[first : first + len(written)] = written
        self._header.threads, self._header.calls = threads, count
        self._header.guards, self._header.pointers = len(guards), len(pointers)
        self._start()
        self._process.stdin.write(b"r")
        if self._answer() == b"f":
            raise AssertionError(_fault(self._header.fault, blocks))
        for block in blocks:
            self._take_back(block)

    def _lay_out(self, calls: bytearray) -> tuple[list[Block], list[int]]:
        """Copies the storages into the file, puts their places there into the calls, and says where pointers stand."""
        blocks: dict[int, Block] = {}
        pointers: list[int] = []
        start = DATA + PAGE
        for at in range(0, len(calls), CALL_BYTES):
            op = OPS[struct.unpack_from("@l", calls, at)[0]]
            for place, field in enumerate(FIELDS[op]):
                where = at + FIRST_FIELD + place * WORD
                [pointer] = struct.unpack_from("@P", calls, where)
                if field.code != "P" or not pointer:
                    continue
                address, size, is_whole = self._storages[pointer]
                writes = not field.is_const
                if address not in blocks:
                    block = blocks[address] = Block(f"{field.name} of {op}", address, size, start, writes)
                    assert block.end < SIZE, "too many tensors for the file"
                    ctypes.memset(self._base + block.start, NAN, block.end - block.start)
                    in_part = "." in field.name  # pages of a cache
                    if not (writes and is_whole and not in_part):
                        ctypes.memmove(self._base + block.at, address, size)
                    start = block.end + PAGE
                blocks[address].is_written |= writes
                struct.pack_into("@P", calls, where, blocks[address].at + pointer - address)
                pointers.append(where)
        return list(blocks.values()), pointers

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
