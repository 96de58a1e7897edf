"""Chooses the launch configuration of a kernel from the device and the sizes: a tuned configuration if there is a tuned
file, else that of the kernel's own heuristic.

A tuned file is ``tuned/<device>/<op>.json``. The folder that QWENKERN_CONFIG_DIR names is searched first, and has the
same layout:

    {"op": "linear", "device": "NVIDIA H100 80GB HBM3", "triton": "3.6.0", "date": "2026-11-24",
     "entries": [{"sizes": {"n": 2048, "k": 11008}, "config": {"BLOCK_K": 512, "num_stages": 4}}]}

The entry whose sizes are nearest, measured in logarithms, overrides fields of the heuristic's configuration. A kernel
over packed weights has one file per format, such as ``linear.int4.json``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..environment import CONFIG_DIR
from ..remembered import REMEMBERED


@dataclass(frozen=True)
class Device:
    """The properties of a device that a configuration depends on."""

    name: str
    backend: str  # "cuda" or "hip"
    capability: int  # compute capability, major * 10 + minor; 0 on hip
    num_sms: int
    shared_memory: int  # bytes that one program may use

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


# Triton's interpreter uses the configurations of an H100.
INTERPRETER = Device("interpreter", "cuda", 90, 132, 232448)
_offline: Device | None = None


Kernel = tuple[str, tuple[tuple[str, int], ...]]  # op, and the sizes by which its configuration is looked up

# The search space of each op: the values that a tuner may try for each field. The kernel files declare them.
SPACES: dict[str, dict[str, tuple[int, ...]]] = {}
_remembered: list[Any] = []
_trial: Trial | None = None
_overrides: Overrides | None = None


@dataclass
class Trial:
    """A configuration that a tuner tries for an op, and the sizes of the launches that used it."""

    op: str
    config: dict[str, Any]
    seen: list[tuple[dict[str, int], dict[str, Any]]] = field(default_factory=list)  # sizes, and the heuristic's choice


def remember(function: Callable) -> Callable:
    """Like functools.cache; ``forget`` clears the cache."""
    cached = functools.cache(function)
    _remembered.append(cached)
    return cached


def forget() -> None:
    """Clears the remembered choices, so the next launches read the tuned files again."""
    for cached in _remembered:
        cached.cache_clear()


@contextlib.contextmanager
def trying(op: str, config: dict[str, Any]) -> Iterator[Trial]:
    """In this context the fields of ``config`` override the heuristic in launches of ``op``, and tuned files are
    ignored."""
    global _trial
    before, _trial = _trial, Trial(op, config)
    forget()
    try:
        yield _trial
    finally:
        _trial = before
        forget()


@dataclass
class Overrides:
    """Configurations that a tuner tries for several kernels at once, and the configurations that the kernels have
    without a tuner. The keys of both are the op and the sizes."""

    chosen: dict[Kernel, dict[str, Any]] = field(default_factory=dict)
    own: dict[Kernel, dict[str, Any]] = field(default_factory=dict)


@contextlib.contextmanager
def overriding() -> Iterator[Overrides]:
    """In this context the fields of ``chosen[op, sizes]`` override the configuration of the op's kernel for these
    sizes. Call ``forget`` after each change of ``chosen``."""
    global _overrides
    before, _overrides = _overrides, Overrides()
    forget()
    try:
        yield _overrides
    finally:
        _overrides = before
        forget()


def named(op: str, form: str) -> str:
    """The name under which an op's kernel for weights of a format is tuned, such as "linear.int4"."""
    return op if form == "dense" else f"{op}.{form}"


def space(name: str) -> dict[str, tuple[int, ...]]:
    """The search space of the kernel with this name (see ``named``)."""
    return SPACES.get(name.partition(".")[0], {})


def device_of(tensor: Tensor) -> Device:
    if _offline is not None and tensor.is_meta:
        return _offline
    return _cuda_device(tensor.device.index) if tensor.is_cuda else INTERPRETER


