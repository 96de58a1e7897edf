"""The measurements of whole models and of other engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from support.clock import set_clock
from support.engines import eventually
from support.models import TINY, tiny_model
from typer.testing import CliRunner

from qwenkern import Config
from qwenkern.benchmarks import end_to_end
from qwenkern.benchmarks.models import contention, llama_cpp, peers, roofline
from qwenkern.benchmarks.models.peers import Engine, Reading
from qwenkern.benchmarks.models.roofline import Roofline
from qwenkern.checkpoint.packing import unpacked
from qwenkern.kernels import c as c_backend

app = typer.Typer()
app.command()(end_to_end.main)
LIMITS = Roofline(bandwidth=1e9, float32=1e10, bfloat16=0.0)

# What llama.cpp's programs print: as many tokens a second of a prompt as 100, and 50 more for all sequences together.
PROGRAM = """#!{python}
import json, os, sys
given = sys.argv[1:]
value = lambda name: int(given[given.index(name) + 1])
with open({log!r}, "a") as log:
    log.write(json.dumps([os.path.basename(sys.argv[0]), *given]) + "\\n")
if "-npl" in given:
    prompt, new, counts = value("-npp"), value("-ntg"), given[given.index("-npl") + 1]
    print("some other line")
    for count in map(int, counts.split(",")):
        print(json.dumps({{"pl": count, "t_pp": count * prompt / 100, "t_tg": count * new / 50}}))
