"""Imports run downwards in the diagram of docs/architecture.md, which alone defines the order."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import qwenkern

ROOT = Path(qwenkern.__file__).parents[1]
FOLDERS = {
    "qwenkern.kernels": ROOT / "kernels",
    "qwenkern.benchmarks": ROOT / "benchmarks",
    "qwenkern": ROOT / "qwenkern",
}

# (module, module): why the first may import the second inside a function, although that runs upwards or closes a cycle.
LAZY: dict[tuple[str, str], str] = {}


@cache
def modules() -> dict[str, Path]:
    """Every file of the package, by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = file
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The package's modules that one imports anywhere in it, but for what LAZY allows it."""
    return frozenset(other for other, _ in _imports(module) if (module, other) not in LAZY)


@cache
def _imports(module: str) -> frozenset[tuple[str, bool]]:
    """The package's modules that one imports anywhere in it, each with whether only a function does so."""
    return frozenset(_imported(module, ast.parse(modules()[module].read_text(encoding="utf-8"))))


def _imported(module: str, tree: ast.AST) -> set[tuple[str, bool]]:
    """The same for a part of the module."""
    package = module.split(".") if modules()[module].name == "__init__.py" else module.split(".")[:-1]

    def visit(node: ast.AST, in_function: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name in modules() else source, in_function
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return {(name, lazy) for name, lazy in visit(tree, False) if name in modules() and name != module}


def types_only(module: str) -> set[str]:
    """The package's modules that one imports under TYPE_CHECKING alone."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {other for block in blocks for other, _ in _imported(module, block)} - {
        other for node in tree.body if node not in blocks for other, _ in _imported(module, node)
    }


@cache
def picture() -> dict[str, int]:
    """Each module that the diagram names, a folder with its slash or a file, and the number of its line."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Modules")[2]
    drawn = re.search(r"```\w*\n(.*?)```", text, re.S)
    assert drawn, "docs/architecture.md has no picture under `Modules`"
    found: dict[str, int] = {}
    for number, line in enumerate(drawn[1].splitlines()):
        for name in re.findall(r"[\w/]+(?:\.py|/)(?=\s|$)", line):
            assert name not in found, f"the picture of docs/architecture.md names {name} twice"
            found[name] = number
    return found


def room(module: str) -> str:
    """The name in the diagram that a module belongs to: the longest one that it begins with."""
    parts = module.split(".")[1:] or ["__init__"]
    if modules()[module].name == "__init__.py" and module != "qwenkern":
        parts.append("__init__")
    path = "/".join(parts) + ".py"
    names = [name for name in picture() if path == name or (name.endswith("/") and path.startswith(name))]
    return max(names, key=len, default=path)


def test_the_picture_has_every_room():
    lying = {room(module) for module in modules()}
    assert lying - set(picture()) == set(), "docs/architecture.md's picture lacks a room"
    assert set(picture()) - lying == set(), "docs/architecture.md's picture has a room that is not there"


def test_the_table_says_what_each_room_holds():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Modules")[2]
    table = "\n".join(re.findall(r"^\|.*", text, re.M))
    for name in picture():
        assert f"`{name}`" in table, f"docs/architecture.md does not say what {name} holds"


def test_imports_run_downwards():
    wrong = [
        f"{module} imports {other}: {room(other)} does not stand below {room(module)}"
        for module in modules()
        for other in imports(module)
        if room(module) != room(other) and picture()[room(other)] <= picture()[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    """But for types' sake, which nothing runs."""
    graph = {module: imports(module) - types_only(module) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_what_may_be_lazy_is_lazy():
    for (module, other), reason in LAZY.items():
        assert reason
        assert [lazy for name, lazy in _imports(module) if name == other] == [True], f"{module} and {other}"


BACKEND_LIBRARIES: dict[str, set[str]] = {}  # a folder of kernels/ -> what else its files import


def test_kernels_import_torch_and_triton_only():
    for module, file in modules().items():
        if module.startswith("qwenkern.kernels"):
            outside = _roots(file) - set(sys.stdlib_module_names)
            own = BACKEND_LIBRARIES.get(".".join(module.split(".")[2:3]), set())
            assert outside - own <= {"torch", "triton", "qwenkern"}, file
            assert all(other.startswith("qwenkern.kernels") for other in imports(module)), file


def test_config_uses_the_standard_library_only():
    assert _roots(ROOT / "qwenkern" / "config.py") - {"qwenkern"} <= set(sys.stdlib_module_names)


def _roots(file: Path) -> set[str]:
    """The top-level packages that a file imports by absolute names."""
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
    return {name.split(".")[0] for name in names}
