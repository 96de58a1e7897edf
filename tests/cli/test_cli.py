"""The command line, run as a user runs it: stdout, stderr and the exit code."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import TINY, save_checkpoint, tiny_model
from support.toy_tokenizer import byte_tokenizer

from qwenkern import Model
from qwenkern.benchmarks import run as run_benchmarks
from qwenkern.cli import commands as cli
from qwenkern.cli import terminal
from qwenkern.engine import Stream
from qwenkern.kernels import c as c_backend

ROOT = Path(__file__).resolve().parents[2]


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
        (["generate", "-m", "{folder}", "--kv-cache-dtype", "int5", "x"], "kv_cache_dtype is 'int5'; expected one", 1),
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


def test_too_little_memory_is_a_line(run, folder, monkeypatch):
    monkeypatch.setattr(cli.Model, "from_pretrained", lambda *_, **__: torch.empty(1 << 60))
    out, err, code = run("generate", "-m", folder, "Hi")
    assert (out, code) == ("", 1)
    assert re.fullmatch(r"error: not enough memory: .*allocate .*\n", err)


def test_a_warning_is_a_line(run, folder, monkeypatch):
    actual = cli.Model.from_pretrained

    def warns(*arguments, **keywords):
        warnings.warn("nobody has a compiler here " + 20 * "and so on ", stacklevel=1)
        return actual(*arguments, **keywords)

    monkeypatch.setattr(cli.Model, "from_pretrained", warns)
    _, err, code = run("generate", "-m", folder, "--max-tokens", 2, "Hi")
    assert code == 0
    assert err.splitlines()[0] == "warning: nobody has a compiler here " + 20 * "and so on "


def test_info_of_a_size_needs_no_file(run):
    out, _, code = run("info", "qwen2.5-3b")
    assert code == 0
    assert "3,085,938,688 parameters" in out
    assert "36,864 bytes a token" in out
    assert "Qwen Research" in out
    assert "contradiction" not in out
    assert re.search(r"^CPU: (C for \S+, (built with the package|compiled)|no C, so torch runs)", out, re.M)
    assert f"threads: {c_backend.threads.count()}\n" in out


def test_threads_are_those_of_the_process(run, folder, monkeypatch):
    monkeypatch.setattr(c_backend.threads, "_asked", None)
    before = torch.get_num_threads()
    try:
        assert run("generate", "-m", folder, "--max-tokens", 2, "--threads", 3, "Hello")[2] == 0
        assert torch.get_num_threads() == c_backend.threads.count() == 3
    finally:
        torch.set_num_threads(before)


def test_info_of_a_checkpoint(run, folder, model):
    out, _, code = run("info", folder)
    assert code == 0
    assert f"{model.config.num_parameters:,} parameters" in out
    assert "contradiction" not in out


def test_pull_of_a_local_model_prints_its_path(run, folder):
    assert run("pull", folder)[0] == f"{folder}\n"


def _wait_for(terminal, text, seconds=300):
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
        [sys.executable, "-c", "from qwenkern.cli.commands import main; main()", "chat", "-m", str(folder)],
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
        assert program.wait(300) == 0
    finally:
        program.kill()
        os.close(terminal)
        os.close(end)


QWENKERN = f"{sys.executable} -m qwenkern"
GENERATE = QWENKERN + " generate -m . --max-tokens 4"


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        (GENERATE + " <&-", "error: standard input is closed; expected a prompt there, or as an argument", 1),
        (r"printf 'a\200' | " + GENERATE, "error: standard input: byte 0x80 at 1 is not utf-8; expected text", 1),
        (QWENKERN + " chat -m . <&-", "Ctrl-C stops an answer", 0),
        (r"printf '\200' | " + QWENKERN + " chat -m .", "error: standard input: byte 0x80 at 0 is not utf-8", 1),
        (GENERATE + " Hi >&-", "error: standard output is closed; expected somewhere to write to", 1),
        (GENERATE + " Hi > /dev/full", "error: standard output: No space left on device", 1),
        (QWENKERN + " info qwen2.5-3b > /dev/full", "error: standard output: No space left on device", 1),
        (QWENKERN + " bench --help > /dev/full", "error: standard output: No space left on device", 1),
        (QWENKERN + " --help >&- 2>&-", "", 1),
        ("{ " + GENERATE + " Hi; echo $? >&2; } | true", "141", 0),
        ("{ " + QWENKERN + " info qwen2.5-3b; echo $? >&2; } | true", "141", 0),
    ],
    ids=lambda value: value.replace(sys.executable, "python") if isinstance(value, str) else str(value),
)
def test_streams_as_a_shell_may_hand_them_over(folder, line, said, code):
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == code
    assert said in done.stderr
    assert not re.search("Traceback|Exception", done.stderr)
    if code:
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["2> /dev/full", "2>&-"])
def test_remarks_that_nobody_hears_change_nothing(folder, model, streams):
    line = f"{GENERATE} Hi {streams}"
    done = subprocess.run(line, shell=True, capture_output=True, cwd=folder, check=False)
    assert (done.stdout.decode(), done.returncode) == (model.generate("Hi", max_tokens=4).text + "\n", 0)


@pytest.mark.slow
@pytest.mark.parametrize("said_by", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_that_knows_ascii_only(folder, model, said_by):
    """What it cannot show is escaped; what is read is UTF-8 all the same."""
    expected = model.generate("Grüße", max_tokens=9).text
    assert not expected.isascii()
    done = subprocess.run(
        [*QWENKERN.split(), "generate", "-m", ".", "--max-tokens", "9"],
        input="Grüße".encode(),
        capture_output=True,
        cwd=folder,
        env=os.environ | {"PYTHONUTF8": "0"} | said_by,
        check=True,
    )
    assert done.stdout == expected.encode("ascii", "backslashreplace") + b"\n"


@pytest.mark.parametrize("environment", [{"COLUMNS": "1"}, {"COLUMNS": "0"}, {"NO_COLOR": "1", "TERM": "nonsense"}])
def test_terminals_of_odd_widths(run, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out, err, code = run("info", "qwen2.5-3b")
    assert (err, code) == ("", 0)
    assert "36,864" in out.replace("\n", "")
    assert "\x1b" not in out


@pytest.mark.slow
def test_no_home_and_an_empty_environment(folder, model):
    line = f"env -i {GENERATE} Hi"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, check=True)
    assert done.stdout == model.generate("Hi", max_tokens=4).text + "\n"


def test_a_path_is_printed_as_the_bytes_that_it_is(model, tmp_path):
    save_checkpoint(model, tmp_path / "here")
    folder = (tmp_path / "here").rename(tmp_path / os.fsdecode(b"caf\xe9"))
    done = subprocess.run([*QWENKERN.split(), "pull", folder], capture_output=True, cwd=tmp_path, check=True)
    assert done.stdout == os.fsencode(folder) + b"\n"


@pytest.fixture
def interrupts():
    """A program that ends by Ctrl-C gives the signal back to the system."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["generate", "-m", "{folder}", "Hi"], (cli.Model, "from_pretrained")),
        (["generate", "-m", "{folder}", "Hi"], (cli.Model, "stream")),
        (["generate", "-m", "{folder}", "Hi"], (Stream, "__next__")),
        (["generate", "-m", "{folder}"], (terminal, "read_stdin")),
        (["chat", "-m", "{folder}"], (cli.Model, "from_pretrained")),
        (["pull", "demo"], (cli.names, "resolve")),
        (["info", "{folder}"], (cli, "find")),
        (["bench", "--op", "rms_norm"], (run_benchmarks, "_cases")),
    ],
)
def test_ctrl_c_ends_without_a_word(run, folder, monkeypatch, interrupts, arguments, where):
    monkeypatch.setattr(*where, interrupted)
    out, err, code = run(*[argument.format(folder=folder) for argument in arguments])
    assert code == 130
    assert "Traceback" not in err
    assert out.strip() == ""


