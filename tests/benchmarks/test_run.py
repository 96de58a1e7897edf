"""The benchmark runner on a CPU: it checks before it times, reports failures, and compares with stored results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import typer
from typer.testing import CliRunner

from qwenkern import Config
from qwenkern.benchmarks import run
from qwenkern.benchmarks.ops.cases import CASES, Size
from qwenkern.benchmarks.ops.providers import PROVIDERS, Provider
from qwenkern.benchmarks.ops.timing import Ceilings, Spread
from qwenkern.benchmarks.reports import results
from qwenkern.benchmarks.reports.results import Row
from qwenkern.kernels import Pages, Weight, reference

LIMITS = Ceilings(copy=1e10, matrix=1e11)
SIZE = Size(2, context=64, device="cpu")
BY_NAME = {case.name: case for case in CASES}
KNOWN = {provider.name: provider for provider in PROVIDERS}
QUICK = ["--model", "qwen2.5-0.5b", "--op", "rms_norm", "--tokens", "1,3", "--seconds", "0.02"]
QUICK += ["--provider", "qwenkern,eager"]
app = typer.Typer()
app.command()(run.main)


@pytest.fixture(autouse=True)
def quick_ceilings(monkeypatch):
    monkeypatch.setattr(run, "ceilings", lambda device: LIMITS)


def _measure(name, *providers):
    return run.measure(BY_NAME[name], "qwen2.5-0.5b", SIZE, list(providers), LIMITS, 0.01)


@pytest.mark.parametrize("name", [name for name in BY_NAME if not name.startswith("lm_head")])
def test_every_case_is_measured(name):
    rows = _measure(name, KNOWN["qwenkern"], KNOWN["eager"], KNOWN["library"], KNOWN["sdpa"], KNOWN["transformers"])
    assert [row.error for row in rows] == [""] * len(rows)
    assert [row.provider for row in rows][:2] == ["qwenkern", "eager"]
    for row in rows:
        assert 0 < row.seconds.p20 <= row.seconds.p50 <= row.seconds.p80
        assert row.of_copy == pytest.approx(row.bandwidth / LIMITS.copy)
        assert row.floor > 0
    assert rows[0].ratio == Spread(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("name", "formats"),
    [("o_proj", {"weights": "int4"}), ("embedding", {"weights": "q8_0"}), ("decode_attention", {"pages": "int8"})],
)
def test_what_is_quantised_is_measured_beside_what_it_stands_for(name, formats):
    """Ours gets the packed tensors, the others dense ones. The packed bytes count."""
    size, given = replace(SIZE, **formats), {}

    def seen(provider):
        def function(case):
            inner = KNOWN[provider].function(case)
            return lambda *inputs: given.setdefault(provider, inputs) and inner(*inputs)

        return replace(KNOWN[provider], function=function)

    chosen = [seen(provider) for provider in ("qwenkern", "dense", "eager")]
    rows = run.measure(BY_NAME[name], "qwen2.5-0.5b", size, chosen, LIMITS, 0.01)
    assert [(row.provider, row.error) for row in rows] == [("qwenkern", ""), ("dense", ""), ("eager", "")]
    formats_of = {
        provider: {each.format for each in inputs if isinstance(each, (Pages, Weight))} - {"dense"}
        for provider, inputs in given.items()
    }
    assert formats_of == {"qwenkern": set(formats.values()), "dense": set(), "eager": set()}
    moved = BY_NAME[name].bytes_moved(Config.from_name("qwen2.5-0.5b"), size)
    assert rows[0].bandwidth == pytest.approx(moved / rows[0].seconds.p50)
    assert {(row.weights, row.pages) for row in rows} == {
        (formats.get("weights", "dense"), formats.get("pages", "dense"))
    }
    assert len({row.key for row in rows}) == 3
    assert rows[0].key != replace(rows[0], weights="dense", pages="dense").key


def test_nothing_is_beside_itself():
    assert [row.provider for row in _measure("o_proj", KNOWN["qwenkern"], KNOWN["dense"])] == ["qwenkern"]


@pytest.mark.parametrize(
    ("name", "weights", "pages", "expected"),
    [
        ("o_proj", "dense", "dense", [("dense", "dense")]),
        ("o_proj", "int4,q4_k", "dense", [("int4", "dense"), ("q4_k", "dense")]),
        ("o_proj", "dense,int4", "dense", [("dense", "dense"), ("int4", "dense")]),
        ("o_proj", "dense", "int8", []),
        ("decode_attention", "int4", "int8", [("dense", "int8")]),
        ("rms_norm", "int4", "dense", []),
    ],
)
def test_the_formats_of_a_case(name, weights, pages, expected):
    assert run.variants(BY_NAME[name], weights.split(","), pages.split(",")) == expected


def test_formats_on_the_command_line():
    done = CliRunner().invoke(app, [*QUICK, "--op", "o_proj,down,rms_norm", "--weights", "q4_k,int8"])
    said = " ".join(done.output.split())
    assert done.exit_code == 0, done.output
    assert "o_proj int8" in said
    assert "left out o_proj: the format q4_k has matrices whose" in said  # 896 is no multiple of 256
    assert "down q4_k" in said
    assert "rms_norm" not in said


def test_compiled_references_are_measured():
    rows = _measure("swiglu", KNOWN["qwenkern"], KNOWN["compile"])
    assert [row.provider for row in rows if row.seconds] == ["qwenkern", "compile"]


def test_the_check_compiles_what_is_timed():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = Provider("compile", lambda case: torch.compile(reference.rms_norm, backend=backend, dynamic=False))
    (row,) = _measure("rms_norm", compiled)
    assert row.error == ""
    assert len(graphs) == 1


def test_cases_run_in_the_order_of_their_names():
    assert [case.name for case in run._cases("linear,rms_norm,o_proj")] == ["o_proj", "down", "rms_norm"]
    assert run._cases("") == CASES


def test_the_peers_norm_is_made_once_for_each_weight(monkeypatch):
    modeling = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    made = []

    class Norm(modeling.Qwen2RMSNorm):
        def __init__(self, *sizes):
            made.append(sizes)
            super().__init__(*sizes)

    monkeypatch.setattr(modeling, "Qwen2RMSNorm", Norm)
    function = KNOWN["transformers"].function(BY_NAME["rms_norm"])
    for weight in 2 * [torch.full((8,), 2.0), torch.full((8,), 3.0)]:
        x = torch.randn(3, 8)
        torch.testing.assert_close(function(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert made == [(8, 1e-6)] * 2


def test_a_wrong_result_is_not_timed():
    wrong = Provider("wrong", lambda case: lambda x, weight, eps: 1.1 * reference.rms_norm(x, weight, eps))
    lost = Provider("lost", lambda case: lambda x, weight, eps: x * float("nan"))
    for row in _measure("rms_norm", wrong, lost):
        assert row.seconds is None
        assert "result 0 of rms_norm: the error is" in row.error


def test_a_broken_provider_is_reported_and_not_fatal():
    def explode(*inputs):
        raise RuntimeError("no such kernel\nat all")

    missing = Provider("missing", lambda case: __import__("a_package_that_is_not_there"))
    broken, ours = _measure("rms_norm", KNOWN["qwenkern"], Provider("broken", lambda case: explode), missing)
    assert (broken.provider, broken.seconds, broken.error) == ("broken", None, "RuntimeError: no such kernel")
    assert ours.provider == "qwenkern"


def test_a_wrong_kernel_of_ours_fails_the_run(monkeypatch):
    wrong = Provider("qwenkern", lambda case: lambda x, weight, eps: -x)
    monkeypatch.setattr(run, "PROVIDERS", [wrong, KNOWN["eager"]])
    done = CliRunner().invoke(app, QUICK)
    assert done.exit_code == 1
    assert "failed rms_norm x1 qwenkern: ArithmeticError: result 0 of rms_norm: the error is" in done.output


def test_the_table_json_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    done = CliRunner().invoke(app, [*QUICK, "--json", str(tmp_path / "now.json"), "--plot", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.output
    for heading in ("us p50", "roofline us", "% copy", "speed-up over it"):
        assert heading in done.output
    stored = json.loads((tmp_path / "now.json").read_text())
    assert {"device", "torch", "triton", "date", "ceilings", "rows", "commit"} <= set(stored)
    assert [(row["tokens"], row["provider"]) for row in stored["rows"]] == [
        (1, "qwenkern"),
        (1, "eager"),
        (3, "qwenkern"),
        (3, "eager"),
    ]
    assert (tmp_path / "plots" / "rms_norm.png").read_bytes().startswith(b"\x89PNG")
    assert results.load(tmp_path / "now.json")[0].seconds.p50 > 0


def test_two_sides():
    sides = ["--side-a", "eager", "--side-b", "qwenkern:/tmp"]
    done = CliRunner().invoke(app, [*QUICK[:-2], *sides])
    assert done.exit_code == 0, done.output
    assert "qwenkern:/tmp" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "rms_nrom"], "rms_nrom: not among"),
        (["--tokens", "0"], "expected numbers from 1 on"),
        (["--tokens", "few"], "expected numbers from 1 on"),
        (["--weights", "int5"], "'int5': expected formats among dense"),
        (["--pages", "int4"], "'int4': expected formats among dense"),
        (["--dtype", "float8"], "expected bfloat16, float16 or float32"),
        (["--provider", "cudnn"], "'cudnn': not among"),
        (["--side-a", "eager"], "expected both or neither"),
    ],
)
def test_bad_arguments(arguments, message):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def _row(p20, p50, p80, **changed):
    return Row("rms_norm", "qwen2.5-3b", 1, 0, "bfloat16", "qwenkern", Spread(p20, p50, p80), **changed)


def test_a_slow_down_is_noticed_and_noise_is_not():
    before = [_row(0.9, 1.0, 1.1)]
    assert results.changes(before, [_row(1.0, 1.09, 1.2)]) == []  # the spreads touch
    assert results.changes(before, [_row(1.02, 1.03, 1.04)]) == []
    (slower,) = results.changes(before, [_row(1.2, 1.3, 1.4)])
    assert str(slower) == "rms_norm x1 qwenkern: slower, 1.30 of the time before"
    (faster,) = results.changes(before, [_row(0.4, 0.5, 0.6)])
    assert "faster" in str(faster)
    assert results.changes(before, [replace(_row(2, 2, 2), tokens=2)]) == []  # never measured before


def test_a_slow_down_fails_the_run(tmp_path, monkeypatch):
    base = tmp_path / "base.json"
    CliRunner().invoke(app, [*QUICK, "--json", str(base)])
    document = json.loads(base.read_text())
    for row in document["rows"]:
        row["seconds"] = {"p20": 1e-9, "p50": 1e-9, "p80": 1e-9}
    base.write_text(json.dumps(document))
    done = CliRunner().invoke(app, [*QUICK, "--base", str(base)])
    assert done.exit_code == 1
    assert "slower" in done.output


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{"case": 1}]}'])
def test_a_damaged_result_is_named(tmp_path, content):
    file = tmp_path / "base.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"base\.json is not a result of this runner"):
        results.load(file)


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep" / "now.json"
    results.save(file, {"rows": []})
    with pytest.raises(TypeError):
        results.save(file, {"rows": object()})
    assert json.loads(file.read_text()) == {"rows": []}
    assert [each.name for each in file.parent.iterdir()] == ["now.json"]
