"""Which processors the C files are compiled for, and which of them this one is.

A wheel carries one library for each fixed target of its architecture, and the best that the processor has is loaded.
setup.py uses this file, too, before anything is installed: it imports the standard library only."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What a library is compiled for."""

    name: str
    machine: str  # as `uname -m` has it on Linux
    flags: tuple[str, ...]  # of gcc and clang
    needs: frozenset[str] = frozenset()  # what the processor must have, as Linux names it in /proc/cpuinfo
    floats: str | None = None  # where this one multiplies pairs of bfloat16: the target that widens them to float32


# What compilers may use under these names. Linux says lzcnt as abm, SSE 3 as pni, and lists AVX only if osxsave is on.
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ARM = frozenset({"asimd", "atomics", "crc32", "asimdrdm", "asimddp"})

# clang splits vectors of 64 bytes in halves for x86-64-v4 unless it is told not to; gcc takes the option as well.
_WHOLE = "-mprefer-vector-width=512"

# gcc for Arm moves loads so far ahead that their values leave no register for some sums, unless it is told not to;
# clang ignores the option.
_IN_ORDER = "-fno-schedule-insns"

# Best first.
TARGETS = (
    Target(
        "x86-64-v4-bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", _WHOLE, "-DPAIRS"),
        _V4 | {"avx512_vnni", "avx512_bf16"},
        floats="x86-64-v4",
    ),
    Target("x86-64-v4", "x86_64", ("-march=x86-64-v4", _WHOLE), _V4),
    Target("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3),
    Target(
        "armv8.6-bf16",
        "aarch64",
        ("-march=armv8.2-a+dotprod+bf16+i8mm", _IN_ORDER, "-DPAIRS"),
        _ARM | {"bf16", "i8mm"},
        floats="armv8.2-dotprod",
    ),
    Target("armv8.2-dotprod", "aarch64", ("-march=armv8.2-a+dotprod", _IN_ORDER), _ARM),
)

# What macOS calls those that not all of Apple's processors have.
_APPLE = {"asimddp": "FEAT_DotProd", "bf16": "FEAT_BF16", "i8mm": "FEAT_I8MM"}


def machine(name: str | None = None) -> str:
    """An architecture (this one's) by the name that targets have."""
    name = name or platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)


def native() -> Target:
    """This very processor, whatever it has: for those that no fixed target fits. Compiled on the machine only."""
    flag = "-march=native" if machine() == "x86_64" else "-mcpu=native"
    return Target("native", machine(), (flag,))


def usable() -> list[Target]:
    """What may be loaded here, best first: QWENKERN_CPU_TARGET alone where it is set, else all that fit.

    Raises ValueError where QWENKERN_CPU_TARGET names no target, or one that this processor lacks something for."""
    from ..environment import CPU_TARGET  # not above: setup.py loads this file alone

    here = [target for target in TARGETS if target.machine == machine()]
    if name := CPU_TARGET.get():
        return [_forced(CPU_TARGET.name, name, [*here, native()])]
    return [target for target in here if target.needs <= features()] + [native()]


def _forced(variable: str, name: str, here: list[Target]) -> Target:
    names = ", ".join(target.name for target in here)
    target = next((target for target in here if target.name == name), None)
    if target is None:
        raise ValueError(f"{variable} is {name!r}; expected one of {names} on {machine()}, or unset for the best")
    if missing := sorted(target.needs - features()):
        raise ValueError(
            f"{variable} is {name!r}, and this processor lacks {', '.join(missing)}; expected another of {names}"
        )
    return target


@functools.cache
def features() -> frozenset[str]:
    """What this processor has and the system lets programs use, as Linux names it."""
    if sys.platform == "darwin":
        return _ARM - {"asimddp"} | {name for name, key in _APPLE.items() if _sysctl(f"hw.optional.arm.{key}")}
    return listed(Path("/proc/cpuinfo"))


def listed(cpuinfo: Path) -> frozenset[str]:
    """What all processors of a /proc/cpuinfo have: its lines are per core, and cores may differ."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    each = {line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))}
    return frozenset.intersection(*(frozenset(line.split()) for line in each)) if each else frozenset()


@functools.cache
def processor() -> str:
    """What tells this processor from others of the same features: its maker's names, and the features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = [platform.processor(), platform.machine()]
    names = {line for line in lines if line.startswith(("model name", "CPU implementer", "CPU part"))} or set(lines)
    return "\n".join([*sorted(names), *sorted(features())])


def _sysctl(name: str) -> bool:
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return not failed and value.value == 1