CTRL_C_WHILE_IT_IMPORTS = """
import os, signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == during:
            os.kill(os.getpid(), signal.SIGINT)
during, ignored = sys.argv[1:]
sys.meta_path.insert(0, Interrupts())
signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
import qwenkern_start
before = signal.getsignal(signal.SIGINT)
sys.argv[1:] = ["--help"]
try:
    qwenkern_start.main()
finally:
    assert signal.getsignal(signal.SIGINT) is before
"""


@pytest.mark.parametrize(
    ("during", "ignored", "code"), [("torch", "", 130), ("numpy", "", 130), ("torch", "ignored", 0), ("none", "", 0)]
)
def test_ctrl_c_while_torch_is_imported(during, ignored, code):
    """numpy, too: torch catches what stops numpy from being imported."""
    command = [sys.executable, "-c", CTRL_C_WHILE_IT_IMPORTS, during, ignored]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert ("Usage" in done.stdout) == (code == 0)


CTRL_C_WHILE_THE_PACKAGE_IS_IMPORTED = """
import os, runpy, signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == during:
            os.kill(os.getpid(), signal.SIGINT)
during, before = sys.argv[1:]
sys.meta_path.insert(0, Interrupts())
signal.signal(signal.SIGINT, signal.SIG_IGN if before == "ignored" else signal.default_int_handler)
sys.argv = ["-m", "--help"]  # as Python has them then
sys.orig_argv = ["python", "-m", "qwenkern", "--help"] if before != "another" else ["python", "-m", "another", "--help"]
try:
    runpy._run_module_as_main("qwenkern")
except KeyboardInterrupt:
    print("KeyboardInterrupt")
"""


