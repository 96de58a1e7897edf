"""Each script of examples/ runs with a small random model, and prints what its docstring says."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fuzz import write_gguf
from support.models import TINY, save_checkpoint, tiny_model
from support.servers import serving

from qwenkern import Model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Run = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose chats are long enough for every script."""
    path = tmp_path_factory.mktemp("examples") / "Tiny-Qwen2.5"
    save_checkpoint(tiny_model(replace(TINY, num_hidden_layers=1, max_position_embeddings=4096)), path)
    return path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a script with arguments, in an empty folder; gives what it printed."""

    def run(name: str, *arguments: str, model: bool = True) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [name, *(["--model", str(folder)] if model else []), *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return run


def subprocess_run(name: str, environment: dict[str, str]) -> str:
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def test_generate_prints_what_generate_returns(run: Run, folder: Path):
    expected = Model.from_pretrained(folder).generate("abc", max_tokens=60)
    assert run("generate.py", "abc") == f"abc{expected.text}\n[60 tokens, ended by length]\n"


def test_structured_prints_what_parses(run: Run):
    printed = run("structured.py").splitlines()
    assert [line.split(":")[0] for line in printed[:4]] == ["name", "country", "inhabitants", "is_capital"]
    assert printed[4] in ("praise", "blame", "unclear")
    assert re.fullmatch("[0-9]{4}-[01][0-9]-[0-3][0-9]", printed[5])


def test_chat_asks_the_second_question_after_the_first_answer(run: Run, folder: Path):
    model = Model.from_pretrained(folder)
    printed = run("chat.py")
    first, second = re.findall(r"^> (.*)$", printed, re.M)[:2]
    messages = [{"role": "system", "content": "You answer in one short sentence."}, {"role": "user", "content": first}]
    messages.append({"role": "assistant", "content": model.chat(messages, max_tokens=80).text})
    messages.append({"role": "user", "content": second})
    assert model.chat(messages, max_tokens=80).text in printed


def test_stream_stops_the_model(run: Run):
    text, _, tail = run("stream.py", "x", "--characters", "20").rpartition("\n[")
    assert 20 <= len(text) < 30
    assert int(tail.split()[0]) < 200


def test_many_callers_answers_each_as_if_alone(run: Run, folder: Path):
    model = Model.from_pretrained(folder)
    printed = run("many_callers.py")
    for question, answer in re.findall(r"^(What.*|Name.*|Write.*)\n    (.*)$", printed, re.M):
        expected = model.chat([{"role": "user", "content": question}], temperature=0, max_tokens=60).text
        assert ast.literal_eval(answer) == expected
    assert printed.endswith("cancelled: True\n")


def test_serve_client_prints_a_stream_and_an_answer_of_the_schema(run: Run, folder: Path):
    with Model.from_pretrained(folder) as model, serving({"tiny": model}) as url:
        expected = model.chat([{"role": "user", "content": "What is a prime number?"}], temperature=0, max_tokens=60)
        printed = run("serve_client.py", "--url", f"{url}/v1", model=False)
    assert printed.startswith(expected.text + "\n")
    found = json.loads(printed.removeprefix(expected.text))
    assert found.keys() == {"mood", "is_long"}
    assert found["mood"] in ("good", "bad", "mixed")


def test_remember_a_prefix_reads_the_document_once(run: Run):
    printed = run("remember_a_prefix.py")
    saved = int(re.search(r"saved (\d+) tokens", printed)[1])
    found = re.findall(r"^\[(\d+) of (\d+) prompt tokens", printed, re.M)
    assert saved > 500
    assert [int(count) for count, _ in found] == [saved] * 2
    assert all(saved <= int(whole) < saved + 128 for _, whole in found)


def test_batch_prints_every_sample_of_every_prompt(run: Run):
    rows = re.findall(r"^ *(-\d+\.\d\d)  sample (\d)  (.*)$", run("batch.py"), re.M)
    assert [(int(sample), prompt[:4]) for _, sample, prompt in rows] == [
        (sample, prompt) for prompt in ("The ", "A li", "impo") for sample in (0, 1)
    ]


def test_score_prints_the_perplexity_of_each_text(run: Run, folder: Path):
    model = Model.from_pretrained(folder)
    printed = run("score.py", "some text", "another")
    for line, text in zip(printed.splitlines(), ("some text", "another"), strict=True):
        assert float(line.split()[1]) == pytest.approx(model.score(text).perplexity, abs=0.01)
        assert line.endswith(text)


def test_deterministic_finds_the_same_bits(run: Run):
    assert run("deterministic.py") == "same tokens: True\nsame log-probabilities: True\n"


def test_tools_answers_a_call(run: Run, monkeypatch: pytest.MonkeyPatch):
    """A random model calls nothing; one that calls is given the result of its call."""
    assert run("tools.py").strip()
    seen = []

    def chat(self: Model, messages: list[dict[str, str]], **_: object) -> object:
        seen.append(list(messages))
        call = '<tool_call>\n{"name": "multiply", "arguments": {"a": 1234, "b": 5678}}\n</tool_call>'
        return type("Completion", (), {"text": call if len(seen) == 1 else "It is seven million."})

    monkeypatch.setattr(Model, "chat", chat)
    assert run("tools.py").endswith("It is seven million.\n")
    assert seen[1][-1] == {"role": "tool", "content": "7006652"}


def test_checkpoints_loads_a_folder_and_a_gguf_file_and_names_what_is_missing(
    run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory
):
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    printed = run("checkpoints.py", str(folder), str(file), str(folder / "absent.gguf"), model=False)
    assert re.search(rf"^{folder}: [\d,]+ parameters, layers: 1, torch.float32$", printed, re.M)
    assert re.search(rf"^{file}: [\d,]+ parameters, layers: 2, torch.bfloat16$", printed, re.M)
    assert f"{folder / 'absent.gguf'}: " in printed.splitlines()[-1]


@pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers")
def test_patch_transformers_changes_roundings_only(run: Run):
    patched, difference, tokens, reverted = run("patch_transformers.py", model=False).splitlines()
    assert patched == "patched: True"
    assert reverted == "reverted: True"
    assert float(difference.split()[-1]) < 0.05  # of logits between -1 and 1, in bfloat16
    assert len(ast.literal_eval(tokens)) == 4


def test_share_with_transformers_shares(run: Run):
    printed = run("share_with_transformers.py", model=False)
    assert printed == "same tokens: True\na change to one is a change to both: True\n"


def test_single_ops_are_torchs_formulas(run: Run):
    differences = dict(line.split() for line in run("single_ops.py", model=False).splitlines())
    assert differences.keys() == {"add_rms_norm", "swiglu", "attention"}
    assert all(float(value) < 0.1 for value in differences.values())  # a rounding of values up to some 10


def test_training_step_learns(run: Run):
    losses = [float(line.split()[-1]) for line in run("training_step.py", model=False).splitlines()]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers")
def test_kernels_layers_puts_our_norm_into_the_model(run: Run):
    difference, module = run("kernels_layers.py", model=False).splitlines()[-2:]
    assert float(difference.split()[-1]) < 1e-4
    assert "qwenkern" in module


def test_time_a_kernel_prints_both_times_and_their_ratio(run: Run):
    printed = run("time_a_kernel.py", model=False)
    assert re.search(r"^qwenkern +[\d.]+ us .* GB/s$", printed, re.M)
    assert re.search(r"^torch +[\d.]+ us .* GB/s$", printed, re.M)
    assert re.search(r"^speed-up over torch: [\d.]+ \(", printed, re.M)


@pytest.mark.slow
def test_check_a_kernel_finds_the_race(compiling: dict[str, str]):
    """In a process of its own, in which Triton compiles."""
    printed = subprocess_run("check_a_kernel.py", compiling)
    assert re.search(r"^with its barrier: off by at most [\d.e-]+$", printed, re.M)
    assert re.search(r"^without it: warp \d releases what was stored .* no barrier .* stores of warp \d", printed, re.M)


def test_every_script_is_run_and_listed():
    """Each has a docstring of two lines between quotes, and at most 40 lines in all."""
    scripts = {file.name for file in EXAMPLES.glob("*.py")}
    text = Path(__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'run\("(\w+\.py)"', text)) == scripts
    listed = re.findall(r"^\| `(\w+\.py)` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(scripts)
    for name in scripts:
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        said, command = (line for line in ast.get_docstring(ast.parse(source)).splitlines() if line)
        assert said.endswith((".", "?"))
        assert command.startswith(f"python examples/{name}")
        assert len(source.splitlines()) <= 40
