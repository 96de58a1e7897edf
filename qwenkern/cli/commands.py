"""The command line. stdout gets only the text; stderr gets progress, speed and errors."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..config import FAMILY
from ..device import choose_device
from ..engine import Completion, Stream
from ..errors import Error
from ..footprint import Layout, layout_of
from ..hub import names
from ..loading import find, tokenizer_of
from ..Model import Model
from . import info as facts
from . import terminal
from .footprint import footprint
from .serve import serve
from .terminal import note, stderr

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Qwen2.5 language models on fused kernels: Triton on a GPU, C on a CPU.",
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help="Name, hub id, folder of safetensors, or .gguf file.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
CacheOption = Annotated[
    str, typer.Option("--kv-cache-dtype", help="How keys and values are cached: auto, float16, int8, fp8, or dtype's.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Number of CPU threads.", show_default="one per physical core")]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens of an answer.", show_default="the checkpoint's")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the checkpoint's")]
TopK = Annotated[
    int | None, typer.Option(help="Sample from the k most likely tokens.", show_default="the checkpoint's")
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the most likely tokens that together reach p.", show_default="the checkpoint's"),
]
MinP = Annotated[
    float | None,
    typer.Option(
        help="Sample from tokens at least this likely, relative to the most likely one.",
        show_default="the checkpoint's",
    ),
]
Penalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1: repeat less.", show_default="the checkpoint's")
]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default="random")]
System = Annotated[str | None, typer.Option(help="System message.", show_default="the checkpoint's")]


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; read from stdin if not given.")] = None,
    model: ModelOption = "demo",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")] = False,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: CacheOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Complete a text, or with --chat answer a question."""
    if prompt is None:
        prompt = terminal.read_stdin()
    loaded = _load(model, device, dtype, kv_cache_dtype, threads)
    params: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or (),
    }
    messages = _with_system(system, [{"role": "user", "content": prompt}])
    _write(loaded.stream(messages if chat or system else prompt, **params))


