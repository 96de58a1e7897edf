"""The folder that keeps compiled libraries and measured choices from one process to the next.

Libraries from this folder are loaded and run, so no other user may be able to write to it. If that cannot be ensured,
nothing is kept, and everything else works."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
import stat
import time
from pathlib import Path

from ..environment import cache_folder
from ..ownership import only_we_can_write

logger = logging.getLogger(__name__)
DAY = 24 * 60 * 60  # seconds
UNUSED = 30  # days
_OURS = re.compile(r"[0-9a-f]{16}-[a-z0-9.-]+\.(so|json)|choice-[a-z-]+-[0-9a-f]{16}\.json")


def folder() -> Path | None:
    """The folder ``compiled`` in the folder of caches. None if the folder cannot be made or others may write to it; a
    warning says so once. A relative path is resolved once, against the current folder at the first call."""
    return _made(str(cache_folder()))


def trusted(path: Path) -> bool:
    """Whether the path is a file or a folder that only this user or root can have written. Raises OSError if it does
    not exist."""
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return False
    return only_we_can_write(status)


def used(file: Path) -> None:
    """Records that a file was used, by its modification time, at most once a day."""
    with contextlib.suppress(OSError):  # in a read-only folder nothing is removed either
        if time.time() - file.stat().st_mtime > DAY:
            os.utime(file)


def tidy(folder: Path) -> None:
    """Removes compiled libraries and measurements that nobody has used for UNUSED days, and unfinished folders older
    than a day. Files with other names stay. A library that another process has loaded stays usable there."""
    now = time.time()
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may remove files at the same time
            age = (now - file.stat().st_mtime) / DAY
            if _OURS.fullmatch(file.name) and age > UNUSED:
                file.unlink()
            elif file.name.startswith("making-") and age > 1:
                shutil.rmtree(file)


@functools.cache
def _made(root: str) -> Path | None:
    try:
        path = Path(root).expanduser().absolute() / "compiled"
        as_root = hasattr(os, "getuid") and os.getuid() == 0
        mode = 0o755 if as_root else 0o700  # a container's user may read what root built into its image
        if not path.is_dir():
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            path.chmod(mode)  # because the umask may remove rights
        elif not trusted(path) and path.stat().st_uid == os.getuid():
            path.chmod(mode)  # an earlier version made the folder with the umask's rights
        if not trusted(path):
            reason = "others may write to it"
        elif not os.access(path, os.R_OK | os.X_OK):
            reason = "it cannot be read"
        else:
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        reason = getattr(error, "strerror", None) or str(error)
    logger.warning("qwenkern: keeps no compiled C and no measurements in %s/compiled: %s", root, reason)
    return None
