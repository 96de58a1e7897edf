"""The package as it is installed and imported: the modules that an import loads, and the requirements."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwenkern

ROOT = Path(qwenkern.__file__).parents[1]
KERNELS = Path(qwenkern.kernels.__file__).parent


def _python(code: str, *options: str, cwd: Path | None = None, **environment: str) -> str:
    """What a program prints that runs in a process of its own."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_integrations_wait_until_they_are_asked_for():
    loaded = _python("import sys, qwenkern; print(*sys.modules)").split()
    assert not [name for name in loaded if name.startswith("qwenkern.integrations")]


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


@pytest.mark.slow
def test_without_triton_c_runs_all_the_same():
    """The same recorded calls, and the same bits."""
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


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["kernels", "benchmarks"])
def test_tools_find_the_folders_of_the_root_inside_the_package(name):
    link = ROOT / "qwenkern" / name
    tracked = subprocess.run(
        ["git", "ls-files", "-s", str(link)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert not tracked.stdout or tracked.stdout.startswith("120000 "), "git has it as another thing than a link"
    assert link.read_text() == f"../{name}" if link.is_file() else link.samefile(ROOT / name)


# The bare name `kernels`, as the root of a checkout puts it on the path


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
