"""Downloads a published file once into the folder of caches, from the first of its origins that has it.

An origin completes a file named ``partial``. When its sha256 is right, the file gets its final name, whatever the
origin. A stamp beside the file then records the file's size, inode and times. While these are unchanged, later starts
do not check the sha256 again.
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

Progress = Callable[[str, int, int], None]  # (the origin's name, bytes downloaded, bytes in all)

_CHUNK = 1 << 20
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # absent on Windows, where only privileged users make links


class Origin(Protocol):
    """A place that a file can be downloaded from. Its bytes are not trusted: the file's sha256 decides."""

    @property
    def name(self) -> str:
        """Its name in a progress bar."""

    def space(self, done: int) -> int:
        """Bytes of disk that the rest of the download needs, after ``done`` bytes."""

    def complete(self, file: BinaryIO, scratch: Path, report: Callable[[int], None]) -> None:
        """Completes a file that holds the beginning of the whole. Raises CheckpointError if it cannot.

        scratch: an empty folder for temporary files. report: called with the number of bytes that the file has."""


@dataclass(frozen=True)
class Download:
    """A published file and its origins, in the order in which they are tried."""

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
    """The absolute path of the folder of caches. Raises CheckpointError if it is below a home folder, or below a
    current folder, that does not exist."""
    folder = cache_folder()
    try:
        return folder.expanduser().absolute()
    except (RuntimeError, OSError) as error:  # the user has no home, or the current folder was deleted
        raise CheckpointError(f"{folder}: {error}; set {CACHE.name} to a folder for downloads") from error


def fetch(source: Download, progress: Progress | None = None) -> Path:
    """The path of the file, which is downloaded unless it is there. Raises CheckpointError with the problem of each
    origin."""
    path = source.path
    try:
        if _is_verified(source):
            return path
        _make_folder(path.parent)
        lock = path.with_name(source.file + ".lock")
        _refuse_planted(lock)  # before FileLock opens it
        with FileLock(lock):
            if not _is_verified(source):  # another process may have downloaded it meanwhile
                _fetch(source, progress or (lambda origin, done, total: None))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = source.origins[-1].space(_size(source.partial))
            raise _disk_full(source, needed, "the disk filled up") from error
        raise CheckpointError(f"{path}: cannot be written, expected a writable cache ({error})") from error
    return path


def _is_verified(source: Download) -> bool:
    """Whether the file exists and has the right sha256. The sha256 is computed unless the stamp shows that the file is
    unchanged."""
    if _size(source.path) != source.size:
        return False
    with open(source.path, "rb") as file:
        status = os.fstat(file.fileno())
        if _read_stamp(source) == _stamp(source, status):
            return True
        if (found := _sha256(file)) == source.sha256:
            _write_stamp(source, status)
            return True
    logger.warning("%s: found sha256 %s, expected %s; it is downloaded again", source.path, found, source.sha256)
    return False


def _stamp(source: Download, status: os.stat_result) -> str:
    """The file's hash, size, inode and times. A change of the file changes them: the system sets ctime, and programs
    cannot choose it."""
    return f"{source.sha256} {status.st_size} {status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}\n"


def _read_stamp(source: Download) -> str | None:
    """The text of the stamp, or None unless this user or root wrote it."""
    try:
        descriptor = os.open(source.stamp, os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read(1000) if _is_ours(os.fstat(descriptor)) else None


def _write_stamp(source: Download, status: os.stat_result) -> None:
    with contextlib.suppress(OSError):  # in a read-only cache every start reads the file
        descriptor, temporary = tempfile.mkstemp(dir=source.stamp.parent, prefix=source.stamp.name)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(_stamp(source, status))
        os.chmod(temporary, 0o644)  # for other users of this cache
        os.replace(temporary, source.stamp)


def _fetch(source: Download, progress: Progress) -> None:
    """Completes the partial file and renames it. The caller holds the lock."""
    partial = source.partial
    for left in partial.parent.glob(glob.escape(_scratch(partial)) + "*"):  # left by a killed download
        shutil.rmtree(left, ignore_errors=True)
    with _open_own(partial) as file:
        _complete(source, file, progress)
        inode = os.fstat(file.fileno()).st_ino
    os.replace(partial, source.path)
    status = os.stat(source.path)
    if status.st_ino == inode:  # else another file has this name now, and the next start checks its sha256
        _write_stamp(source, status)


def _complete(source: Download, file: BinaryIO, progress: Progress) -> None:
    """Tries the origins in order until the file has its sha256. Raises CheckpointError with the problem of each
    origin."""
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
    """Completes the file from one origin. If the sha256 is wrong, the file is emptied. If it had bytes of an earlier
    run, the origin is tried once more from the start; otherwise CheckpointError is raised."""
    while True:
        started = os.fstat(file.fileno()).st_size
        with tempfile.TemporaryDirectory(  # an unpredictable name
            prefix=_scratch(source.partial), dir=source.partial.parent, ignore_cleanup_errors=True
        ) as scratch:
            origin.complete(file, Path(scratch), lambda done: progress(origin.name, done, source.size))
        if (found := _sha256(file)) == source.sha256:
            return
        file.truncate(0)
        fault = f"{source.partial}: found sha256 {found} of what {origin.name} completed, expected {source.sha256}"
        logger.warning("%s; it is deleted", fault)
        if not started:
            raise CheckpointError(f"{fault}; deleted, run again to download it again")
        # else the wrong bytes may be those of an earlier run or of another origin


def _scratch(partial: Path) -> str:
    """The prefix of the names of scratch folders."""
    return f"{partial.stem}.fetch-"


def _make_folder(folder: Path) -> None:
    """Makes a folder and the missing folders above it. Other users cannot write to them, whatever the umask."""
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(mode=0o755, exist_ok=True)


def _refuse_planted(path: Path) -> None:
    """Raises CheckpointError if the path is a link, because the link may point to a file that must not be written."""
    if os.path.lexists(path):
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise CheckpointError(
                f"{path}: found a link, or something that is no file; expected a plain file: remove it and run again"
            )


def _is_ours(status: os.stat_result) -> bool:
    """Whether this is a plain file without other links that only this user or root can have written."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        return False
    return only_we_can_write(status)


@contextlib.contextmanager
def _open_own(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for reading and writing, or makes it. If the path is a link, or a file that other users can write
    to, it is removed first."""
    flags = os.O_RDWR | os.O_CREAT | _NO_FOLLOW | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = None
    with contextlib.suppress(OSError):  # the path is a link, or another user's file
        descriptor = os.open(path, flags, 0o644)
    if descriptor is None or not _is_ours(os.fstat(descriptor)):
        if descriptor is not None:
            os.close(descriptor)
        if os.path.lexists(path):
            logger.warning("%s: others can write to it, or it is a link; removed, the download starts over", path)
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
