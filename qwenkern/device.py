"""Chooses a model's device, its dtype, its formats and the CPU threads."""

from __future__ import annotations

import torch

from .arguments import whole
from .config import Config
from .errors import ConfigError, RequestError, shown
from .kernels import Pages
from .kernels import c as c_backend
from .kernels.pages import FORMATS as PAGES
from .kernels.pages import DensePages

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(device: str | torch.device) -> torch.device:
    """The requested device; "auto" is CUDA if there is a GPU. Raises RequestError."""
    expected = "expected 'auto', 'cpu', 'cuda' or 'cuda:N'"
    if not isinstance(device, (str, torch.device)):
        raise RequestError(f"device is {shown(device)}; {expected}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise RequestError(f"device is {shown(device)}; {expected}") from error
    if found.type not in ("cpu", "cuda"):
        raise RequestError(f"device is {shown(device)}; {expected}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"device is {shown(device)}, and torch sees {torch.cuda.device_count()} CUDA devices")
    return found


def choose_dtype(
    dtype: str | torch.dtype, config: Config, device: torch.device, quantised: bool = False
) -> torch.dtype:
    """The requested dtype. "auto" is the checkpoint's, or float32 on a CPU if the weights are quantised: these keep
    their format, so activations in float32 cost nothing there. Raises RequestError, or ConfigError if the checkpoint's
    dtype is not supported."""
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
    if name == "auto" and quantised and device.type == "cpu":
        return torch.float32
    if name == "auto":
        name = config.dtype.removeprefix("torch.")
        if name == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "float16"  # before Ampere
        if name not in _DTYPES:
            raise ConfigError(
                f"{config.source}: dtype is {shown(config.dtype)}; expected {', '.join(map(repr, _DTYPES))}, or one of "
                "them given as dtype="
            )
    if name not in _DTYPES:
        raise RequestError(f"dtype is {shown(dtype)} ({name:.80}); expected 'auto', {', '.join(map(repr, _DTYPES))}")
    return _DTYPES[name]


def check_cache_dtype(kv_cache_dtype: str | torch.dtype) -> str:
    """The name of a dtype of the key-value cache, or "auto". Raises RequestError if no model has it."""
    name = str(kv_cache_dtype).removeprefix("torch.") if isinstance(kv_cache_dtype, (str, torch.dtype)) else ""
    names = ["auto", *_DTYPES, *(each for each in PAGES if each not in (DensePages.format, *_DTYPES))]
    if name not in names:
        raise RequestError(f"kv_cache_dtype is {shown(kv_cache_dtype)}; expected one of {', '.join(map(repr, names))}")
    return name


def choose_pages(kv_cache_dtype: str | torch.dtype, dtype: torch.dtype) -> type[Pages]:
    """The format of the key-value cache of a model that computes in ``dtype``. "auto" is ``dtype``. Raises
    RequestError."""
    name, own = check_cache_dtype(kv_cache_dtype), str(dtype).removeprefix("torch.")
    if name in ("auto", own):
        return DensePages
    stored = {each: found for each, found in PAGES.items() if found is not DensePages}
    if name not in stored:
        raise RequestError(
            f"kv_cache_dtype is {name!r}, and the model computes in {own}; expected one of "
            f"{', '.join(map(repr, dict.fromkeys(('auto', own, *stored))))}"
        )
    return stored[name]


def use_threads(threads: int | None) -> None:
    """Sets the CPU threads of this process, and checks the environment variables for the CPU before any weight is read.
    Raises RequestError."""
    threads = whole("threads", threads, 1, c_backend.threads.MOST, optional=True)
    try:
        if threads is not None:
            c_backend.threads.use(threads)
        c_backend.check_environment()
    except ValueError as error:
        raise RequestError(str(error)) from None
