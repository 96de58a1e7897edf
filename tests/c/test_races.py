"""ThreadSanitizer finds no data race in the C ops, and finds the races that this file makes on purpose."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from qwenkern.kernels.c import compiler, targets

PROGRAM = Path(__file__).with_name("races.c")
SANITIZE = ("-fsanitize=thread", "-O1", "-g")
TURNS, PATIENCE = 10, 120  # of the program; seconds that it may take
RACE, OTHER_BITS = "ThreadSanitizer: data race", "differ from those of one"


class Mutation(NamedTuple):
    """In ``file`` of the C files, replaces each text by its replacement."""

    name: str
    file: str
    replace: dict[str, str]


NEXT_LOOPS = {
    "normed_rows": ("linear.h", "return rows;"),
    "decode_attention": (
        "decode_attention.c",
        "for (long row = first_task(me, S * Hkv * group); row >= 0; row = next_task(me)) {",
    ),
    "prefill_attention": (
        "prefill_attention.c",
        "for (long task = first_task(me, tasks); task >= 0; task = next_task(me)) {",
    ),
}
RESET = (
    "if (me->num_threads > 1) atomic_store_explicit(taken_of(me, me->loops + 1, me->index), 0, memory_order_relaxed);"
)
ACQUIRE = "atomic_load_explicit(&n->value, memory_order_acquire)"  # in wait_for_change, twice
BROKEN = [
    *(
        Mutation(f"threads do not meet in {op}", file, {f"    barrier(me);\n    {after}": f"    {after}"})
        for op, (file, after) in NEXT_LOOPS.items()
    ),
    Mutation("counters are not reset", "team.c", {RESET: ""}),
    Mutation("counters of the present loop are reset", "team.c", {RESET: RESET.replace("loops + 1", "loops")}),
    Mutation("who waits acquires nothing", "team.c", {ACQUIRE: ACQUIRE.replace("acquire", "relaxed")}),
    Mutation(
        "who is waited for releases nothing",
        "team.c",
        {"atomic_fetch_add(&n->value, 1)": "atomic_fetch_add_explicit(&n->value, 1, memory_order_relaxed)"},
    ),
    Mutation("rows share their maxima", "draw.c", {"args->scratch + r * ceil_div(V, DRAW_RUN)": "args->scratch"}),
    Mutation(
        "the cache's size is no atomic variable",
        "linear_few_tokens.c",
        {
            "static atomic_long known;": "static long known;",
            "atomic_load_explicit(&known, memory_order_relaxed)": "known",
            "atomic_store_explicit(&known, size, memory_order_relaxed)": "known = size",
        },
    ),
]


class Build:
    """The program and the C files, compiled for the best target of this machine to be watched."""

    def __init__(self, folder: Path) -> None:
        flags = [flag for flag in compiler.FLAGS if flag not in ("-shared", "-fPIC")]
        self._compile = [*compiler.command(), *flags, *targets.usable()[0].flags, *SANITIZE]
        self._folder = folder
        self._objects = {
            file.name: self._object(file, compiler.SOURCES, folder) for file in (*compiler.SOURCES.glob("*.c"), PROGRAM)
        }

    def program(self) -> Path:
        return self._link(self._objects.values(), self._folder)

    def mutant(self, mutation: Mutation, folder: Path) -> Path:
        for file in compiler.files():
            shutil.copy(file, folder)
        changed = folder / mutation.file
        text = changed.read_text(encoding="utf-8")
        for old, new in mutation.replace.items():
            assert old in text, f"{old!r} does not stand in {mutation.file}"
            text = text.replace(old, new)
        changed.write_text(text, encoding="utf-8")
        includes = f'#include "{mutation.file}"'
        sources = [changed] if changed.suffix == ".c" else [*folder.glob("*.c")]
        again = [file for file in sources if file == changed or includes in file.read_text(encoding="utf-8")]
        objects = self._objects | {file.name: self._object(file, folder, folder) for file in again}
        return self._link(objects.values(), folder)

    def _object(self, file: Path, headers: Path, folder: Path) -> Path:
        made = folder / f"{file.stem}.o"
        subprocess.run([*self._compile, f"-I{headers}", "-c", str(file), "-o", str(made)], check=True)
        return made

    def _link(self, objects: Iterable[Path], folder: Path) -> Path:
        made = folder / "races"
        subprocess.run([*self._compile, *map(str, objects), "-o", str(made), "-lm"], check=True)
        return made


def run(command: Sequence[str | Path], seconds: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Runs a program up to the first race. Older ThreadSanitizers fail where addresses are as random as Linux can make
    them."""
    fixed = ["setarch", platform.machine(), "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    return subprocess.run(
        [*fixed, *map(str, command)],
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Skips where the compiler or the system has no ThreadSanitizer."""
    folder = tmp_path_factory.mktemp("races")
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    command = [*compiler.command(), *SANITIZE, "-pthread", str(empty), "-o", str(folder / "empty")]
    try:
        compiled = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        pytest.skip(f"no C compiler here: {error}")
    if compiled.returncode:
        pytest.skip(f"{command[0]} has no ThreadSanitizer: {compiled.stdout.strip()[-300:]}")
    started = run([folder / "empty"])
    if started.returncode:
        pytest.skip(f"ThreadSanitizer does not start here: {started.stdout.strip()[-300:]}")
    return Build(folder)


@pytest.mark.slow
@pytest.mark.xdist_group("races")
def test_the_ops_have_no_data_race(build: Build) -> None:
    done = run([build.program(), str(TURNS)])
    assert done.returncode == 0, done.stdout
    assert "data race" not in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("races")
@pytest.mark.parametrize("mutation", BROKEN, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found(build: Build, mutation: Mutation, tmp_path: Path) -> None:
    """Where tasks are left out no two threads touch the same memory, but the results have other bits."""
    done = run([build.mutant(mutation, tmp_path), str(10 * TURNS)])
    print(done.stdout)
    assert done.returncode != 0, "nothing was found"
    assert re.search(f"{RACE}|{OTHER_BITS}", done.stdout), done.stdout
