"""Converts text to token ids and back: Qwen2's byte-level BPE, from tokenizer.json or from a GGUF file's metadata.

The `tokenizers` library encodes. This module decodes, from the bytes of each token, so that the same code decodes a
whole text and a stream. A special token, such as <|im_end|>, stands for structure and not for text.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, decoders, models

from ..errors import CheckpointError, ConfigError, RequestError, shown
from ..generation import END_TOKENS, check_eos_token
from ..reading import read_json
from .added_tokens import AnyOf
from .chat_template import ChatTemplate
from .messages import plain, unused_characters
from .tokenizer_files import begin_with, beginning_of, check_parts, guard, open_library, qwen2_library

# llama.cpp's names (src/llama-vocab.cpp) for Qwen2's expression, of models that normalize text as Qwen2 does. llama.cpp
# has more names for the expression in other vocabularies ("megrez", "kormo", "f2llmv2"; "stablelm2", "hunyuan",
# "solar-open"), which no Qwen2.5 model has.
_QWEN2_PRE = ("qwen2", "deepseek-r1-qwen")
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type
_PROBE = "Hello, wörld!  It's 2024 \n\n\t" + "a" * 64 + " " * 64 + "x"
_LONG = 2**14  # characters; `encode` holds the interpreter's lock, so long texts go to encode_batch_fast
_RETRY_LIMIT = 10_000_000  # of the expression engine, per match


def _byte_alphabet() -> dict[str, int]:
    """The character -> byte table of byte-level BPE. A printable byte is its own character; others begin at U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