@app.command()
def chat(
    model: ModelOption = "demo",
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    seed: Seed = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache_dtype: CacheOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Chat with a model. Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D or /exit leaves."""
    loaded = _load(model, device, dtype, kv_cache_dtype, threads)
    params: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then edits the line and remembers earlier ones
    messages = _with_system(system, [])
    note("[dim]Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D or /exit leaves.[/]")
    while (said := terminal.ask("> ")) not in (None, "/exit"):
        if said == "/reset":
            messages = _with_system(system, [])
        elif said:
            turn = [*messages, {"role": "user", "content": said}]
            try:
                answer = _write(loaded.stream(turn, **params), on_interrupt="stop")
            except KeyboardInterrupt:  # before the first token
                continue
            except Error as error:  # such as a conversation longer than the context: the program continues
                terminal.complain(error)
                continue
            messages = [*turn, {"role": "assistant", "content": answer.text}]


@app.command()
def pull(model: Annotated[str, typer.Argument(help="Name or hub id.")] = "demo") -> None:
    """Fetch a model into the cache and print where it is."""
    with _progress() as progress:
        path = names.resolve(model, lambda origin, done, total: progress(f"download from {origin}", done, total))
    if licence := names.licence(model):
        note(f"licence: {licence}")
    typer.echo(os.fsencode(path))  # the path as the file system's bytes


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="Name of a size, hub id, folder or .gguf file.")] = "demo",
    renew: Annotated[
        bool, typer.Option("--renew", help="Only repeat the measurements of this CPU, and print what changed.")
    ] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Only say which backend runs each op here, and why the others do not.")
    ] = False,
) -> None:
    """Show parameters, memory by context length, contradictions in the numbers, and how this CPU computes.

    Loads no weights."""
    if kernels:
        from . import serving

        table = Table(title=f"ops of {serving.MODEL} in bfloat16", title_justify="left")
        for column in ("op", "tokens", "runs on", "others"):
            table.add_column(column)
        for op, tokens, runs, others in serving.served():
            table.add_row(op, str(tokens), runs, others)
        Console(highlight=False).print(table)
        return
    if renew:
        for name, value in facts.renewed().items():
            Console(highlight=False, soft_wrap=True).print(f"{name}: {value}")
        return
    layout, warnings = _facts(model)
    facts.show(model, layout, names.licence(model), warnings)


app.command()(footprint)
app.command()(serve)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Name, hub id, folder of safetensors with dense weights, or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, which is made.")],
    to: Annotated[str, typer.Option(help="int8, int4 (embedding and output: int8) or fp8.")] = "int4",
) -> None:
    """Write a checkpoint with quantised weights, which loads as it is."""
    from .quantising import quantise

    with _progress() as progress:
        written = quantise(model, out, to, progress)
    if written.dense:
        note(f"{len(written.dense)} matrices (such as {written.dense[0]}) stay dense: {to} has none of their size")
    if written.twice:
        note(f"the weights were quantised before ({', '.join(written.twice)}): rounding twice costs quality")
    note(
        f"{written.before / 1e9:.2f} GB became {written.after / 1e9:.2f} GB; "
        f"mean squared error {written.error:.2e} of the mean square of the weights"
    )
    typer.echo(os.fsencode(out))


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON)
def bench(context: typer.Context) -> None:
    """Time the kernels next to torch, torch.compile and other libraries that are installed (see bench --help)."""
    from ..benchmarks import run

    _program(run.main, "qwenkern bench", context.args)


@app.command(context_settings=PASSED_ON)
def tune(context: typer.Context) -> None:
    """Search for this device's fastest launch configurations (see tune --help)."""
    from ..benchmarks import tune as tuner

    _program(tuner.main, "qwenkern tune", context.args)


def _program(program: Callable[..., None], name: str, arguments: list[str]) -> None:
    """Runs a program of benchmarks/ with the arguments of a subcommand."""
    raise typer.Exit(terminal.command(program)(arguments, prog_name=name, standalone_mode=False) or 0)


def main() -> NoReturn:
    """Entry point. terminal.py defines the exit codes."""
    terminal.run(app)


def _load(model: str, device: str, dtype: str, kv_cache_dtype: str, threads: int | None) -> Model:
    with _progress() as progress:
        return Model.from_pretrained(
            model, device=device, dtype=dtype, kv_cache_dtype=kv_cache_dtype, threads=threads, progress=progress
        )


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress bars on stderr, one per task, if stderr is a terminal."""
    columns = TextColumn("{task.description:8}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _write(stream: Stream, on_interrupt: str = "exit") -> Completion:
    """Prints a stream as it comes, and finally its speed. Ctrl-C ends the stream; with "exit" it is raised again."""
    started = time.perf_counter()
    first = None
    interrupted = False
    try:
        for text in stream:
            first = first or time.perf_counter()
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        stream.close()
    print(flush=True)
    completion = stream.completion
    ended = time.perf_counter()
    if first is not None:
        rate = (completion.num_tokens - 1) / max(ended - first, 1e-9)
        note(
            f"[dim]{completion.num_prompt_tokens} prompt tokens, first text after {first - started:.2f} s; "
            f"{completion.num_tokens} tokens, {rate:.1f} tokens/s"
            f"{' (stopped)' if interrupted else ''}[/]"
        )
    if interrupted and on_interrupt == "exit":
        raise KeyboardInterrupt
    return completion


def _with_system(system: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    return ([{"role": "system", "content": system}] if system else []) + messages


def _facts(model: str) -> tuple[Layout, list[str]]:
    """The layout of a checkpoint, or of a size of the family by its name, as it would be loaded here, and the
    contradictions in the configuration."""
    device = choose_device("auto")
    if model.lower() in FAMILY and not Path(model).exists():
        return layout_of(FAMILY[model.lower()], device), []
    with _progress() as progress:
        path, checkpoint = find(model, progress)
    layout = layout_of(checkpoint.config, device, stored=checkpoint.formats)
    return layout, facts.contradictions(
        checkpoint.config,
        path.stem if path.is_file() else path.name,
        checkpoint.shapes,
        tokenizer_of(checkpoint, path).vocab_size,
    )
