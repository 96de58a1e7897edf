"""The command line, run as a person runs it: what is on stdout, what on stderr, and the exit code."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from toy import byte_tokenizer
from twins import TINY, save_checkpoint, tiny_model

from qwenkern import Model, cli
from qwenkern.kernels import cpu


@pytest.fixture(scope="module")
def model():
    return tiny_model(tokenizer=byte_tokenizer(TINY.vocab_size))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("Tiny-Qwen2.5")
    save_checkpoint(model, folder)
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Calls main() in this process: (stdout, stderr, exit code)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["qwenkern", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", __import__("io").StringIO(stdin))
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = done.code or 0
        return *capfd.readouterr(), code

    return run


def test_generate_writes_the_text_and_nothing_else_to_stdout(run, folder, model):
    expected = model.generate("Hello", max_tokens=12).text
    out, err, code = run("generate", "-m", folder, "--max-tokens", 12, "Hello")
    assert (out, code) == (expected + "\n", 0)
    assert "5 prompt tokens" in err
    assert "tokens/s" in err


def test_a_prompt_may_come_through_a_pipe(run, folder, model):
    assert run("generate", "-m", folder, "--max-tokens", 5, stdin="Hello")[0] == (
        model.generate("Hello", max_tokens=5).text + "\n"
    )


def test_chat_option_and_sampling_options_arrive(run, folder, model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    fields = {"max_tokens": 9, "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 4}
    expected = model.chat(messages, repetition_penalty=1.1, **fields).text
    options = [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", value)]
    out, _, _ = run(
        "generate", "--chat", "--system", "Be brief.", "-m", folder, "--repetition-penalty", 1.1, *options, "Hi"
    )
    assert out == expected + "\n"


def test_stop_strings(run, folder, model):
    full = model.generate("Hello", max_tokens=30).text
    stop = full[6:8]
    out, _, _ = run("generate", "-m", folder, "--max-tokens", 30, "--stop", "never there", "--stop", stop, "Hello")
    assert out == full[: full.index(stop)] + "\n"


def test_a_conversation(run, folder, model):
    said = [{"role": "user", "content": "one"}]
    first = model.chat(said, max_tokens=6).text
    said += [{"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
    second = model.chat(said, max_tokens=6).text
    out, _, code = run("chat", "-m", folder, "--max-tokens", 6, stdin="one\ntwo\n\n/reset\none\n/exit\nnot read\n")
    assert (out, code) == (f"{first}\n{second}\n{first}\n", 0)


def test_a_conversation_too_long_is_no_end(run, folder):
    out, err, code = run("chat", "-m", folder, "--max-tokens", 4, stdin="x" * 600 + "\nshort\n")
    assert "tokens, and the context length is 512" in err
    assert out.strip()
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["generate", "-m", "{folder}", "--temperature", "nan", "x"], "error: temperature is nan", 1),
        (["generate", "-m", "{folder}", ""], "error: the prompt is empty", 1),
        (["generate", "-m", "/nowhere/model.gguf", "x"], "/nowhere/model.gguf", 1),
        (["generate", "-m", "{folder}", "--device", "tpu", "x"], "device is 'tpu'", 1),
        (["generate", "-m", "{folder}", "--threads", "0", "x"], "error: threads is 0; expected a whole number", 1),
        (["generate", "--bogus"], "No such option: --bogus", 2),
        (["dance"], "No such command 'dance'", 2),
        (["info", "qwen9"], "unknown name 'qwen9'", 1),
    ],
)
def test_errors_are_a_line_and_an_exit_code(run, folder, arguments, message, code):
    out, err, found = run(*[argument.format(folder=folder) for argument in arguments])
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert (out, found) == ("", code)


def test_info_of_a_size_needs_no_file(run):
    out, _, code = run("info", "qwen2.5-3b")
    assert code == 0
    assert "3,085,938,688 parameters" in out
    assert "36,864 bytes a token" in out
    assert "Qwen Research" in out
    assert "contradiction" not in out
    assert re.search(r"^CPU: (C for \S+, (built with the package|compiled)|no C, so torch runs)", out, re.M)
    assert f"threads: {cpu.threads.count()}\n" in out


def test_threads_are_those_of_the_process(run, folder, monkeypatch):
    monkeypatch.setattr(cpu.threads, "_asked", None)
    before = torch.get_num_threads()
    try:
        assert run("generate", "-m", folder, "--max-tokens", 2, "--threads", 3, "Hello")[2] == 0
        assert torch.get_num_threads() == cpu.threads.count() == 3
    finally:
        torch.set_num_threads(before)


def test_info_of_a_checkpoint(run, folder, model):
    out, _, code = run("info", folder)
    assert code == 0
    assert f"{model.config.num_parameters:,} parameters" in out
    assert "contradiction" not in out


def test_pull_of_a_local_model_prints_its_path(run, folder):
    assert run("pull", folder)[0] == f"{folder}\n"


def _wait_for(terminal, text, seconds=60):
    """Reads a terminal until it shows the text."""
    seen, ends = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < ends, f"no {text!r} in {seen!r}"
        if select.select([terminal], [], [], 0.5)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    """The answer is longer than what a terminal holds unread, so it cannot end before it is stopped."""
    save_checkpoint(tiny_model(replace(TINY, max_position_embeddings=16384)), folder := tmp_path / "Tiny-Qwen2.5")
    terminal, end = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-c", "from qwenkern.cli import main; main()", "chat", "-m", str(folder)],
        stdin=end,
        stdout=end,
        stderr=end,
        cwd=folder,
        env=os.environ | {"COLUMNS": "200"},  # no line of the report is broken in two
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    try:
        _wait_for(terminal, "> ")
        os.write(terminal, b"go on and on\n")
        _wait_for(terminal, "go on and on\r\n")
        os.read(terminal, 1)  # the first of the 16,353 tokens of the answer
        program.send_signal(signal.SIGINT)
        rest = _wait_for(terminal, "(stopped)").split("(stopped)")[1]
        if "> " not in rest:
            _wait_for(terminal, "> ")
        time.sleep(0.5)  # a person's pause: readline must be waiting
        program.send_signal(signal.SIGINT)
        _wait_for(terminal, "> ")
        os.write(terminal, b"/exit\n")
        assert program.wait(30) == 0
    finally:
        program.kill()
        os.close(terminal)
        os.close(end)


def test_a_reader_that_leaves_makes_no_noise(folder):
    arguments = ["qwenkern", "generate", "-m", str(folder), "x"]
    program = f"import sys; sys.argv = {arguments}; from qwenkern.cli import main; main()"
    done = subprocess.run(
        f'{sys.executable} -c "{program}" | true', shell=True, capture_output=True, text=True, cwd=folder, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_a_folder_loads_to_the_same_model(folder, model):
    loaded = Model.from_pretrained(folder, device="cpu")
    assert loaded.dtype == model.dtype
    for (name, a), (_, b) in zip(loaded.module.named_parameters(), model.module.named_parameters(), strict=True):
        assert (a == b).all(), name
    assert loaded.generate("abc", max_tokens=9) == model.generate("abc", max_tokens=9)
