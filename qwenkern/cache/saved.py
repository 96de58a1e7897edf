"""Saves the cached pages of a text to a file, and loads them again, such as for a long system prompt.

The file has the safetensors format: the token ids, and for each layer the pages of each tensor of the cache's format.
The metadata has the facts that a loading model must share with the saving one, such as its fingerprint and its dtype.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .allocator import BlockTable
from .paged_cache import PagedCache

VERSION = "qwenkern prefix 1"
IDS = "ids"


def copied(cache: PagedCache, ids: Sequence[int], salt: str) -> dict[str, Tensor]:
    """Copies the pages that hold the longest beginning of ``ids`` to the host. Returns them with the ids in them."""
    pages = [entry.page for entry in cache.find(ids, salt)]
    tensors = {IDS: torch.tensor(ids[: len(pages) * cache.page_size], dtype=torch.int32, device="cpu")}
    for index, layer in enumerate(cache.pages):
        for name, tensor in zip(layer.names, layer.tensors_by_page, strict=False):
            tensors[_name(index, name)] = tensor[pages].cpu()
    return tensors


def put_back(cache: PagedCache, tensors: Mapping[str, Tensor], salt: str) -> int:
    """Writes copied pages to free pages of the cache, where `find` finds them like those of a text that has ended.
    Returns the number of tokens. Raises RequestError, and changes nothing, if too few pages are free."""
    ids = tensors[IDS].tolist()
    known = cache.find(ids, salt)
    table = BlockTable(salt)
    cache.begin(table, known, 0)
    try:
        cache.extend(table, len(ids) - table.length)
        for index, layer in enumerate(cache.pages):
            for name, tensor in zip(layer.names, layer.tensors_by_page, strict=False):
                tensor[table.pages[len(known) :]] = tensors[_name(index, name)][len(known) :].to(tensor.device)
        table.length = len(ids)
        cache.remember(table, ids)
    finally:
        cache.release(table)
    return len(ids)


def write(file: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Writes the file completely, or not at all."""
    from safetensors.torch import save_file

    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name[:100]}.")
    os.close(handle)
    try:
        save_file(dict(tensors), temporary, metadata={"format": VERSION, **facts})
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def read(file: Path, facts: Mapping[str, str], cache: PagedCache) -> dict[str, Tensor]:
    """The tensors of a file. Raises CheckpointError unless it was written with the same facts, for a cache of the same
    format and sizes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            found = stored.metadata() or {}
            for name, expected in {"format": VERSION, **facts}.items():
                if found.get(name) != expected:
                    raise CheckpointError(f"{file}: {name} is {found.get(name)}; expected {expected}")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 # no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {error}; expected a file that Model.save_prefix has written") from error
    ids = tensors.get(IDS)
    if ids is None or ids.dim() != 1 or ids.dtype != torch.int32 or len(ids) % cache.page_size:
        raise CheckpointError(f"{file}: has no token ids of whole pages of {cache.page_size} tokens")
    for index, layer in enumerate(cache.pages):
        for name, like in zip(layer.names, layer.tensors_by_page, strict=False):
            shape, tensor = (len(ids) // cache.page_size, *like.shape[1:]), tensors.get(_name(index, name))
            if tensor is None or tensor.shape != shape or tensor.dtype != like.dtype:
                what = "is missing" if tensor is None else f"is {tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{file}: {_name(index, name)} {what}; expected {like.dtype} {list(shape)}")
    return tensors


def _name(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"
