"""The folder where compiled libraries and measured choices are kept from one process to the next.

What lies there is loaded and run, so it must be ours alone; where it cannot be, nothing is kept and all else works."""

from __future__ import annotations

import functools
import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def folder() -> Path | None:
    """``compiled`` below QWENKERN_CACHE, else ``$XDG_CACHE_HOME/qwenkern``, else ``~/.cache/qwenkern``. None, which is
    said once, where it cannot be made or others may write to it."""
    own, shared = os.environ.get("QWENKERN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return _made(own or str(Path(shared or "~/.cache", "qwenkern")))


def trusted(path: Path) -> bool:
    """Whether only this user, or the administrator, can have written it. Raises OSError where it is not there."""
    status = path.stat()
    if not hasattr(os, "getuid"):  # Windows, where rights are not read this way
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _made(root: str) -> Path | None:
    try:
        path = Path(root).expanduser() / "compiled"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not trusted(path) and path.stat().st_uid == os.getuid():
            path.chmod(0o700)  # made by an earlier version, under a generous umask
        if trusted(path):
            return path
        reason = "others may write to it"
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        reason = getattr(error, "strerror", None) or str(error)
    logger.warning("qwenkern: keeps no compiled C and no measurements in %s/compiled: %s", root, reason)
    return None
