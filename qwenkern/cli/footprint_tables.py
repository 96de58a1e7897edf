"""The tables of `qwenkern footprint`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from ..footprint.cards import AS_OF, USABLE, Card
from ..footprint.case import Case


def show(model: str, case: Case, device: str, cards: Sequence[Card]) -> None:
    """Prints one case: the parts of its memory, and a row for each card."""
    found, layout = case.footprint, case.layout
    dtype = str(layout.dtype).removeprefix("torch.")
    kept = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in [*layout.weights_by_format.items()])
    parts = Table(title=f"{model}: {layout.config.num_parameters:,} parameters, {_what(case)}", title_justify="left")
    parts.add_column("part")
    parts.add_column("bytes", justify="right")
    parts.add_column("what")
    cache = f"exact: {layout.token:,} a token, in {layout.cache_name}"
    rows = [
        ("weights", found.weights, f"exact: {kept}; norms and biases in {dtype}"),
        ("cache", found.cache, cache),
        ("activations", found.activations, f"allowance: a pass in {dtype}, logits, cosines and sines"),
        ("graphs", found.graphs, "allowance: captured passes and steps"),
        (
            "process",
            found.process,
            "allowance: CUDA and the libraries" if layout.on_gpu else "allowance: Python, torch",
        ),
    ]
    for name, size, how in rows:
        if size:
            parts.add_row(name, f"{size:,}", how)
    parts.add_section()
    parts.add_row("together", f"{found.total:,}", f"{found.total / 1e9:.2f} GB")
    out = Console(highlight=False)
    out.print(parts, _cards(case, device, cards))


def compare(model: str, cases: Sequence[Case], device: str, cards: Sequence[Card]) -> None:
    """Prints several cases, a row for each."""
    table = Table(title=f"{model}: memory in GB{' on a CPU' if device == 'cpu' else ''}", title_justify="left")
    for column in ("quantize", "cache in", "tokens", "weights", "cache", "rest", "all", "fits"):
        table.add_column(column, justify="left" if column in ("quantize", "cache in", "fits") else "right")
    for case in cases:
        found = case.footprint
        rest = found.total - found.weights - found.cache
        sizes = [f"{size / 1e9:.2f}" for size in (found.weights, found.cache, rest, found.total)]
        smallest = min((card.gib for card in cards if case.fits(card)), default=None)
        tokens = f"{case.context:,}" if case.sequences == 1 else f"{case.sequences:,} x {case.context:,}"
        fits = "no card" if smallest is None else f"{smallest} GB"
        table.add_row(case.quantize, case.layout.cache_name, tokens, *sizes, fits)
    table.caption = f"rest: allowances; fits: the smallest of the cards, {USABLE:.0%} of whose memory is enough"
    table.caption_justify = "left"
    Console(highlight=False).print(table)


def show_check(checked: dict[str, Any]) -> None:
    table = Table(title="Loaded here", title_justify="left")
    for column in ("part", "computed", "actual"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name in ("weights", "cache"):
        table.add_row(name, f"{checked[name]['computed']:,}", f"{checked[name]['actual']:,}")
    out = Console(highlight=False)
    out.print(table)
    process = checked["process"]
    for name, size in process["used"].items():
        before, loaded = process["before"][name], process["loaded"][name]
        out.print(
            f"{name} memory of this process: {before:,} bytes, with the model {loaded:,}, after a pass {size:,}",
            soft_wrap=True,
        )
    for name, size in checked.get("gpu", {}).items():
        out.print(f"{name} memory of the GPU: {size:,} bytes")


def _cards(case: Case, device: str, cards: Sequence[Card]) -> Table:
    """A table with a row for all cards that have the same memory."""
    what = "machines" if device == "cpu" else f"cards, as of {AS_OF}"
    table = Table(title=f"{USABLE:.0%} of the memory of common {what}", title_justify="left")
    for column in ("memory", "fits", "left", "longest context", "cards"):
        table.add_column(column, justify="left" if column in ("cards", "fits") else "right")
    total = case.footprint.total
    for _, group in groupby(sorted(cards, key=lambda card: card.gib), key=lambda card: card.gib):
        alike = [*group]
        longest = case.longest_context(alike[0])
        left = alike[0].usable - total
        names = ", ".join(card.name + " *" * card.is_older for card in alike) if device != "cpu" else ""
        table.add_row(
            f"{alike[0].gib} GB",
            "yes" if left >= 0 else "no",
            f"{left / 1e9:.1f} GB" if left >= 0 else "",
            f"{longest:,}" if longest else "",
            names,
        )
    if any(card.is_older for card in cards):
        table.caption = "* older than the kernels need: torch runs the model, slower"
        table.caption_justify = "left"
    return table


def _what(case: Case) -> str:
    sequences = "1 sequence" if case.sequences == 1 else f"{case.sequences:,} sequences"
    stored = "as it is stored" if case.quantize == "stored" else case.quantize
    return f"{stored}, {sequences} of {case.context:,} tokens"
