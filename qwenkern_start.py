"""The entry point of ``qwenkern`` and ``python -m qwenkern``. Ctrl-C ends both silently with code 130, even while torch
is imported. If the current folder was deleted, they print an error in one line.

This module is outside of the package, because an import of anything inside the package first imports torch, which takes
seconds. This module imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

_before: Any = None  # the handler of SIGINT before watch


def main() -> NoReturn:
    """Entry point."""
    watch()
    from qwenkern.cli.commands import main as run

    try:
        signal.signal(signal.SIGINT, _before)
        run()
    except KeyboardInterrupt:  # before run() handles it
        sys.exit(130)


def watch() -> None:
    """Lets Ctrl-C end the process until main starts the program. Ends the process if the current folder is gone."""
    global _before
    if _before is None:
        _before = signal.getsignal(signal.SIGINT)
        if _before is signal.default_int_handler:  # else the shell or a caller has its own handler
            # Not KeyboardInterrupt, which imported code may catch. Nothing is open yet that would have to be closed.
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        os.getcwd()
    except OSError as error:  # otherwise torch's MKL would end the process
        sys.exit(f"error: the current folder: {error.strerror}; expected one that is there")


def is_module_run(package: str) -> bool:
    """Whether ``python -m package`` is importing the package, which happens before Python runs its __main__."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in (package, f"-m{package}")
