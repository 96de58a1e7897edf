"""`qwenkern footprint --check`: loads a model, and compares the memory that it takes with the computed memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..config import FAMILY
from ..errors import Error, RequestError, shown
from ..footprint.case import Case
from ..Model import Model


def device_of(device: str | None, check: bool) -> str:
    """ "cuda" or "cpu". Raises RequestError for another device, and with ``check`` if this machine does not have it."""
    if device not in (None, "cuda", "cpu"):
        raise RequestError(f"device is {shown(device)}; expected 'cuda' or 'cpu'")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if check and device == "cuda" != here:
        raise RequestError("device is 'cuda', which --check does not find on this machine; expected 'cpu'")
    return device or (here if check else "cuda")


def compare(model: str, case: Case, device: str) -> dict[str, Any]:
    """The computed and the actual bytes of weights and cache. Also the memory of the process before it loads the model,
    with the model, and after a forward pass over a prompt of the case's length, at most a chunk."""
    before = process_memory()
    layout = case.layout
    loaded = _load(model, case, device)
    after = process_memory()
    loaded.generate([0] * max(1, min(case.context, loaded.prefill_chunk) - 1), max_tokens=1, temperature=0)
    weights = sum(parameter.nbytes for parameter in loaded.module.parameters())
    cache = sum(pages.nbytes for pages in loaded.cache.pages)
    found = {
        "weights": {"computed": layout.weights, "actual": weights},
        "cache": {"computed": layout.cache(loaded.cache.num_pages), "actual": cache},
        "process": {"computed": case.footprint.total, "before": before, "loaded": after, "used": process_memory()},
    }
    if device == "cuda":
        found["gpu"] = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return found


def refuse_a_difference(checked: dict[str, Any]) -> None:
    """Raises Error if the actual bytes of weights or cache differ from the computed bytes."""
    for name in ("weights", "cache"):
        computed, actual = checked[name]["computed"], checked[name]["actual"]
        if computed != actual:
            raise Error(f"{name}: {computed:,} bytes were computed, and the model has {actual:,}; expected the same")


def _load(model: str, case: Case, device: str) -> Model:
    layout = case.layout
    options: dict[str, Any] = {
        "device": device,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "quantize": case.argument,
        "kv_cache_dtype": case.kv_cache_dtype,
        "cache_tokens": case.sequences * case.context,
    }
    if model.lower() in FAMILY and not Path(model).exists():
        return Model.from_config(layout.config, **options)
    return Model.from_pretrained(model, **options)


def process_memory() -> dict[str, int]:
    """Bytes of this process in main memory: all, and those that no file backs. Empty if the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    lines = {"resident": "VmRSS", "anonymous": "RssAnon"}
    return {
        name: int(match[1]) * 1024
        for name, line in lines.items()
        if (match := re.search(rf"^{line}:\s+(\d+) kB$", text, re.M))
    }
