"""Determines how much memory this machine has for a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

_PROCESS, _CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroups of version 1 have a number near 2**63 if there is no limit


class Memory(NamedTuple):
    """Bytes of a device: all memory, free memory, and memory that this process has reserved but does not use."""

    total: int
    free: int
    kept: int = 0

    @property
    def available(self) -> int:
        return self.free + self.kept


def memory_of(device: torch.device) -> Memory:
    """The memory of a GPU, from CUDA and torch's allocator. For a CPU: main memory and swap space, all of it counted as
    free, because the system can shrink its file cache and move other programs to the swap space."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free, torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    total = main_memory() + swap_space()
    return Memory(total, total)


def main_memory() -> int:
    """The machine's memory, or the smallest limit of this process's cgroups."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, cgroup_limit() or whole)


def swap_space(file: Path = Path("/proc/meminfo")) -> int:
    """The bytes of swap space; 0 if the system does not tell."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")), 0)


def cgroup_limit(process: Path = _PROCESS, root: Path = _CGROUPS) -> int | None:
    """The bytes that the cgroup of this process may use; None without a limit. Groups are nested, and the smallest
    limit counts."""
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return None
    files: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files += [folder / "memory.max" for folder in _upwards(root, path)]
        elif "memory" in controllers.split(","):  # cgroups of version 1
            files += [folder / "memory.limit_in_bytes" for folder in _upwards(root / "memory", path)]
    limits = [limit for file in files if (limit := _number(file)) is not None and limit < _UNLIMITED]
    return min(limits, default=None)


def _upwards(mount: Path, path: str) -> list[Path]:
    """A group's folder and the folders above it. In a container, the path may be one of the host; then the mount itself
    is the group's folder."""
    inner = Path(path.lstrip("/"))
    return [mount / inner, *(mount / above for above in inner.parents)]


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None  # the text may be "max"
