"""The examples of the documents run, and the links in them lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from typer.main import get_command

from qwenkern.cli.commands import app
from qwenkern.server.settings import Bounds

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers")
def test_drop_in_examples():
    text = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(examples) >= 4
    names: dict[str, object] = {"__name__": "example"}
    for number, example in enumerate(examples):
        exec(compile(example, f"drop-in.md, example {number + 1}", "exec"), names)


def test_a_page_lists_all_environment_variables():
    named = set(re.findall(r"QWENKERN_[A-Z_]*[A-Z]", (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")))
    files = [ROOT / "setup.py", ROOT / "Makefile"]
    files += [
        file for folder in ("qwenkern", "kernels", "benchmarks", "tests") for file in (ROOT / folder).rglob("*.py")
    ]
    used = {name for file in files for name in re.findall(r"QWENKERN_[A-Z_]*[A-Z]", file.read_text(encoding="utf-8"))}
    assert sorted(named) == sorted(used)


def section(page: str, heading: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_a_page_lists_all_options_of_the_server():
    options = {name for each in get_command(app).commands["serve"].params for name in each.opts}
    assert set(re.findall(r"(?<=`)--?[a-z-]+", section("serving.md", "Options"))) == options - {"--help"}


def test_a_page_lists_all_bounds_of_the_server():
    found = {}
    for names, values in re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", section("serving.md", "Bounds"), re.M):
        unit = 2**20 if "MiB" in values else 1
        numbers = [unit * int(number.replace(",", "")) for number in re.findall(r"\d+(?:,\d{3})*", values)]
        found |= dict(zip(re.findall(r"\w+", names), numbers, strict=True))
    assert found == dataclasses.asdict(Bounds())


GENERATED = {"index.md", "contributing.md", "security.md", "changelog.md", "examples.md"}  # by docs/site/pages.py
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = (document.parent / name) if name else document
            if target.name in GENERATED:
                continue
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
