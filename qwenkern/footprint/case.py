"""A model with a user's options, and its footprint as JSON: for `qwenkern footprint` and for the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..arguments import whole
from ..checkpoint.mixes import MIXES
from ..config import Config
from ..errors import RequestError, shown
from ..kernels import Weight
from ..kernels.pages import FORMATS as PAGES
from ..kernels.weights import FORMATS as WEIGHTS
from .cards import AS_OF, USABLE, Card
from .choice import layout_of
from .layout import Footprint, Layout

STORED = "stored"
DTYPES = ("bfloat16", "float16", "float32")
QUANTISED = [*(name for name in WEIGHTS if name != "dense"), *MIXES]
IN_CACHE = list(dict.fromkeys([*DTYPES, *(name for name in PAGES if name != "dense")]))


@dataclass(frozen=True)
class Case:
    """``quantize``: STORED (unchanged), or one of DTYPES and QUANTISED. ``kv_cache_dtype``: "auto" or one of
    IN_CACHE."""

    quantize: str
    kv_cache_dtype: str
    context: int
    sequences: int
    layout: Layout

    @property
    def argument(self) -> str | None:
        """The value of a model's quantize=."""
        return None if self.quantize == STORED else "none" if self.quantize in DTYPES else self.quantize

    @property
    def footprint(self) -> Footprint:
        return self.layout.footprint(self.context, self.sequences)

    def longest_context(self, card: Card) -> int:
        return self.layout.longest_context(card.usable, self.sequences)

    def fits(self, card: Card) -> bool:
        return self.footprint.total <= card.usable

    def described(self, model: str, cards: Sequence[Card]) -> dict[str, Any]:
        """As JSON; sizes in bytes."""
        layout, found = self.layout, self.footprint
        return {
            "model": model,
            "parameters": layout.config.num_parameters,
            "quantize": self.quantize,
            "dtype": str(layout.dtype).removeprefix("torch."),
            "context": self.context,
            "sequences": self.sequences,
            "kv_cache_dtype": layout.cache_name,
            "device": "cuda" if layout.on_gpu else "cpu",
            "bytes": asdict(found) | {"total": found.total},
            "exact": ["weights", "cache"],
            "weights_by_format": layout.weights_by_format | {"norms and biases": layout.vectors},
            "cache_bytes_per_token": layout.token,
            "cards_as_of": AS_OF,
            "usable": USABLE,
            "cards": [
                {
                    "name": each.name,
                    "memory": each.memory,
                    "usable": each.usable,
                    "is_older": each.is_older,  # than the kernels need
                    "fits": self.fits(each),
                    "longest_context": self.longest_context(each),
                }
                for each in cards
            ],
        }


def case_of(
    config: Config,
    device: str,
    *,
    context: int,
    quantize: str = STORED,
    sequences: int = 1,
    kv_cache_dtype: str = "auto",
    dtype: str = "auto",
    stored: Mapping[str, Weight] | None = None,
) -> Case:
    """device: "cuda" or "cpu". stored: as in `layout_of`. Raises RequestError for a value out of its range."""
    whole("context", context, 1, config.context_length)
    whole("sequences", sequences, 1, 1 << 20)
    form = quantize
    if form in DTYPES:
        if dtype not in ("auto", form):
            raise RequestError(f"quantize is {form!r}, and dtype {shown(dtype)}; expected one of the two")
        form, dtype = "none", form
    layout = layout_of(
        config,
        torch.device(device),
        quantize=None if form == STORED else form,
        stored=stored,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
    )
    return Case(quantize, kv_cache_dtype, context, sequences, layout)
