"""The commands and code in the pages: Python code runs, and each command, option, target and file exists. The same is
true of the commands in the workflows. The API reference has every public name."""

from __future__ import annotations

import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import transformers
import typer
from support.models import TINY, reference_model, tiny_model
from support.toy_tokenizer import byte_tokenizer

import qwenkern
import qwenkern.integrations.transformers as transformers_patch
from qwenkern import Model, kernels
from qwenkern.cli import terminal
from qwenkern.cli.commands import app

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
COMMANDS = ("qwenkern", "make", "python", "pytest")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block, indented ones too; what is outside them has the language "prose"."""
    language, lines = "prose", []
    for line in [*page.read_text(encoding="utf-8").splitlines(), "```"]:
        if line.lstrip().startswith("```"):
            yield language, textwrap.dedent("\n".join(lines)) if language != "prose" else "\n".join(lines)
            language, lines = line.strip()[3:] if language == "prose" else "prose", []
        else:
            lines.append(line)


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page, in a block or between backticks, or of a workflow. Comments, the folder of
    the environment, variables before the command and what a pipe leads to are left out."""
    lines = []
    if page.suffix == ".yml":
        lines = re.findall(r"^ *- run: (.*)", page.read_text(encoding="utf-8"), re.M)
    for language, text in blocks(page) if page.suffix == ".md" else ():
        if language == "prose":
            lines += re.findall(r"^ {4}(\S.*)", text, re.M) + re.findall(r"`([^`]+)`", text)
        elif language != "python":
            lines += text.splitlines()
    found = []
    for line in lines:
        line = re.sub(r"\s#.*|[|;&>].*", "", " ".join(line.split()).removeprefix("$ "))
        line = re.sub(r"^(\w+=\S* )*(\.venv/bin/)?", "", line)
        if re.match(rf"({'|'.join(COMMANDS)}) [^.(]", line):
            found.append(shlex.split(line))
    return found


def options(command: Any) -> set[str]:
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}


def program(file: str) -> Any:
    """The command line of a program of benchmarks/."""
    module = importlib.import_module("qwenkern." + file.removesuffix(".py").replace("/", "."))
    return typer.main.get_command(terminal.command(module.main))


def check_qwenkern(words: list[str]) -> None:
    group = typer.main.get_command(app)
    if not words or words[0].startswith("-"):
        assert set(words) <= options(group)
        return
    assert words[0] in group.commands, f"qwenkern has no command {words[0]}"
    programs = {"bench": "benchmarks/run.py", "tune": "benchmarks/tune.py"}
    command = program(programs[words[0]]) if words[0] in programs else group.commands[words[0]]
    unknown = {word.partition("=")[0] for word in words[1:] if word.startswith("-")} - options(command)
    assert not unknown, f"qwenkern {words[0]} has no {unknown}"


def check_python(words: list[str]) -> None:
    file = words[0]
    if file.startswith("-"):  # python -m ...
        return
    source = (ROOT / file).read_text(encoding="utf-8")
    given = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
    by_typer = file.startswith("benchmarks/") and "typer" in source
    unknown = given - options(program(file)) if by_typer else {name for name in given if f'"{name}"' not in source}
    assert not unknown, f"{file} has no {unknown}"


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        assert "=" in word or re.search(rf"^{word}:", makefile, re.M), f"the Makefile has no target {word}"


def check_pytest(words: list[str], markers: list[str]) -> None:
    for word in words:
        assert not word.startswith("tests") or (ROOT / word).exists(), f"{word} does not exist"
    for flag, value in pairwise(words):
        assert flag != "-m" or any(value.removeprefix("not ") == marker.partition(":")[0] for marker in markers), value


@pytest.mark.parametrize("page", [*PAGES, *WORKFLOWS], ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_exist(page: Path, pytestconfig: pytest.Config):
    for name, *words in commands(page):
        if name == "qwenkern":
            check_qwenkern(words)
        elif name == "python":
            check_python(words)
        elif name == "make":
            check_make(words)
        else:
            check_pytest(words, pytestconfig.getini("markers"))


def test_commands_are_found():
    """The search above is not blind."""
    found = commands(ROOT / "README.md")
    assert ["make", "demo"] in found
    assert ["qwenkern", "chat"] in found
    assert ["make", "docs"] in commands(ROOT / ".github" / "workflows" / "docs.yml")
    for wrong in (["genrate"], ["generate", "--temprature", "1"], ["bench", "--opp", "rope"]):
        with pytest.raises(AssertionError):
            check_qwenkern(wrong)
    for check, wrong in ((check_make, ["tset"]), (check_python, ["examples/chat.py", "--modle", "x"])):
        with pytest.raises(AssertionError):
            check(wrong)


@pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers")
@pytest.mark.parametrize("name", ["README.md", "docs/tutorial.md"])
def test_python_of_pages_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Block after block in one session, as a reader types them, with small random models in the place of downloads."""

    def load(*_: object, **keywords: object) -> Model:
        return tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size), **keywords)

    monkeypatch.setattr(Model, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda _: reference_model(tiny_model()))
    examples = [text for language, text in blocks(ROOT / name) if language == "python"]
    assert examples
    names: dict[str, object] = {"__name__": "example"}
    for number, example in enumerate(examples):
        exec(compile(example, f"{name}, example {number + 1}", "exec"), names)
    assert capsys.readouterr().out


def found(path: str) -> object:
    """What a dotted path of the reference names."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError:
        return importlib.import_module(path)


def test_the_api_reference_has_every_public_name():
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", text, re.M)
    assert len(listed) == len(set(listed))
    described = [found(path) for path in listed]
    described += [value for value in vars(qwenkern.errors).values() if qwenkern.errors in described]
    for package in (qwenkern, kernels, transformers_patch):
        missing = [name for name in package.__all__ if not any(getattr(package, name) is each for each in described)]
        assert missing == ["__version__"] * (package is qwenkern)