else:
    prompt, new = value("-p"), value("-n")
    found = {{"build_number": 7, "build_commit": "abc", "cpu_info": "c", "n_threads": value("--threads")}}
    print(json.dumps(found | {{"avg_ns": 1e9 * (prompt / 100 + new / 50)}}))
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Replaces llama.cpp's programs; returns their arguments."""
    folder, log = tmp_path / "bin", tmp_path / "log"
    folder.mkdir()
    for name in ("llama-bench", "llama-batched-bench"):
        (folder / name).write_text(PROGRAM.format(python=sys.executable, log=str(log)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv(llama_cpp.LLAMA_CPP.name, str(folder))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def threads(monkeypatch):
    """Restores what end_to_end sets."""
    before = torch.get_num_threads()
    monkeypatch.setenv("QWENKERN_THREADS", "1")
    yield
    torch.set_num_threads(before)


def test_one_sequence_is_llama_benchs_and_several_are_batched_benchs(programs, tmp_path):
    found = llama_cpp.Programs(tmp_path / "model.gguf", 3)
    assert found.facts["build_number"] == 7
    assert found.facts["n_threads"] == 3
    assert found.seconds(1, 200, 25) == (2.0, 0.5)
    assert found.seconds(8, 200, 25) == (16.0, 4.0)
    first, prompt, decode, batched = programs()
    assert [each[0] for each in (first, prompt, decode)] == ["llama-bench"] * 3
    assert all(each[each.index("--threads") + 1] == "3" for each in programs())
    assert decode[decode.index("-d") + 1] == "200", "tokens are decoded behind the prompt"
    assert batched[0] == "llama-batched-bench"
    assert batched[batched.index("-c") + 1] == "2048", "room for 225 tokens of each, rounded up to 256"


def test_missing_programs_are_named_with_where_they_were_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv(llama_cpp.LLAMA_CPP.name, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"llama-bench is not in {tmp_path}, which QWENKERN_LLAMA_CPP names"):
        llama_cpp.find("llama-bench")
    monkeypatch.delenv(llama_cpp.LLAMA_CPP.name)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="any folder of PATH; QWENKERN_LLAMA_CPP may name another"):
        llama_cpp.find("llama-bench")


def test_what_a_program_says_at_its_end_is_passed_on(programs, tmp_path):
    found = llama_cpp.Programs(tmp_path / "model.gguf", 1)
    (tmp_path / "bin" / "llama-batched-bench").write_text("#!/bin/sh\necho 'no such file' >&2\nexit 3\n")
    with pytest.raises(RuntimeError, match="llama-batched-bench ended with 3, saying: no such file"):
        found.seconds(2, 8, 2)


def test_llama_cpps_engine_is_a_file_of_known_weights(programs, tmp_path):
    pytest.importorskip("gguf")  # not on every machine with a GPU
    model = tiny_model(dtype=torch.bfloat16)
    peers.write_gguf(model, tmp_path / "model.gguf")
    engine = peers.llama_cpp(tmp_path / "model.gguf", 1)
    reading = engine.read([[1] * 200] * 8, 25)
    assert (reading.first, reading.rate) == (16.0, pytest.approx(50.0))
    assert engine.in_16_bits
    # the file's vectors are float32
    assert peers.step_weights(model) < engine.weights < 1.05 * peers.step_weights(model)


def test_the_gguf_file_of_a_model_holds_its_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    model, config = tiny_model(dtype=torch.bfloat16), TINY
    peers.write_gguf(model, tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(found) == len(dict(unpacked(model.module, model.config)))
    gate = torch.from_numpy(found["blk.1.ffn_gate.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(gate, model.module.model.layers[1].mlp.gate_up_proj.weight[: config.intermediate_size])
    key = model.module.model.layers[0].self_attn.qkv_proj.bias[config.q_size :][: config.kv_size]
    assert torch.equal(torch.from_numpy(found["blk.0.attn_k.bias"].data.copy()), key.float())


def test_a_step_reads_weights_and_cache():
    """A token of 3B reads 6.17 GB of weights, and 36,864 bytes per cached token."""
    config = Config.from_name("qwen2.5-3b")
    assert 2 * config.num_parameters == pytest.approx(6.17e9, rel=1e-3), "its embedding is the head, too"
    assert roofline.step_bytes(config, 1000, 4, 100) == 1000 + 400 * 36864


@pytest.mark.parametrize(("name", "layers"), [("qwen2.5-0.5b", 357.9e6), ("qwen2.5-7b", 6.525e9)])
def test_a_prompt_multiplies_layers_for_each_token_and_the_head_once(name, layers):
    """A tied and an untied embedding."""
    config = Config.from_name(name)
    head = config.vocab_size * config.hidden_size
    assert roofline.prompt_operations(config, 2, 512) == pytest.approx(4 * (layers * 512 + head), rel=1e-3)


def test_the_roofline_is_that_of_our_c():
    if not c_backend.library():
        pytest.skip("no C compiler here")
    found = roofline.roofline(torch.device("cpu"), 1)
    assert found.bandwidth > 1e9
    assert found.float32 > 1e9
    # Pairs are twice the products of one instruction, at half the rate on some; more, and the compiler left some out.
    assert found.bfloat16 == 0 or found.float32 / 4 < found.bfloat16 < found.float32 * 4
    assert found.peak == max(found.float32, found.bfloat16)


def test_the_read_loop_reads_everything():
    """The result is the sum of one lane. A changed number in any place changes the sum of some lane."""
    if (loops := roofline._loops()) is None:
        pytest.skip("no C compiler here")
    lanes, size = 8, 1 << 20
    for threads in (1, 3):
        for place in (0, size // 16, size // 8 - 64 * lanes):
            data = torch.zeros(size // 8, dtype=torch.int64)
            base = place // (4 * lanes) * 4 * lanes  # the first of four vectors, whose first lane is looked at
            data[base] = 5
            assert loops.read_memory(data.data_ptr(), size, threads) == 5, (threads, place)


def test_without_c_torch_gives_the_limits(monkeypatch):
    monkeypatch.setattr(c_backend, "library", lambda: None)
    found = roofline.roofline(torch.device("cpu"), 1)
    assert min(found.bandwidth, found.float32, found.bfloat16) > 0


def test_speed_ups_and_shares_are_taken_within_a_round():
    """In the second round everything is half as fast, also the limits."""
    config, asked = TINY, []
    speeds = iter([1.0, 1.0, 0.5, 0.25])

    def limits():
        nonlocal speed
        speed = next(speeds)
        return Roofline(1e9 * speed, 1e10 * speed, 0.0)

    def engine(times, in_16_bits=True):
        def read(prompts, new):
            asked.append((len(prompts), len(prompts[0]), new))
            return Reading(2.0 / speed / times, 100.0 * speed * times)

        return Engine(read, 1000, in_16_bits)

    speed = 0.0
    engines = {"qwenkern": engine(1), "slow": engine(0.5), "quantised": engine(2, in_16_bits=False)}
    rows, rounds = end_to_end.measure(engines, config, 2, 10, 4, 3, limits)
    mine, slow, quantised = rows
    assert asked == [(2, 10, 4)] * 12
    assert [limit.bandwidth for limit in rounds] == [1e9, 0.5e9, 0.25e9], "the round that warms up does not count"
    assert slow["prompt_speedup"] == slow["decode_speedup"] == [2, 2, 2]
    assert quantised["decode_speedup"] == [0.5, 0.5, 0.5], "a loss is a result like others"
    assert not {"prompt_speedup", "decode_speedup"} & set(mine), "qwenkern has no speed-up over itself"
    assert mine["first_token_seconds"] == 4.0
    assert mine["prompt_tokens_per_second"] == 5.0
    assert mine["of_peak"] == pytest.approx(roofline.prompt_operations(config, 2, 10) / 2.0 / 1e10)
    assert mine["of_bandwidth"] == pytest.approx(100 * roofline.step_bytes(config, 1000, 2, 12) / 2 / 1e9)
    assert "of_peak" not in quantised, "its products are others"


def test_what_compiles_for_minutes_comes_last():
    names = ["qwenkern", "transformers", "compiled", "llama.cpp"]
    assert end_to_end.in_turns(names) == [["qwenkern", "transformers", "llama.cpp"], ["qwenkern", "compiled"]]
    assert end_to_end.in_turns(names[:2]) == [names[:2]]


def test_results_are_kept_while_an_engine_still_compiles(monkeypatch, tmp_path):
    """A run that is ended then has a row of each of the others."""

    class Ended(BaseException):
        pass

    def read(prompts, new):
        raise Ended

    def make(name, *given):
        return Engine(read if name == "compiled" else lambda prompts, new: Reading(1.0, 2.0), 1)

    monkeypatch.setattr(end_to_end, "make", make)
    monkeypatch.setattr(end_to_end, "roofline", lambda *given: LIMITS)
    options = [
        "--peers",
        "transformers,compiled",
        "--batch",
        "1,2",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "now.json"),
    ]
    with pytest.raises(Ended):
        CliRunner().invoke(app, [*SMALL, *options], catch_exceptions=False)
    kept = json.loads((tmp_path / "now.json").read_text())["rows"]
    assert [(row["engine"], row["batch"]) for row in kept] == [
        ("qwenkern", 1), ("transformers", 1), ("qwenkern", 2), ("transformers", 2),
    ]  # fmt: skip


def test_a_peer_that_fails_is_reported():
    def broken(prompts, count):
        raise RuntimeError("out of memory")

    engines = {"qwenkern": Engine(lambda prompts, new: Reading(1.0, 2.0), 1), "peer": Engine(broken, 1)}
    mine, peer = end_to_end.measure(engines, TINY, 2, 3, 4, 2, lambda: LIMITS)[0]
    assert peer == {"batch": 2, "prompt": 3, "engine": "peer", "error": "RuntimeError: out of memory"}
    assert mine["tokens_per_second"] == 2.0


def test_a_decode_rate_is_what_more_tokens_cost_more(monkeypatch):
    now = 0.0

    def generate(prompts, count):
        nonlocal now
        now += 3.0 + 0.5 * (count - 1)

    set_clock(monkeypatch, peers, perf_counter=lambda: now)
    assert peers.timed(generate)([[1, 2], [3, 4]], 8) == Reading(3.0, 4.0)


def test_unknown_peers_are_named():
    done = CliRunner().invoke(app, ["--model", "qwen2.5-0.5b", "--layers", "1", "--peers", "vllm"])
    assert done.exit_code == 2
    said = " ".join(done.output.replace("│", " ").split())
    assert "vllm: not among bfloat16, transformers, patched, liger, compiled, llama.cpp" in said


SMALL = ["--model", "qwen2.5-0.5b", "--layers", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1"]


def run(tmp_path, *options):
    done = CliRunner().invoke(app, [*SMALL, *options, "--threads", "1", "--json", str(tmp_path / "now.json")])
    assert done.exit_code == 0, done.output
    return json.loads((tmp_path / "now.json").read_text()), done.output


@pytest.mark.slow
def test_end_to_end_of_random_weights(tmp_path, threads, programs):
    pytest.importorskip("gguf")
    found, said = run(tmp_path, "--peers", "transformers,llama.cpp", "--note", "a stand-in")
    assert [row["engine"] for row in found["rows"]] == ["qwenkern", "transformers", "llama.cpp"]
    assert all(row["tokens_per_second"] > 0 and row["of_bandwidth"] > 0 for row in found["rows"])
    assert all(len(row["decode_speedup"]) == 3 for row in found["rows"][1:])
    assert found["programs"]["llama.cpp"]["build_number"] == 7
    assert {"target", "load_before", "roofline", "commit", "date"} <= set(found)
    assert (found["threads"], found["note"]) == (1, "a stand-in")
    assert all(word in said for word in ("speed-up", "bandwidth", "GFLOP/s in float32", "build 7"))


def test_a_missing_peer_is_said(tmp_path, threads, monkeypatch):
    monkeypatch.setenv(llama_cpp.LLAMA_CPP.name, str(tmp_path))
    found, said = run(tmp_path, "--peers", "llama.cpp")
    assert "left out llama.cpp" in said
    assert [row["engine"] for row in found["rows"]] == ["qwenkern"]


@pytest.mark.slow
def test_decoding_beside_a_busy_process(tmp_path, threads):
    found, said = run(tmp_path, "--peers", "transformers", "--busy", "1")
    assert [row["engine"] for row in found["rows"]] == ["qwenkern", "transformers"]
    assert found["busy"] == 1
    assert all(row["share"][0] > 0 for row in found["rows"])
    assert "busy process" in said


def test_busy_processes_end_with_the_block_and_with_their_parent(monkeypatch):
    mark = f"# of process {os.getpid()}"  # other tests have busy processes, too
    monkeypatch.setattr(contention, "SPIN", contention.SPIN + mark)
    with contention.busy(2):
        assert _spinning() == 2
    assert _spinning() == 0
    code = f"""
import os
from qwenkern.benchmarks.models import contention
contention.SPIN += {mark!r}
contention.busy(1).__enter__()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd="/")
    eventually(lambda: _spinning() == 0)


def _spinning() -> int:
    if not os.path.isdir("/proc/self"):
        pytest.skip("no list of processes in /proc here")
    found = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                words = file.read().split(b"\0")
        except OSError:
            continue
        found += contention.SPIN.encode() in words
    return found


@pytest.mark.slow
def test_two_processes_each_have_a_row(tmp_path, threads):
    found, _ = run(tmp_path, "--peers", "transformers", "--twice")
    names = [f"{engine}, process {number}" for engine in ("qwenkern", "transformers") for number in (1, 2)]
    assert [row["engine"] for row in found["rows"]] == names
    assert all(row["share"][0] > 0 for row in found["rows"])


def test_shares_are_those_of_the_calm_speed():
    rates = {"engine": iter([9.0, 10.0, 4.0, 20.0, 10.0, 30.0, 3.0])}
    (row,) = contention.calm_and_busy({"engine": lambda: next(rates["engine"])}, 0, 3)
    assert row["calm_tokens_per_second"] == [20.0, 10.0, 30.0]
    assert row["share"] == [0.4, 0.1, 0.5]


def test_a_process_that_fails_says_why():
    with contention.process(int, "no model") as read, pytest.raises(RuntimeError, match=r"ValueError: .*no model"):
        read()
    with contention.process(os._exit, 3) as read, pytest.raises(RuntimeError, match="its process ended with 3"):
        read()
