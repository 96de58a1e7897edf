"""`qwenkern footprint`: what a model takes, and which cards it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..arguments import whole
from ..checkpoint.mixes import MIXES
from ..config import Config
from ..errors import ConfigError, RequestError, shown
from ..footprint import Footprint, Layout, layout_of
from ..footprint.cards import AS_OF, CARDS, MACHINES, USABLE, Card, card_named
from ..kernels import Weight
from ..kernels.pages import FORMATS as PAGES
from ..kernels.weights import FORMATS as WEIGHTS
from ..loading import find
from . import footprint_check, footprint_tables

QUANTISED = [*(name for name in WEIGHTS if name != "dense"), *MIXES]
STORED = "stored"
DTYPES = ("bfloat16", "float16", "float32")
IN_CACHE = dict.fromkeys([*DTYPES, *(name for name in PAGES if name != "dense")])


@dataclass(frozen=True)
class Case:
    """A combination of what was asked for. ``quantize`` is a word of the option of that name."""

    quantize: str
    kv_cache_dtype: str
    context: int
    sequences: int
    layout: Layout

    @property
    def argument(self) -> str | None:
        """As quantize= of a model."""
        return None if self.quantize == STORED else "none" if self.quantize in DTYPES else self.quantize

    @property
    def footprint(self) -> Footprint:
        return self.layout.footprint(self.context, self.sequences)

    def longest_context(self, card: Card) -> int:
        return self.layout.longest_context(card.usable, self.sequences)

    def fits(self, card: Card) -> bool:
        return self.footprint.total <= card.usable


def footprint(
    model: Annotated[str, typer.Argument(help="Name of a size, hub id, folder or .gguf file.")] = "demo",
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            help=f"stored (as it is), {', '.join(DTYPES)}, {', '.join(QUANTISED)}. This and the next three "
            "options may be given several times.",
            show_default="stored",
        ),
    ] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens of a sequence.", show_default="4096")] = None,
    sequences: Annotated[list[int] | None, typer.Option(help="Sequences at once.", show_default="1")] = None,
    kv_cache_dtype: Annotated[
        list[str] | None,
        typer.Option(help=", ".join(["auto", *IN_CACHE]) + ".", show_default="auto"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu.", show_default="cuda; with --check what is here")
    ] = None,
    card: Annotated[str | None, typer.Option(help='Only this card, such as "RTX 4090".')] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Load the model on this machine, and compare what it takes.")
    ] = False,
) -> None:
    """Compute the memory that a model takes, and which cards it fits. Reads no weights, except with --check."""
    device = footprint_check.device_of(device, check)
    cards = MACHINES if device == "cpu" else CARDS
    if card is not None:
        cards = (card_named(card, cards),)
    config, stored = numbers_of(model)
    cases = []
    for form, pages in product(quantize or [STORED], kv_cache_dtype or ["auto"]):
        layout = _layout(config, stored, device, form, dtype, pages)
        for length, count in product(context or [min(4096, config.context_length)], sequences or [1]):
            whole("context", length, 1, config.context_length)
            whole("sequences", count, 1, 1 << 20)
            cases.append(Case(form, pages, length, count, layout))
    if check and len(cases) > 1:
        raise RequestError(f"--check was given with {len(cases)} combinations; expected one")
    checked = footprint_check.compare(model, cases[0], device) if check else None
    if as_json:
        found = [_described(model, case, device, cards) for case in cases]
        typer.echo(json.dumps({"cases": found} if checked is None else {"cases": found, "check": checked}, indent=2))
    elif len(cases) == 1:
        footprint_tables.show(model, cases[0], device, cards)
    else:
        footprint_tables.compare(model, cases, device, cards)
    if checked is not None:
        if not as_json:
            footprint_tables.show_check(checked)
        footprint_check.refuse_a_difference(checked)


def _layout(
    config: Config, stored: Mapping[str, Weight] | None, device: str, form: str, dtype: str, kv_cache_dtype: str
) -> Layout:
    if form in DTYPES:
        if dtype not in ("auto", form):
            raise RequestError(f"quantize is {form!r}, and dtype {shown(dtype)}; expected one of the two")
        form, dtype = "none", form
    return layout_of(
        config,
        torch.device(device),
        quantize=None if form == STORED else form,
        stored=stored,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
    )


class _Known(Exception):
    """Ends a download when the configuration is there."""

    def __init__(self, config: Config) -> None:
        self.config = config


def numbers_of(model: str) -> tuple[Config, Mapping[str, Weight] | None]:
    """The configuration of a size of the family or of a checkpoint, and the quantised matrices of a file
    (None: the configuration says all). Weights of a hub's repository are not downloaded."""

    def stop(config: Config) -> None:
        raise _Known(config)

    if not Path(model).exists():
        try:
            return Config.from_name(model), None
        except ConfigError:  # another name
            pass
    try:
        _, checkpoint = find(model, accept=stop)
    except _Known as known:
        return known.config, None
    return checkpoint.config, checkpoint.formats


def _described(model: str, case: Case, device: str, cards: tuple[Card, ...]) -> dict[str, Any]:
    layout, found = case.layout, case.footprint
    return {
        "model": model,
        "parameters": layout.config.num_parameters,
        "quantize": case.quantize,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "context": case.context,
        "sequences": case.sequences,
        "kv_cache_dtype": layout.cache_name,
        "device": device,
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
                "fits": case.fits(each),
                "longest_context": case.longest_context(each),
            }
            for each in cards
        ],
    }
