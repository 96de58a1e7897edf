"""The C files compiled for a target, once per run of the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.sharing import one_worker_at_a_time

from qwenkern.kernels.c import compiler, targets


def compiled(command: Sequence[str], target: targets.Target, factory: pytest.TempPathFactory) -> list[str]:
    """The object files of a library for a target. The first worker that asks for them compiles them."""
    with one_worker_at_a_time(factory, f"objects-{target.name}") as folder:
        place, making = folder / f"objects-{target.name}", folder / f"making-{target.name}"
        if not place.exists():
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()

            def compile_one(source: Path) -> None:
                made = str(making / f"{source.stem}.o")
                flags = (*compiler.FLAGS, *target.flags)
                subprocess.run([*command, *flags, "-c", str(source), "-o", made], check=True)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, sorted(compiler.SOURCES.glob("*.c"))))
            making.rename(place)
    return sorted(map(str, place.glob("*.o")))
