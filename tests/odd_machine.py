"""A program that runs the commands of the README on an unusual machine. It needs Linux and root.

    python tests/odd_machine.py                     # every step; several minutes
    python tests/odd_machine.py --list
    python tests/odd_machine.py --only README       # steps whose name has this in it; may be given several times

The machine: a clone of this repository's last commit, owned by a user id without a passwd entry; no HOME and no other
variable than PATH and QWENKERN_CACHE; a PATH without compilers; a cache that holds the demo model and nothing else; one
busy process for each core. A step that changes one of these has a name that says so.

Packages come from an environment that is there (--venv), and the model from a cache that is there (--models), so
nothing is fetched. What happens to mounts stays in a namespace of this program's own.

It prints a table, and each failure's output. A step fails by another exit code than expected, by a traceback, or if it
does not print what it should. The exit code is the number of failures.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("/mnt/odd")  # in our own namespace, so that a step may lose /tmp
CHECKOUT, CACHE, BIN, HOME = PLACE / "checkout", PLACE / "cache", PLACE / "bin", PLACE / "home"
COMPILER = re.compile(r"(.*-)?(cc|c89|c99|gcc|clang|g\+\+|c\+\+|clang\+\+|tcc|icx)(-[\d.]+)?")
UID = 54321

TOY = """
import sys
from transformers import Qwen2Config, Qwen2ForCausalLM
heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
config = Qwen2Config(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **heads)
Qwen2ForCausalLM(config).save_pretrained(sys.argv[1])
"""
SHORT = 'qwenkern generate --max-tokens 4 "def f(n):"'
TEXT = "    if n"  # how the demo model goes on, in whatever it computes
KEEPS_NOTHING = f"{TEXT}.*keeps no compiled C and no measurements in "


@dataclass
class Step:
    name: str
    command: str  # for sh
    code: int = 0
    prints: str = ""  # a regular expression
    warnings: int | None = None  # how many lines of stderr begin with "warning:"
    mounts: str = ""  # for sh, as root, before
    environment: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def steps() -> Iterator[Step]:
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    cli = re.search(r"```\n(qwenkern generate.*?)```", readme, re.S)[1].splitlines()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    assert len(blocks) == 2

    yield Step("pip install", 'python -m pip install --no-index --no-build-isolation -c constraints.txt -e ".[hub]"')
    yield Step("README: make demo", "touch .venv/ready && make demo", prints="def is_prime|prime")
    yield Step("README: make test, one file", "make test ARGS=tests/cli/test_info.py", prints="passed")
    (PLACE / "first.py").write_text(blocks[0], encoding="utf-8")
    yield Step("README: Python, as a file", f"python {PLACE}/first.py", prints=r"torch.Size\(\[3, ")
    (PLACE / "short.py").write_text(re.sub(r"max_tokens=\d+", "max_tokens=4", blocks[0]), encoding="utf-8")
    second = blocks[1].replace('"Qwen/Qwen2.5-3B-Instruct"', f'"{PLACE}/toy"')
    second += "print(ours.generate([1, 2], max_tokens=3).token_ids)\n"
    (PLACE / "second.py").write_text(second, encoding="utf-8")
    yield Step("README: transformers", f"python {PLACE}/second.py", prints=r"\[\d+, \d+, \d+\]")
    for line in cli:
        command = line.partition("  #")[0].strip()
        given = "printf 'Hi\\n' | " if command == "qwenkern chat" else ""
        limit = " --max-tokens 24" if "generate" in command or command == "qwenkern chat" else ""
        yield Step(f"README: {command}", given + command + limit, prints=r"\S")
    yield Step("README: qwenkern bench --help", "qwenkern bench --help", prints="Usage")
    yield Step("README: qwenkern tune, no GPU", "qwenkern tune --budget 600", code=2, prints="Error")
    yield Step("python -m qwenkern", SHORT.replace("qwenkern", "python -m qwenkern"), prints=TEXT, warnings=1)
    yield Step("info", "qwenkern info demo", prints="no C compiler found|compiler")
    yield Step("info --renew", "qwenkern info --renew", prints=r"\S")

    yield Step("C: a compiler", SHORT, prints=TEXT, warnings=0, environment={"PATH": with_compiler()})
    yield Step("C: kept, and no compiler any more", SHORT, prints=TEXT, warnings=0)
    failing = other_cache("failing")
    yield Step("C: a compiler that fails", SHORT, prints=TEXT, warnings=1, environment=failing | {"CC": "false"})
    yield Step("C: an unbalanced quote", SHORT, prints=TEXT, warnings=1, environment=failing | {"CC": "cc '"})
    yield Step("C: umask 0", f"umask 0; {SHORT}", prints=TEXT, warnings=0, environment=real("umask"))
    full = other_cache("full", models=False)
    tiny = f"mount -t tmpfs -o size=64k,uid={UID},mode=755 none {PLACE}/full"
    small = f"{tiny} && ln -s {CACHE}/models {PLACE}/full/models"
    yield Step("cache: full", SHORT, prints=TEXT, warnings=1, environment=real("full") | full, mounts=small)
    yield Step("cache: full, pull", "qwenkern pull demo", code=1, prints="error: .*MB free, expected", mounts=tiny,
               environment=full)  # fmt: skip
    sealed = f"mount --bind {CACHE} {CACHE} && mount -o remount,bind,ro {CACHE}"
    yield Step("cache: read-only", SHORT, prints=TEXT, mounts=sealed)
    fresh = f"mkdir -p {PLACE}/sealed && ln -sfn {CACHE}/models {PLACE}/sealed/models"
    yield Step("cache: read-only, nothing compiled", SHORT, prints=KEEPS_NOTHING, warnings=0, mounts=fresh,
               environment={"QWENKERN_CACHE": f"{PLACE}/sealed", "PATH": with_compiler()})  # fmt: skip

    alone = ("QWENKERN_CACHE",)
    yield Step("home: none, no cache named", SHORT, code=1, prints="error: .*QWENKERN_CACHE", without=alone)
    for name, home in {"/nonexistent": "/nonexistent", "empty text": "", "relative": "somewhere"}.items():
        yield Step(f"home: {name}", SHORT, prints=TEXT, environment={"HOME": home})
    yield Step("home: /nonexistent, no cache named", SHORT, code=1, prints="error: ", without=alone,
               environment={"HOME": "/nonexistent"})  # fmt: skip
    (HOME / ".cache" / "qwenkern").mkdir(parents=True)
    (HOME / ".cache" / "qwenkern" / "models").symlink_to(CACHE / "models")
    yield Step("home: read-only, with the model", SHORT, prints=KEEPS_NOTHING, warnings=0, without=alone,
               environment={"HOME": str(HOME), "PATH": with_compiler()})  # fmt: skip
    yield Step("home: read-only, empty", "qwenkern pull demo", code=1, prints="error: .*cannot be written",
               without=alone, environment={"HOME": "/usr"})  # fmt: skip

    locked = "mount -t tmpfs -o ro none /tmp && mount -t tmpfs -o ro none /var/tmp"
    elsewhere = real("nowhere") | {"TMPDIR": "/proc"}
    yield Step("TMPDIR: not to be written", SHORT, prints=TEXT, warnings=0, environment=elsewhere)
    # torch._dynamo, which torch imports at a decode step, wants a folder for its cache, if only to look into
    nowhere, there = {"TMPDIR": "/usr"}, {"TMPDIR": "/usr", "TORCHINDUCTOR_CACHE_DIR": "/usr"}
    yield Step("TMPDIR: nor /tmp, nor here", f"cd / && {SHORT}", code=1, prints="error: .*No usable temporary dir",
               mounts=locked, environment=nowhere)  # fmt: skip
    yield Step("TMPDIR: the same, and torch's own folder named", f"cd / && {SHORT}", prints=TEXT, mounts=locked,
               environment=there)  # fmt: skip
    china = 'qwenkern generate --chat --max-tokens 24 "用中文介绍一下北京。"'
    yield Step("locale: LANG=C", china, prints="北京", environment={"LANG": "C"})
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    yield Step("locale: ASCII, by order", "printf 用中文介绍一下北京。 | qwenkern generate --chat --max-tokens 24",
               prints=r"\\u5317\\u4eac", environment=ascii_only)  # fmt: skip
    yield Step("locale: ASCII, by order, as an argument", china, code=1, prints="error: text has a lone surrogate",
               environment=ascii_only)  # fmt: skip
    yield Step("locale: of no system", china, prints="北京", environment={"LC_ALL": "xx_YY.UTF-8"})
    yield Step("stdin: closed", f"{SHORT} <&-", prints=TEXT)
    yield Step(
        "stdin: closed, and no prompt", "qwenkern generate <&-", code=1, prints="error: standard input is closed"
    )
    yield Step("stdin: closed, chat", "qwenkern chat <&-")
    yield Step("stdout: closed", f"{SHORT} >&-", code=1, prints="error: standard output is closed")
    yield Step("stderr: closed", f"{SHORT} 2>&-", prints=TEXT)
    yield Step("all streams closed", f"{SHORT} <&- >&- 2>&-", code=1)
    early = "env --default-signal=INT timeout --preserve-status -s INT {} " + SHORT
    yield Step("Ctrl-C while it starts", early.format(2), code=130)
    yield Step("Ctrl-C while it loads", early.format(5), code=130)
    gone = "mkdir {0} && cd {0} && rmdir {0} &&".format(PLACE / "gone")
    # torch with MKL cannot be imported there: MKL ends the process, Python's or ours
    for command in (SHORT, "qwenkern info qwen2.5-3b"):
        yield Step(f"folder: deleted, {command.split()[1]}", f"{gone} {command}", code=1,
                   prints="^error: the current folder: .*expected one that is there\n$")  # fmt: skip
    yield Step("folder: not readable", f"mkdir -p {PLACE}/dark && cd {PLACE}/dark && chmod 0 . && {SHORT}", prints=TEXT)

    yield Step("Python: -I", f"python -I {PLACE}/short.py", prints="torch.Size")
    yield Step("Python: -P", f"python -P -W error::SyntaxWarning {PLACE}/short.py",
               prints="torch.Size")  # fmt: skip
    yield Step("Python: -O", f"python -OO {PLACE}/short.py", prints="torch.Size")
    yield Step("Python: from stdin, without __file__", f"python < {PLACE}/short.py", prints="torch.Size")
    run = "exec(compile(open('{}', encoding='utf-8').read(), '<cell>', 'exec'), {{'__name__': '__main__'}})"
    for script in ("short", "second"):
        yield Step(f"Python: a notebook's exec, {script}", f'python -c "{run.format(PLACE / (script + ".py"))}"',
                   prints=r"torch.Size|\[\d+, ")  # fmt: skip
    yield Step("limits: 64 open files", f"ulimit -n 64; {SHORT}", prints=TEXT)
    yield Step("limits: no files may be written", f"ulimit -f 0; {SHORT}", code=1, prints="error: .*No usable temp",
               environment=real("nofiles"))  # fmt: skip
    yield Step("limits: 1 process", f"ulimit -u 1; {SHORT}", prints=TEXT, environment=real("noforks"))
    yield Step("system: no /proc", SHORT, prints=TEXT, mounts="mount -t tmpfs none /proc", environment=real("noproc"))
    yield Step("system: no /sys", SHORT, prints=TEXT, mounts="mount -t tmpfs none /sys", environment=real("nosys"))
    yield Step("system: no /dev/shm", SHORT, prints=TEXT, mounts="mount -t tmpfs -o ro none /dev/shm")


def with_compiler() -> str:
    return f"{CHECKOUT}/.venv/bin:{os.environ['PATH']}"


def other_cache(name: str, models: bool = True) -> dict[str, str]:
    """A cache without anything compiled."""
    folder = PLACE / name
    folder.mkdir(exist_ok=True)
    os.chown(folder, UID, UID)
    if models:
        (folder / "models").symlink_to(CACHE / "models")
    return {"QWENKERN_CACHE": str(folder)}


def real(name: str) -> dict[str, str]:
    """A cache like that, and a compiler."""
    return other_cache(name, models=name != "full") | {"PATH": with_compiler()}


def prepare(venv: Path, models: Path) -> None:
    """The clone, its environment, the cache and the PATH."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(CHECKOUT)], check=True)
    BIN.mkdir()
    for program in [*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()]:
        if not COMPILER.fullmatch(program.name) and not (BIN / program.name).is_symlink():
            (BIN / program.name).symlink_to(program)
    shutil.copytree(models, CACHE / "models", ignore=shutil.ignore_patterns("*.verified", "*.lock"))
    python = (venv / "bin" / "python").resolve()
    open_way(Path(sysconfig.get_paths()["stdlib"]).parents[1])
    subprocess.run([python, "-m", "venv", "--without-pip", CHECKOUT / ".venv"], check=True)
    packages = next(venv.glob("lib/python*/site-packages"))
    own = next(CHECKOUT.glob(".venv/lib/python*/site-packages"))
    (own / "those_of_another.pth").write_text(f"{packages}\n")
    for entry in ("pytest", "ruff"):
        (CHECKOUT / ".venv" / "bin" / entry).write_text(f'#!/bin/sh\nexec "$(dirname "$0")/python" -m {entry} "$@"\n')
        (CHECKOUT / ".venv" / "bin" / entry).chmod(0o755)
    python = CHECKOUT / ".venv" / "bin" / "python"
    subprocess.run([python, "-c", TOY, PLACE / "toy"], check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["chown", "-R", f"{UID}:{UID}", CHECKOUT, CACHE, PLACE / "toy"], check=True)
    os.chown(PLACE, UID, UID)


