"""How the package hangs together: who imports whom, how long importing takes, and what it needs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qwenkern

ROOT = Path(qwenkern.__file__).parents[1]
KERNELS = Path(qwenkern.kernels.__file__).parent

# Each room may import those to its left; see docs/architecture.md.
ORDER = [
    "errors",
    "arguments",
    "reading",
    "config",
    "kernels",
    "rope",
    "cache",
    "qwen2",
    "sampling",
    "generation",
    "tokenizer",
    "generate",
    "completion",
]
ORDER += ["Model"]
LEAVES = {"errors": set(), "reading": {"errors"}, "config": {"errors", "reading"}}
LEAVES |= {"download": {"errors"}, "sources": {"errors", "reading", "config", "download"}}
LEAVES |= {"arguments": {"errors"}, "sampling": {"arguments", "errors"}}


def _imports(file: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    inside = file.is_relative_to(KERNELS)
    package = ["qwenkern", "kernels"] if inside else list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "qwenkern" else {module}
    return found


def _rooms(file: Path) -> set[str]:
    return {name.split(".")[1] for name in _imports(file) if name.startswith("qwenkern.")}


def test_kernels_import_torch_and_triton_only():
    for file in KERNELS.rglob("*.py"):
        roots = {name.split(".")[0] for name in _imports(file)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "triton", "qwenkern"}, file
        assert all(name.startswith("qwenkern.kernels") for name in _imports(file) if name.startswith("qwenkern")), file


@pytest.mark.parametrize("room", ORDER)
def test_rooms_import_only_earlier_ones(room):
    file = ROOT / "qwenkern" / f"{room}.py"
    if not file.exists():
        assert room == "kernels"
        return
    later = set(ORDER[ORDER.index(room) :]) | {"cli", "integrations", "benchmarks", "info"}
    if room == "Model":  # lazily: see below
        later -= {"integrations"}
    assert not _rooms(file) & later - {"kernels"}, f"{room} imports {_rooms(file) & later}"
    if room in LEAVES:
        assert _rooms(file) <= LEAVES[room]


def test_integrations_import_neither_command_line_nor_benchmarks():
    for file in (ROOT / "qwenkern" / "integrations").glob("*.py"):
        assert not _rooms(file) & {"cli", "benchmarks", "info"}, file


def test_integrations_wait_until_they_are_asked_for():
    loaded = _python("import sys, qwenkern; print(*sys.modules)").split()
    assert not [name for name in loaded if name.startswith("qwenkern.integrations")]


def test_only_the_command_line_imports_benchmarks():
    for file in (ROOT / "qwenkern").rglob("*.py"):
        assert "benchmarks" not in _rooms(file) or file.name == "cli.py"


def test_config_uses_the_standard_library_only():
    roots = {name.split(".")[0] for name in _imports(ROOT / "qwenkern" / "config.py")}
    assert roots - {"qwenkern"} <= set(sys.stdlib_module_names)


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_brings_in_no_extra():
    """What takes long to import, or is an extra, waits until it is used."""
    loaded = _python("import sys, qwenkern; print(*sys.modules)").split()
    assert not {"transformers", "huggingface_hub", "gguf", "typer", "rich", "pandas", "scipy", "matplotlib"} & set(
        loaded
    )


def test_the_cpu_path_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # what an import of a missing package does
import torch, qwenkern
from qwenkern import Config, Model
config = Config(64, 32, 48, 1, 2, 1, 16, max_position_embeddings=128)
print(Model.from_config(config, device="cpu").generate([1, 2], max_tokens=3).num_tokens)
"""
    assert _python(code).strip() == "3"


def test_the_bare_name_kernels_is_refused(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(KERNELS.parent)!r}); import kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "from qwenkern import kernels" in done.stderr
    assert done.returncode == 1


def test_the_package_is_typed():
    assert (ROOT / "qwenkern" / "py.typed").exists()


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs everything")
@pytest.mark.xdist_group("one worker")
def test_a_group_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 does not read what pytest-xdist 3.8 writes: then times are taken beside other tests, and what a whole
    file shares is made by each worker."""
    assert request.node.nodeid.endswith("@one worker")
