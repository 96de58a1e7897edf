"""Measures what a format of weights or of the cache costs in quality: the mean KL divergence of the next token's
distribution, and how often the most probable token stays the same.

    python benchmarks/quality.py                                    the demo model, as its file is
    python benchmarks/quality.py --quantize int4,int8,fp8           rounded as it loads
    python benchmarks/quality.py --cache int8,fp8 --json FILE
    python benchmarks/quality.py --model qwen2.5-3b --layers 4      random weights of the real sizes

Two divergences are measured for each case, over the same text:

    arithmetic   from the same quantised weights, multiplied in float32 with a float32 cache: the cost of rounding
                 activations and the cache, without that of rounding the weights
    whole        from the model before it was quantised, also in float32: the whole loss of a user
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qwenkern import Config, Model
from qwenkern.benchmarks.ops.timing import circumstances
from qwenkern.benchmarks.reports import results
from qwenkern.cli import terminal
from qwenkern.config import FAMILY
from qwenkern.kernels.environment import KERNELS

WINDOW = 256  # tokens that are computed at once
SHARE = 16  # tokens that are used of each text
TEXTS = Path(__file__).resolve().parents[1] / "tests" / "data" / "texts.json"  # in a checkout


def windows(model: Model, texts: Path) -> list[list[int]]:
    """The first tokens of each text of a JSON file [{"language": ..., "text": ...}, ...], WINDOW tokens at a time.
    Random tokens for a model without a tokenizer."""
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, model.config.vocab_size, (3, WINDOW), generator=generator).tolist()
    entries = json.loads(texts.read_text("utf-8"))
    first = {each["language"]: each["text"] for each in reversed(entries)}
    ids = [token for text in first.values() for token in model.tokenizer.encode(text + "\n")[:SHARE]]
    return [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]


def log_probabilities(model: Model, ids: list[list[int]], kernels: str = "") -> Iterator[Tensor]:
    """The log-probabilities [T, vocabulary] of each window, in float64. ``kernels`` names the backend."""
    before = os.environ.get(KERNELS.name)
    try:
        if kernels:
            os.environ[KERNELS.name] = kernels
        for window in ids:
            yield model.forward(window).double().log_softmax(-1)
    finally:
        if kernels:
            os.environ.pop(KERNELS.name)
        if before is not None:
            os.environ[KERNELS.name] = before


def load(model: str, layers: int, **how: Any) -> Model:
    """A model by name. A size of the family has random weights, with ``layers`` layers if not 0."""
    if model.lower() not in FAMILY:
        return Model.from_pretrained(model, device="cpu", cache_tokens=2 * WINDOW, **how)
    config = Config.from_name(model)
    config = replace(config, num_hidden_layers=layers) if layers else config
    return Model.from_config(config, device="cpu", cache_tokens=2 * WINDOW, **how)


def compare(truth: list[Tensor], other: Iterator[Tensor]) -> dict[str, float]:
    """The mean divergence in nats, and the share of tokens with the same most probable next token."""
    divergences, same = [], []
    for expected, found in zip(truth, other, strict=True):
        divergences.append((expected.exp() * (expected - found)).sum(-1))
        same.append(expected.argmax(-1) == found.argmax(-1))
    return {"kl": float(torch.cat(divergences).mean()), "same": float(torch.cat(same).double().mean())}


def main(
    model: Annotated[
        str, typer.Option(help="What `generate` takes, or a size of the family (random weights).")
    ] = "demo",
    quantize: Annotated[str, typer.Option(help="Formats of weights, with commas; stored: as the file is.")] = "stored",
    cache: Annotated[str, typer.Option(help="Formats of the cache, with commas.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Dtypes of activations, with commas.")] = "auto",
    layers: Annotated[int, typer.Option(help="Number of layers, with random weights; 0: those of the size.")] = 0,
    texts: Annotated[Path, typer.Option(help='JSON: [{"language": ..., "text": ...}, ...]')] = TEXTS,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
) -> None:
    """Compare quantised runs with float32 runs."""
    facts: dict[str, Any] = circumstances(torch.device("cpu")) | {"model": Path(model).name, "layers": layers}
    whole = load(model, layers, quantize="none", dtype="float32", kv_cache_dtype="float32")
    ids = windows(whole, texts)
    facts["tokens"] = sum(map(len, ids))
    original = list(log_probabilities(whole, ids, "reference"))
    del whole
    rows = []
    table = Table("weights", "activations", "cache", "KL, arithmetic", "same token", "KL, whole", "same token")
    for form in quantize.split(","):
        how = {} if form == "stored" else {"quantize": form}
        plain = load(model, layers, **how, dtype="float32", kv_cache_dtype="float32")
        exact = list(log_probabilities(plain, ids, "reference"))
        del plain
        for kind, pages in itertools.product(dtype.split(","), cache.split(",")):
            mine = load(model, layers, **how, dtype=kind, kv_cache_dtype=pages)
            found = list(log_probabilities(mine, ids))
            row: dict[str, Any] = {"weights": form, "dtype": str(mine.dtype).removeprefix("torch."), "cache": pages}
            row |= {"arithmetic": compare(exact, iter(found)), "whole": compare(original, iter(found))}
            rows.append(row)
            cells = [f"{row[each][key]:.2e}" if key == "kl" else f"{row[each][key]:.1%}" for each, key in CELLS]
            table.add_row(form, row["dtype"], pages, *cells)
            if json_file:
                results.save(json_file, facts | {"rows": rows})
    Console().print(table)


CELLS = [("arithmetic", "kl"), ("arithmetic", "same"), ("whole", "kl"), ("whole", "same")]

if __name__ == "__main__":
    terminal.run(terminal.command(main))