@pytest.mark.parametrize(
    ("during", "before", "code", "says"),
    [
        ("torch", "", 130, ""),
        ("numpy", "", 130, ""),
        ("qwenkern.cli.commands", "", 130, ""),
        ("torch", "ignored", 0, "Usage"),
        ("none", "", 0, "Usage"),
        ("torch", "another", 0, "KeyboardInterrupt"),  # a library that the program imports does not end it
    ],
)
def test_ctrl_c_while_python_m_imports_the_package(during, before, code, says):
    command = [sys.executable, "-c", CTRL_C_WHILE_THE_PACKAGE_IS_IMPORTED, during, before]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert (says in done.stdout) if says else not done.stdout


def test_python_m_is_the_command():
    command = [sys.executable, "-m", "qwenkern", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "Usage: python -m qwenkern" in done.stdout


def test_a_current_folder_that_was_deleted_is_said(tmp_path):
    """torch with MKL cannot be imported there."""
    start = f"{sys.executable} -c 'import sys; sys.path.insert(0, sys.argv[1]); import qwenkern_start as s; s.main()'"
    line = f"mkdir gone && cd gone && rmdir ../gone && {start} '{ROOT}'"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False)
    expected = "error: the current folder: No such file or directory; expected one that is there\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_the_command_begins_with_the_standard_library_only():
    assert '[project.scripts]\nqwenkern = "qwenkern_start:main"\n' in (ROOT / "pyproject.toml").read_text()
    code = "import sys; before = set(sys.modules); import qwenkern_start; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} - {"qwenkern_start"} <= sys.stdlib_module_names


@pytest.mark.slow
def test_signals_while_it_generates(tmp_path):
    """Ctrl-C, several times, is exit code 130; SIGTERM ends it as it ends others."""
    save_checkpoint(tiny_model(replace(TINY, max_position_embeddings=16384)), folder := tmp_path / "Tiny-Qwen2.5")
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)):
        program = subprocess.Popen(
            [*QWENKERN.split(), "generate", "-m", str(folder), "go on and on"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        )
        program.stdout.read(1)  # the first of 16,372 tokens, more than a pipe holds
        for _ in range(3):
            program.send_signal(number)
        _, err = program.communicate(timeout=300)
        assert program.returncode == code
        assert b"Traceback" not in err


def test_a_folder_loads_to_the_same_model(folder, model):
    loaded = Model.from_pretrained(folder, device="cpu")
    assert loaded.dtype == model.dtype
    for (name, a), (_, b) in zip(loaded.module.named_parameters(), model.module.named_parameters(), strict=True):
        assert (a == b).all(), name
    assert loaded.generate("abc", max_tokens=9) == model.generate("abc", max_tokens=9)
