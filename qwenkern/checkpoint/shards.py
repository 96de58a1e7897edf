"""Writes tensors as safetensors files of limited size, so that not all tensors need to be in memory.

Format: https://github.com/huggingface/safetensors#format. The library's own writer orders tensors by name. This module
orders them so that each begins at a multiple of 64 bytes if sizes allow it, and so that tensors of one kind are
adjacent: q, k and v can then be mapped as one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .mapped import DTYPES

SHARD = 2 << 30  # bytes after which the next file begins
ALIGNMENT = 64
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes model.safetensors, or several files and an index. Tensors are on the CPU."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD:
            shards.append(_write(_temporary(folder, len(shards)), pending))
            pending, size = {}, 0
    if pending or not shards:
        shards.append(_write(_temporary(folder, len(shards)), pending))
    if len(shards) == 1:
        os.rename(_temporary(folder, 0), folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(_temporary(folder, i), folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _temporary(folder: Path, shard: int) -> Path:
    """The name of a file until the number of files is known."""
    return folder / f"shard-{shard}"


def _write(file: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Writes a file. Returns the names of its tensors."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in tensors))  # in the order of a format's names
    ordered = sorted(tensors, key=lambda name: (-_alignment(tensors[name]), kinds.index(name.rpartition(".")[2])))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with open(file, "xb") as stream:
        stream.write(len(header).to_bytes(8, "little"))
        stream.write(header)
        for name in ordered:
            stream.write(tensors[name].view(-1).view(torch.uint8).numpy().data)
        stream.flush()
        os.fsync(stream.fileno())
    return ordered


def _alignment(tensor: Tensor) -> int:
    """The largest power of two, up to ALIGNMENT, that divides a tensor's bytes: the next tensor is aligned to it."""
    return ALIGNMENT if not tensor.nbytes else min(ALIGNMENT, tensor.nbytes & -tensor.nbytes)
