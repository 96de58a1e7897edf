"""The inner loops of the C ops keep their sums in registers, on each target that a compiler here builds for."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from c import emulated, inner_loops, objects
from support.sharing import one_worker_at_a_time

from qwenkern.kernels.c import build, compiler, targets

# Functions whose inner loops may use the stack, and why that costs little. All others may not.
EXCEPTIONS = {
    "linear_(few_tokens|many_tokens|grouped)": "behind the product: what ends in a register goes through memory",
    "plain_.*|run_plain": "loops to be read, not to be fast",
    "silu_mul": "AVX2 has 16 registers, fewer than the constants of exp and of rounding: they are read from the stack",
    "drawn_from_(few|many)|end_of_sum|sum_(intervals|keys)": "the constants of exp again",
}


# Products with codes. A narrow register has half of a tile's rows or a quarter, so the factors of a tile and some of
# its codes of 8 bits are on the stack. A sum there would add two moves for each product.
GROUPED = re.compile(r"multiply_\w+_[12]_[01](\.|$)")


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_sums_stay_in_registers(target: targets.Target, tmp_path_factory: pytest.TempPathFactory) -> None:
    loops = inner_loops.loops(*_library(target, tmp_path_factory))
    spilled = [loop for loop in loops if len(loop.stack_moves) > _allowed(loop, target)]
    assert not spilled, "; ".join(map(str, spilled))
    for hot in ("dots_", "multiply_"):  # under these names, so that they are what was looked at
        assert any(loop.function.startswith(hot) for loop in loops), f"no function is called {hot}..."


SUMS = """
typedef float narrow __attribute__((vector_size(16)));
typedef float wide __attribute__((vector_size(64)));
void fits(narrow *out, const narrow *a, const narrow *b, long count) {
    narrow sum = {0};
    for (long k = 0; k < count; k++) sum += a[k] * b[k];
    *out = sum;
}
void too_wide(wide *out, const wide *a, const wide *b, long count) {
    wide sum = {0};
    for (long k = 0; k < count; k++) sum += a[k] * b[k];
    *out = sum;
}
void too_many(narrow *out, const narrow *a, const narrow *b, long count) {
    narrow sums[40] = {0};
    for (long k = 0; k < count; k++)
#pragma GCC unroll 40
        for (int i = 0; i < 40; i++) sums[i] += a[k] * b[k * 40 + i];
    for (int i = 0; i < 40; i++) out[i] = sums[i];
}
"""


@pytest.mark.parametrize("name", ["x86-64-v3", "armv8.2-dotprod"])
def test_sums_on_the_stack_are_found(name: str, tmp_path: Path) -> None:
    """Forty sums, more than there are registers; and in gcc's code vectors that are wider than registers."""
    target = next(target for target in targets.TARGETS if target.name == name)
    source = tmp_path / "sums.c"
    source.write_text(SUMS)
    flags = ("-O3", "-ffp-contract=fast", "-shared", "-fPIC")
    loops = inner_loops.loops(*_built(target, flags, source, tmp_path))
    found = {loop.function for loop in loops if loop.stack_moves}
    assert {loop.function for loop in loops} == {"fits", "too_wide", "too_many"}
    assert "fits" not in found
    assert "too_many" in found
    assert "too_wide" in found or not _is_gcc(target)


def _is_gcc(target: targets.Target) -> bool:
    command = compiler.command() if target.machine == targets.machine() else [emulated.compiler_for(target)]
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    return "Free Software Foundation" in said


def _allowed(loop: inner_loops.Loop, target: targets.Target) -> float:
    if any(re.match(rf"({names})(\.|$)", loop.function) for names in EXCEPTIONS):
        return math.inf
    is_narrow = "v4" not in target.name
    return loop.multiply_adds / 2 if is_narrow and GROUPED.match(loop.function) else 0


def _library(target: targets.Target, factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The C files as a library, and the objdump that reads it. Where it runs, the one that other tests run."""
    command, objdump = _programs(target)
    if target.machine == targets.machine() and target.needs <= targets.features():
        with one_worker_at_a_time(factory, "library"):
            library = Path(build._load(target).library._name)
        if library.exists():
            return library, objdump
    library = factory.mktemp("library") / "library.so"
    flags = (*compiler.FLAGS, *target.flags)
    subprocess.run(
        [*command, *flags, *objects.compiled(command, target, factory), "-o", str(library), "-lm"], check=True
    )
    return library, objdump


def _built(target: targets.Target, flags: tuple[str, ...], source: Path, folder: Path) -> tuple[Path, str]:
    """One file as a library, and the objdump that reads it."""
    command, objdump = _programs(target)
    library = folder / "library.so"
    subprocess.run([*command, *flags, *target.flags, str(source), "-o", str(library), "-lm"], check=True)
    return library, objdump


def _programs(target: targets.Target) -> tuple[list[str], str]:
    """The command of the compiler for a target, and the objdump that reads its code."""
    is_native = target.machine == targets.machine()
    if not is_native and target.name not in emulated.EMULATORS:
        pytest.skip(f"no compiler for {target.machine} is asked for here")
    command = compiler.command() if is_native else [emulated.compiler_for(target)]
    objdump = "objdump" if is_native else emulated.compiler_for(target).replace("gcc", "objdump")
    missing = [program for program in (command[0], objdump) if not shutil.which(program)]
    if missing:
        required = target.machine == "aarch64" and not is_native and os.environ.get("QWENKERN_REQUIRE_ARM") == "1"
        (pytest.fail if required else pytest.skip)(f"needs {' and '.join(missing)}")
    return command, objdump
