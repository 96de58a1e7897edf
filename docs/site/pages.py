"""Makes pages of the site from files that lie outside docs/, so that each text exists once.

A hook of mkdocs. README.md is the home page; links between the files of the repository become links between pages."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # in the repository: on the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=rewritten(text, source, page)))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """Rewrites the links of a file of docs/ to files outside."""
    uri = page.file.src_uri  # type: ignore[attr-defined]  # mkdocs passes a Page
    return markdown if uri in PAGES.values() else rewritten(markdown, f"docs/{uri}", uri)


def rewritten(text: str, source: str, page: str) -> str:
    """A text with its links to files of the repository, relative to `source`, as links relative to `page`."""

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        target = PAGES.get(target, target.removeprefix("docs/"))
        return found[1] + posixpath.relpath(target, posixpath.dirname(page) or ".")

    return LINK.sub(link, text)
