"""The standard streams and the exit codes of every program.

    0      success
    1      an error, in one line on stderr
    2      a wrong command line
    130    Ctrl-C
    141    the reader of the output has closed it; programs that SIGPIPE ends have this code, too

An error while writing to stderr changes neither the output nor the exit code.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console

from ..errors import Error, RequestError


class _Stderr(Console):
    def on_broken_pipe(self) -> None:  # rich's own method ends the program, and closes stdout
        self.quiet = True


_OF_WRITING = (
    errno.ENOSPC,
    errno.EIO,
    errno.EBADF,
    errno.EFBIG,
    errno.EDQUOT,
)  # errors of a stream, which have no file name
stderr = _Stderr(stderr=True, highlight=False)


def note(*parts: Any, **keywords: Any) -> None:
    """Prints a note on stderr, as rich's Console.print does."""
    with contextlib.suppress(OSError):  # such as a full disk: see the module's docstring
        stderr.print(*parts, **keywords)


def complain(error: object) -> None:
    """Prints an error on stderr."""
    note("[red]error:[/]", end=" ")
    note(str(error), markup=False, soft_wrap=True)


def warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Replaces warnings.showwarning. Leaves out the line of code, which does not help users of the command line."""
    note("[yellow]warning:[/]", end=" ")
    note(str(message), markup=False, soft_wrap=True)


def read_stdin() -> str:
    """All of standard input, which must be UTF-8, or the locale's encoding if this is another one."""
    if sys.stdin is None:
        raise RequestError("standard input is closed; expected a prompt there, or as an argument")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input: {_not_text(error)}") from error
    except OSError as error:
        raise RequestError(f"standard input: {error.strerror}") from error


def ask(prompt: str) -> str | None:
    """Shows the prompt on a terminal, and returns a line from standard input: "" after Ctrl-C, None at the end."""
    if sys.stdin is None:
        return None
    try:
        return input(prompt if sys.stdin.isatty() else "").strip()
    except KeyboardInterrupt:
        print()
        return ""
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input: {_not_text(error)}") from error


def _not_text(error: UnicodeDecodeError) -> str:
    found = error.object[error.start]
    return f"byte 0x{found:02x} at {error.start} is not {error.encoding}; expected text"


def command(function: Callable[..., Any]) -> typer.Typer:
    """A program with one command, from a function with typer's annotations."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    return app


def run(app: typer.Typer) -> NoReturn:
    """Runs the program with the arguments of the command line, and exits."""
    try:
        _prepare()
        code = app(standalone_mode=False) or 0  # the code of typer.Exit
        sys.stdout.flush()
    except Error as error:
        complain(error)
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as done:  # typer and rich raise it for a broken pipe
        code = 141 if isinstance(done.__context__, BrokenPipeError) else done.code
    except BrokenPipeError:
        code = 141
    except OSError as error:
        file = error.filename or ("standard output" if error.errno in _OF_WRITING else None)
        complain(f"{file}: {error.strerror}" if file else error)
        code = 1
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):
            with contextlib.suppress(OSError):
                error.show()  # a wrong command line: click prints the usage
            code = error.exit_code
        elif isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):  # torch's
            complain(f"not enough memory: {str(error).partition(chr(10))[0]}")
            code = 1
        else:
            raise
    _exit(code)


def _prepare() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get this number, and all output
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  open as long as the program runs
    if sys.stdout is None:
        raise RequestError("standard output is closed; expected somewhere to write to")
    if isinstance(sys.stdin, io.TextIOWrapper):
        ascii_only = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if ascii_only else sys.stdin.encoding, errors="strict")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr, because a terminal may not have a character
    warnings.showwarning = warn
    if os.environ.get("COLUMNS") == "0":  # the width is unknown, and rich would print nothing
        del os.environ["COLUMNS"]


def _exit(code: int) -> NoReturn:
    if code == 130:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))  # a second Ctrl-C ends the process
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:  # the error is printed already; the interpreter tries again when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code == 141 and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    sys.exit(code)
