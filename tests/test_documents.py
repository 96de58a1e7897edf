"""The examples of the documents run, and the links in them lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
