"""Requirements on every registered op, such as tests, documentation and a benchmark. A test names what a new op
lacks."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.references import mapped
from support.tolerances import assert_as_close_as

from qwenkern import Config, kernels
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.kernels import dispatch
from qwenkern.kernels.c.backend import C
from qwenkern.kernels.dispatch import BACKENDS, OPS, Backend, refusals, serving
from qwenkern.kernels.recording import CannotRecord, recording
from qwenkern.kernels.weights import FORMATS, Dense

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels"


def test_every_op_is_exported():
    assert set(OPS) == set(kernels.__all__) - {"Pages", "Weight"}, "kernels/__init__.py exports others"
    assert all(getattr(kernels, name) is op for name, op in OPS.items())


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_every_file_is_imported(file):
    """One that is not registers nothing, and another backend would run in its place without a word."""
    if file.name in ("namesake.py", "reference.py"):
        return  # for those who import them by their names
    name = ".".join(["qwenkern", "kernels", *file.relative_to(FOLDER).with_suffix("").parts])
    assert name.removesuffix(".__init__") in sys.modules, f"nobody imports {file}"


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_documented_measured_and_tested(name):
    assert (OPS[name].__doc__ or "").strip(), f"{name} has no docstring"
    page = (ROOT / "docs" / "api" / "ops.md").read_text(encoding="utf-8")
    assert re.search(rf"^::: qwenkern\.kernels\.\w+\.{name}$", page, re.M), f"docs/api/ops.md does not have {name}"
    assert name in {case.op for case in CASES}, f"benchmarks/ops/cases.py has no case of {name}"
    asked = re.compile(rf'"{name}"|\.{name}\(')
    tests = [file for file in FOLDER.parent.glob("tests/kernels/test_*.py") if file.name != "test_arguments.py"]
    assert any(asked.search(file.read_text(encoding="utf-8")) for file in tests), f"tests/kernels has no test of {name}"


@pytest.mark.parametrize("name", C.implementations)
def test_an_op_in_c_is_tested_there(name):
    text = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests" / "c").glob("test_*.py"))
    assert re.search(rf"fast\.{name}\(|kernels\.{name}\(", text), f"no file of tests/c calls fast.{name}"


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ids=lambda file: file.stem)
def test_the_tests_of_a_kernel_run_on_its_ptx(file):
    """Of those files that break one on purpose."""
    if file.stem in ("test_mutations", "test_attention"):  # the second has the kernels of the two beside it
        return
    mutated = re.search(r'^\s+"triton/\w+\.py",$|Mutation\([^)]*"triton/', file.read_text(encoding="utf-8"), re.M)
    listed = f"import {file.stem}\n" in (ROOT / "tests" / "ptx" / "test_kernels.py").read_text(encoding="utf-8")
    assert listed or not mutated, f"tests/ptx/test_kernels.py runs no test of {file.stem}"


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_what_a_backend_runs_is_as_close_as_torch(backend, monkeypatch):
    """Every op that it does not refuse at a small model's sizes, on a CPU; and a refusal completes a sentence."""
    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    # lm_head_top_k has three values here; with one seed in 40 (0 is one) those of torch are nearer by chance
    torch.manual_seed(1)
    config, ran = Config(96, 64, 96, 1, 4, 2, 32, max_position_embeddings=128), 0
    for case in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = case.inputs(config, Size(3, context=70, dtype=dtype, device="cpu"))
            first = next(each for each in inputs if isinstance(each, torch.Tensor))
            reason = refusals(case.op, first, *inputs)[backend.name]
            assert reason is None or reason.startswith(("does not take ", "has no such kernel", "does not run on cpu"))
            if reason is None:
                assert_runs_as_close_as_torch(backend, case.op, inputs)
                ran += 1
    assert ran or not backend.serves("cpu"), f"{backend.name} runs nothing of a small model"


def assert_runs_as_close_as_torch(backend, op, inputs):
    peers = [mapped(torch.Tensor.clone, each) for each in inputs]
    wide = [mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, each) for each in peers]
    given, _ = OPS[op].wrap(tuple(inputs), {})
    results = backend.implementations[op].run(*given), OPS[op].reference(*peers), OPS[op].reference(*wide)
    for out, peer, truth in zip(*(each if isinstance(each, tuple) else (each,) for each in results), strict=True):
        if out.is_floating_point():
            assert_as_close_as(out, peer, truth)
        else:
            assert torch.equal(out, truth)


def test_what_is_registered_must_fit():
    before = list(BACKENDS)
    other = Backend("other", lambda kind: False, lambda x: None)
    try:
        with pytest.raises(ValueError, match="backend other implements rms_nrom, and there is no such op among"):
            other.implements()(_named("rms_nrom", lambda x, weight, eps: x))
        namesake = _named("rms_norm", lambda x, weight, eps: x)
        with pytest.raises(ValueError, match="backend other's refusal of rms_norm does not take the op's arguments"):
            other.implements(lambda x, weight: None)(namesake)
        with pytest.raises(ValueError, match=r"other's rms_norm has the arguments \['x', 'weight'\]; expected"):
            other.implements()(_named("rms_norm", lambda x, weight: x))
        other.implements(lambda x, *rest, **keywords: None)(namesake)
        with pytest.raises(ValueError, match="backend other implements rms_norm twice"):
            other.implements()(namesake)
        with pytest.raises(ValueError, match="there are two backends 'other'"):
            Backend("other", lambda kind: False, lambda x: None)
    finally:
        BACKENDS[:] = before


