"""Loading, from the name of a model to its parts: its cost, and the order of its failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import TINY

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Q
from support.toy_gguf import write_gguf

from qwenkern import CheckpointError, Model
from qwenkern.checkpoint.repack import repack

# 95 million weights; q, k and v are smaller than a huge page
LARGER = replace(TINY, hidden_size=512, intermediate_size=2048, num_hidden_layers=24, head_dim=128, vocab_size=320)
# Loads argv[1]. Prints how much more memory of its own the process has then, at most and at the end.
CHILD = """
import json, sys, threading, torch
from qwenkern import Model
import qwenkern.checkpoint.gguf

def own():
    lines = [line.split() for line in open("/proc/self/status")]
    return next(1024 * int(line[1]) for line in lines if line[0] == "RssAnon:")

before, most, done = own(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], own())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
model = Model.from_pretrained(sys.argv[1], device="cpu", cache_tokens=64)
done.set()
watcher.join()
print(json.dumps([most[0] - before, own() - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process holds")
def test_loading_takes_the_memory_of_the_file_and_little_more(tmp_path):
    write_gguf(tmp_path / "larger.gguf", LARGER, Q.Q8_0, others={"lm_head.weight": Q.Q5_0})
    size = (tmp_path / "larger.gguf").stat().st_size
    assert size > 90e6
    command = [sys.executable, "-c", CHILD, str(tmp_path / "larger.gguf")]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    most, end = json.loads(child.stdout)
    assert size * 0.95 < end <= most < 1.05 * size + 12e6


def test_a_tokenizer_that_is_wrong_ends_the_loading_of_weights(tmp_path, monkeypatch):
    done = []

    def slow(tasks):
        done.append(tasks)
        time.sleep(0.5)
        repack(tasks)

    monkeypatch.setattr("qwenkern.checkpoint.gguf.repack", slow)
    monkeypatch.setattr("qwenkern.checkpoint.gguf._AT_ONCE", 1)
    monkeypatch.setattr("qwenkern.loading.tokenizer_of", _wrong)
    write_gguf(tmp_path / "toy.gguf", replace(TINY, intermediate_size=192), Q.Q4_0)
    with pytest.raises(CheckpointError, match=r"^the tokenizer is wrong$"):
        Model.from_pretrained(tmp_path / "toy.gguf", device="cpu", cache_tokens=64)
    assert len(done) < 14


def _wrong(*_):
    raise CheckpointError("the tokenizer is wrong")
