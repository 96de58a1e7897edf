"""Reads the tokenizer files of a folder into an object of the `tokenizers` library, within limits.

The files are tokenizer.json or, for transformers' slow tokenizers, vocab.json, merges.txt and the added tokens. The
size of a file is checked before it is read. The steps of a tokenizer are checked before they process any text, because
each step of a chain of replacements can double a text, and a regular expression may run for ever.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError, ConfigError, shown
from ..reading import read_json, refuse_pointer

# Qwen2's own expression: GPT-4's with one digit at a time. A GGUF file names it ("qwen2") but does not contain it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The regular expressions of published byte-level vocabularies, which read a text only once. Other expressions are
# refused, because no check can bound their time.
EXPRESSIONS = {
    QWEN2_SPLIT,
    QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),  # GPT-4's, Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",  # Qwen3.5's
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2's
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Qwen2's in llama.cpp's spelling, without a group that ignores case
    QWEN2_SPLIT.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
    r"\p{N}",
    r"\p{N}{1,3}",
    r"[\r\n]",
}
LARGEST_TOKENIZER = 64_000_000  # bytes; Qwen2.5's have 7,000,000, the largest published ones 34,000,000
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt"}
_MOST_PARTS = 16
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def open_library(folder: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """The tokenizer of a folder, and the file that it comes from. Raises CheckpointError, which names the file."""
    file, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    if file.is_file():
        _measure(file)
        refuse_pointer(file)
        with guard(CheckpointError, f"{file}: not a tokenizer that the tokenizers library can read"):
            return tokenizers.Tokenizer.from_file(str(file)), file
    if not vocabulary.is_file() or not merges.is_file():
        raise CheckpointError(
            f"{file}: no such file; expected the tokenizer of a Qwen2.5 checkpoint, or vocab.json and merges.txt"
        )
    _measure(vocabulary)
    _measure(merges)
    with guard(CheckpointError, f"{vocabulary} and {merges.name}: not a vocabulary and its merges"):
        library = qwen2_library(*models.BPE.read_file(str(vocabulary), str(merges)))
    for token_id, token in _added_tokens(folder, library):
        library.add_tokens([token])
        found = library.token_to_id(token.content)
        if token_id not in (None, found):
            raise CheckpointError(
                f"{folder}: the added token {shown(token.content)} has id {token_id}, and {found} is the "
                f"next id after {vocabulary.name}; expected ids without a gap"
            )
    settings, file = read_json(folder / "tokenizer_config.json"), folder / "tokenizer_config.json"
    begins, beginning = settings.get("add_bos_token") or False, _content(settings.get("bos_token"))
    if not isinstance(begins, bool):
        raise ConfigError(f"{file}: add_bos_token is {shown(begins)}; expected true or false")
    if begins and isinstance(beginning, str) and beginning:
        token_id = library.token_to_id(beginning)
        begin_with(library, beginning, token_id)
    return library, vocabulary


def begin_with(library: tokenizers.Tokenizer, token: str, token_id: int | None) -> None:
    """Makes the library put a token before every text."""
    named = {"id": "BEGIN", "ids": [token_id], "tokens": [token]}
    library.post_processor = processors.TemplateProcessing(
        single="BEGIN $A", pair="BEGIN $A $B", special_tokens=[named]
    )


def beginning_of(library: tokenizers.Tokenizer, text: str) -> tuple[int, ...]:
    """The ids that the library's post-processor puts before a text; ``text`` is a sample."""
    bare = library.encode(text, add_special_tokens=False).ids
    whole = library.encode(text).ids
    starts = (n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare)
    if (start := next(starts, None)) is None:
        raise ValueError("its post-processor changes a text's ids")
    return tuple(whole[:start])


