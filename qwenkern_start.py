"""Where the command ``qwenkern`` begins, and ``python -m qwenkern``. Ctrl-C ends both with code 130, without a word,
while torch is imported, too. A current folder that was deleted is an error in one line.

It lies beside the package, because importing anything inside the package imports torch first, which takes seconds. Only
the standard library is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn

_before: Any = None  # what Ctrl-C did before watch


def main() -> NoReturn:
    """Entry point."""
    watch()
    from qwenkern.cli.commands import main as run

    try:
        signal.signal(signal.SIGINT, _before)
        run()
    except KeyboardInterrupt:  # in the moment before run() looks out for it
        sys.exit(130)


def watch() -> None:
    """Has Ctrl-C end the process until main hands over to the program. Ends it where the current folder is gone."""
    global _before
    if _before is None:
        _before = signal.getsignal(signal.SIGINT)
        if _before is signal.default_int_handler:  # else the shell, or a caller, has other plans with Ctrl-C
            # Not KeyboardInterrupt: what is imported may catch that. Nothing is open yet that would have to be closed.
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        os.getcwd()
    except OSError as error:  # torch's MKL would end the process
        sys.exit(f"error: the current folder: {error.strerror}; expected one that is there")


def is_module_run(package: str) -> bool:
    """Whether ``python -m package`` is importing the package, which Python does before it runs its __main__."""
    return sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in (package, f"-m{package}")
