"""One published file, fetched once into the folder of caches, from the first of its origins that has it.

An origin completes a file of our own under the name ``partial``; the whole gets its final name when its sha256 is
right, wherever the bytes came from. A stamp beside it spares the next start the reading: it holds what the file system
said of the file then.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from filelock import FileLock

from ..errors import CheckpointError
from ..kernels.environment import CACHE, cache_folder
from ..kernels.ownership import only_we_can_write

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (where the bytes come from, bytes that are there, bytes in all)

_CHUNK = 1 << 20
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has neither this nor links that anybody may make


class Origin(Protocol):
    """Where a file can be fetched from. Its bytes are not trusted: the file's sha256 decides."""

    @property
    def name(self) -> str:
        """What a progress bar calls it."""

    def space(self, done: int) -> int:
        """Bytes of disk that the rest needs, where so many are there."""

    def complete(self, file: BinaryIO, scratch: Path, report: Callable[[int], None]) -> None:
        """Brings a file that is a beginning of the whole to its full length. Raises CheckpointError where it cannot.

        scratch: an empty folder for whatever it needs. report: called with the bytes that are there."""


@dataclass(frozen=True)
class Download:
    """A file that was published, and its origins, the first to be asked first."""

    folder: str
    file: str
    sha256: str
    size: int  # in bytes
    origins: tuple[Origin, ...]

    @property
    def path(self) -> Path:
        return cache_dir() / "models" / self.folder / self.file

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.file + ".partial")

    @property
    def stamp(self) -> Path:
        return self.path.with_name(self.file + ".verified")


def cache_dir() -> Path:
    """The absolute path of the folder of caches. Raises CheckpointError where it is below a home, or a current folder,
    that is not there."""
    folder = cache_folder()
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:  # nobody's home; a current folder that was deleted
        raise CheckpointError(f"{folder}: {error}; set {CACHE.name} to a folder for downloads") from error


def fetch(source: Download, progress: Progress | None = None) -> Path:
    """The file's path, after it was fetched unless it is there. Raises CheckpointError with what each origin said."""
    path = source.path
    try:
        if _is_verified(source):
            return path
        _make_folder(path.parent)
        lock = path.with_name(source.file + ".lock")
        _refuse_planted(lock)  # before FileLock opens it
        with FileLock(lock):
            if not _is_verified(source):  # nobody fetched it while we waited
                _fetch(source, progress or (lambda origin, done, total: None))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = source.origins[-1].space(_size(source.partial))
            raise _disk_full(source, needed, "the disk filled up") from error
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
    """Completes the partial file and gives it its name. The lock is held."""
    partial = source.partial
    for left in partial.parent.glob(glob.escape(_scratch(partial)) + "*"):  # by a pull that was killed
        shutil.rmtree(left, ignore_errors=True)
    with _open_own(partial) as file:
        _complete(source, file, progress)
        inode = os.fstat(file.fileno()).st_ino
    os.replace(partial, source.path)
    status = os.stat(source.path)
    if status.st_ino == inode:  # else the next start looks for itself
        _write_stamp(source, status)


def _complete(source: Download, file: BinaryIO, progress: Progress) -> None:
    """Asks the origins one after the other, until the file has its hash. Raises CheckpointError with what each said."""
    faults = []
    for origin in source.origins:
        done = os.fstat(file.fileno()).st_size
        if (free := shutil.disk_usage(source.partial.parent).free) < origin.space(done):
            raise _disk_full(source, origin.space(done), f"found {free / 1e6:,.0f} MB free")
        if done:
            logger.info("%s: %d of %d bytes are there", source.partial, done, source.size)
        try:
            _complete_from(origin, source, file, progress)
            return
        except CheckpointError as fault:
            logger.info("%s", fault)
            faults.append(str(fault))
    raise CheckpointError("; ".join(faults))


def _complete_from(origin: Origin, source: Download, file: BinaryIO, progress: Progress) -> None:
    """Raises CheckpointError, with an empty file, where the origin's bytes are not what was published."""
    while True:
        started = os.fstat(file.fileno()).st_size
        with tempfile.TemporaryDirectory(  # a name that nobody foresees
            prefix=_scratch(source.partial), dir=source.partial.parent, ignore_cleanup_errors=True
        ) as scratch:
            origin.complete(file, Path(scratch), lambda done: progress(origin.name, done, source.size))
        if (found := _sha256(file)) == source.sha256:
            return
        file.truncate(0)
        fault = f"{source.partial}: found sha256 {found} of what {origin.name} completed, expected {source.sha256}"
        logger.warning("%s; it is thrown away", fault)
        if not started:
            raise CheckpointError(f"{fault}; thrown away, run again to refetch")
        # else the beginning, of an earlier run or another origin, may have been what was wrong


def _scratch(partial: Path) -> str:
    """How the names of scratch folders begin."""
    return f"{partial.stem}.fetch-"


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
    return only_we_can_write(status)


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
            logger.warning("%s: others can write to it, or it is a link; removed, a new one is begun", path)
            os.unlink(path)
        descriptor = os.open(path, flags | os.O_EXCL, 0o644)
    with open(descriptor, "r+b") as file:
        yield file


def _disk_full(source: Download, needed: int, found: str) -> CheckpointError:
    return CheckpointError(
        f"{source.path.parent}: {found}, expected {needed / 1e6:,.0f} MB for the rest of {source.file}; make room, or "
        f"point {CACHE.name} at another disk, and run again (it resumes)"
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