def open_way(folder: Path) -> None:
    """Lets everyone reach a folder below one that is closed (Python in root's home, say), in our namespace."""
    closed = next((each for each in reversed(folder.parents) if not each.stat().st_mode & 1), None)
    if closed:
        held = PLACE / "python"
        held.mkdir()
        mount("--bind", folder, held)
        mount("-t", "tmpfs", "-o", "mode=755", "none", closed)
        folder.mkdir(parents=True)
        mount("--bind", held, folder)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def run(step: Step) -> tuple[str, float, str]:
    """What is wrong ("" if nothing), the seconds it took, and what it printed."""
    environment = {"PATH": f"{CHECKOUT}/.venv/bin:{BIN}", "QWENKERN_CACHE": str(CACHE)} | step.environment
    for name in step.without:
        del environment[name]
    pairs = [f"{name}={value}" for name, value in environment.items()]
    script = f'{step.mounts or ":"} && exec "$@"'
    user = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
    command = ["unshare", "-m", "sh", "-c", script, "sh", *user, "env", "-i", *pairs, "sh", "-c", step.command]
    started = time.perf_counter()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, cwd=CHECKOUT, check=False, timeout=500
    )
    seconds = time.perf_counter() - started
    stdout, stderr = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    warned = len(re.findall("^warning:", stderr, re.M))
    wrong = []
    if done.returncode != step.code:
        wrong.append(f"exit code {done.returncode}, expected {step.code}")
    if "Traceback (most recent call last)" in stdout + stderr:
        wrong.append("a traceback")
    if not re.search(step.prints, stdout + stderr, re.S):
        wrong.append(f"does not print {step.prints!r}")
    if step.warnings not in (None, warned):
        wrong.append(f"{warned} warnings, expected {step.warnings}")
    return "; ".join(wrong), seconds, f"{stdout}\n--- stderr\n{stderr}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="whose packages are used")
    parser.add_argument("--models", type=Path, default=Path("~/.cache/qwenkern/models").expanduser())
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="processes that compute beside")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT")
    parser.add_argument("--skip", action="append", default=[], metavar="TEXT")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="also what steps print that are right")
    given = parser.parse_args()
    if os.environ.get("ODD_MACHINE") != "inside":
        inside = ["unshare", "--mount", sys.executable, *sys.argv]
        return subprocess.run(inside, env=os.environ | {"ODD_MACHINE": "inside"}, check=False).returncode

    failures = 0
    with tempfile.TemporaryDirectory(prefix="odd-machine-") as folder:
        mount("-t", "tmpfs", "-o", "mode=755", "none", "/mnt")
        PLACE.mkdir()
        mount("--bind", folder, PLACE)
        prepare(given.venv.resolve(), given.models)
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
        print("| step | exit code as expected | seconds |\n|---|---|---|")
        try:
            for step in steps():
                if given.only and step.name != "pip install" and not any(text in step.name for text in given.only):
                    continue
                if any(text in step.name for text in given.skip):
                    continue
                if given.list:
                    print(f"| {step.name} | `{step.command}` | |")
                    continue
                wrong, seconds, printed = run(step)
                failures += bool(wrong)
                print(f"| {step.name} | {wrong or step.code} | {seconds:.1f} |", flush=True)
                if wrong or given.verbose:
                    print(f"    $ {step.command}\n" + re.sub("^", "    ", printed.rstrip(), flags=re.M), flush=True)
        finally:
            for process in busy:
                process.kill()
            subprocess.run(["umount", "-l", PLACE], check=False)
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(main())
