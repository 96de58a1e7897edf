"""Compiles the C files to a library, writes a manifest beside it, and checks whether a library matches its manifest.

setup.py uses this file before anything is installed, so it imports the standard library only."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-pthread", "-shared", "-fPIC", "-fvisibility=hidden")
ANSWER, COMPILE = 10, 300  # the compiler's time limits in seconds: for its version, and for the C files
SLOWEST = ("grouped_products.c", "float_activations.c")  # started first, so that they run beside all other files


class CompilerError(Exception):
    """The compiler fails. The message is one line."""


class NoCompiler(CompilerError):
    """There is no compiler, or it does not answer. It is not asked again."""


class Refused(Exception):
    """A library fails a check. The message is one line and gives the reason."""


def files() -> list[Path]:
    """The files that a library is compiled from."""
    return sorted(SOURCES.glob("*.[ch]"))


def digest(*facts: str) -> str:
    """A hash of the C files and of ``facts``."""
    parts = [file.name.encode() + b"\0" + file.read_bytes() for file in files()]
    return hashlib.sha256(b"\0".join([*parts, *(fact.encode() for fact in facts)])).hexdigest()


def given() -> str:
    """The environment variable CC."""
    return os.environ.get("CC", "").strip()


def command() -> list[str]:
    """The command of the compiler: CC, else the first of cc, gcc and clang. Raises NoCompiler if CC is no command
    line."""
    if not given():
        return [next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")]
    try:
        return shlex.split(given())
    except ValueError as error:
        raise NoCompiler(f"CC is {given()!r}, which is no command line: {error}") from None


def answers() -> str:
    """The first line of the compiler's version text. Raises NoCompiler if the compiler does not answer within ANSWER
    seconds. The result is remembered, so a compiler that hangs costs that time once."""
    said = _asked(tuple(command()))
    if isinstance(said, NoCompiler):
        raise said
    return said


@functools.cache
def _asked(compiler: tuple[str, ...]) -> str | NoCompiler:
    try:
        return _run([*compiler, "--version"], ANSWER, NoCompiler).partition("\n")[0]
    except NoCompiler as error:
        return error


def compile_to(library: Path, flags: Sequence[str]) -> None:
    """Compiles the C files, and writes the library and its manifest. Each file is renamed into place, so concurrent
    processes see whole files. Raises CompilerError, or OSError if the folder cannot be written to."""
    compiler, version, hashed = command(), answers(), digest()  # hashed first: a later edit recompiles
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="making-") as folder:
        made = Path(folder, library.name)
        sources = [file for file in files() if file.suffix == ".c"]
        sources.sort(key=lambda file: file.name in SLOWEST, reverse=True)
        objects = [str(Path(folder, f"{file.stem}.o")) for file in sources]

        def compile_one(source: Path, to: str) -> None:
            _run([*compiler, *FLAGS, *flags, "-c", str(source), "-o", to], COMPILE, place=folder)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in [pool.submit(compile_one, *each) for each in zip(sources, objects, strict=True)]:
                done.result()
        _run([*compiler, *FLAGS, *flags, *objects, "-o", str(made), "-lm"], COMPILE, place=folder)
        written = {
            "sources": hashed,
            "library": hashlib.sha256(made.read_bytes()).hexdigest(),
            "compiler": " ".join([*compiler, f"({version})"]),
            "flags": [*FLAGS, *flags],
        }
        manifest = made.with_suffix(".json")
        manifest.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        for file in (made, manifest):
            _flush(file)
            file.chmod(0o644)  # independent of the umask: others may read it but not write to it
            os.replace(file, library.with_name(file.name))


def check(library: Path, flags: Sequence[str]) -> None:
    """Raises Refused, with the reason, unless the library, its manifest and the C files match."""
    manifest = library.with_suffix(".json")
    for file in (library, manifest):
        if file.exists() and not file.is_file():
            raise Refused(f"{file} is no file")  # reading a pipe would not end
    try:
        said = json.loads(manifest.read_text(encoding="utf-8"))
        sources, hashed, with_flags = said["sources"], said["library"], said["flags"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(f"{manifest} is missing or damaged: {type(error).__name__}: {error}") from None
    try:
        content = library.read_bytes()
    except OSError as error:
        raise Refused(f"{library} cannot be read: {error.strerror}") from None
    if hashed != hashlib.sha256(content).hexdigest():
        raise Refused(f"{library} is damaged: its hash is not the one in {manifest.name}")
    if sources != digest() or with_flags != [*FLAGS, *flags]:
        raise Refused(f"{library} was built from other sources than those in {SOURCES}")


def fits(library: Path, flags: Sequence[str]) -> bool:
    """Whether ``check`` passes."""
    try:
        check(library, flags)
    except Refused:
        return False
    return True


def _run(
    arguments: Iterable[str], seconds: float, failure: type[CompilerError] = CompilerError, place: str | None = None
) -> str:
    """The standard output of a program. ``place`` is a folder for its temporary files; the system's folder for them may
    not be writable."""
    arguments = list(arguments)
    environment = None if place is None else os.environ | dict.fromkeys(("TMPDIR", "TMP", "TEMP"), place)
    name = f"the C compiler {shlex.join(arguments[:1])}"
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env=environment,
        )
    except OSError as error:
        raise NoCompiler(f"{name} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoCompiler(f"{name} did not answer within {seconds:.0f} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise failure(f"{name} failed with exit code {done.returncode}{': ' + said[0] if said else ''}")
    return done.stdout


def _flush(file: Path) -> None:
    """Writes a file to the disk before it is renamed, so a power cut leaves the whole file or none."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
