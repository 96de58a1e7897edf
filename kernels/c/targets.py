"""The processors that the C files are compiled for, and the ones among them that fit this processor.

A wheel carries one library for each fixed target of its architecture, and the best one that this processor supports is
loaded. setup.py uses this file before anything is installed, so it imports the standard library only."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """A set of processor instructions that a library is compiled for."""

    name: str
    machine: str  # what `uname -m` prints on Linux
    flags: tuple[str, ...]  # for gcc and clang
    needs: frozenset[str] = frozenset()  # required features, by their names in Linux's /proc/cpuinfo
    floats: str | None = None  # if this target multiplies pairs of bfloat16: the target that widens them to float32


# The features of the x86-64 levels. Linux calls lzcnt abm, and SSE 3 pni; it lists AVX only if osxsave is on.
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_ARM = frozenset({"asimd", "atomics", "crc32", "asimdrdm", "asimddp"})

# Without this option clang splits 64-byte vectors into halves for x86-64-v4. gcc takes the option too.
_WHOLE = "-mprefer-vector-width=512"

# Without this option gcc for Arm moves loads so early that their values occupy registers of the sums. clang ignores the
# option.
_IN_ORDER = "-fno-schedule-insns"

# Best first.
TARGETS = (
    Target(
        "x86-64-v4-bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", _WHOLE, "-DPAIRS"),
        _V4 | {"avx512_vnni", "avx512_bf16"},
        floats="x86-64-v4-vnni",
    ),
    Target("x86-64-v4-vnni", "x86_64", ("-march=x86-64-v4", "-mavx512vnni", _WHOLE), _V4 | {"avx512_vnni"}),
    Target("x86-64-v4", "x86_64", ("-march=x86-64-v4", _WHOLE), _V4),
    Target("x86-64-v3-vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
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

# macOS's names of the features that some of Apple's processors lack.
_APPLE = {"asimddp": "FEAT_DotProd", "bf16": "FEAT_BF16", "i8mm": "FEAT_I8MM"}


def machine(name: str | None = None) -> str:
    """The name that targets use for an architecture (by default, this machine's)."""
    name = name or platform.machine()
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(name, name)


def native() -> Target:
    """The target of this processor with all its features, for processors that no fixed target fits. No wheel has it; it
    is compiled on this machine."""
    # gcc tunes for AMD's and newer processors by splitting some chains of fused multiply-adds of 256 bits, and not
    # others, so a sum would depend on the loop that adds it. Its tuning for Haswell splits none.
    flags = ("-march=native", "-mtune=haswell") if machine() == "x86_64" else ("-mcpu=native",)
    return Target("native", machine(), flags)


def usable() -> list[Target]:
    """The targets that may be loaded here, best first. If QWENKERN_CPU_TARGET is set, that target only.

    Raises ValueError if QWENKERN_CPU_TARGET names no target, or one that needs features this processor lacks."""
    from ..environment import CPU_TARGET  # not at the top: setup.py loads this file by itself

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
    """The features of this processor that the system lets programs use, by Linux's names."""
    if sys.platform == "darwin":
        return _ARM - {"asimddp"} | {name for name, key in _APPLE.items() if _sysctl(f"hw.optional.arm.{key}")}
    return listed(Path("/proc/cpuinfo"))


def listed(cpuinfo: Path) -> frozenset[str]:
    """The features that all processors of a /proc/cpuinfo share. The file lists each core, and cores may differ."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    each = {line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))}
    return frozenset.intersection(*(frozenset(line.split()) for line in each)) if each else frozenset()


@functools.cache
def processor() -> str:
    """A text that identifies this kind of processor: its maker's names and its features."""
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
