"""Results as files: the rows, and the comparison of two files."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwenkern.benchmarks.ops.timing import Spread


@dataclass(frozen=True)
class Row:
    """One provider's time for one case, in seconds, bytes per second and operations per second."""

    case: str
    model: str
    tokens: int
    context: int
    dtype: str
    provider: str
    seconds: Spread | None  # None: it failed
    error: str = ""
    same: bool = True  # False: work of the same size that is not the same op
    bandwidth: float = 0.0
    rate: float = 0.0
    of_copy: float = 0.0  # share of the copy bandwidth
    of_matrix: float = 0.0  # share of the matrix rate
    floor: float = 0.0  # roofline time in seconds: bytes / copy bandwidth or operations / matrix rate, the larger
    weights: str = "dense"  # the formats
    pages: str = "dense"
    ratio: Spread | None = None  # the speed-up of qwenkern: this provider's time / qwenkern's, in the same rounds

    @property
    def key(self) -> tuple[str, ...]:
        formats = self.weights, self.pages
        return (self.case, self.model, str(self.tokens), str(self.context), self.dtype, *formats, self.provider)

    @property
    def place(self) -> str:
        """The case, and the formats that are not dense."""
        formats = [self.weights] * (self.weights != "dense") + [f"{self.pages} pages"] * (self.pages != "dense")
        return " ".join([self.case, *formats])


def save(file: Path, document: dict[str, Any]) -> None:
    """Writes a whole file, or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(document, stream, indent=1)
            stream.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def document(circumstances: dict[str, Any], ceilings: Any, rows: Iterable[Row]) -> dict[str, Any]:
    return {**circumstances, "ceilings": asdict(ceilings), "rows": [asdict(row) for row in rows]}


def load(file: Path) -> list[Row]:
    """The rows of a stored result. Raises ValueError, which names the file, if it is not a result."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        spreads = {name: None for name in ("seconds", "ratio")}
        return [Row(**row | {name: Spread(**row[name]) if row[name] else None for name in spreads}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a result of this runner: {error}") from error


@dataclass(frozen=True)
class Change:
    """A row that became slower or faster by more than its noise."""

    row: Row
    ratio: float  # the time now over the time before

    def __str__(self) -> str:
        where = f"{self.row.place} x{self.row.tokens} {self.row.provider}"
        return f"{where}: {'slower' if self.ratio > 1 else 'faster'}, {self.ratio:.2f} of the time before"


def changes(before: Sequence[Row], now: Sequence[Row], least: float = 0.05) -> list[Change]:
    """The rows that changed by more than ``least``, and whose ranges from the 20th to the 80th percentile are apart."""
    old = {row.key: row.seconds for row in before}
    found = []
    for row in now:
        then = old.get(row.key)
        if then is None or row.seconds is None:
            continue
        apart = row.seconds.p20 > then.p80 or row.seconds.p80 < then.p20
        ratio = row.seconds.p50 / then.p50
        if apart and abs(ratio - 1) > least:
            found.append(Change(row, ratio))
    return found


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """The spread of the ratios of readings in the same rounds."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


def middle_and_ends(values: Sequence[float]) -> list[float]:
    """The median, the smallest and the largest value; empty for no values."""
    return [statistics.median(values), min(values), max(values)] if values else []


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))
