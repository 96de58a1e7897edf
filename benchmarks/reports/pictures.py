"""Draws pictures of results."""

from __future__ import annotations

from pathlib import Path

from qwenkern.benchmarks.ops.timing import Ceilings
from qwenkern.benchmarks.reports.results import Row


def plot(rows: list[Row], limits: Ceilings, folder: Path) -> list[Path]:
    """Draws bandwidth over tokens, one picture per case. Needs matplotlib (the extra `bench`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for case in dict.fromkeys(row.place for row in rows):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        mine = [row for row in rows if row.place == case and row.seconds]
        for provider in dict.fromkeys(row.provider for row in mine):
            line = sorted((row.tokens, row.bandwidth / 1e9) for row in mine if row.provider == provider)
            axes.plot(*zip(*line, strict=True), marker="o", label=provider)
        axes.axhline(limits.copy / 1e9, color="grey", linestyle="--", label="copy, measured")
        axes.set(title=f"{case}, {mine[0].model}" if mine else case, xlabel="tokens", ylabel="GB/s", xscale="log")
        axes.legend(fontsize=8)
        files.append(folder / f"{case.replace(' ', '-')}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files
