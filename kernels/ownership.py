"""Whether another user can have written a file. Files that are loaded, run or trusted must not be writable by others.

Imports the standard library only, and nothing of the package, like environment.py."""

from __future__ import annotations

import os
import stat


def only_we_can_write(status: os.stat_result) -> bool:
    """Whether the file with this os.stat result belongs to this user or to root, and nobody else may write to it.
    Always True on Windows, where os.stat does not show access rights."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
