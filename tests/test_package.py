"""How the package hangs together: who imports whom, how long importing takes, and what it needs."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwenkern

ROOT = Path(qwenkern.__file__).parents[1]
KERNELS = Path(qwenkern.kernels.__file__).parent

# Each room may import those before it, and no other; see docs/architecture.md.
ORDER = [
    "errors",
    "arguments",
    "reading",
    "config_fields",
    "config",
    "kernels",
    "rope",
    "cache",
    "qwen2",
    "sampling",
    "generation",
    "checkpoint",
    "hub",
    "text",
]
ORDER += [
    "engine",
    "integrations",
    "Model",
    "__init__",
    "terminal",
    "benchmarks",
    "cli",
    "__main__",
]
LEAVES = {
    "reading": {"errors"},
    "config_fields": {"errors"},
    "config": {"errors", "reading", "config_fields"},
    "kernels": set(),
    "hub": {"errors", "reading", "config"},
    "arguments": {"errors"},
    "sampling": {"arguments", "errors"},
}


def _files() -> dict[str, list[Path]]:
    """All files of the package, by room: a file or a folder below it."""
    found = {"kernels": list(KERNELS.rglob("*.py")), "benchmarks": list((ROOT / "benchmarks").glob("*.py"))}
    for file in (ROOT / "qwenkern").rglob("*.py"):
        found.setdefault(_room(file.relative_to(ROOT / "qwenkern").parts), []).append(file)
    return found


def _room(parts: tuple[str, ...]) -> str:
    """The edge of a program is a room of its own within cli/: the benchmarks' programs have it, too."""
    names = [part.removesuffix(".py") for part in parts]
    return "terminal" if names[:2] == ["cli", "terminal"] else names[0]


def _imports(file: Path) -> set[str]:
    """Absolute names of all modules that a file imports, anywhere in it."""
    inside = file.is_relative_to(KERNELS)
    package = (
        ["qwenkern", *file.relative_to(KERNELS.parent).parts[:-1]]
        if inside
        else list(file.relative_to(ROOT).parts[:-1])
    )
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            package_of_modules = module == "qwenkern" or module == "qwenkern.cli"
            found |= {f"{module}.{alias.name}" for alias in node.names} if package_of_modules else {module}
    return found


def _rooms(file: Path) -> set[str]:
    """The package itself is a room, too, where a file takes more from it than modules: its __version__, or a class that
    has another name than its module."""
    parts = {_room(tuple(name.split(".")[1:])) for name in _imports(file) if name.startswith("qwenkern.")}
    return {part if part in _files() else "__init__" for part in parts}


def test_kernels_import_torch_and_triton_only():
    for file in KERNELS.rglob("*.py"):
        roots = {name.split(".")[0] for name in _imports(file)} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "triton", "qwenkern"}, file
        assert all(name.startswith("qwenkern.kernels") for name in _imports(file) if name.startswith("qwenkern")), file


def test_every_room_has_its_place():
    assert set(_files()) == set(ORDER)
    documented = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Rooms")[2]
    for room in set(ORDER) - {"__init__", "__main__"}:
        assert re.search(rf"`{room}(\.py|/)`", documented), f"docs/architecture.md does not say what {room} holds"


@pytest.mark.parametrize("room", ORDER)
def test_rooms_import_only_earlier_ones(room):
    allowed = LEAVES.get(room, set(ORDER[: ORDER.index(room)])) | {room}
    for file in _files()[room]:
        assert _rooms(file) <= allowed, f"{file} imports {_rooms(file) - allowed}"


def test_integrations_wait_until_they_are_asked_for():
    loaded = _python("import sys, qwenkern; print(*sys.modules)").split()
    assert not [name for name in loaded if name.startswith("qwenkern.integrations")]


def test_only_the_command_line_imports_benchmarks():
    for file in (ROOT / "qwenkern").rglob("*.py"):
        assert "benchmarks" not in _rooms(file) or file.name == "commands.py"


def test_config_uses_the_standard_library_only():
    roots = {name.split(".")[0] for name in _imports(ROOT / "qwenkern" / "config.py")}
    assert roots - {"qwenkern"} <= set(sys.stdlib_module_names)


def _python(code: str, *options: str, cwd: Path | None = None, **environment: str) -> str:
    """What a program prints that runs in a process of its own."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_in_no_extra():
    """What takes long to import, or is an extra, waits until it is used."""
    loaded = _python("import sys, qwenkern; print(*sys.modules)").split()
    assert not {"transformers", "huggingface_hub", "gguf", "typer", "rich", "pandas", "scipy", "matplotlib"} & set(
        loaded
    )


DECODES_IN_C = """
import sys
if sys.argv[1] == "without":
    sys.modules["triton"] = None  # what an import of a missing package does
