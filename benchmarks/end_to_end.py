"""Time to load, to the first token, and tokens a second: qwenkern beside transformers on the same weights.

    python benchmarks/end_to_end.py [--model demo] [--prompt-tokens 128] [--new-tokens 32] [--repeats 5] [--json FILE]

Both run in one process, in turns, on the weights that qwenkern loaded (bfloat16), with the same number of threads.
The ratio's spread is that of the paired repeats. transformers' own loading is not timed here: it takes another path.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers import __version__ as transformers_version

import qwenkern
from qwenkern import Model

COPY_BYTES = 1 << 29


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args()

    started = time.perf_counter()
    model = Model.from_pretrained(options.model, device="cpu", dtype="bfloat16")
    load = time.perf_counter() - started
    theirs = transformers_model(model)
    prompt = torch.randint(1000, 100_000, (options.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    ours_runs, their_runs = [], []
    for repeat in range(options.repeats + 1):
        pair = time_qwenkern(model, prompt, options.new_tokens), time_transformers(theirs, prompt, options.new_tokens)
        if repeat:  # the first pair warms up
            ours_runs.append(pair[0])
            their_runs.append(pair[1])
    weights = sum(parameter.nbytes for parameter in model.module.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.module.model.embed_tokens.weight.nbytes  # one row of it is read
    copy = copy_bandwidth()
    result = {
        "model": options.model,
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.date.today().isoformat(),
        "versions": {
            "qwenkern": qwenkern.__version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
            "python": platform.python_version(),
        },
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "load_seconds": load,
        "copy_bytes_per_second": copy,
        "floor_tokens_per_second": copy / weights,
        "first_token_seconds": summary([run[0] for run in ours_runs], [run[0] for run in their_runs], lower=True),
        "tokens_per_second": summary([run[1] for run in ours_runs], [run[1] for run in their_runs], lower=False),
    }
    show(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def time_qwenkern(model: Model, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second after it."""
    times = [time.perf_counter()]
    with model.stream(prompt, max_tokens=new_tokens, temperature=0, ignore_eos=True) as stream:
        times += [time.perf_counter() for _ in stream._steps]
    return times[1] - times[0], (len(times) - 2) / (times[-1] - times[1])


@torch.inference_mode()
def time_transformers(model: Qwen2ForCausalLM, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """The same for transformers' own greedy loop over its dynamic cache."""
    times: list[float] = []

    class Clock:
        def put(self, _: torch.Tensor) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.tensor([prompt])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=Clock(),
    )
    return times[1] - times[0], (len(times) - 2) / (times[-1] - times[1])  # the prompt is put first


def transformers_model(model: Model) -> Qwen2ForCausalLM:
    """transformers' Qwen2 over the very weights of ours: views of the packed parameters, not copies."""
    config = model.config
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(
            Qwen2Config(
                **{name: getattr(config, name) for name in names.split()},
                max_position_embeddings=config.max_position_embeddings,
                rms_norm_eps=config.rms_norm_eps,
                tie_word_embeddings=config.tie_word_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            )
        )
    weights = {}
    for name, tensor in model.module.state_dict().items():
        if "qkv_proj" in name:
            sizes = [config.q_size, config.kv_size, config.kv_size]
            weights |= {name.replace("qkv", part): rows for part, rows in zip("qkv", tensor.split(sizes), strict=True)}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), tensor.chunk(2), strict=True)
            weights |= {name.replace("gate_up", part): rows for part, rows in parts}
        else:
            weights[name] = tensor
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its buffers are not in the state
    return theirs.eval()


def copy_bandwidth() -> float:
    """Bytes a second that this machine reads and writes when it copies a block too large for its caches."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * COPY_BYTES / (time.perf_counter() - started))
    return best


def summary(ours: list[float], theirs: list[float], lower: bool) -> dict[str, float | list[float]]:
    """Medians, and how many times better ours is: median, least and most of the paired ratios."""
    ratios = [(b / a if lower else a / b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "qwenkern": statistics.median(ours),
        "transformers": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def show(result: dict) -> None:
    table = Table(title=f"{result['model']}, {result['prompt_tokens']} prompt tokens, {result['device']}")
    for column in ("", "qwenkern", "transformers", "ratio (range)"):
        table.add_column(column, justify="right" if column else "left")
    for name, unit in (("first_token_seconds", "s to the first token"), ("tokens_per_second", "tokens/s")):
        row = result[name]
        low, high = row["ratio_range"]
        table.add_row(
            unit,
            f"{row['qwenkern']:.2f}",
            f"{row['transformers']:.2f}",
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        )
    console = Console()
    console.print(table)
    console.print(
        f"loaded in {result['load_seconds']:.1f} s; weights at the copy bandwidth of "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s would allow {result['floor_tokens_per_second']:.1f} tokens/s"
    )


if __name__ == "__main__":
    main()