def test_a_backend_that_is_not_recorded_ends_a_recording():
    """Its results would be those of the recording for ever."""
    before, x = list(BACKENDS), torch.ones(2, 32)
    other = Backend("other", lambda kind: kind == "cpu", lambda x: None)
    try:
        other.implements()(_named("rms_norm", lambda x, weight, eps: x + 1))
        BACKENDS[:] = [other]
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("QWENKERN_KERNELS", raising=False)
            assert torch.equal(kernels.rms_norm(x, x[0], 1e-6), x + 1)
            with recording([]), pytest.raises(CannotRecord, match="rms_norm runs in other, whose calls are not"):
                kernels.rms_norm(x, x[0], 1e-6)
    finally:
        BACKENDS[:] = before


def _named(name, function):
    function.__name__ = name
    return function


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_backend_is_called_as_its_folder(backend):
    assert (FOLDER / backend.name).is_dir()
    assert backend.implementations, f"kernels/{backend.name}/ implements nothing"
    assert all(name in OPS for name in backend.implementations)


def test_triton_refuses_a_format_that_needs_a_newer_gpu(monkeypatch):
    from qwenkern.kernels.triton import backend, tuning

    later = type("Later", (Dense,), {"format": "later of test_ops", "triton_capability": 89})
    del FORMATS[later.format]
    weight = later(torch.ones(2, 2))
    for capability, expected in ((80, "weights of the format later of test_ops on sm_80 (from sm_89)"), (90, None)):
        monkeypatch.setattr(
            tuning, "device_of", lambda x, c=capability: tuning.Device("a GPU", "cuda", c, 100, 1 << 16)
        )
        assert backend.refuses_format("weights", weight, later.triton_load) == expected
    assert backend.refuses_format("weights", weight, None) == "weights of the format later of test_ops"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_that_is_too_old_runs_the_reference_and_says_so_once(monkeypatch, recwarn, dtype):
    from qwenkern.kernels.triton import backend, tuning

    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    x = torch.ones(2, 32, dtype=dtype)
    first = SimpleNamespace(device=torch.device("cuda:0"), dtype=dtype, numel=x.numel)
    for capability in (75, 80):
        device = tuning.Device("a GPU", "cuda", capability, 40, 1 << 16)
        monkeypatch.setattr(tuning, "device_of", lambda x, device=device: device)
        dispatch._warn_once.cache_clear()
        for op, *arguments in (("rms_norm", x, x[0], 1e-6), ("swiglu", x)):
            found = serving(op, first, *arguments)
            assert (found and found.backend) is (backend.TRITON if capability == 80 else None)
    assert [str(each.message) for each in recwarn] == [
        "qwenkern: the Triton kernel does not take tensors on sm_75 (from sm_80); torch runs it, slower"
    ]


@pytest.mark.parametrize("call", ["by position", "by name", "torch.ops"])
def test_a_kernel_is_launched_on_its_tensors_device(monkeypatch, call):
    """Whatever the current device is, and however the op is called."""
    current, launched = [0], []

    @contextlib.contextmanager
    def use(device):
        current[0] = device.index
        yield
        current[0] = 0

    x = torch.ones(2, 32)
    found = SimpleNamespace(run=lambda x, weight, eps: launched.append(current[0]) or x.clone())
    monkeypatch.setattr(sys.modules["qwenkern.kernels.contract"], "serving", lambda *args, **keywords: found)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.Tensor, "device", property(lambda tensor: torch.device("cuda:1")))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", use)
    if call == "by name":
        kernels.rms_norm(eps=1e-6, weight=x[0], x=x)
    else:
        (torch.ops.qwenkern if call == "torch.ops" else kernels).rms_norm(x, x[0], 1e-6)
    assert launched == [1]


def test_more_sequences_than_a_grid_has_programs_are_refused():
    from qwenkern.kernels.triton import decode_attention, prefill_attention

    pages = kernels.pages.DensePages(*[torch.empty(1, 64, 1, 32, device="meta")] * 2)
    for count, expected in ((65535, None), (65536, "65536 sequences (at most 65535)")):
        q = torch.empty(count, 2, 32, device="meta")
        assert decode_attention.refuses_paged(q, pages, 64) == expected
    q = torch.empty(32 * 10, 2, 32, device="meta")
    assert prefill_attention.refuses_paged(q, pages, 64, 65525) is None
    assert prefill_attention.refuses_paged(q, pages, 64, 65526).startswith("320 tokens of 65526 sequences (at most")
