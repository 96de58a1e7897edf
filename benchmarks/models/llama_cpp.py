"""Measures llama.cpp with its own programs: `llama-bench` for one sequence, `llama-batched-bench` for several at once.

The programs are in the folder that QWENKERN_LLAMA_CPP names, or on PATH. Each reading is one run of a program, which
loads the file, warms up, and takes the times itself. The times include neither loading nor the choice of the next
token."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenkern.kernels.environment import LLAMA_CPP

LIMIT = 900  # seconds that a program may take
FACTS = "build_number build_commit cpu_info backends n_threads n_batch n_ubatch flash_attn load_mode type_k type_v"
# The fastest of the options that were tried on two cores; see docs/performance.md.
SETTINGS = ("--flash-attn", "on")


def find(name: str) -> str:
    """The path of a program. Raises FileNotFoundError, which names the folders where it was expected."""
    folder = LLAMA_CPP.get()
    found = shutil.which(name, path=folder) if folder else shutil.which(name)
    if found is None:
        where = (
            f"{folder}, which {LLAMA_CPP.name} names"
            if folder
            else f"any folder of PATH; {LLAMA_CPP.name} may name another"
        )
        raise FileNotFoundError(f"llama.cpp's {name} is not in {where}")
    return found


class Programs:
    """llama.cpp on one GGUF file with a number of threads."""

    def __init__(self, file: Path, threads: int) -> None:
        """Raises FileNotFoundError if a program is missing, and RuntimeError if it cannot read the file."""
        self.bench, self.batched = find("llama-bench"), find("llama-batched-bench")
        self.common = ["--model", str(file), "--threads", str(threads), *SETTINGS]
        first = self._bench("-p", "1", "-n", "0")
        self.facts = {name: first[name] for name in FACTS.split() if name in first} | {"flags": list(SETTINGS)}

    def seconds(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        """The seconds for ``batch`` prompts of ``prompt`` tokens, and those for ``new`` more tokens of each."""
        if batch == 1:
            prefill = self._bench("-p", str(prompt), "-n", "0")
            decode = self._bench("-p", "0", "-n", str(new), "-d", str(prompt))
            return prefill["avg_ns"] / 1e9, decode["avg_ns"] / 1e9
        room = batch * (-(-(prompt + new) // 256) * 256)  # the program rounds each sequence's share up to 256 tokens
        # One sequence comes last, because the program may lose its last output when it ends.
        sizes = {"-npp": prompt, "-ntg": new, "-npl": f"{batch},1", "-c": room}
        options = [str(part) for pair in sizes.items() for part in pair]
        found = _rows([self.batched, *self.common, *options, "--output-format", "jsonl"])[0]
        return found["t_pp"], found["t_tg"]

    def _bench(self, *options: str) -> dict[str, Any]:
        return _rows([self.bench, *self.common, *options, "-r", "1", "-o", "jsonl"])[0]


def _rows(command: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON lines that a program prints. Raises RuntimeError with its last line of output if there are none."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"{Path(command[0]).name} ended with {done.returncode}, saying: {said}")
    return rows