import hashlib, torch, qwenkern
from qwenkern.cli import info
from qwenkern.kernels import c as c_backend
config = qwenkern.Config(256, 64, 96, 2, 2, 1, 32, max_position_embeddings=128)
torch.manual_seed(0)
model = qwenkern.Model.from_config(config, device="cpu", dtype="bfloat16")
played = []
Recorded = c_backend.RecordedCalls
Recorded.replay, replay = lambda recorded: (played.append(recorded), replay(recorded)), Recorded.replay
done = model.generate([1, 2, 3], max_tokens=9, logprobs=2)
logits = model.forward([1, 2, 3, *done.token_ids])
print(len(played), hashlib.sha256(logits.numpy().tobytes()).hexdigest(), done.token_ids, done.logprobs)
print(info.processor()["Triton"], info.processor()["CPU"], file=sys.stderr)
"""


def test_without_triton_c_runs_all_the_same():
    """The same tape, and the same bits."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "QWENKERN_KERNELS")
    }
    run = [
        subprocess.run(
            [sys.executable, "-c", DECODES_IN_C, which], capture_output=True, text=True, check=True, env=environment
        )
        for which in ("without", "with")
    ]
    assert run[0].stdout == run[1].stdout
    assert int(run[0].stdout.split()[0]) >= 8
    assert "not installed, so torch runs on a GPU C for" in run[0].stderr
    assert "not installed" not in run[1].stderr


def test_without_triton_ops_have_gradients_and_fakes():
    code = """
import sys
sys.modules["triton"] = None
import torch
from qwenkern import kernels
x = torch.randn(2, 8, requires_grad=True)
kernels.rms_norm(x, torch.ones(8), 1e-6).sum().backward()
compiled = torch.compile(lambda x: kernels.swiglu(x), fullgraph=True, backend="aot_eager")
print(x.grad.isfinite().all().item(), torch.equal(compiled(x), kernels.swiglu(x)), kernels.layers.RMSNorm.has_backward)
"""
    assert _python(code).split() == ["True"] * 3


# The bare name `kernels`, as the root of a checkout puts it on the path


def test_the_bare_name_is_the_library_that_has_it():
    code = """
import transformers
from transformers import Qwen2ForCausalLM
from transformers.utils import is_kernels_available
import kernels, kernels.layer
print(kernels.__version__, kernels.__file__, is_kernels_available(), kernels.Mode.__module__)
from qwenkern import kernels
print(kernels.__name__, kernels.rms_norm.__name__)
"""
    found = _python(code, cwd=ROOT).split()
    assert found[0] == importlib.metadata.version("kernels")
    assert not Path(found[1]).is_relative_to(ROOT) or "site-packages" in found[1]
    assert found[2:] == ["True", "kernels.layer.mode", "qwenkern.kernels", "rms_norm"]


def test_pytest_as_a_module_runs_in_the_root():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cli/test_info.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def without_the_library(tmp_path_factory) -> Path:
    """This environment's packages but for the library `kernels`."""
    place = tmp_path_factory.mktemp("packages")
    for package in Path(torch.__file__).parents[1].iterdir():
        if not package.name.startswith("kernels"):
            (place / package.name).symlink_to(package)
    return place


def test_without_the_library_the_folder_stands_in_nobodys_way(without_the_library):
    code = """
import transformers
from transformers import Qwen2ForCausalLM
from transformers.utils import is_kernels_available
print(is_kernels_available())
try:
    from kernels import rms_norm
except ImportError as error:
    print("no", error.name)
try:
    import kernels.rms_norm
except ModuleNotFoundError as error:
    print("no", error.name)
import kernels
try:
    kernels.rms_norm
except AttributeError as error:
    print(error)
"""
    said = _python(code, "-S", cwd=ROOT, PYTHONPATH=str(without_the_library)).splitlines()
    assert said[:3] == ["False", "no kernels", "no kernels.rms_norm"]
    assert "write `from qwenkern import kernels`" in said[3]


def test_a_library_that_is_broken_says_so(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    code = "import sys; sys.path.insert(1, sys.argv[1]); import kernels"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "ImportError: broken on purpose" in done.stderr


def test_the_package_is_typed():
    assert (ROOT / "qwenkern" / "py.typed").exists()


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs everything")
@pytest.mark.xdist_group("one worker")
def test_a_group_stays_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 does not read what pytest-xdist 3.8 writes: then times are taken beside other tests, and what a whole
    file shares is made by each worker."""
    assert request.node.nodeid.endswith("@one worker")
