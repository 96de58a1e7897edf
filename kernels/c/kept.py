"""The folder where compiled libraries and measured choices are kept from one process to the next.

What lies there is loaded and run, so it must be ours alone; where it cannot be, nothing is kept and all else works."""

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
    """``compiled`` in the folder of caches. None, which is said once, where it cannot be made or others may write to
    it. A relative one is below the folder that was the current one when it was first needed."""
    return _made(str(cache_folder()))


def trusted(path: Path) -> bool:
    """Whether it is a file or a folder, and only this user, or the administrator, can have written it. Raises OSError
    where it is not there."""
    status = path.stat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return False
    return only_we_can_write(status)


def used(file: Path) -> None:
    """Notes that a file was needed, once a day."""
    with contextlib.suppress(OSError):  # a read-only folder: nothing is tidied there either
        if time.time() - file.stat().st_mtime > DAY:
            os.utime(file)


def tidy(folder: Path) -> None:
    """Removes what earlier versions compiled and measured and nobody has used for UNUSED days, and what has not been
    finished for a day. Files that are not ours by name stay; what another process has loaded lives on there."""
    now = time.time()
    for file in folder.iterdir():
        with contextlib.suppress(OSError):  # another process tidies at once
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
        mode = 0o755 if as_root else 0o700  # what root makes in an image is there for whoever runs it
        if not path.is_dir():
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            path.chmod(mode)  # whatever the umask
        elif not trusted(path) and path.stat().st_uid == os.getuid():
            path.chmod(mode)  # made by an earlier version, under a generous umask
        if not trusted(path):
            reason = "others may write to it"
        elif not os.access(path, os.R_OK | os.X_OK):
            reason = "it cannot be read"
        else:
            return path
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        reason = getattr(error, "strerror", None) or str(error)
    logger.warning("qwenkern: keeps no compiled C and no measurements in %s/compiled: %s", root, reason)
    return None
