"""Tries thousands of damaged files and unusual requests. Each must end in success or in a qwenkern.Error.

    python tests/fuzz.py                     20,000 inputs for every target
    python tests/fuzz.py -n 500 gguf chat    fewer, for some
    python tests/fuzz.py --only 1234 gguf    one input again, with its traceback

An input depends only on its target and its number, so these two reproduce a fault. An input may take at most SECONDS
of processor time. Everything except success or qwenkern.Error is a fault: another exception, a hang, a crash.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_STACKSIZE", "256K")  # a thousand threads, when asked for, fit into MEMORY

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save
from support import packers
from text.test_tokenizer import toy_folder, toy_metadata

from qwenkern import Config, Model
from qwenkern.checkpoint import open_checkpoint
from qwenkern.checkpoint.packing import slots
from qwenkern.cli import commands as cli
from qwenkern.errors import Error
from qwenkern.hub import download
from qwenkern.hub.names import resolve
from qwenkern.text.tokenizer import Tokenizer

SECONDS = 20.0  # of the processor's time that one input may take, and a tenth of what it may take on the clock
MEMORY = 6 << 30  # bytes that the process may take; an input that wants more raises MemoryError, a fault
CONFIG = Config(270, 16, 32, 2, 4, 2, 4, max_position_embeddings=256, tie_word_embeddings=True, source="toy")

Target = Callable[[random.Random], None]
TARGETS: dict[str, Callable[[Path], Target]] = {}


class TooSlow(BaseException):
    """An input that took longer than SECONDS. Not an Exception, so that nothing handles it."""


def target(make: Callable[[Path], Target]) -> Callable[[Path], Target]:
    """Registers what prepares a target in an empty folder and returns the function that tries one input."""
    TARGETS[make.__name__] = make
    return make


# --- what damage looks like -------------------------------------------------------------------------------------------


def odd_values(chance: random.Random) -> Any:
    """An unexpected value, of those that JSON can express."""
    deep: Any = []
    for _ in range(chance.choice((3, 2000))):
        deep = [deep]
    numbers = (0, 1, -1, 2, 7, 255, 256, 2**24, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63) - 1)
    numbers += (10**400, -(10**400), 10**5000)
    numbers += (0.5, -0.0, 1.0, 1e-320, 1e308, -1.5, float("nan"), float("inf"), -float("inf"))
    texts = (
        "",
        "a",
        "1",
        "null",
        "true",
        "\0",
        "\ud800",
        "<|im_end|>",
        "../../etc/passwd",
        "{{",
        "é" * 9,
        "x" * 100_000,
    )
    holders = (
        [],
        {},
        [[]],
        [None],
        [1, "a"],
        ["a"],
        {"a": 1},
        {"": None},
        [{}],
        [0] * 5000,
        deep,
        {"type": "Sequence"},
    )
    return copy.copy(chance.choice(chance.choice((numbers, texts, holders, (None, True, False)))))


def damaged(chance: random.Random, value: Any) -> Any:
    """A copy of a dict or list with one to three changes anywhere inside."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        if value:
            _change_inside(chance, value)
    return value


def _change_inside(chance: random.Random, value: Any) -> Any:
    key = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
    what = chance.random()
    if what < 0.08:
        del value[key]
    elif what < 0.12 and isinstance(value, dict):
        value[chance.choice((f"{key}_", str(key).upper(), ""))] = value.pop(key)
    elif what < 0.16 and isinstance(value, list):
        value.insert(key, copy.copy(value[key]))
    elif what < 0.20:
        other = chance.choice(list(value)) if isinstance(value, dict) else chance.randrange(len(value))
        value[key], value[other] = value[other], value[key]
    else:
        value[key] = _changed(chance, value[key])
    return value