class Tokenizer:
    """A checkpoint's tokenizer, made by `from_folder` or `from_gguf`. It is immutable, so threads may share it.

    vocab_size       the number of logits; smaller ids without a token decode to nothing
    special_ids      ids that `decode` leaves out
    beginning_ids    ids that the checkpoint puts before a text, such as a beginning-of-text token; empty for Qwen2.5
    end_of_text_ids  ids that end a text: those with a spelling in generation.END_TOKENS, and the checkpoint's own
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        source: str,
        vocab_size: int,
        eos_tokens: Iterable[str] = (),
        chat_template: ChatTemplate | None = None,
    ) -> None:
        if not isinstance(library.model, models.BPE) or not _spells_bytes(library.decoder):
            found = f"{type(library.model).__name__} with {type(library.decoder).__name__} decoder"
            raise CheckpointError(f"{source}: the tokenizer is {found}; expected byte-level BPE, as Qwen2.5 has")
        missing = [f"0x{byte:02X}" for spelling, byte in _BYTE_OF.items() if library.token_to_id(spelling) is None]
        if missing:  # the library silently drops a character that has no token
            raise CheckpointError(
                f"{source}: the vocabulary has no token for {len(missing)} of the 256 bytes ({', '.join(missing[:4])})"
            )
        check_parts(library, source)
        library.no_truncation()
        library.no_padding()
        library.model.dropout = None
        added = library.get_added_tokens_decoder()
        self._library = library
        # The same model without added tokens, for text without special tokens. The library's own switch,
        # encode_special_tokens, is state of a shared object, and does not apply to added tokens that are not special,
        # such as <tool_call>.
        self._plain = tokenizers.Tokenizer(library.model)
        self._plain.normalizer = library.normalizer
        self._plain.pre_tokenizer = library.pre_tokenizer
        self._source = source
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._any_added = AnyOf(self._added.values())
        self._any_special = AnyOf(token.content for token in added.values() if token.special)
        self._chat_template = chat_template or ChatTemplate({}, {}, source)
        self.vocab_size = vocab_size
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        ends = {token_id for token_id, token in self._added.items() if token in END_TOKENS}
        ends |= {end for token in eos_tokens if (end := self.id_of(token)) is not None}
        self.end_of_text_ids = frozenset(ends)
        with guard(CheckpointError, f"{source}: the tokenizer fails on a line of text"):
            self.beginning_ids = beginning_of(library, _PROBE)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads a Hugging Face folder: tokenizer.json (or vocab.json and merges.txt) and, if present,
        tokenizer_config.json, added_tokens.json, special_tokens_map.json, chat_template.jinja,
        additional_chat_templates/, chat_template.json and config.json (for vocab_size).

        Raises CheckpointError, which names the file, if a file is missing or damaged.
        """
        folder = Path(path)
        library, file = open_library(folder)
        config = read_json(folder / "tokenizer_config.json")
        named = {name: token for name, token in config.items() if name.endswith("_token")}
        named = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        tokens = {name: token for name, token in named.items() if isinstance(token, str)}
        width = read_json(folder / "config.json").get("vocab_size")
        vocab = library.get_vocab(with_added_tokens=True)
        check_eos_token(config.get("eos_token"), vocab, width, folder / "tokenizer_config.json")
        used = 1 + max(vocab.values(), default=-1)
        return cls(
            library,
            str(file),
            max(used, width) if isinstance(width, int) else used,
            [tokens["eos_token"]] if "eos_token" in tokens else [],
            ChatTemplate.from_folder(folder, tokens),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Reads the `tokenizer.*` keys of a GGUF file. `source` is the file's name, for messages.

        Raises CheckpointError, which names the key, unless the vocabulary is a valid gpt2-style one with qwen2
        splitting."""
        for key, wanted in (("model", ("gpt2",)), ("pre", _QWEN2_PRE)):
            if (found := metadata.get(f"tokenizer.ggml.{key}")) not in wanted:
                names = " or ".join(map(repr, wanted))
                raise CheckpointError(f"{source}: tokenizer.ggml.{key} is {shown(found)}; expected {names}")
        tokens = _list_of(str, metadata, "tokenizer.ggml.tokens", source)
        types = _list_of(int, metadata, "tokenizer.ggml.token_type", source)
        merges = _pairs(_list_of(str, metadata, "tokenizer.ggml.merges", source), source)
        if len(types) != len(tokens):
            raise CheckpointError(
                f"{source}: tokenizer.ggml.token_type has {len(types)} entries; expected {len(tokens)}"
            )
        if odd := set(types) - {_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED}:
            raise CheckpointError(f"{source}: tokenizer.ggml.token_type holds {min(odd)}; expected 1, 3, 4 or 5")
        # Unused entries ([PAD151665]) pad the embedding to a round size. They must not match text.
        vocab = {token: n for n, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED}
        if len(vocab) != len(types) - types.count(_UNUSED):
            twice = next(token for n, token in enumerate(tokens) if types[n] != _UNUSED and vocab[token] != n)
            raise CheckpointError(f"{source}: tokenizer.ggml.tokens has {shown(twice)} twice; expected distinct tokens")
        with guard(CheckpointError, f"{source}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"):
            # A GGUF file does not name the steps. transformers 5.23 omits the normalizer, so text in NFD gets other
            # ids.
            library = qwen2_library(vocab, merges)
        # In a GGUF file, <|fim_prefix|> and similar tokens are control tokens. In the official tokenizer.json they are
        # text, which decode shows. The tokenizer follows its file; the ids are the same.
        library.add_tokens(
            [
                AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        named = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("eom", "eom"), ("pad", "padding")):
            key = f"tokenizer.ggml.{key}_token_id"
            if (token_id := metadata.get(key)) is not None:
                if type(token_id) is not int or not 0 <= token_id < len(tokens):
                    raise ConfigError(f"{source}: {key} is {shown(token_id)}; expected an id below {len(tokens)}")
                named[f"{name}_token"] = tokens[token_id]
        ends = [named[name] for name in ("eos_token", "eot_token", "eom_token") if name in named]
        key, begins = "tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.add_bos_token", False)
        if not isinstance(begins, bool):
            raise ConfigError(f"{source}: {key} is {shown(begins)}; expected true or false")
        if begins and "bos_token" not in named:
            raise ConfigError(f"{source}: {key} is true; expected tokenizer.ggml.bos_token_id as well")
        if begins:
            begin_with(library, named["bos_token"], metadata["tokenizer.ggml.bos_token_id"])
        return cls(library, source, len(tokens), ends, ChatTemplate.from_gguf(metadata, named, source))

    def files(self) -> dict[str, bytes]:
        """The files, by name, of a folder with the same tokenizer and chat templates. They contain only those
        end-of-text ids that follow from the vocabulary."""
        return {
            "tokenizer.json": self._library.to_str().encode(),
            "tokenizer_config.json": (json.dumps(self.settings(), ensure_ascii=False, indent=2) + "\n").encode(),
        }

    def settings(self) -> dict[str, Any]:
        """The fields of a tokenizer_config.json: the chat templates, and the tokens that they use by name."""
        return self._chat_template.settings()

    def spelling_of(self, token_id: int) -> str:
        """The spelling of a token in the vocabulary, such as "Ġthe"; "" for an id without a token."""
        return self._library.id_to_token(token_id) or ""

    def added_tokens(self) -> dict[int, str]:
        """The tokens beside those of the byte-level vocabulary, by id."""
        return dict(self._added)

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The ids of `text`, with no token before or after it; see `encode_prompt`.

        If the text spells a special token, it becomes that token, as chat templates need. With allow_special=False, for
        text from users, it stays text. Raises RequestError if `text` is not a str or cannot be UTF-8.
        """
        if not isinstance(text, str):
            raise RequestError(f"text is a {type(text).__name__}; expected a str")
        try:
            text.encode()
        except UnicodeEncodeError as fault:
            found = f"a lone surrogate, U+{ord(text[fault.start]):04X}, at position {fault.start}"
            raise RequestError(f"text has {found}; expected text that UTF-8 can hold") from fault
        library = self._library if allow_special else self._plain
        # Qwen's expression reaches the engine's limit only on a run of blanks of about that length. If it fails on a
        # shorter text, the checkpoint's expression is wrong.
        failed = f"the tokenizer failed on a text of {len(text)} characters"
        error, where = (RequestError, "") if len(text) >= _RETRY_LIMIT else (CheckpointError, f"{self._source}: ")
        with guard(error, where + failed):
            if len(text) < _LONG:
                return library.encode(text, add_special_tokens=False).ids
            return library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of `text` for a model to continue or score: `beginning_ids` first, unless the text begins with them.

        An end token that the checkpoint puts after a text is left out, because the model cannot continue after it.
        """
        ids, beginning = self.encode(text), list(self.beginning_ids)
        return ids if ids[: len(beginning)] == beginning else beginning + ids

    @cached_property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The id that the chat template writes after an answer; empty if it writes none or if there is no template."""
        answer = "(the answer)"
        turns = [{"role": "user", "content": "(the question)"}, {"role": "assistant", "content": answer}]
        for messages in (turns, [{"role": "system", "content": "(the rule)"}, *turns]):
            try:
                text = self.render_chat(messages, add_generation_prompt=False)
            except (RequestError, CheckpointError):  # no template, or one that refuses this conversation or fails
                continue
            _, found, after = text.rpartition(answer)
            if found and (place := next(self._any_special.places(after), None)):
                return frozenset({self._id_of_added(after[slice(*place)])})
        return frozenset()

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, with U+FFFD for bytes that are not UTF-8. Raises RequestError for an id outside the
        vocabulary."""
        try:
            ids = iter(ids)
        except TypeError:
            raise RequestError(f"ids are {shown(ids)}; expected a list of token ids") from None
        return b"".join(self.shown_bytes(token_id, skip_special) for token_id in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, which need not be whole characters; b"" for an id without a token."""
        try:
            token_id = operator.index(token_id)
        except (TypeError, ValueError, RuntimeError):  # the last two: an array or a tensor with several elements
            raise RequestError(f"token id is {shown(token_id)}; expected an int below {self.vocab_size}") from None
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id is {shown(token_id)}; expected 0 to {self.vocab_size - 1}")
        if token_id in self._added:
            return self._added[token_id].encode()
        return _bytes_of(self._library.id_to_token(token_id) or "")

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary ("<|im_end|>", "Ġthe"), or None."""
        try:
            return self._library.token_to_id(token)
        except UnicodeEncodeError:  # a lone surrogate, which no token has
            return None

    def _id_of_added(self, token: str) -> int:
        """The id of an added token."""
        token_id = self._library.token_to_id(token)
        assert token_id is not None, token
        return token_id

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text for messages of {"role": ..., "content": ...}; see ChatTemplate.render."""
        return self._chat_template.render(messages, tools, add_generation_prompt, continue_final_message, **variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """The ids of `render_chat`'s text, in which only the template's own special tokens are special.

        If a user types <|im_end|>, it is encoded as text and cannot end a message. In an assistant's content, strings
        such as <tool_call> become tokens. Without such strings, the result is encode(render_chat(...)). One case is not
        covered: a token whose halves are in two fields that a template joins directly, which Qwen's template never
        does. The errors are those of render_chat and encode.
        """
        chat, text = self._chat_template.read(
            messages, tools, add_generation_prompt, continue_final_message, **variables
        )
        # While the template runs, private-use characters replace strings that spell a token. So every token in the
        # rendered text is the template's own. The text between these tokens is encoded as text, in one piece.
        hidden = dict(zip(self._added.values(), unused_characters(text), strict=False))
        if len(hidden) < len(self._added):
            raise RequestError("messages: they use every private-use character; expected some to be unused")

        def hide(value: Any) -> Any:
            return plain(value, "messages", lambda s: self._any_added.replace(s, hidden))

        guarded = replace(chat, messages=hide(chat.messages), tools=hide(chat.tools), variables=hide(chat.variables))
        for message, original in zip(guarded.messages, chat.messages, strict=True):
            if original["role"] == "assistant" and original.get("content") is not None:
                message["content"] = self._any_special.replace(original["content"], hidden)
        if guarded == chat:
            return self.encode(text)
        shown = {ord(character): token for token, character in hidden.items()}
        rendered = self._chat_template.write(guarded)
        if rendered.translate(shown) != text:
            raise RequestError(
                "messages: they spell special tokens, and the chat template of "
                f"{Path(self._source).name} reads or changes those; expected contents without them, or "
                "encode(render_chat(...)) if you trust the contents"
            )
        ids, end = [], 0
        for start, following in self._any_added.places(rendered):
            ids += self.encode(rendered[end:start].translate(shown), allow_special=False)
            ids.append(self._id_of_added(rendered[start:following]))
            end = following
        return ids + self.encode(rendered[end:].translate(shown), allow_special=False)

    def shown_bytes(self, token_id: int, skip_special: bool) -> bytes:
        """token_bytes, or b"" for a special token if ``skip_special``."""
        shown = self.token_bytes(token_id)
        # operator.index, because the id may be an element of a tensor, whose hash differs from that of its value.
        return b"" if skip_special and operator.index(token_id) in self.special_ids else shown


@lru_cache(maxsize=2**13)  # few different tokens make up most of a text
def _bytes_of(token: str) -> bytes:
    """The bytes of a token of the vocabulary."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # it is not spelled in the byte alphabet, so it is its own text
        return token.encode()


def _spells_bytes(decoder: Any) -> bool:
    """Whether the decoder is ByteLevel, or a sequence with only ByteLevel."""
    if isinstance(decoder, decoders.Sequence):
        return [step.get("type") for step in json.loads(decoder.__getstate__())["decoders"]] == ["ByteLevel"]
    return isinstance(decoder, decoders.ByteLevel)


def _list_of(kind: type, metadata: Mapping[str, Any], key: str, source: str) -> list[Any]:
    values = metadata.get(key)
    if values is None:
        raise CheckpointError(f"{source}: {key} is missing; expected a list of {kind.__name__}")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise CheckpointError(f"{source}: {key} is a {type(values).__name__}; expected a list of {kind.__name__}")
    if not {*map(type, values)} <= {kind}:  # faster than a loop over the 150,000 tokens of a vocabulary
        for n, value in enumerate(values):
            if not isinstance(value, kind):
                raise CheckpointError(f"{source}: {key}[{n}] is {shown(value, 40)}; expected {kind.__name__}")
    return list(values)


def _pairs(merges: list[str], source: str) -> list[tuple[str, str]]:
    """The two tokens of each merge, which a space separates."""
    pairs = cast("list[tuple[str, str]]", list(map(tuple, map(str.split, merges, repeat(" ")))))
    if not {*map(len, pairs)} <= {2}:
        n = next(n for n, pair in enumerate(pairs) if len(pair) != 2)
        raise CheckpointError(
            f"{source}: tokenizer.ggml.merges[{n}] is {shown(merges[n])}; expected two tokens and a space"
        )
    return pairs
