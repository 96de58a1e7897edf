"""Where the command ``qwenkern`` begins. Ctrl-C ends it with code 130, without a word, while torch is imported, too. A
current folder that was deleted is an error in one line.

It lies beside the package, because importing anything inside the package imports torch first, which takes seconds. Only
the standard library is imported here.
"""

import os
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Entry point."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else the shell, or a caller, has other plans with Ctrl-C
        # Not KeyboardInterrupt: what is imported may catch that. Nothing is open yet that would have to be closed.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        os.getcwd()
    except OSError as error:  # torch's MKL would end the process
        sys.exit(f"error: the current folder: {error.strerror}; expected one that is there")
    from qwenkern.cli.commands import main as run

    try:
        signal.signal(signal.SIGINT, before)
        run()
    except KeyboardInterrupt:  # in the moment before run() looks out for it
        sys.exit(130)
