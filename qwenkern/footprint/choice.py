"""Makes a Layout from a user's options: quantize=, dtype=, kv_cache_dtype=."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoint.formats import NONE, formats_of, stored_formats
from ..config import Config
from ..device import choose_dtype, choose_pages
from ..kernels import Weight
from .layout import Layout


def layout_of(
    config: Config,
    device: torch.device,
    *,
    quantize: str | None = None,
    stored: Mapping[str, Weight] | None = None,
    dtype: str | torch.dtype = "auto",
    kv_cache_dtype: str | torch.dtype = "auto",
) -> Layout:
    """The layout of a model as it would be loaded. The device need not exist on this machine.

    quantize: None (matrices as stored), one of NONE, a format, or a mix of checkpoint/mixes.py. stored: a checkpoint's
    quantised matrices by name, without memory; None: as in the configuration. dtype, kv_cache_dtype, errors: as in
    Model.from_pretrained."""
    on_gpu = device.type == "cuda"
    if dtype == "auto" and on_gpu and not torch.cuda.is_available():
        dtype = config.dtype  # as on a GPU that supports it
    if stored is None:
        stored = stored_formats(config, torch.float32)
    is_quantised = bool(stored) if quantize is None else quantize not in NONE
    chosen = choose_dtype(dtype, config, device, is_quantised)
    matrices = formats_of(config, None if quantize in NONE else quantize, chosen)
    if quantize is None:
        matrices |= stored
    return Layout(config, matrices, chosen, on_gpu, choose_pages(kv_cache_dtype, chosen))
