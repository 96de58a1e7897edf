"""Runs everything that needs a GPU in one call: facts, correctness, whole models, every kernel's time, and tuning.

    python benchmarks/on_gpu.py --out results                  everything, in less than 9 minutes
    python benchmarks/on_gpu.py --out results --only kernels   one part
    python benchmarks/on_gpu.py --out results --tune 300       also the tuner
    python benchmarks/on_gpu.py --out results --kernels FILE   with kernels compiled elsewhere (carry.py)
    python benchmarks/on_gpu.py --out results --dry-run        every part on a CPU, with tiny sizes

It needs no network. `pip install --no-build-isolation --no-deps -e .` installs a bare checkout. Each part is a program
with a time limit, so a part that fails or hangs does not stop the others. The next part gets the time that a part does
not use. At most eight files are written, the tuner's included.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOG = "on_gpu.log"  # of all parts
QUICK = ("qwenkern", "eager", "library", "sdpa")  # providers that compile nothing but our own kernels


@dataclass
class Part:
    name: str
    command: list[str]
    seconds: float  # the time limit
    interpreted: bool = False  # in a dry run this part uses Triton's interpreter; others use the torch references


def parts(out: Path, dry: bool, tune: float) -> list[Part]:
    """The parts, the most important first."""
    python, here, tests = sys.executable, ROOT / "benchmarks", ROOT / "tests"
    model = ["--model", "qwen2.5-0.5b" if dry else "qwen2.5-3b"]
    tiny = ["--layers", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    one = ["--batch", "1", "--prompt-tokens", "128", "--new-tokens", "64", "--repeats", "3"]
    many = ["--batch", "1,16", "--prompt-tokens", "128,2048", "--new-tokens", "64", "--repeats", "3"]
    steps = ["--tokens", "1", "--context", "64"] if dry else ["--tokens", "1,16", "--context", "1024,8192"]
    cases, slow = kernel_names()
    sizes = ["--seconds", "0.3", "--op", ",".join(cases)]
    if dry:
        sizes, slow = ["--tokens", "1", "--seconds", "0.05", "--op", "rms_norm,swiglu"], ["qwenkern", "transformers"]
    pytest = [python, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    pytest += ["-c", str(ROOT / "pyproject.toml")]
    # A test file that cannot be imported must not stop the others. Most of the time is compilation, on the host.
    workers = ["-n", str(max(1, min(14, (os.cpu_count() or 1) - 2)))] if importlib.util.find_spec("xdist") else []
    on_gpu = ["-m", "gpu", *workers, "--continue-on-collection-errors", *kernel_tests()]
    whole = [python, str(here / "end_to_end.py"), *model]

    def end_to_end(name: str, prompts: list[str]) -> list[str]:
        return [*whole, "--json", str(out / f"{name}.json"), *(tiny if dry else prompts)]

    def bench(name: str, *options: str) -> list[str]:
        return [python, str(here / "run.py"), "--json", str(out / f"{name}.json"), *model, *options]

    chosen = [
        Part(
            "correctness",
            pytest + ([str(tests / "kernels" / "test_rms_norm.py"), "-k", "small_values"] if dry else on_gpu),
            150,
            interpreted=True,
        ),
        Part("end_to_end", [*end_to_end("end_to_end", many), "--peers", "transformers"], 80),
        Part("where", bench("where", "--where", *steps), 30),
        Part("kernels", bench("kernels", *sizes, "--provider", ",".join(QUICK)), 85),
        Part(
            "compiled",
            [*end_to_end("end_to_end_compiled", one), "--peers", "patched" if dry else "patched,liger,compiled"],
            95,
        ),
        Part("peers", bench("kernels_peers", *sizes, "--provider", ",".join(slow)), 50),
        Part("sanitizer", [python, str(here / "sanitizer.py")], 10),  # and the time that the others leave
    ]
    if tune:
        command = [python, str(here / "tune.py"), *model, "--budget", str(tune), "--out", str(out / "tuned")]
        chosen.append(
            Part("tune", [*command, *(["--op", "rms_norm", "--tokens", "1"] if dry else [])], tune + 90, True)
        )
    return chosen


def kernel_names() -> tuple[list[str], list[str]]:
    """The cases, those of a decode step first; and the providers that are slow to start, with our own to compare."""
    from qwenkern.benchmarks.offline.plan import LAYER
    from qwenkern.benchmarks.ops.cases import CASES
    from qwenkern.benchmarks.ops.providers import PROVIDERS

    cases = dict.fromkeys([*LAYER, "lm_head", "lm_head_top_k", *(case.name for case in CASES)])
    return list(cases), ["qwenkern", *(each.name for each in PROVIDERS if each.name not in QUICK)]


def kernel_tests() -> list[str]:
    """The files whose tests run on a GPU. The others need packages that the machine may lack."""
    on_gpu = re.compile(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if on_gpu.search(file.read_text(encoding="utf-8"))]


def check_installed() -> None:
    if subprocess.run([sys.executable, "-c", "import qwenkern.benchmarks"], capture_output=True, cwd="/").returncode:
        raise SystemExit(f"qwenkern is not installed: pip install --no-build-isolation --no-deps -e {ROOT}")


def use_kernels(file: Path) -> None:
    """Gives all parts a folder of compiled kernels, to which they add their own."""
    from qwenkern.benchmarks.offline.carried import unpack

    folder = Path(tempfile.mkdtemp(prefix="qwenkern-kernels-"))
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    print(f"{unpack(file, folder)} compiled kernels from {file}", flush=True)


def facts() -> dict[str, object]:
    """Facts of this machine, and its measured limits."""
    from dataclasses import asdict

    import torch

    from qwenkern.benchmarks.ops.timing import ceilings, circumstances

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, object] = circumstances(device) | {"ceilings": asdict(ceilings(device))}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"], found["memory"] = properties.multi_processor_count, properties.total_memory
        found["l2_cache"] = properties.L2_cache_size
    return found


def run(part: Part, out: Path, env: dict[str, str]) -> dict[str, Any]:
    """Runs a part with ``env`` added to the environment. Its output goes to the log, which is kept in any case."""
    started = time.monotonic()
    with (out / LOG).open("a+b") as log:
        log.write(f"== {part.name}\n".encode())
        log.flush()
        begin = log.tell()
        process = subprocess.Popen(
            part.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=out,
            env={**os.environ, **env},
            start_new_session=True,
        )
        try:
            status = process.wait(part.seconds)
            outcome = "passed" if status == 0 else f"failed with {status}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {part.seconds:.0f} s"
        finally:  # end also the part's workers, which would disturb the next parts
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(begin)
        tail = log.read().decode(errors="replace").splitlines()[-60:]
    print(f"== {part.name}: {outcome}, {time.monotonic() - started:.0f} s", *tail, sep="\n", flush=True)
    return {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--only", action="append", help="a part's name; may be given several times")
    parser.add_argument("--tune", type=float, default=0, metavar="SECONDS", help="also search configurations")
    parser.add_argument("--kernels", type=Path, metavar="FILE", help="what carry.py made for this GPU")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    check_installed()
    known = parts(out, options.dry_run, options.tune)
    if unknown := set(options.only or []) - {part.name for part in known}:
        parser.error(f"--only {', '.join(unknown)}: the parts are {', '.join(part.name for part in known)}")
    (out / LOG).unlink(missing_ok=True)
    if options.kernels:
        use_kernels(options.kernels)
    done: list[dict[str, Any]] = []
    summary, spare = {"facts": facts(), "parts": done}, 0.0
    print(json.dumps(summary["facts"], indent=1), flush=True)
    for part in known:
        if not options.only or part.name in options.only:
            env = {"TRITON_INTERPRET": "1"} if options.dry_run and part.interpreted else {}
            limit = part.seconds + spare
            done.append(run(replace(part, seconds=limit), out, env))
            spare = max(0.0, limit - done[-1]["seconds"])
            (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if options.kernels:
        print(f"{len(os.listdir(os.environ['TRITON_CACHE_DIR']))} folders in Triton's cache now")
    if (out / "tuned").is_dir():  # one file instead of many
        shutil.make_archive(str(out / "tuned"), "gztar", out / "tuned")
        shutil.rmtree(out / "tuned")
    print(*(f"{each['part']}: {each['outcome']} ({each['seconds']} s)" for each in done), sep="\n")
    raise SystemExit(any(each["outcome"] != "passed" for each in done))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