def _changed(chance: random.Random, value: Any) -> Any:
    if isinstance(value, (dict, list)) and value and chance.random() < 0.85:
        return _change_inside(chance, value)
    if isinstance(value, bool):
        return chance.choice((not value, odd_values(chance)))
    if isinstance(value, (int, float)) and chance.random() < 0.5:
        whole = int(value) if abs(value) < 2**64 else 1
        return chance.choice((value + 1, value - 1, -value, value * 2, value * 1000, float(whole), str(whole), [value]))
    if isinstance(value, str) and value and chance.random() < 0.5:
        at = chance.randrange(len(value))
        return chance.choice(
            (value[:at], value[at:], value[:at] + chr(chance.randrange(1, 0xD800)) + value[at:], [value])
        )
    return odd_values(chance)


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """A copy with one to four changes: bits, cut ends, extreme integers, pieces repeated."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = min(chance.randrange(len(changed) + 1), chance.randrange(len(changed) + 1))  # headers come first
        what = chance.randrange(6)
        if what == 0 and changed:
            changed[at - 1] ^= 1 << chance.randrange(8)
        elif what == 1:
            del changed[at:]
        elif what == 2:
            extreme = chance.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
            changed[at : at + 8] = extreme.to_bytes(8, "little")
        elif what == 3:
            changed[at:at] = changed[at : at + chance.randrange(1, 64)]
        elif what == 4:
            changed[at : at + chance.randrange(1, 16)] = chance.randbytes(chance.randrange(16))
        elif changed:
            changed[at - 1] = chance.choice((0, 0x22, 0x7B, 0x7D, 0xFF, 0x80))
    return bytes(changed)


def as_json(value: Any) -> bytes:
    """JSON of what Python's own encoder refuses, too: integers of thousands of digits, and deep nesting."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b'{"eos_token_id": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    finally:
        sys.set_int_max_str_digits(limit)


def write_json(chance: random.Random, file: Path, content: Any) -> None:
    """Damaged JSON: mostly well-formed with odd values, sometimes torn."""
    text = as_json(damaged(chance, content))
    file.write_bytes(damaged_bytes(chance, text) if chance.random() < 0.15 else text)


# --- a sound checkpoint to start from ---------------------------------------------------------------------------------


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.05 * torch.randn(slot.shape, generator=generator) for name, slot in slots(CONFIG).items()}


CONFIG_JSON = {
    "model_type": "qwen2",
    "vocab_size": 270,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128},
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "hidden_act": "silu",
    "use_sliding_window": False,
    "sliding_window": 128,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "bos_token_id": 266,
    "eos_token_id": [265, 266],
    "quantization_config": None,
}
GENERATION_JSON = {
    "bos_token_id": 266,
    "eos_token_id": [265, 266],
    "pad_token_id": 266,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "repetition_penalty": 1.05,
    "max_new_tokens": 4,
    "max_length": 40,
    "suppress_tokens": None,
    "num_beams": 1,
}


