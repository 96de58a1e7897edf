"""Whether a file can have been written by others: what is loaded and run, or believed, must not.

Standard library only, and nothing of the package, as environment.py."""

from __future__ import annotations

import os
import stat


def only_we_can_write(status: os.stat_result) -> bool:
    """Whether what os.stat says this of belongs to this user, or to the administrator, and nobody else may write to it.
    Always True on Windows, where rights are not read this way."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
