"""From a user's words (quantize=, dtype=, kv_cache_dtype=) to a Layout."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoint.formats import formats_of
from ..config import Config
from ..errors import RequestError, shown
from ..kernels import Pages, Weight
from ..kernels.pages import FORMATS as PAGES
from ..kernels.pages import DensePages
from .layout import Layout

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NONE = ("none", *DTYPES)  # words for dense weights


def layout_of(
    config: Config,
    *,
    on_gpu: bool,
    quantize: str = "none",
    stored: Mapping[str, Weight] | None = None,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
) -> Layout:
    """The layout of a model as it would be loaded.

    quantize: "none" (as it is stored), a dtype (dense), a format or a mix of checkpoint/formats.py. stored: a
    checkpoint's quantised matrices by name; the others are dense. dtype: "auto" is what the weights are computed
    with by default. kv_cache_dtype: "auto", a dtype, or a format of kernels/pages/. Raises RequestError."""
    if quantize in DTYPES:
        if dtype not in ("auto", quantize):
            raise RequestError(f"quantize is {shown(quantize)} and dtype {shown(dtype)}; expected one of the two")
        quantize, dtype, stored = "none", quantize, None
    is_quantised = quantize != "none" or bool(stored)
    chosen = _dtype(dtype, config, is_quantised, on_gpu)
    if quantize == "none":
        matrices = formats_of(config, None, chosen) | dict(stored or {})
    else:
        matrices = formats_of(config, quantize, chosen)
    pages, cache_dtype = pages_of(kv_cache_dtype, chosen, is_quantised and not on_gpu)
    return Layout(config, matrices, chosen, on_gpu, pages, cache_dtype)


def _dtype(name: str, config: Config, is_quantised: bool, on_gpu: bool) -> torch.dtype:
    if name == "auto":
        name = "float32" if is_quantised and not on_gpu else config.dtype.removeprefix("torch.")
        if name not in DTYPES:  # float64, say: loading asks for one of the three
            name = "bfloat16"
    if name not in DTYPES:
        raise RequestError(f"dtype is {shown(name)}; expected 'auto' or one of {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def pages_of(name: str, dtype: torch.dtype, in_half: bool = False) -> tuple[type[Pages], torch.dtype]:
    """The format of the cache's pages, and the dtype that they are allocated with. ``in_half``: "auto" is float16."""
    if name == "auto":
        return DensePages, torch.float16 if in_half else dtype
    if name in DTYPES:
        return DensePages, DTYPES[name]
    if name not in PAGES or name == DensePages.format:
        others = [each for each in PAGES if each != DensePages.format]
        expected = ", ".join(map(repr, ("auto", *DTYPES, *others)))
        raise RequestError(f"kv_cache_dtype is {shown(name)}; expected one of {expected}")
    return PAGES[name], dtype