def write_folder(folder: Path) -> None:
    toy_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_JSON))
    (folder / "model.safetensors").write_bytes(save(weights(), metadata={"format": "pt"}))


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(file: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "qwen2")
    numbers = {"embedding_length": 16, "feed_forward_length": 32, "block_count": 2, "context_length": 256}
    numbers |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    for key, value in numbers.items():
        writer.add_uint32(f"qwen2.{key}", value)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    for key, value in toy_metadata().items():
        add = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}[type(value)]
        add(key, value)
    for name, tensor in weights().items():
        stem, kind = name.rsplit(".", 1)
        layer, stem = stem.split(".", 3)[2:] if stem.startswith("model.layers.") else (None, stem)
        theirs = f"{GGUF_NAMES[stem]}.{kind}"
        writer.add_tensor(theirs if layer is None else f"blk.{layer}.{theirs}", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def use(path: Path) -> None:
    """Loads a checkpoint and does with it what a user does first."""
    model = Model.from_pretrained(path, device="cpu", cache_tokens=128)
    model.generate("hello", max_tokens=2)
    model.chat([{"role": "user", "content": "hello"}], max_tokens=2)


# --- files ------------------------------------------------------------------------------------------------------------


def damaged_file(folder: Path, name: str, content: dict[str, Any]) -> Target:
    """A valid checkpoint in which only this file is damaged."""
    write_folder(folder)

    def one(chance: random.Random) -> None:
        write_json(chance, folder / name, content)
        use(folder)

    return one


@target
def config(folder: Path) -> Target:
    return damaged_file(folder, "config.json", CONFIG_JSON)


@target
def generation_config(folder: Path) -> Target:
    return damaged_file(folder, "generation_config.json", GENERATION_JSON)


@target
def tokenizer_json(folder: Path) -> Target:
    write_folder(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    rest = {key: value for key, value in content.items() if key != "model"}  # else the vocabulary takes every change

    def one(chance: random.Random) -> None:
        changed = damaged(chance, content) if chance.random() < 0.3 else content | damaged(chance, rest)
        (folder / "tokenizer.json").write_bytes(as_json(changed))
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.decode(tokenizer.encode("Hello, wörld <|im_end|>"))

    return one


@target
def tokenizer_config(folder: Path) -> Target:
    write_folder(folder)
    content = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "add_bos_token": True,
        "additional_special_tokens": ["<|im_start|>"],
        "added_tokens_decoder": {"265": {"content": "<|im_end|>", "special": True, "normalized": False}},
        "model_max_length": 256,
        "tokenizer_class": "Qwen2Tokenizer",
    }

    def one(chance: random.Random) -> None:
        write_json(chance, folder / "tokenizer_config.json", content)
        tokenizer = Tokenizer.from_folder(folder)
        tokenizer.encode_chat([{"role": "user", "content": "hello <|im_end|>"}])

    return one


@target
def vocabulary(folder: Path) -> Target:
    """vocab.json and merges.txt, without a tokenizer.json."""
    write_folder(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"])

    def one(chance: random.Random) -> None:
        sound = chance.random() < 0.5
        (folder / "merges.txt").write_bytes(merges.encode() if sound else damaged_bytes(chance, merges.encode()))
        if sound:
            write_json(chance, folder / "vocab.json", model["vocab"])
        else:
            (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        Tokenizer.from_folder(folder).encode("hello")

    return one


@target
def safetensors(folder: Path) -> Target:
    write_folder(folder)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def one(chance: random.Random) -> None:
        changed = data[:8] + damaged_bytes(chance, data[8:])
        if chance.random() < 0.7:
            text = as_json(damaged(chance, header))
            changed = len(text).to_bytes(8, "little") + text + data[8 + size :]
        file.unlink()  # a file that is mapped must not change
        file.write_bytes(changed)
        use(folder)

    return one


@target
def quantised(folder: Path) -> Target:
    """A GPTQ checkpoint whose configuration or whose file is damaged."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
    packers.write_checkpoint(
        folder, config, lambda name, shape: packers.gptq(packers.integers(shape, 4, 32), 4, "gptq_v2")
    )
    file = folder / "model.safetensors"
    data, fields = file.read_bytes(), json.loads((folder / "config.json").read_text())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def one(chance: random.Random) -> None:
        place = chance.random()
        changed = dict(fields)
        if place < 0.4:
            changed["quantization_config"] = damaged(chance, config)
        (folder / "config.json").write_bytes(as_json(changed))
        text = as_json(damaged(chance, header)) if 0.4 <= place < 0.8 else data[8 : 8 + size]
        rest = damaged_bytes(chance, data[8 + size :]) if place >= 0.8 else data[8 + size :]
        file.unlink()  # a file that is mapped must not change
        file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
        for _ in open_checkpoint(folder).tensors(torch.bfloat16):
            pass

    return one


@target
def index(folder: Path) -> Target:
    write_folder(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    content = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(slots(CONFIG), "model-00001-of-00001.safetensors"),
    }

    def one(chance: random.Random) -> None:
        write_json(chance, folder / "model.safetensors.index.json", content)
        open_checkpoint(folder)

    return one


@target
def gguf(folder: Path) -> Target:
    write_gguf(folder / "sound.gguf")
    data = (folder / "sound.gguf").read_bytes()

    def one(chance: random.Random) -> None:
        file = folder / "damaged.gguf"
        file.unlink(missing_ok=True)
        file.write_bytes(damaged_bytes(chance, data))
        use(file)

    return one


@target
def gguf_metadata(folder: Path) -> Target:
    numbers = {
        "general.architecture": "qwen2",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": 266,
    }
    numbers |= {"tokenizer.ggml.eot_token_id": 265, "qwen2.embedding_length": 16, "qwen2.feed_forward_length": 32}
    numbers |= {"qwen2.block_count": 2, "qwen2.context_length": 256, "qwen2.attention.head_count": 4}
    numbers |= {"qwen2.attention.layer_norm_rms_epsilon": 1e-6, "qwen2.rope.scaling.type": "yarn"}
    numbers |= {"qwen2.rope.scaling.factor": 2.0, "qwen2.rope.scaling.original_context_length": 128}

    def one(chance: random.Random) -> None:
        if chance.random() < 0.5:
            Config.from_gguf(damaged(chance, numbers), vocab_size=270, tie_word_embeddings=True)
            return
        tokenizer = Tokenizer.from_gguf(damaged(chance, numbers | toy_metadata()), "toy.gguf")
        tokenizer.encode_chat([{"role": "user", "content": "hello"}])

    return one


# --- requests ---------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look", "arguments": {"city": "Ulm", "days": [1, 2]}}}
CHAT = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "hello <|im_end|>", "name": "Ann"},
    {"role": "user", "content": [{"type": "text", "text": "more"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "rain", "tool_call_id": "1"},
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
FRAGMENTS = (
    "{{ 'x' * 40000000 }}",
    "{{ 7 ** 100000000 }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ messages[0].content | center(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ ('x' * 1000).replace('x', 'y' * 1000).replace('y', 'z' * 1000) }}",
    "{{ ([0] * 100000000) | length }}",
    "{{ messages | tojson }}",
    "{{ messages[0]['content'].__class__.__mro__ }}",
    "{% if tools %}{{ tools | tojson }}{% endif %}",
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ messages | map(attribute='content') | join(' ') }}",
    "{{ (1 << 1000000000) }}",
    "{{ 'ab' | list | batch(100000000, 'x') | list }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ missing.deeper }}",
    "{% generation %}x{% endgeneration %}",
    "{% include 'x' %}",
    "{% set x = messages %}{{ x.append(1) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ cycler('a').next() }}",
)


@target
def template(folder: Path) -> Target:
    write_folder(folder)
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())

    def one(chance: random.Random) -> None:
        source = "".join(chance.choices(FRAGMENTS, k=chance.randint(1, 3)))
        if chance.random() < 0.5:
            source = _changed(chance, source)
        file.write_bytes(as_json(content | {"chat_template": source}))
        Tokenizer.from_folder(folder).encode_chat([{"role": "user", "content": "hello"}], TOOLS)

    return one


@target
def chat(folder: Path) -> Target:
    tokenizer = Tokenizer.from_gguf(toy_metadata(), "toy.gguf")

    def one(chance: random.Random) -> None:
        messages, tools = copy.deepcopy(CHAT), copy.deepcopy(TOOLS)
        if chance.random() < 0.2:
            tools = damaged(chance, tools)
        else:
            messages = damaged(chance, messages)
        tokenizer.encode_chat(messages, tools)

    return one


def _model() -> Model:
    tokenizer = Tokenizer.from_gguf(toy_metadata(), "toy.gguf")
    return Model.from_config(CONFIG, device="cpu", dtype="float32", tokenizer=tokenizer, cache_tokens=128)


PARAMS = {
    "max_tokens": 3,
    "min_tokens": 1,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {7: 1.0, 8: -5.0},
    "seed": 3,
    "stop": ["ab", "c"],
    "stop_token_ids": [3, 4],
    "ignore_eos": False,
    "n": 2,
    "logprobs": 2,
    "skip_special_tokens": True,
    "priority": 3,
    "cache_salt": "mine",
}


@target
def parameters(folder: Path) -> Target:
    model = _model()

    def one(chance: random.Random) -> None:
        some = {name: PARAMS[name] for name in chance.sample(list(PARAMS), chance.randint(1, len(PARAMS)))}
        model.generate([1, 2, 3], **({"max_tokens": 3} | damaged(chance, some)))

    return one


@target
def prompts(folder: Path) -> Target:
    model = _model()
    sound = ["hello", [1, 2, 3], [{"role": "user", "content": "hello"}], [[1, 2], "hello", [5]], ["a", "b"]]
    extra = (b"bytes", 1.5, range(5), {1, 2}, object(), float, np.arange(4), torch.arange(4), torch.rand(3), ("a", 1))

    def one(chance: random.Random) -> None:
        prompt = (
            chance.choice(extra) if chance.random() < 0.1 else _changed(chance, copy.deepcopy(chance.choice(sound)))
        )
        call = chance.choice((model.generate, model.chat, model.score, model.forward, model.stream))
        result = call(prompt, max_tokens=2) if call not in (model.score, model.forward) else call(prompt)
        if call == model.stream:
            list(result)

    return one


@target
def options(folder: Path) -> Target:
    write_folder(folder)
    sound = {"device": "cpu", "dtype": "float32", "cache_tokens": 128, "prefill_chunk": 16, "threads": 1}
    sound |= {"deterministic": True}

    def one(chance: random.Random) -> None:
        changed = damaged(chance, sound)
        keywords = {name: changed[name] for name in sound if name in changed}
        if chance.random() < 0.3:
            Model.from_config(odd_values(chance), **keywords)
        else:
            Model.from_pretrained(folder, **keywords)

    return one


@target
def names(folder: Path) -> Target:
    sound = ("demo", "qwen2.5-3b-instruct", "Qwen/Qwen2.5-7B", "somebody/finetune", "./folder", "x.gguf", "~/model")

    def one(chance: random.Random) -> None:
        name = chance.choice((chance.choice(sound), _changed(chance, chance.choice(sound)), odd_values(chance)))
        no_network = mock.patch.object(download, "_fetch", side_effect=Error("no network"))
        with no_network, mock.patch.dict(os.environ, {"QWENKERN_CACHE": str(folder)}):
            resolve(name)

    return one


@target
def command_line(folder: Path) -> Target:
    write_folder(folder)
    flags = ("--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed")
    flags += ("--stop", "--system", "--device", "--dtype", "--threads", "--chat", "--help", "-m", "--model", "--x")

    def one(chance: random.Random) -> None:
        arguments = [chance.choice(("generate", "info", "chat", "", "x", "generate")), "--model", str(folder), "hello"]
        arguments += ["--max-tokens", "2"]
        for _ in range(chance.randint(0, 3)):
            text = odd_values(chance)
            with contextlib.suppress(ValueError, RecursionError):  # what Python does not print
                arguments += [chance.choice(flags), str(text)[:500].replace("\0", "")]
        with (
            mock.patch.object(sys, "argv", ["qwenkern", *arguments]),
            mock.patch.object(sys, "stdin", io.StringIO("hello\n")),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            mock.patch.object(cli, "stderr", Console(file=io.StringIO())),
        ):
            try:
                cli.main()
            except SystemExit as done:
                if done.code not in (None, 0, 1, 2):
                    raise AssertionError(f"exit code {done.code}") from done

    return one


# --- the run ----------------------------------------------------------------------------------------------------------


def attempt(one: Target, name: str, number: int) -> str:
    """ "success", the name of a qwenkern.Error, or a fault: the exception's type and where it was raised."""
    signal.signal(signal.SIGPROF, _too_slow)
    signal.signal(signal.SIGALRM, _too_slow)  # also ends an input that sleeps
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS)
    faulthandler.dump_traceback_later(15 * SECONDS, exit=True)  # native code does not see the signals
    try:
        one(random.Random(f"{name}/{number}"))
    except Error as error:
        return type(error).__name__
    except KeyboardInterrupt:
        raise
    except BaseException as fault:
        frames = [
            frame for frame in traceback.extract_tb(fault.__traceback__) if "tests" not in Path(frame.filename).parts
        ]
        where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"FAULT {type(fault).__name__}{where}: {str(fault)[:90]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    return "success"


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def run(name: str, count: int, progress: bool = False) -> Iterator[tuple[int, str]]:
    """The outcome of each input of a target, by its number."""
    with tempfile.TemporaryDirectory() as folder:
        one = TARGETS[name](Path(folder))
        for number in range(count):
            if progress:
                print(f"\r{name} {number}", end="", file=sys.stderr)
            yield number, attempt(one, name, number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target", help=", ".join(TARGETS))
    parser.add_argument("-n", "--inputs", type=int, default=20_000, help="for each target")
    parser.add_argument("--only", type=int, help="the number of one input")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    found = 0
    for name in arguments.targets or TARGETS:
        if arguments.only is not None:
            with tempfile.TemporaryDirectory() as folder:
                TARGETS[name](Path(folder))(random.Random(f"{name}/{arguments.only}"))
            continue
        started, outcomes, first = time.perf_counter(), Counter(), {}
        for number, outcome in run(name, arguments.inputs):
            outcomes[outcome] += 1
            first.setdefault(outcome, number)
        print(f"{name}: {outcomes.total():,} inputs in {time.perf_counter() - started:.0f} s", flush=True)
        for outcome, count in outcomes.most_common():
            print(f"  {count:7,}  {outcome}  (first: {first[outcome]})", flush=True)
            found += count if outcome.startswith("FAULT") else 0
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
