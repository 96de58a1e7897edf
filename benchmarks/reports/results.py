"""Results as files: what a row is, how two files are compared, and the tables that documents take from them."""

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
    """One provider's time for one case. Seconds, bytes a second, operations a second."""

    case: str
    model: str
    tokens: int
    context: int
    dtype: str
    provider: str
    seconds: Spread | None  # None: it failed
    error: str = ""
    same: bool = True  # the same op as ours, not only work of the same size
    bandwidth: float = 0.0
    rate: float = 0.0
    of_copy: float = 0.0  # share of the copy bandwidth
    of_matrix: float = 0.0  # share of the matrix rate
    floor: float = 0.0  # seconds: bytes at the copy bandwidth, or operations at the matrix rate, whichever is more
    ratio: Spread | None = None  # its time over ours, in the same rounds

    @property
    def key(self) -> tuple[str, ...]:
        return (self.case, self.model, str(self.tokens), str(self.context), self.dtype, self.provider)


def save(file: Path, document: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
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
    """The rows of a stored result. Raises ValueError that names the file where it is none."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        spreads = {name: None for name in ("seconds", "ratio")}
        return [Row(**row | {name: Spread(**row[name]) if row[name] else None for name in spreads}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a result of this runner: {error}") from error


@dataclass(frozen=True)
class Change:
    """A row that is slower or faster than it was, by more than its own noise."""

    row: Row
    ratio: float  # now over before

    def __str__(self) -> str:
        where = f"{self.row.case} x{self.row.tokens} {self.row.provider}"
        return f"{where}: {'slower' if self.ratio > 1 else 'faster'}, {self.ratio:.2f} of the time before"


def changes(before: Sequence[Row], now: Sequence[Row], least: float = 0.05) -> list[Change]:
    """What moved: by more than ``least``, and so that the middle halves of the readings do not touch."""
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
    """Of readings that were taken in the same rounds."""
    return Spread.of([a / b for a, b in zip(theirs, ours, strict=True)])


def middle_and_ends(values: Sequence[float]) -> list[float]:
    """Median, least and most, or nothing of nothing."""
    return [statistics.median(values), min(values), max(values)] if values else []


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))
