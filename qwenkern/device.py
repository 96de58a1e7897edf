"""Chooses a model's device, its dtype, the CPU threads, and the size of its cache."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from .arguments import whole
from .config import Config
from .errors import ConfigError, RequestError, shown
from .kernels import Pages
from .kernels import c as c_backend
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
    """The requested dtype. "auto" is the checkpoint's, or float32 on a CPU if the weights are quantised: they are read
    as they are, so x in float32 costs nothing there. Raises RequestError, or ConfigError for a wrong checkpoint's."""
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


def choose_format(argument: str, name: str, formats: Mapping[str, type[Pages]]) -> type[Pages]:
    """The format of this name. Raises RequestError, which names the argument."""
    if not isinstance(name, str) or name not in formats:
        raise RequestError(f"{argument} is {shown(name)}; expected one of {', '.join(map(repr, formats))}")
    return formats[name]


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


def cache_room(
    asked: int | None,
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    prefill_chunk: int,
    pages: type[Pages] = DensePages,
) -> int:
    """The number of tokens in the key-value cache: the requested one, else a default. Raises RequestError if the whole
    memory of the device would not hold it."""
    asked = whole("cache_tokens", asked, 1, optional=True)
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    per_token = layers * pages.bytes_per_token(heads, config.head_dim, dtype)
    if asked is None:
        per_chunk = prefill_chunk * (4 * config.vocab_size + 4 * config.intermediate_size * dtype.itemsize)
        return _default_cache_tokens(config, per_token, per_chunk, device)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[1] if on_gpu else _machine_memory()
    if (most := memory // per_token) < asked:
        raise RequestError(f"cache_tokens is {shown(asked)}; all memory of {device} would hold {most}")
    return asked


def _default_cache_tokens(config: Config, per_token: int, per_chunk: int, device: torch.device) -> int:
    """On a GPU, the tokens that its free memory holds, less a reserve. The reserve is a tenth of the memory, or more: a
    twentieth and the ``per_chunk`` bytes that a chunk of a prompt takes with all of its logits, if that is at most a
    quarter of the free memory. On a CPU, where memory is taken only when it is used, four contexts, but at most half of
    the machine's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserve = max(total // 10, min(total // 20 + per_chunk, free // 4))
        tokens, most = (free - reserve) // per_token, 64 * config.context_length
    else:
        tokens, most = _machine_memory() // 2 // per_token, 4 * config.context_length
    if tokens < 1:
        raise RequestError(f"{device} has no memory left for a key-value cache; expected a smaller model")
    return min(tokens, most)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
