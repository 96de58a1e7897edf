"""The number of threads that the C functions use.

The default is one thread per physical core: two threads on one core share its multipliers, and do not read memory
faster. The number is lower if a cpuset, a cgroup's quota or torch allows fewer, because a thread that waits for
processor time delays all the others."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..environment import MOST_THREADS as MOST
from ..environment import THREADS

_asked: int | None = None


def count() -> int:
    """The number of threads of the next call: the argument of ``use``, or QWENKERN_THREADS, or one for each physical
    core that this process may run on, at most the cgroup's quota rounded up. Except for QWENKERN_THREADS, the number is
    at most torch.get_num_threads().

    Cores and quota are read once. Raises ValueError if QWENKERN_THREADS is not a whole number from 1 to MOST."""
    if _asked is not None:
        return min(_asked, torch.get_num_threads())
    if given := THREADS.get():
        return given
    return min(available(), torch.get_num_threads())


def use(threads: int) -> None:
    """Sets the number of threads of this process from now on, also for torch. Raises ValueError for a number that is
    not allowed."""
    global _asked
    if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= MOST:
        raise ValueError(f"threads is {threads!r}; expected a whole number from 1 to {MOST}")
    torch.set_num_threads(threads)
    _asked = threads


@contextlib.contextmanager
def one_in_torch() -> Iterator[None]:
    """In this context torch's operations use one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def available() -> int:
    """The number of physical cores that this process may use, at most the cgroup's quota."""
    quota = cgroup_quota()
    cores = physical_cores(allowed())
    return cores if quota is None else min(cores, quota)


def allowed() -> frozenset[int]:
    """The logical processors of this process's affinity mask, which taskset and cpusets set."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))  # on macOS torch.get_num_threads() counts only the fast cores


def physical_cores(processors: frozenset[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """The number of physical cores of these logical processors. If the system gives no cores, each processor counts as
    a core."""
    cores = set()
    for processor in processors:
        try:
            cores.add((system / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            cores.add(str(processor))
    return len(cores)


def cgroup_quota(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The number of processors whose time the cgroup's quota allows, rounded up. None without a limit. Groups are
    nested, and the smallest quota counts."""
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return None
    shares = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            shares += [_share(folder / "cpu.max") for folder in _upwards(root, path)]
        elif "cpu" in controllers.split(","):  # version 1, mounted under the controllers' names or as cpu
            mounts = (root / controllers, root / "cpu")
            shares += [
                _share(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                for mount in mounts
                for folder in _upwards(mount, path)
            ]
    known = [share for share in shares if share is not None]
    return max(1, min(-(-quota // period) for quota, period in known)) if known else None


def _upwards(mount: Path, path: str) -> list[Path]:
    """A group's folder and the folders above it. In a container the path may be that of the host; then the mount itself
    is the group's folder."""
    inner = Path(path.lstrip("/"))
    return [mount / inner, *(mount / above for above in inner.parents)]


def _share(*files: Path) -> tuple[int, int] | None:
    """(quota, period): microseconds of processor time in each period, from one file of two numbers or from two
    files."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return (int(quota), int(period)) if quota.isdecimal() and int(period) > 0 else None  # not "max", nor -1
    except (OSError, ValueError):
        return None
