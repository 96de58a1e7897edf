"""`qwenkern footprint`: its tables, its JSON, and the comparison with a loaded model."""

from __future__ import annotations

import json
import sys

import pytest
from support.models import TINY, save_checkpoint, tiny_model

from qwenkern.cli import commands, footprint_check
from qwenkern.hub import names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Tiny-Qwen2.5")
    save_checkpoint(tiny_model(), folder)
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Calls main() in this process: (stdout, stderr, exit code)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qwenkern", "footprint", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as done:
            commands.main()
        return *capfd.readouterr(), done.value.code or 0

    return run


@pytest.mark.parametrize("name", ["qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "qwen2.5-coder-3b"])
def test_a_size_needs_no_file(run, monkeypatch, name):
    monkeypatch.setattr(names, "pull", None)
    out, err, code = run(name)
    assert (err, code) == ("", 0)
    assert "6,171,877,376" in out
    assert "36,864 a token" in out
    assert "B200" in out


def test_json_has_the_same_numbers(run):
    out, _, code = run("qwen2.5-3b", "--json", "--context", 32768, "--card", "rtx 4090")
    [case] = json.loads(out)["cases"]
    assert code == 0
    assert case["bytes"]["weights"] == 6_171_877_376
    assert case["bytes"]["cache"] == (32768 + 64) * 36_864
    assert case["bytes"]["total"] == sum(size for name, size in case["bytes"].items() if name != "total")
    [card] = case["cards"]
    assert (card["name"], card["memory"], card["fits"], card["longest_context"]) == ("RTX 4090", 24 << 30, True, 32768)


def test_combinations_are_a_row_each(run):
    options = ("--quantize", "int8", "--quantize", "q4_k_m", "--context", 1024, "--context", 8192, "--sequences", 4)
    out, _, code = run("qwen2.5-7b", *options)
    assert code == 0
    assert out.count("4 x 8,192") == out.count("4 x 1,024") == 2
    cases = json.loads(run("qwen2.5-7b", *options, "--json")[0])["cases"]
    assert [(case["quantize"], case["context"], case["sequences"]) for case in cases] == [
        ("int8", 1024, 4),
        ("int8", 8192, 4),
        ("q4_k_m", 1024, 4),
        ("q4_k_m", 8192, 4),
    ]


def test_a_cpu_has_machines_for_cards(run):
    out, _, _ = run("qwen2.5-7b", "--quantize", "q8_0", "--device", "cpu")
    assert "float32" in out
    assert "256 GB" in out
    assert "B200" not in out


def test_a_card_that_the_kernels_do_not_run_on_is_marked(run):
    assert "T4 *" in run("qwen2.5-0.5b", "--card", "T4")[0]
    assert "*" not in run("qwen2.5-0.5b", "--card", "L4")[0]


@pytest.mark.parametrize("options", [(), ("--kv-cache-dtype", "float32"), ("--context", 100, "--sequences", 3)])
def test_a_check_finds_what_was_computed(run, folder, options):
    out, err, code = run(folder, "--check", "--device", "cpu", "--json", *options)
    assert (err, code) == ("", 0)
    found = json.loads(out)["check"]
    for part in ("weights", "cache"):
        assert found[part]["computed"] == found[part]["actual"] > 0
    sizes = [found["process"][when]["resident"] for when in ("before", "loaded", "used")]
    assert 0 < min(sizes) <= sizes[2]


def test_a_check_shows_its_comparison(run, folder):
    out, _, _ = run(folder, "--check", "--device", "cpu")
    assert "Loaded here" in out
    assert f"{4 * TINY.num_parameters:,}" in out
    assert "anonymous memory of this process" in out


def test_a_difference_is_an_error(run, folder, monkeypatch):
    actual = footprint_check.compare

    def other(*arguments):
        found = actual(*arguments)
        found["cache"]["actual"] += 1
        return found

    monkeypatch.setattr(footprint_check, "compare", other)
    _, err, code = run(folder, "--check", "--device", "cpu", "--json")
    assert code == 1
    assert "error: cache: " in err


def test_weights_of_a_hubs_repository_are_not_downloaded(run, folder, monkeypatch):
    def snapshot(hub_id, accept):
        from qwenkern import Config

        accept(Config.from_json(folder / "config.json"))
        raise AssertionError("downloads")

    monkeypatch.setattr(names, "snapshot", snapshot)
    out, err, code = run("somebody/finetune")
    assert (err, code) == ("", 0)
    assert f"{TINY.num_parameters:,} parameters" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "q9"), "quantize is 'q9'; expected None or one of"),
        (("--card", "RTX 9999"), "card is 'RTX 9999'; expected one of"),
        (("--context", 40000), "context is 40000; expected a whole number from 1 to 32768"),
        (("--sequences", 0), "sequences is 0; expected a whole number from 1"),
        (("--device", "tpu"), "device is 'tpu'; expected 'cuda' or 'cpu'"),
        (("--kv-cache-dtype", "int3"), "kv_cache_dtype is 'int3'; expected one of 'auto'"),
        (("--check", "--device", "cpu", "--context", 64, "--context", 128), "--check was given with 2 combinations"),
    ],
)
def test_wrong_options_are_a_line(run, options, message):
    out, err, code = run("qwen2.5-3b", *options)
    assert (out, code) == ("", 1)
    assert message in " ".join(err.split())