def qwen2_library(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Byte-level BPE with Qwen2's normalization and splitting."""
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    return library


def check_parts(library: tokenizers.Tokenizer, source: str) -> None:
    """Raises CheckpointError for steps that could take long or make a text long. Called before the tokenizer processes
    any text."""

    def refuse(what: str) -> None:
        raise CheckpointError(f"{source}: {what}; expected the steps of a byte-level BPE tokenizer such as Qwen2.5's")

    for kind, part in (
        ("normalizer", library.normalizer),
        ("pre_tokenizer", library.pre_tokenizer),
        ("post_processor", library.post_processor),
    ):
        steps = list(_steps(json.loads(part.__getstate__()))) if part is not None else []
        types = [step.get("type") for step in steps]
        most = 2 if kind == "post_processor" else _MOST_PARTS
        if len(steps) > most:
            refuse(f"{kind} has {len(steps)} steps; at most {most} are allowed")
        for step in steps:
            if kind == "normalizer" and step["type"] not in _NORMALIZERS:
                refuse(f"{kind} has a step of type {shown(step['type'], 40)}")
            if kind == "pre_tokenizer" and step["type"] not in ("Split", "ByteLevel", "Digits"):
                refuse(f"{kind} has a step of type {shown(step['type'], 40)}")
            expression = step.get("pattern", {}).get("Regex") if step["type"] == "Split" else None
            if expression is not None and expression not in EXPRESSIONS:
                refuse(f"{kind} splits by the unknown expression {shown(expression)}")
            if step["type"] == "TemplateProcessing" and len(step["single"]) > _MOST_PARTS:
                refuse(f"{kind} puts {len(step['single'])} pieces together; at most {_MOST_PARTS} are allowed")
        if kind == "pre_tokenizer" and types.count("ByteLevel") > 1:  # each step encodes a byte as two
            refuse(f"{kind} has {types.count('ByteLevel')} steps of type 'ByteLevel'")


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a part of a tokenizer.json, those within sequences included."""
    if part.get("type") != "Sequence":
        yield part
    for name in ("normalizers", "pretokenizers", "processors"):
        for inner in part.get(name, []) if part.get("type") == "Sequence" else []:
            yield from _steps(inner)


def _added_tokens(folder: Path, library: tokenizers.Tokenizer) -> Iterator[tuple[int | None, AddedToken]]:
    """Yields (id, token) of all tokens that are not in vocab.json, in the order of ids. As in transformers, they come
    from tokenizer_config.json's added_tokens_decoder, else from added_tokens.json and special_tokens_map.json."""
    config, listed = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = read_json(config)
    described = settings.get("added_tokens_decoder")
    if described is None:
        settings = read_json(folder / "special_tokens_map.json") | settings
    special = {_content(token) for name, token in settings.items() if name.endswith("_token")}
    extra = settings.get("additional_special_tokens") or []
    special |= {_content(token) for token in (extra if isinstance(extra, list) else [])}
    special = {token for token in special if isinstance(token, str) and token} | {"<|endoftext|>"}
    if described is not None:
        source, entries = f"{config}: added_tokens_decoder", _entries(described, f"{config}: added_tokens_decoder")
        tokens = {_id(key, source): _described(token, f"{source}: {shown(key)}") for key, token in entries}
    else:
        source, entries = str(listed), _entries(read_json(listed), str(listed))
        tokens = {
            _id(token_id, source): AddedToken(content, special=content in special, normalized=content not in special)
            for content, token_id in entries
        }
    yield from sorted(tokens.items())
    have = {token.content for token in tokens.values()}
    yield from ((library.token_to_id(token), AddedToken(token, special=True)) for token in sorted(special - have))


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _entries(value: Any, source: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{source} is {shown(value)}; expected an object of tokens")
    return list(value.items())


def _id(value: Any, source: str) -> int:
    try:
        token_id = int(value) if not isinstance(value, (bool, float)) else -1
    except (TypeError, ValueError):
        token_id = -1
    if not 0 <= token_id < 2**31:
        raise CheckpointError(f"{source} has the id {shown(value)}; expected a whole number of at least 0")
    return token_id


def _described(token: Any, source: str) -> AddedToken:
    if not isinstance(token, Mapping) or not isinstance(token.get("content"), str) or not token["content"]:
        raise CheckpointError(f"{source} is {shown(token)}; expected an object with content and flags")
    flags = {name: token[name] for name in _FLAGS if name in token}
    if wrong := [name for name, value in flags.items() if not isinstance(value, bool)]:
        raise CheckpointError(f"{source}: {wrong[0]} is {shown(flags[wrong[0]])}; expected true or false")
    return AddedToken(token["content"], **flags)


def _measure(file: Path) -> None:
    if (found := file.stat().st_size) > LARGEST_TOKENIZER:
        raise CheckpointError(f"{file}: has {found} bytes; expected {LARGEST_TOKENIZER} at most")


@contextmanager
def guard(error: type[Exception], complaint: str) -> Iterator[None]:
    """Raises errors of the Rust library as `error`. Some are panics, which pyo3 raises as a bare BaseException."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as fault:
        raise error(f"{complaint}: {fault}") from fault
