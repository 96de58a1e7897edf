"""`qwenkern footprint`: the memory that a model takes, and the cards that it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from ..config import Config
from ..errors import ConfigError, RequestError
from ..footprint.cards import CARDS, MACHINES, card_named
from ..footprint.case import DTYPES, IN_CACHE, QUANTISED, STORED, case_of
from ..kernels import Weight
from ..loading import find
from . import footprint_check, footprint_tables


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
        for length, count in product(context or [min(4096, config.context_length)], sequences or [1]):
            case = case_of(
                config,
                device,
                context=length,
                quantize=form,
                sequences=count,
                kv_cache_dtype=pages,
                dtype=dtype,
                stored=stored,
            )
            cases.append(case)
    if check and len(cases) > 1:
        raise RequestError(f"--check was given with {len(cases)} combinations; expected one")
    checked = footprint_check.compare(model, cases[0], device) if check else None
    if as_json:
        found = [case.described(model, cards) for case in cases]
        typer.echo(json.dumps({"cases": found} if checked is None else {"cases": found, "check": checked}, indent=2))
    elif len(cases) == 1:
        footprint_tables.show(model, cases[0], device, cards)
    else:
        footprint_tables.compare(model, cases, device, cards)
    if checked is not None:
        if not as_json:
            footprint_tables.show_check(checked)
        footprint_check.refuse_a_difference(checked)


class _Known(Exception):
    """Ends a download as soon as the configuration is there."""

    def __init__(self, config: Config) -> None:
        self.config = config


def numbers_of(model: str) -> tuple[Config, Mapping[str, Weight] | None]:
    """The configuration of a size of the family or of a checkpoint, and the quantised matrices of a checkpoint on this
    machine (None: the configuration is enough). Weights of a hub repository are not downloaded."""

    def stop(config: Config) -> None:
        raise _Known(config)

    if not Path(model).exists():
        try:
            return Config.from_name(model), None
        except ConfigError:  # not a size of the family
            pass
    try:
        _, checkpoint = find(model, accept=stop)
    except _Known as known:
        return known.config, None
    return checkpoint.config, checkpoint.formats