def is_offline() -> bool:
    return _offline is not None


@contextlib.contextmanager
def offline(device: Device) -> Iterator[None]:
    """In this context ops on meta tensors choose and launch kernels as on this device, to compile without a GPU."""
    global _offline
    before, _offline = _offline, device
    REMEMBERED.clear()  # the choices for meta tensors depend on the device
    try:
        yield
    finally:
        _offline = before
        REMEMBERED.clear()


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    return Device(
        name=properties.name,
        backend="hip" if hip else "cuda",
        capability=0 if hip else properties.major * 10 + properties.minor,
        num_sms=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 65536),
    )


def lookup(op: str, device: Device, sizes: dict[str, int], heuristic: dict[str, Any]) -> dict[str, Any]:
    """The configuration of one launch. Callers cache the result."""
    if _trial is not None and _trial.op == op:
        _trial.seen.append((sizes, heuristic))
        return {**heuristic, **_trial.config}
    try:
        entries = _entries(op, device.folder, CONFIG_DIR.get() or "")
        config = {**heuristic, **_nearest(entries, sizes, heuristic, space(op))}
    except ValueError as error:  # a stale or damaged tuned file must not end a forward pass
        _warn_once(f"{op} for {device.name}: {error}")
        config = heuristic
    if _overrides is not None:
        kernel = op, tuple(sizes.items())
        _overrides.own[kernel] = config
        config = {**config, **_overrides.chosen.get(kernel, {})}
    return config


def _nearest(
    entries: list[dict[str, Any]], sizes: dict[str, int], heuristic: dict[str, Any], space: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The configuration of the nearest entry. Raises ValueError if an entry does not fit the kernel."""
    if not entries:
        return {}
    for entry in entries:
        if missing := set(sizes) - set(entry["sizes"]):
            raise ValueError(f"a tuned configuration has no size {', '.join(sorted(missing))}")
        if unknown := set(entry["config"]) - set(heuristic):
            raise ValueError(
                f"a tuned configuration sets {', '.join(sorted(unknown))}, and the kernel has {', '.join(heuristic)}"
            )
        for name, value in entry["config"].items():
            if name in space and not _is_alike(value, space[name]):  # Triton would raise in a forward pass
                raise ValueError(f"a tuned configuration sets {name} to {value}; expected a value like {space[name]}")
    return min(entries, key=lambda entry: _distance(entry["sizes"], sizes))["config"]


def _is_alike(value: int, tried: tuple[int, ...]) -> bool:
    """Whether the tuner tries a value, or the value is from 1 to the largest that it tries; if all that it tries are
    powers of two, the value must be one, too."""
    powers = all(each & (each - 1) == 0 for each in tried)
    return value in tried or (0 < value <= max(tried) and not (powers and value & (value - 1)))


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"qwenkern: {problem}; the kernel's own choice is used in its place", stacklevel=4)


def _distance(tuned: dict[str, int], sizes: dict[str, int]) -> float:
    return sum((math.log2(tuned[name]) - math.log2(size)) ** 2 for name, size in sizes.items())


@remember
def _entries(op: str, folder: str, override: str) -> list[dict[str, Any]]:
    for root in (override, Path(__file__).parent / "tuned"):
        file = os.path.join(root, folder, f"{op}.json")
        if root and os.path.isfile(file):  # for an invalid path os.path returns False, and pathlib raises
            return read_entries(Path(file))
    return []


def read_entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a tuned file. Sizes are whole numbers of at least 1, and fields of configurations whole numbers of
    at least 0. Raises ValueError, which names the file, if the file is not valid."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            if not (_are_numbers(entry["sizes"], 1) and _are_numbers(entry["config"], 0)):
                raise TypeError("sizes and config must be objects of whole numbers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is not a tuned configuration: {error!r}") from error
    return entries


def _are_numbers(values: object, least: int) -> bool:
    return isinstance(values, dict) and all(type(value) is int and value >= least for value in values.values())
