"""Model.warm_up: after it, nothing is compiled or captured during an answer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support.engines import check_pages, with_capture
from support.models import TINY, tiny_model

from qwenkern import RequestError, SamplingParams
from qwenkern.engine import warm_up
from qwenkern.engine.capture import PROMPT_LENGTHS, CallCapture, GraphCapture
from qwenkern.engine.speculation import SIZES
from qwenkern.generation import Generation


class Fake(CallCapture):
    """Imitates a GPU with torch on a CPU, and logs each capture."""

    steps_in_flight = 1

    def __init__(self) -> None:
        self.captured: list[str] = []

    def padded(self, sequences: int) -> int:
        return 1 << (sequences - 1).bit_length()

    def padded_prompt(self, tokens: int) -> int | None:
        return next((length for length in (8, 16, 32) if tokens <= length), None)

    def capture(self, function, has_run=False):
        out = function()
        self.captured.append(f"{'prompts' if has_run else 'step'} of {len(function.__self__._batch.ids)}")

        def replay() -> None:
            out.copy_(function())

        return replay, out


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setenv("QWENKERN_KERNELS", "reference")
    model = tiny_model()
    return with_capture(model, Fake())


def captured(model) -> list[str]:
    found, model._runner.captured.capture.captured = model._runner.captured.capture.captured, []
    return found


def test_what_is_asked_for_is_captured_and_nothing_later(model):
    model.warm_up(max_sequences=3, max_prompt=20, sampled=False)
    assert captured(model) == ["prompts of 8", "prompts of 16", "prompts of 32", *(f"step of {n}" for n in (4, 2, 1))]
    check_pages(model)
    prompts = [[5] * length for length in (3, 9, 8)]
    for batch in (prompts, prompts[:1], prompts[1:]):
        model.generate(batch, max_tokens=9, temperature=0, ignore_eos=True)
    assert captured(model) == []
    model.generate(prompts[0], max_tokens=3, temperature=1, top_k=20, ignore_eos=True)
    assert captured(model) == ["step of 1"]  # sampled instead of greedy


def test_the_sampling_of_the_checkpoint_is_captured_too(model):
    model.generation = Generation(sampling={"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05})
    model.warm_up(max_sequences=2, max_prompt=1)
    assert captured(model) == ["prompts of 8", *(f"step of {n}" for n in (2, 1, 2, 1))]
    model.generate([[5], [6]], SamplingParams(max_tokens=9), ignore_eos=True)
    assert captured(model) == []


@pytest.mark.parametrize(
    ("cache_tokens", "sizes"), [(64, ["step of 1"]), (192, ["step of 4", "step of 2", "step of 1"])]
)
def test_no_more_than_the_cache_has_room_for(monkeypatch, cache_tokens, sizes):
    monkeypatch.setenv("QWENKERN_KERNELS", "reference")
    model = tiny_model(cache_tokens=cache_tokens)
    with_capture(model, Fake())
    model.warm_up(max_sequences=64, max_prompt=10**6, sampled=False)
    assert captured(model) == ["prompts of 8", "prompts of 16", "prompts of 32", *sizes]
    check_pages(model)


def test_deterministic_decodes_no_more_than_it_promises(monkeypatch):
    monkeypatch.setenv("QWENKERN_KERNELS", "reference")
    model = tiny_model(deterministic=True)
    with_capture(model, Fake())
    model.warm_up(max_sequences=64, max_prompt=4, sampled=False)
    assert captured(model) == ["prompts of 8", "step of 1"]


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"max_prompt": "many"}, {"sampled": 2}])
def test_wrong_arguments(model, wrong):
    [name] = wrong
    with pytest.raises(RequestError, match=name):
        model.warm_up(**wrong)


def test_on_a_cpu_the_steps_are_recorded(monkeypatch):
    monkeypatch.delenv("QWENKERN_KERNELS", raising=False)
    monkeypatch.setattr("qwenkern.kernels.triton.backend.INTERPRETED", False)
    for speculate in (False, True):
        model = tiny_model(CONFIG_IN_C, torch.bfloat16, speculate=speculate)
        model.warm_up(max_sequences=3, max_prompt=5)
        sizes = {size for (size, _), step in model._runner.captured._steps.items() if step}
        assert sizes == ({1, 2, 3, *SIZES} if speculate else {1, 2, 3})


CONFIG_IN_C = TINY.__class__(**{**vars(TINY), "intermediate_size": 192})  # a multiple of the C functions' block size


def test_sizes_and_lengths_are_those_that_are_captured():
    capture = GraphCapture.__new__(GraphCapture)  # skips __init__, which needs a GPU
    assert warm_up.decode_sizes(capture, 1) == [1]
    assert warm_up.decode_sizes(capture, 9) == [16, 8, 4, 2, 1]
    assert warm_up.prompt_lengths(capture, 1) == [16]
    assert warm_up.prompt_lengths(capture, 17) == [16, 32]
    assert warm_up.prompt_lengths(capture, 10**6) == list(PROMPT_LENGTHS)
    assert warm_up.prompt_lengths(CallCapture(), 100) == []


# The kernels of all passes, by Triton's keys: those that a child process compiles, and those that a model launches
KERNELS = """
import sys
import torch
from unittest import mock
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from qwenkern import Config
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.cache import BlockTable, PagedCache
from qwenkern.engine import warm_up
from qwenkern.engine.capture import CallCapture
from qwenkern.engine.captured_prefill import MOST_PROMPTS, CapturedPrefill
from qwenkern.engine.captured_step import CapturedStep
from qwenkern.engine.runner import Runner
from qwenkern.kernels import dependent_launches
from qwenkern.kernels.triton import offline, tuning
from qwenkern.qwen2 import Qwen2
from qwenkern.sampling import Drawing, sampler

sizes, lengths, longest = (1, 3, 16, 24), (16, 64), 200
config = Config(512, 256, 768, 3, 4, 2, 64, max_position_embeddings=512)
device, found = DEVICES["sm_90"], set()


def note(self, *args, grid, warmup, **constants):
    _, specialization, options = self.device_caches[driver.active.get_current_device()][-1](*args, **constants)
    found.add((self.__name__, str(specialization), str(options)))


class Capture(CallCapture):
    def capture(self, function, has_run=False):
        with dependent_launches(None if has_run else {}, on=not has_run):
            return (lambda: None), function()


drawings = Drawing(), Drawing(512), Drawing(64, adjusts=True, logprobs=20)
prompts = [warm_up.Prompts(length, MOST_PROMPTS + 1, MOST_PROMPTS) for length in lengths]
prompts += [warm_up.Prompts(longest, 1, 1)]
weights = warm_up.layouts(Qwen2(config, torch.bfloat16, torch.device("meta")))
task = warm_up.Task(config, torch.bfloat16, weights, "dense", 64, device, sizes, drawings, tuple(prompts))
with offline.compiling(device), mock.patch.object(JITFunction, "run", note):
    task.run()
compiled, found = found, set()

draw = sampler.draw
sampler.draw = lambda *args: draw(*args).zero_()  # nothing is computed, so the ids would be anything
cpu = torch.device("cpu")
model = Qwen2(config, torch.bfloat16, cpu)
cache = PagedCache(config, 4096, torch.bfloat16, cpu)
as_gpu = mock.patch.object(tuning, "INTERPRETER", device)
with tuning.offline(device), offline.active(device), as_gpu, mock.patch.object(JITFunction, "run", note):
    for size in sizes:
        for drawing in drawings:
            CapturedStep(model, cache, size, drawing, Capture())
    with torch.inference_mode(), dependent_launches(None, on=False):
        for length in lengths:
            run = CapturedPrefill(model, cache, length, Capture())
            for count in (1, 3):
                parts = [(BlockTable(), [7] * (length // count - 1)) for _ in range(count)]
                for table, ids in parts:
                    cache.extend(table, len(ids))
                run(parts, list(range(count)))
        for tokens in (longest, longest - 1):
            Runner(model, cache, Capture()).logits([(BlockTable(), [7] * tokens)], [tokens - 1])
print(len(compiled), len(found), *sorted(map(str, found - compiled)), sep="\\n")
"""


def test_a_child_compiles_what_a_model_launches(compiling):
    done = subprocess.run(
        [sys.executable, "-c", KERNELS], capture_output=True, text=True, env=compiling, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    compiled, launched, *missing = done.stdout.splitlines()
    assert not missing
    assert int(compiled) >= int(launched) > 20


CHILDREN = """
import sys, warnings
from dataclasses import replace
from pathlib import Path
import torch
from qwenkern import Config
from qwenkern.benchmarks.offline.machine_code import DEVICES
from qwenkern.engine import warm_up
from qwenkern.kernels.triton.offline import compiling
from qwenkern.qwen2 import Qwen2
from qwenkern.sampling import Drawing

warm_up.MOST_PROCESSES = 2
config = Config(512, 256, 768, 3, 4, 2, 64, max_position_embeddings=512)
weights = warm_up.layouts(Qwen2(config, torch.bfloat16, torch.device("meta")))
task = warm_up.Task(config, torch.bfloat16, weights, "dense", 64, DEVICES["sm_90"], (1,), (Drawing(),), ())
print(warm_up._compiled(task))
folder = Path(sys.argv[1])
cubins = set(folder.rglob("*.cubin"))
with compiling(task.device) as names:
    task.run()
print(len(names) == len(cubins) > 4, set(folder.rglob("*.cubin")) == cubins)
stamp, other = warm_up._stamp(task), warm_up._stamp(replace(task, page_size=32))
print(stamp.parent == folder, stamp != other)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(warm_up._compiled(replace(task, weights=(weights[0]._replace(format="feathers"), *weights[1:]))))
print(caught[0].message)
"""


@pytest.mark.slow
def test_children_share_the_kernels_and_say_what_fails(compiling, tmp_path):
    """Two child processes compile all that one process would: it then finds everything in the cache."""
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, str(tmp_path)],
        capture_output=True, text=True, env=compiling | {"TRITON_CACHE_DIR": str(tmp_path)}, cwd="/", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compiled, shared, stamps, failed, message = done.stdout.splitlines()
    assert (compiled, shared, stamps, failed) == ("True", "True True", "True True", "False")
    assert "compiled in advance" in message
    assert "weights have no format 'feathers'" in message
