"""The tokenizer against two other implementations (tiktoken's BPE with its regex engine, and transformers' class), the
incremental detokenizer against decoding at once, chat templates against transformers, and each kind of bad input.

Most tests use a toy vocabulary: the 256 bytes, a few merges, and a few special tokens. Tests marked `demo` use the real
vocabulary.
"""

from __future__ import annotations

import json
import re
import threading
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers

from qwenkern.errors import CheckpointError, ConfigError, RequestError
from qwenkern.text import tokenizer as room
from qwenkern.text.added_tokens import AnyOf
from qwenkern.text.detokenizer import Detokenizer
from qwenkern.text.tokenizer import Tokenizer
from qwenkern.text.tokenizer_files import EXPRESSIONS, QWEN2_SPLIT

TEXTS = json.loads(Path(__file__).parents[1].joinpath("data", "texts.json").read_text("utf-8"))
PROSE = [text for text in TEXTS if ":" not in text["language"]]

# ChatML with tools, written for these tests. It refuses a role of "critic" and skips every role that it does not know.
TEMPLATE = """{%- if messages[0].role != "system" %}
    {{- "<|im_start|>system\\nBe brief.<|im_end|>\\n" }}
{%- endif %}
{%- if tools %}
    {{- "<|im_start|>tools" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "critic" %}{{- raise_exception("no critics") }}{%- endif %}
    {%- if message.role not in ["system", "user", "assistant", "tool"] %}{%- continue %}{%- endif %}
    {{- "<|im_start|>" + message.role + "\\n" }}
    {%- if message.content is defined %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- "<tool_call>" }}{{- (call.function or call) | tojson }}{{- "</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": 'Höhe <b>"cm"</b> & time',
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "default": None}}, "required": ["at"]},
    },
}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": "Büsum", "days": 2, "exact": True}}}
CHATS = {
    "plain": ([{"role": "user", "content": "Wie hoch ist die Flut?"}], None),
    "system": (
        [{"role": "system", "content": "You are a pilot."}, {"role": "user", "content": "Hello\n\n there "}],
        None,
    ),
    "turns": (
        [
            {"role": "user", "content": "1 < 2?"},
            {"role": "assistant", "content": "Yes & no."},
            {"role": "system", "content": "Later on."},
            {"role": "user", "content": "  "},
        ],
        None,
    ),
    "tools": ([{"role": "user", "content": "高潮は？"}], [TOOL, TOOL]),
    "system and tools": ([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}], [TOOL]),
    "calls and results": (
        [
            {"role": "user", "content": "Tide?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": '{"cm": 183}'},
            {"role": "tool", "content": "none"},
            {"role": "assistant", "content": "183 cm", "tool_calls": None},
            {"role": "assistant", "content": "Again:", "tool_calls": [CALL["function"]]},
        ],
        [TOOL],
    ),
}
IM_START, IM_END, END_OF_TEXT, TOOL_CALL, TOOL_CALL_END, UNUSED = range(264, 270)


def toy_metadata(**changes) -> dict:
    """The metadata of a GGUF file with a vocabulary of 270. A change to None removes the key."""
    spelled = {byte: character for character, byte in room._BYTE_OF.items()}
    tokens = [spelled[byte] for byte in range(256)]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ø §", "à ¸", "ì Ŀ"]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "[PAD269]"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 264 + [3, 3, 3, 4, 4, 5],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": IM_END,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata |= {"tokenizer." + key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def toy_folder(folder: Path, **changes) -> Path:
    """The toy vocabulary as a Hugging Face folder. `changes` replace keys of tokenizer.json."""
    content = json.loads(Tokenizer.from_gguf(toy_metadata(), "toy.gguf")._library.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    config = {
        "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>",
        "pad_token": {"content": "<|endoftext|>"},
        "bos_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def split_by(expression: str) -> dict:
    """The pre_tokenizer of a tokenizer.json with this regular expression."""
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, as_bytes]}


def pieces(tokenizer: Tokenizer, ids: list[int], **options) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


@pytest.fixture(scope="module")
def toy() -> Tokenizer:
    return Tokenizer.from_gguf(toy_metadata(), "toy.gguf")


@pytest.fixture(scope="module")
def demo_metadata(demo_path) -> dict:
    from qwenkern.checkpoint import open_checkpoint

    return open_checkpoint(demo_path).metadata


@pytest.fixture(scope="module")
def demo(demo_metadata) -> Tokenizer:
    return Tokenizer.from_gguf(demo_metadata, "demo.gguf")


# The texts


def test_the_texts_are_as_many_as_promised():
    assert len({text["text"] for text in TEXTS}) == len(TEXTS) >= 220
    assert len({text["language"] for text in PROSE} - {"mixed scripts"}) >= 29
    assert len({text["language"] for text in TEXTS if text["language"].startswith("code:")}) >= 10


# The real vocabulary against other implementations


@pytest.fixture(scope="module")
def tiktoken_ids(demo_metadata):
    """A function: text, whether to parse special tokens -> ids, by tiktoken and Python's own normalization."""
    entries = list(zip(demo_metadata["tokenizer.ggml.tokens"], demo_metadata["tokenizer.ggml.token_type"], strict=True))
    ranks = {bytes(room._BYTE_OF[c] for c in token): n for n, (token, kind) in enumerate(entries) if kind == 1}
    added = {token: n for n, (token, kind) in enumerate(entries) if kind in (3, 4)}
    encoding = tiktoken.Encoding("qwen2", pat_str=QWEN2_SPLIT, mergeable_ranks=ranks, special_tokens=added)

    def encode(text: str, special: bool) -> list[int]:
        parts = re.split("(" + "|".join(map(re.escape, added)) + ")", text) if special else [text]
        ids = []
        for part in parts:
            known = [added[part]] if special and part in added else None
            ids += known or encoding.encode_ordinary(unicodedata.normalize("NFC", part))
        return ids

    return encode


@pytest.mark.demo
@pytest.mark.parametrize("special", [True, False])
def test_ids_equal_tiktokens(demo, tiktoken_ids, special):
    differing = {
        text["language"]: text["text"]
        for text in TEXTS
        if demo.encode(text["text"], allow_special=special) != tiktoken_ids(text["text"], special)
    }
    assert not differing
    joined = "\n".join(text["text"] for text in TEXTS)
    assert demo.encode(joined, allow_special=special) == tiktoken_ids(joined, special)


def test_the_expression_is_qwens():
    """The tests against tiktoken pass our expression to it, so they cannot find an error in the expression."""
    theirs = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    assert theirs.PRETOKENIZE_REGEX == QWEN2_SPLIT


@pytest.mark.demo
def test_merges_come_in_the_order_of_ids(demo_metadata):
    """tiktoken ranks a merge by the id of its result. It can be a reference only because of this order."""
    id_of = {token: n for n, token in enumerate(demo_metadata["tokenizer.ggml.tokens"])}
    results = [id_of[merge.replace(" ", "")] for merge in demo_metadata["tokenizer.ggml.merges"]]
    assert results == list(range(256, 256 + len(results)))


@pytest.mark.demo
def test_ids_and_decoding_equal_transformers(demo, demo_metadata):
    transformers = pytest.importorskip("transformers")
    entries = list(zip(demo_metadata["tokenizer.ggml.tokens"], demo_metadata["tokenizer.ggml.token_type"], strict=True))
    theirs = transformers.Qwen2Tokenizer(
        vocab={token: n for n, (token, kind) in enumerate(entries) if kind == 1},
        merges=[tuple(merge.split(" ")) for merge in demo_metadata["tokenizer.ggml.merges"]],
    )
    theirs.add_tokens([AddedToken(t, special=kind == 3, normalized=False) for t, kind in entries if kind in (3, 4)])
    for text in TEXTS:
        ids = demo.encode(text["text"])
        assert ids == theirs(text["text"])["input_ids"], text["language"]
        assert demo.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text["language"]


@pytest.mark.demo
def test_text_in_nfd_is_composed(demo):
    """transformers 5.23 does this wrong for a GGUF file: its tokenizer has no normalizer."""
    assert demo.encode("Cafe\u0301") == demo.encode("Café") != demo.encode("Cafe") + demo.encode("\u0301")


@pytest.mark.demo
def test_every_text_survives_and_streams(demo):
    for text in TEXTS:
        ids = demo.encode(text["text"])
        assert demo.decode(ids, skip_special=False) == demo._library.decode(ids, skip_special_tokens=False)
        assert "".join(pieces(demo, ids)) == demo.decode(ids), text["language"]
        if "special token" not in text["language"]:  # in these texts, normalization stops at each special token
            assert demo.decode(ids, skip_special=False) == unicodedata.normalize("NFC", text["text"]), text["language"]


@pytest.mark.demo
@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, 151_935)), max_size=12))
def test_any_ids_of_the_real_vocabulary_decode_as_the_library_does(demo, ids):
    whole = demo.decode(ids, skip_special=False)
    assert whole == demo._library.decode(ids, skip_special_tokens=False)
    assert "".join(pieces(demo, ids, skip_special=False)) == whole


@pytest.mark.demo
def test_the_real_vocabulary(demo, demo_metadata):
    assert demo.vocab_size == 151_936
    assert demo.end_of_text_ids == {151_643, 151_645, 151_662, 151_663, 151_664}
    assert [demo.token_bytes(n) for n in (151_662, 151_663, 151_664)] == [
        b"<|fim_pad|>",
        b"<|repo_name|>",
        b"<|file_sep|>",
    ]
    assert demo.id_of("</s>") not in demo.end_of_text_ids  # llama.cpp lists it, but here it is ordinary text
    assert demo.end_of_turn_ids == {151_645}
    assert demo.encode_prompt("a") == demo.encode("a")
    assert demo.id_of("<|im_start|>") == 151_644
    assert demo.id_of("[PAD151665]") is None
    assert demo.decode([151_665, 151_935]) == ""
    assert {demo.id_of(token) for token in ("<tool_call>", "</tool_call>")}.isdisjoint(demo.special_ids)

    def seconds() -> float:  # of the processor, because others may use it meanwhile
        started = time.process_time()
        Tokenizer.from_gguf(demo_metadata, "demo.gguf")
        return time.process_time() - started

    assert any(seconds() < 1.5 for _ in range(3))  # 0.35 s on two cores


@pytest.mark.demo
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_qwens_template_renders_reference_model_does(demo, demo_metadata, chat, prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer(chat_template=demo_metadata["tokenizer.chat_template"])
    messages, tools = CHATS[chat]
    # a key with the value None counts as absent; transformers before 5.23 would write "None"
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    wanted = theirs.apply_chat_template(given, tools=tools, add_generation_prompt=prompt, tokenize=False)
    assert demo.render_chat(messages, tools, prompt) == wanted
    assert demo.encode_chat(messages, tools, prompt) == demo.encode(wanted)
    if chat == "plain":
        assert "You are Qwen, created by Alibaba Cloud. You are a helpful assistant." in wanted


@pytest.mark.demo
@pytest.mark.parametrize("content", ["The tide is", "", " x \n"])
def test_qwens_template_leaves_a_message_unfinished_as_reference_model_does(demo, demo_metadata, content):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Tokenizer(chat_template=demo_metadata["tokenizer.chat_template"])
    messages = [{"role": "user", "content": "Tide?"}, {"role": "assistant", "content": content}]
    wanted = theirs.apply_chat_template(messages, tools=[TOOL], continue_final_message=True, tokenize=False)
    assert demo.render_chat(messages, [TOOL], continue_final_message=True) == wanted
    assert demo.encode_chat(messages, [TOOL], continue_final_message=True) == demo.encode(wanted)


# What a tokenizer puts before a text


BEGIN = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
A = {"Sequence": {"id": "A", "type_id": 0}}
AS_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def around(*single: dict) -> dict:
    """The post_processor of a tokenizer.json with this template."""
    known = {"<|im_start|>": IM_START, "<|endoftext|>": END_OF_TEXT}
    tokens = {name: {"id": name, "ids": [n], "tokens": [name]} for name, n in known.items()}
    pair = [A, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": list(single), "pair": pair, "special_tokens": tokens}


PROCESSORS = {
    "none": None,
    "bytes, as Qwen2.5": AS_BYTES,
    "a beginning": around(BEGIN, A),
    "a beginning, as R1-Distill-Qwen": {"type": "Sequence", "processors": [AS_BYTES, around(BEGIN, A)]},
    "both": around(BEGIN, A, END),
    "an end": around(A, END),
    "two": around(BEGIN, END, A),
    "as BERT": {"type": "BertProcessing", "sep": ["<|endoftext|>", END_OF_TEXT], "cls": ["<|im_start|>", IM_START]},
}


@pytest.mark.parametrize("said", [{}, {"add_bos_token": True, "bos_token": "<|im_start|>"}, {"add_bos_token": False}])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_text_begins_reference_model_begins_it(kind, said, tmp_path):
    """If there is a tokenizer.json, its post-processor decides, and add_bos_token changes nothing."""
    transformers = pytest.importorskip("transformers")
    toy_folder(tmp_path, post_processor=PROCESSORS[kind])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"} | said))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 270}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    for text in ("hello", "", " ", "h", "Ø§ hello<|im_end|>h"):
        wanted = theirs(text)["input_ids"]
        if kind in ("both", "an end", "as BERT"):  # prompts get no end token
            assert wanted.pop() == END_OF_TEXT
        assert ours.encode_prompt(text) == wanted
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("bos", ["<|im_start|>", None, {"content": "<|im_start|>", "__type": "AddedToken"}], ids=str)
@pytest.mark.parametrize("said", [True, False, None])
def test_without_a_tokenizer_json_add_bos_token_counts(said, bos, tmp_path):
    transformers = pytest.importorskip("transformers")
    toy = Tokenizer.from_gguf(toy_metadata(), "toy.gguf")
    toy._library.model.save(str(tmp_path))
    added = {n: {"content": token, "special": True} for n, token in toy._added.items()}
    config = {"bos_token": bos, "added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer"}
    config |= {} if said is None else {"add_bos_token": said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 270}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.from_folder(tmp_path).encode_prompt("hello") == theirs("hello")["input_ids"]


def test_add_bos_token_that_says_neither(tmp_path):
    toy = Tokenizer.from_gguf(toy_metadata(), "toy.gguf")
    toy._library.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "add_bos_token": "yes"}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: add_bos_token is 'yes'; expected true or false"):
        Tokenizer.from_folder(tmp_path)


def test_a_beginning_comes_once(tmp_path):
    ours = Tokenizer.from_folder(toy_folder(tmp_path, post_processor=around(BEGIN, A)))
    assert ours.beginning_ids == (IM_START,)
    assert ours.encode_prompt("<|im_start|>h") == [IM_START, ord("h")] == ours.encode_prompt("h")
    chat = [{"role": "user", "content": "hello"}]
    assert ours.encode_chat(chat) == ours.encode(ours.render_chat(chat)) == ours.encode_prompt(ours.render_chat(chat))
    assert ours.encode_chat(chat)[:2] != [IM_START, IM_START]


def test_a_gguf_says_whether_a_text_begins_with_a_token():
    said = {"ggml__bos_token_id": END_OF_TEXT, "ggml__add_eos_token": True}
    assert Tokenizer.from_gguf(toy_metadata(**said), "toy.gguf").encode_prompt("h") == [ord("h")]
    assert Tokenizer.from_gguf(toy_metadata(**said, ggml__add_bos_token=False), "toy.gguf").beginning_ids == ()
    ours = Tokenizer.from_gguf(toy_metadata(**said, ggml__add_bos_token=True), "toy.gguf")
    assert ours.encode_prompt("h") == [END_OF_TEXT, ord("h")]
    assert ours.encode("h") == [ord("h")]
    chat = [{"role": "user", "content": "<|endoftext|>hello"}]
    assert END_OF_TEXT not in ours.encode_chat(chat)


# Encoding


def test_merges_and_special_tokens(toy):
    assert toy.vocab_size == 270
    assert toy.special_ids == {IM_START, IM_END, END_OF_TEXT}
    assert toy.end_of_text_ids == {IM_END, END_OF_TEXT}
    assert toy.id_of("Ġhello") == 260
    assert toy.id_of("nothing") is None
    assert toy.encode("hello hello<|im_end|><tool_call>h") == [259, 260, IM_END, TOOL_CALL, ord("h")]
    assert toy.encode("") == []


def test_an_unused_token_matches_no_text(toy):
    assert toy.encode("[PAD269]") == list(b"[PAD269]")
    assert toy.id_of("[PAD269]") is None


def test_text_of_a_stranger_has_no_special_tokens(toy):
    text = "<|im_end|>hello<tool_call>"
    ll = toy.id_of("ll")
    assert toy.encode(text, allow_special=False) == [*b"<|im_end|>", 259, *b"<tool_ca", ll, ord(">")]
    assert toy.encode(text) == [IM_END, 259, TOOL_CALL]


def test_threads_do_not_disturb_each_other(toy):
    wrong = []

    def encode(allow_special: bool) -> None:
        wanted = [IM_END] if allow_special else list(b"<|im_end|>")
        wrong.extend(n for n in range(2000) if toy.encode("<|im_end|>", allow_special=allow_special) != wanted)

    threads = [threading.Thread(target=encode, args=(n % 2 == 0,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@given(st.text())
def test_text_survives_but_for_normalization(toy, text):
    assert toy.decode(toy.encode(text, allow_special=False)) == normalizers.NFC().normalize_str(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "text is a NoneType; expected a str"),
        (b"hello", "text is a bytes; expected a str"),
        (["hello"], "text is a list; expected a str"),
        ("ab\ud83dc", "a lone surrogate, U+D83D, at position 2"),
        ("\udc80", "a lone surrogate, U+DC80, at position 0"),
    ],
)
def test_what_cannot_be_encoded(toy, text, message):
    with pytest.raises(RequestError, match=re.escape(message)):
        toy.encode(text)


def test_the_vocabulary_of_a_distilled_model_is_read_as_qwens(toy):
    distilled = Tokenizer.from_gguf(toy_metadata(ggml__pre="deepseek-r1-qwen"), "toy.gguf")
    for text in TEXTS:
        assert distilled.encode(text["text"]) == toy.encode(text["text"])


# Decoding


def test_bytes_of_tokens(toy):
    assert [toy.token_bytes(n) for n in range(256)] == [bytes([n]) for n in range(256)]
    assert toy.token_bytes(260) == b" hello"
    assert toy.token_bytes(IM_END) == b"<|im_end|>"
    assert toy.token_bytes(UNUSED) == b""


def test_decode_leaves_out_special_tokens_only(toy):
    ids = [IM_START, 259, TOOL_CALL, UNUSED, IM_END]
    assert toy.decode(ids) == "hello<tool_call>"
    assert toy.decode(ids, skip_special=False) == "<|im_start|>hello<tool_call><|im_end|>"


def test_ids_may_be_a_tensor(toy):
    assert toy.decode(torch.tensor([IM_START, 259, IM_END])) == "hello"


@pytest.mark.parametrize(
    ("token_id", "message"),
    [
        (270, "token id is 270; expected 0 to 269"),
        (-1, "token id is -1; expected 0 to 269"),
        (2**70, f"token id is {2**70}; expected"),
        (1.0, "token id is 1.0; expected an int below 270"),
        ("5", "token id is '5'; expected an int"),
        (None, "token id is None; expected an int"),
        (10**400, "token id is 1000000"),
        (torch.tensor([1, 2]), "token id is tensor([1, 2]); expected an int"),
    ],
)
def test_what_cannot_be_decoded(toy, token_id, message):
    for call in (toy.token_bytes, Detokenizer(toy).add, lambda n: toy.decode([0, n])):
        with pytest.raises(RequestError, match=re.escape(message)):
            call(token_id)


@pytest.mark.parametrize("ids", [None, 3, object()])
def test_what_are_no_ids(toy, ids):
    with pytest.raises(RequestError, match=r"ids are .*; expected a list of token ids"):
        toy.decode(ids)


@settings(max_examples=500)
@given(st.lists(st.integers(0, 269), max_size=24), st.booleans())
def test_pieces_join_to_the_whole_for_any_ids(toy, ids, skip_special):
    parts = pieces(toy, ids, skip_special=skip_special)
    assert "".join(parts) == toy.decode(ids, skip_special=skip_special)
    assert "".join(parts) == toy._library.decode(ids, skip_special_tokens=skip_special)
    assert not any("\ud800" <= character <= "\udfff" for part in parts for character in part)


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👩‍👧‍👦👋🏽🇩🇪",
        "اللغة العربية",
        "ภาษาไทย",
        "हिन्दी",
        "한국어",
        "\u1112\u1161\u11ab",
        "你好，世界",
        "naïve — ok\n",
        "\ufffdx",
    ],
)
def test_each_character_comes_whole_and_at_once(toy, text):
    """Byte by byte: each piece is one character, and comes as soon as the character is complete."""
    parts = pieces(toy, list(text.encode()))
    assert [part for part in parts if part] == list(text)
    assert parts == [c for character in text for c in [""] * (len(character.encode()) - 1) + [character]] + [""]


def test_finish_flushes_and_begins_anew(toy):
    detokenizer = Detokenizer(toy)
    assert detokenizer.add(0xF0) + detokenizer.add(0x9F) == ""
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""
    assert detokenizer.add(259) == "hello"


def test_a_special_token_left_out_does_not_break_a_character(toy):
    assert "".join(pieces(toy, [0xC3, IM_END, 0xA9])) == toy.decode([0xC3, IM_END, 0xA9]) == "é"


# From a GGUF file's metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "llama"}, "toy.gguf: tokenizer.ggml.model is 'llama'; expected 'gpt2'"),
        ({"ggml__model": None}, "tokenizer.ggml.model is None; expected 'gpt2'"),
        ({"ggml__pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'; expected 'qwen2' or 'deepseek-r1-qwen'"),
        ({"ggml__pre": ["qwen2"]}, "tokenizer.ggml.pre is ['qwen2']; expected 'qwen2' or 'deepseek-r1-qwen'"),
        ({"ggml__tokens": None}, "tokenizer.ggml.tokens is missing; expected a list of str"),
        ({"ggml__tokens": "abc"}, "tokenizer.ggml.tokens is a str; expected a list of str"),
        ({"ggml__tokens": ["a", 3]}, "tokenizer.ggml.tokens[1] is 3; expected str"),
        ({"ggml__token_type": None}, "tokenizer.ggml.token_type is missing; expected a list of int"),
        ({"ggml__token_type": [1] * 9}, "tokenizer.ggml.token_type has 9 entries; expected 270"),
        ({"ggml__token_type": [7] * 270}, "tokenizer.ggml.token_type holds 7; expected 1, 3, 4 or 5"),
        ({"ggml__merges": None}, "tokenizer.ggml.merges is missing; expected a list of str"),
        ({"ggml__merges": ["h e", "hello"]}, "tokenizer.ggml.merges[1] is 'hello'; expected two tokens and a space"),
        ({"ggml__merges": ["h e l"]}, "tokenizer.ggml.merges[0] is 'h e l'; expected two tokens and a space"),
        ({"ggml__merges": ["z z"]}, "tokenizer.ggml.merges do not fit tokenizer.ggml.tokens"),
    ],
)
def test_damaged_metadata(changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Tokenizer.from_gguf(toy_metadata(**changes), "toy.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__eos_token_id": 270}, "tokenizer.ggml.eos_token_id is 270; expected an id below 270"),
        ({"ggml__eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1; expected an id below 270"),
        ({"ggml__eot_token_id": True}, "tokenizer.ggml.eot_token_id is True; expected an id below 270"),
        ({"ggml__eom_token_id": [266]}, "tokenizer.ggml.eom_token_id is [266]; expected an id below 270"),
        ({"ggml__bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x'; expected an id below 270"),
        ({"ggml__add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token is 'yes'; expected true or false"),
        ({"ggml__add_bos_token": True}, "tokenizer.ggml.add_bos_token is true; expected tokenizer.ggml.bos_token_id"),
    ],
)
def test_metadata_that_says_no_token(changes, message):
    with pytest.raises(ConfigError, match=re.escape("toy.gguf: " + message)):
        Tokenizer.from_gguf(toy_metadata(**changes), "toy.gguf")


def test_a_token_that_occurs_twice():
    tokens = [*toy_metadata()["tokenizer.ggml.tokens"]]
    tokens[260] = "hell"
    with pytest.raises(CheckpointError, match=r"toy\.gguf: tokenizer\.ggml\.tokens has 'hell' twice"):
        Tokenizer.from_gguf(toy_metadata(ggml__tokens=tokens), "toy.gguf")


def test_a_vocabulary_without_all_bytes():
    """The library would silently drop a missing byte from every text."""
    tokens = [*toy_metadata()["tokenizer.ggml.tokens"]]
    tokens[0xA9] = "unlike a byte"
    with pytest.raises(CheckpointError, match=r"no token for 1 of the 256 bytes \(0xA9\)"):
        Tokenizer.from_gguf(toy_metadata(ggml__tokens=tokens), "toy.gguf")


def test_special_tokens_keep_their_ids_wherever_they_lie():
    tokens = toy_metadata()["tokenizer.ggml.tokens"]
    types = toy_metadata()["tokenizer.ggml.token_type"]
    moved = toy_metadata(ggml__tokens=tokens[264:] + tokens[:264], ggml__token_type=types[264:] + types[:264])
    moved["tokenizer.ggml.eos_token_id"] = 6
    tokenizer = Tokenizer.from_gguf(moved, "toy.gguf")
    assert tokenizer.encode("<|im_end|>h") == [1, 6 + ord("h")]
    assert tokenizer.end_of_text_ids == {1, 2, 6}


# From a folder


def test_folder_and_gguf_agree(toy, tmp_path):
    tokenizer = Tokenizer.from_folder(toy_folder(tmp_path))
    assert tokenizer.vocab_size == 269
    assert (tokenizer.special_ids, tokenizer.end_of_text_ids) == (toy.special_ids, toy.end_of_text_ids)
    for text in TEXTS:
        assert tokenizer.encode(text["text"]) == toy.encode(text["text"])
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.render_chat(messages) == toy.render_chat(messages)


def test_templates_know_the_special_tokens_of_the_folder(tmp_path):
    (toy_folder(tmp_path) / "chat_template.jinja").write_text(
        "{{ eos_token }}{{ pad_token }}{{ bos_token is defined }}"
    )
    assert Tokenizer.from_folder(tmp_path).render_chat([MESSAGE]) == "<|im_end|><|endoftext|>False"


def test_width_of_the_model_comes_from_config_json(tmp_path):
    (toy_folder(tmp_path) / "config.json").write_text('{"vocab_size": 300}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode([299, 259, 269]) == "hello"
    with pytest.raises(RequestError, match="expected 0 to 299"):
        tokenizer.decode([300])


def test_settings_for_training_are_switched_off(tmp_path):
    """A tokenizer.json may have truncation, padding and dropout. Each would silently change a prompt."""
    content = json.loads((toy_folder(tmp_path) / "tokenizer.json").read_text("utf-8"))
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": END_OF_TEXT}
    padding |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    model = content["model"] | {"dropout": 1.0}
    toy_folder(tmp_path, truncation=truncation, padding=padding, model=model)
    assert Tokenizer.from_folder(tmp_path).encode("hello hello hello") == [259, 260, 260]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; expected the tokenizer of a Qwen2.5 checkpoint"),
        (b"", "not a tokenizer that the tokenizers library can read"),
        (b"{", "not a tokenizer that the tokenizers library can read"),
        (b"\xff\xfe", "not a tokenizer that the tokenizers library can read"),
        (b"[]", "not a tokenizer that the tokenizers library can read"),
        (b'{"version": "9.0"}', "not a tokenizer that the tokenizers library can read"),
    ],
)
def test_tokenizer_json_missing_or_corrupt(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / 'tokenizer.json'}: {message}")):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
            "the tokenizer is WordLevel with ByteLevel",
        ),
        ({"decoder": {"type": "Fuse"}}, "the tokenizer is BPE with Fuse decoder; expected byte-level BPE"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "the vocabulary has no token for 255 of the 256 bytes (0x21",
        ),
        ({"pre_tokenizer": split_by("(")}, "not a tokenizer that the tokenizers library can read: Oniguruma error"),
    ],
)
def test_tokenizer_json_of_another_kind(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=re.escape(f"tokenizer.json: {message}")):
        Tokenizer.from_folder(toy_folder(tmp_path, **changes))


def doubling(times: int) -> dict:
    """A normalizer that doubles a text so many times."""
    step = {"type": "Replace", "pattern": {"Regex": "(.)"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * times}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": doubling(40)}, "normalizer has 40 steps; at most 16 are allowed"),
        ({"normalizer": doubling(2)}, "normalizer has a step of type 'Replace'"),
        ({"normalizer": {"type": "Sequence", "normalizers": [doubling(1)]}}, "normalizer has a step of type 'Replace'"),
        ({"normalizer": {"type": "Prepend", "prepend": "x"}}, "normalizer has a step of type 'Prepend'"),
        ({"pre_tokenizer": split_by(".*.*.*z")}, "pre_tokenizer splits by the unknown expression '.*.*.*z'"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 9}},
            "pre_tokenizer has 9 steps of type 'ByteLevel'",
        ),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "pre_tokenizer has a step of type 'WhitespaceSplit'"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 40,
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                    "special_tokens": {},
                }
            },
            "post_processor puts 40 pieces together; at most 16 are allowed",
        ),
        (
            {"post_processor": {"type": "Sequence", "processors": [BYTES] * 40}},
            "post_processor has 40 steps; at most 2 are allowed",
        ),
    ],
)
def test_steps_that_could_take_for_ever(tmp_path, changes, message):
    started = time.process_time()
    with pytest.raises(CheckpointError, match=re.escape(f"tokenizer.json: {message}")):
        Tokenizer.from_folder(toy_folder(tmp_path, **changes))
    assert time.process_time() - started < 2


@pytest.mark.slow
@pytest.mark.parametrize("expression", sorted(EXPRESSIONS))
def test_expressions_read_a_text_once(tmp_path, expression):
    """For any text, twice the length takes about twice as long."""
    library = Tokenizer.from_folder(toy_folder(tmp_path, pre_tokenizer=split_by(expression)))._library

    def seconds(text: str) -> float:
        started = time.process_time()
        library.encode(text)
        return time.process_time() - started

    for unit in (" ", "a", "1", "\n", "'", " a", "\r\n ", "!\n", "é1 ", "\t\n\ta", "'S "):
        assert seconds(unit * (200_000 // len(unit))) < 8 * seconds(unit * (50_000 // len(unit))) + 0.2, unit


def test_steps_of_qwen_like_tokenizers_are_taken(tmp_path):
    nfc = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}
    digits = split_by(QWEN2_SPLIT)
    digits["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    changes = {"normalizer": nfc, "pre_tokenizer": digits, "decoder": {"type": "Sequence", "decoders": [BYTES]}}
    tokenizer = Tokenizer.from_folder(toy_folder(tmp_path, **changes))
    assert tokenizer.encode("hello") == [259]
    assert tokenizer.decode([259]) == "hello"


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_files_are_measured_before_they_are_read(tmp_path, name):
    older_folder(tmp_path)
    with open(tmp_path / name, "wb") as file:
        file.truncate(64_000_001)  # a sparse file, which takes no space on the disk
    with pytest.raises(CheckpointError, match=rf"{name}: has 64000001 bytes; expected 64000000 at most"):
        Tokenizer.from_folder(tmp_path)


# From a folder without tokenizer.json


def token(content: str, special: bool = True) -> dict:
    return {"content": content, "special": special} | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)


def older_folder(folder: Path, config: dict | None = None, num_tokens: int = 264, **files) -> Path:
    """The toy vocabulary as vocab.json and merges.txt. `files`: further JSON files, named without .json."""
    metadata = toy_metadata()
    vocab = {token: n for n, token in enumerate(metadata["tokenizer.ggml.tokens"][:num_tokens])}
    config = {"tokenizer_class": "Qwen2Tokenizer"} | (config or {})
    for name, content in ({"vocab": vocab, "tokenizer_config": config} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
    merges = ["#version: 0.2", *metadata["tokenizer.ggml.merges"], ""]
    (folder / "merges.txt").write_text("\n".join(merges), "utf-8")
    return folder


NAMED = {"<|im_start|>": 264, "<|im_end|>": 265, "<|endoftext|>": 266, "<tool_call>": 267}
DESCRIBED = {str(n): token(name, name != "<tool_call>") for name, n in NAMED.items()}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"config": {"added_tokens_decoder": DESCRIBED, "eos_token": "<|im_end|>"}},
        {"config": {"added_tokens_decoder": DESCRIBED, "eos_token": "<|endoftext|>"}, "added_tokens": {"x": 264}},
        {"added_tokens": NAMED},
        {"added_tokens": NAMED, "config": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}},
        {
            "added_tokens": NAMED,
            "special_tokens_map": {
                "eos_token": {"content": "<|im_end|>", "lstrip": False},
                "additional_special_tokens": ["<|im_start|>"],
            },
        },
        {"num_tokens": 269, "special_tokens_map": {"eos_token": "<|im_end|>"}},
    ],
)
def test_vocabulary_and_merges_load_as_in_transformers(tmp_path, arguments):
    transformers = pytest.importorskip("transformers")
    older_folder(tmp_path, **arguments)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    wanted = {n: (added.content, added.special) for n, added in theirs.added_tokens_decoder.items()}
    assert {n: (content, n in ours.special_ids) for n, content in ours._added.items()} == wanted
    for text in [text["text"] for text in TEXTS] + ["hello<|im_end|> Cafe\u0301<tool_call><|im_start|>\n"]:
        assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": ["a"]}, "vocab.json and merges.txt: not a vocabulary and its merges"),
        ({"vocab": {"a": 0}}, "vocab.json and merges.txt: not a vocabulary and its merges"),
        ({"added_tokens": {"<|im_end|>": 300}}, "'<|im_end|>' has id 300, and 264 is the next id after vocab"),
        ({"added_tokens": {"<|im_end|>": "x"}}, "added_tokens.json has the id 'x'; expected a whole number"),
        ({"added_tokens": {"<|im_end|>": True}}, "added_tokens.json has the id True; expected a whole number"),
        ({"config": {"added_tokens_decoder": [1]}}, "added_tokens_decoder is [1]; expected an object of tokens"),
        ({"config": {"added_tokens_decoder": {"264": "x"}}}, "'264' is 'x'; expected an object with content and flags"),
        (
            {"config": {"added_tokens_decoder": {"264": {"content": "x", "special": "yes"}}}},
            "'264': special is 'yes'; expected true or false",
        ),
    ],
)
def test_damaged_files_of_a_vocabulary(tmp_path, arguments, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Tokenizer.from_folder(older_folder(tmp_path, **arguments))


def test_a_vocabulary_without_merges(tmp_path):
    (older_folder(tmp_path) / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file; .* or vocab\.json and merges\.txt"):
        Tokenizer.from_folder(tmp_path)


def test_an_expression_that_panics_at_load(tmp_path, monkeypatch):
    """The regex engine gives up on (a+a+)+y before a run of a's, and the library makes a Rust panic of this."""
    monkeypatch.setattr("qwenkern.text.tokenizer_files.EXPRESSIONS", {QWEN2_SPLIT, "(a+a+)+y"})
    toy_folder(tmp_path, pre_tokenizer=split_by("(a+a+)+y"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer fails on a line of text: .*retry-limit"):
        Tokenizer.from_folder(tmp_path)


def test_an_expression_that_panics_later(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenkern.text.tokenizer_files.EXPRESSIONS", {QWEN2_SPLIT, "(q+q+)+y"})
    tokenizer = Tokenizer.from_folder(toy_folder(tmp_path, pre_tokenizer=split_by("(q+q+)+y")))
    for allow_special in (True, False):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer failed on a text of 64 characters"):
            tokenizer.encode("q" * 64, allow_special=allow_special)
    assert tokenizer.encode("hello") == [259]
    # If a text is so long that Qwen's own expression reaches the limit, the error is a RequestError.
    monkeypatch.setattr(room, "_RETRY_LIMIT", 64)
    with pytest.raises(RequestError, match=r"^the tokenizer failed on a text of 64 characters"):  # and no path
        tokenizer.encode("q" * 64)


def test_other_threads_run_while_a_long_text_is_encoded(toy):
    text = "hello <|im_end|> " * 200_000

    def longest_pause() -> float:
        """Of another thread, as a share of the time that the encoding takes."""
        times, done = [], threading.Event()

        def tick() -> None:
            while not done.wait(0.001):
                times.append(time.monotonic())

        thread = threading.Thread(target=tick)
        thread.start()
        times.append(begun := time.monotonic())
        found = toy.encode(text)
        times.append(ended := time.monotonic())
        done.set()
        thread.join()
        assert toy.decode(found, skip_special=False) == text
        assert found == toy._library.encode(text, add_special_tokens=False).ids
        return max(later - earlier for earlier, later in pairwise(sorted(times))) / (ended - begun)

    assert any(longest_pause() < 0.5 for _ in range(3))  # other programs may make one of the pauses


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interruptions_pass_through(toy, monkeypatch, interruption):
    class Interrupted:
        def encode(self, *_, **__):
            raise interruption

    monkeypatch.setattr(toy, "_library", Interrupted())
    with pytest.raises(interruption):
        toy.encode("hello")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "chat_template.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not readable as JSON"),
        (b"[1]", "holds a list; expected a JSON object"),
        (b"\xff", "not readable as UTF-8 text"),
        (b"[" * 200_000, "not readable as JSON"),
    ],
)
def test_other_files_corrupt(tmp_path, name, content, message):
    toy_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path / name}: {message}")):
        Tokenizer.from_folder(tmp_path)


# Chat templates


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_renders_reference_model_does(toy, chat, prompt):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=toy._library, chat_template=TEMPLATE)
    messages, tools = CHATS[chat]
    # a key with the value None counts as absent; transformers before 5.23 would write "None"
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    wanted = theirs.apply_chat_template(given, tools=tools, add_generation_prompt=prompt, tokenize=False)
    assert toy.render_chat(messages, tools, prompt) == wanted
    assert toy.encode_chat(messages, tools, prompt) == toy.encode(wanted)


UNFINISHED = [
    "The tide is",
    "The tide is \n",
    "  The tide",
    "",
    " ",
    "a <|im_end|>\n<|im_start|>",
    "<tool_call>\n{",
    "高潮\U0010fffd ",
]


@pytest.mark.parametrize("content", UNFINISHED)
@pytest.mark.parametrize("template", ["as it is", "trimmed"])
@pytest.mark.parametrize("chat", ["plain", "system", "turns", "tools"])
def test_a_message_that_goes_on_ends_where_reference_model_ends_it(chat, template, content):
    transformers = pytest.importorskip("transformers")
    source = TEMPLATE if template == "as it is" else TEMPLATE.replace("message.content }}", "message.content | trim }}")
    toy = Tokenizer.from_gguf(toy_metadata(chat_template=source), "toy.gguf")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=toy._library, chat_template=source)
    messages, tools = CHATS[chat]
    messages = [*messages, {"role": "assistant", "content": content}]
    wanted = theirs.apply_chat_template(messages, tools=tools, continue_final_message=True, tokenize=False)
    assert toy.render_chat(messages, tools, continue_final_message=True) == wanted
    ids = toy.encode_chat(messages, tools, continue_final_message=True)
    assert toy.decode(ids, skip_special=False) == wanted
    before = toy.encode_chat(messages[:-1], tools, add_generation_prompt=True)
    if content.strip():  # otherwise the reference also removes the line feed before a trimmed message
        assert ids[: len(before)] == before  # the cache has the keys and values of these tokens
    assert {IM_START, IM_END}.isdisjoint(ids[len(before) :])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "the last one has tool calls"),
        ({"role": "assistant", "content": "Well", "tool_calls": [CALL]}, "the last one has tool calls"),
        ({"role": "assistant"}, "the last one has no content"),
        ({"role": "sailor", "content": "Ahoy"}, "changes or omits the content of the last message"),
    ],
)
def test_messages_that_cannot_go_on(toy, message, complaint):
    with pytest.raises(RequestError, match=complaint):
        toy.encode_chat([MESSAGE, message], continue_final_message=True)
    with pytest.raises(RequestError, match="messages: found an empty one"):
        toy.encode_chat([], continue_final_message=True)


def chat_of(template: str, **options) -> str:
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    return tokenizer.render_chat([{"role": "user", "content": "<hello> é"}], **options)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content | tojson }}", '"<hello> é"'),
        ("{{ [1, {'b': 2, 'a': 3}] | tojson(indent=1) }}", '[\n 1,\n {\n  "b": 2,\n  "a": 3\n }\n]'),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("a\n   {% if true %}\nb\n   {% endif %}\nc", "a\nb\nc"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ '{0.__class__}'.format(messages) }}-", "-"),  # the sandbox gives no access to attributes
        ("{{ eos_token }}{{ pad_token is defined }}{{ style }}", "<|im_end|>Falsecalm"),
    ],
)
def test_what_templates_rely_on(template, text):
    assert chat_of(template, style="calm") == text


def test_strftime_now_tells_the_date():
    assert chat_of("{{ strftime_now('%Y') }}") in {str(year) for year in range(2020, 2100)}


MESSAGE = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: found an empty one; expected a list of at least one dict"),
        ("hello", "messages: found a str; expected a list"),
        (MESSAGE, "messages: found a dict; expected a list"),
        (None, "messages: found a NoneType; expected a list"),
        ([MESSAGE, "hello"], "messages[1] is a str; expected a dict with role and content"),
        ([{"content": "hello"}], "messages[0]: role is None; expected a string"),
        ([{"role": 3, "content": "hello"}], "messages[0]: role is 3; expected a string"),
        ([{"role": "user"}], "messages[0]: content is missing; expected a string"),
        ([MESSAGE, {"role": "assistant", "content": None}], "messages[1]: content is missing; expected a string"),
        ([{"role": "user", "content": ["hello"]}], "messages[0].content[0] is a str; expected a dict"),
        ([MESSAGE | {"image": object()}], "messages[0] holds a object; expected strings, numbers, lists and dicts"),
        (
            [{"role": "critic", "content": "hello"}],
            "chat template of toy.gguf does not accept them: TemplateError: no critics",
        ),
        (
            [MESSAGE, {"role": "User", "content": ""}],
            "messages[1]: the chat template of toy.gguf ignores the role 'User'",
        ),
    ],
)
def test_messages_that_are_refused(toy, messages, message):
    for call in (toy.render_chat, toy.encode_chat):
        with pytest.raises(RequestError, match=re.escape(message)):
            call(messages)


@pytest.mark.parametrize(
    ("template", "more", "message"),
    [
        ("{{ raise_exception('no') }}", {}, "of tokenizer_config.json does not accept them"),
        ("{{ messages[0].content | upper }}", {"continue_final_message": True}, "changes or omits the content"),
        ("{{ messages[0].content | replace('|', '') }}", {}, "reads or changes those"),
        ("{% if messages[0].role == 'user' %}hello{% endif %}", {}, "ignores the role"),
        (None, {}, "needs a chat template"),
    ],
)
def test_a_refusal_does_not_tell_the_folder(tmp_path, template, more, message):
    """A server passes the message on to its clients."""
    folder = toy_folder(tmp_path)
    file = folder / "tokenizer_config.json"
    fields = {name: value for name, value in json.loads(file.read_text()).items() if name != "chat_template"}
    file.write_text(json.dumps(fields | ({"chat_template": template} if template else {})))
    said = [{"role": "nobody" if "role" in message else "user", "content": "hello <|im_end|>"}]
    with pytest.raises(RequestError, match=message) as refused:
        Tokenizer.from_folder(folder).encode_chat(said, **more)
    assert str(tmp_path) not in str(refused.value)


@pytest.mark.parametrize("tools", ["tide", {"name": "tide"}, [print]])
def test_tools_that_are_refused(toy, tools):
    with pytest.raises(RequestError, match=r"tools: found .* expected a list of dicts"):
        toy.render_chat([MESSAGE], tools)


def calling(arguments) -> list[dict]:
    call = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": arguments}}
    answer = {"role": "tool", "tool_call_id": "call_1", "name": "tide", "content": "183"}
    return [MESSAGE, {"role": "assistant", "content": None, "tool_calls": [call]}, answer]


@pytest.mark.parametrize("arguments", [{"at": "Büsum", "days": [1, 2.5, None], "deep": {"a": True}}, {}, [1], 7])
def test_arguments_as_json_text_are_what_they_spell(toy, arguments):
    wanted = toy.encode_chat(calling(arguments), [TOOL])
    for text in (json.dumps(arguments), json.dumps(arguments, ensure_ascii=False, indent=3)):
        assert toy.encode_chat(calling(text), [TOOL]) == wanted
    bare = [MESSAGE, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": json.dumps(arguments)}]}]
    assert toy.render_chat(bare) == toy.render_chat(
        [MESSAGE, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    )


@pytest.mark.parametrize("text", ['{"at": ', "Büsum", "[" * 5000, '{"n": ' + "9" * 5000 + "}"])
def test_arguments_that_are_no_json_stay_as_the_model_wrote_them(toy, text):
    assert json.dumps(text, ensure_ascii=False) in toy.render_chat(calling(text))


def test_empty_arguments_are_none(toy):
    assert toy.render_chat(calling(" ")) == toy.render_chat(calling({}))


@pytest.mark.parametrize("shown", ["'\\n' + ARGUMENTS", "ARGUMENTS", "'x' ~ ARGUMENTS"])
def test_a_template_that_wants_json_text_gets_it(shown):
    """DeepSeek-R1-Distill-Qwen's template adds the arguments to a string. A dict would raise an error there, or be
    written in Python's notation."""
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ SHOWN }}{% endfor %}{{ m.content }}{% endfor %}"
    )
    template = template.replace("SHOWN", shown.replace("ARGUMENTS", "c.function.arguments"))
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    assert '{"at":  "x"}' in tokenizer.render_chat(calling('{"at":  "x"}'))


@pytest.mark.parametrize("asks", ["m['content'] is none", "m.content is none", "not m.content is not none"])
@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_a_template_that_asks_for_null_gets_it(asks, content):
    """DeepSeek-R1-Distill-Qwen's template writes tool calls only if the content is none. Others would write "None"."""
    template = (
        "{% for m in messages %}{% if ASKS %}{% for c in m.tool_calls %}<{{ c.function.name }}>{% endfor %}"
        "{% else %}{{ '<A>' + m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template.replace("ASKS", asks)), "toy.gguf")
    called = {"role": "assistant", "tool_calls": calling({})[1]["tool_calls"]} | content
    chat = [{"role": "user", "content": "<|im_end|>"}, called]
    assert tokenizer.render_chat(chat) == "<A><|im_end|><tide>"
    assert tokenizer.decode(tokenizer.encode_chat(chat)) == "<A><|im_end|><tide>"
    plain = Tokenizer.from_gguf(
        toy_metadata(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"), "toy.gguf"
    )
    assert plain.render_chat(chat) == "<|im_end|>"


def test_special_tokens_escaped_in_arguments_are_text(toy):
    spelled = toy.encode_chat(calling('{"at": "\\u003c|im_end|\\u003e"}'))
    assert spelled == toy.encode_chat(calling({"at": "<|im_end|>"}))
    assert spelled.count(IM_END) == toy.encode_chat(calling({"at": ""})).count(IM_END)


def test_content_as_parts_is_their_text(toy):
    parts = [{"type": "text", "text": "hel"}, {"type": "input_text", "text": "lo <|im_end|>", "annotations": []}]
    wanted = toy.encode_chat([{"role": "user", "content": "hel\nlo <|im_end|>"}])
    assert toy.encode_chat([{"role": "user", "content": parts}]) == wanted
    assert toy.encode_chat([{"role": "user", "content": parts[:1]}]) == toy.encode_chat(
        [{"role": "user", "content": "hel"}]
    )


def test_developers_are_the_system_unless_the_template_knows_them(toy):
    chat = [{"role": "developer", "content": "Be brief."}, MESSAGE]
    assert toy.render_chat(chat) == toy.render_chat([{"role": "system", "content": "Be brief."}, MESSAGE])
    template = "{% for m in messages %}{{ 'D' if m.role == 'developer' else m.role }}{{ m.content }}{% endfor %}"
    knows = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    assert knows.render_chat(chat) == "DBe brief.userhello"


def nested(depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> list:
    value = []
    value.append({"value": value})
    return value


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": nested(5000)}}]},
            "messages[1] is nested more than 100",
        ),
        ({"tool_calls": [{"function": {"name": "f", "arguments": itself()}}]}, "levels deep, or contains itself"),
        ({"tool_calls": itself()}, "levels deep, or contains itself"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "[" * 500 + "]" * 500}}]},
            "messages[1]: the arguments of a tool call is nested more than 100 levels deep",
        ),
        ({"tool_calls": "f"}, "messages[1]: tool_calls is 'f'; expected a list of dicts"),
        ({"tool_calls": ["f"]}, "messages[1]: tool_calls is ['f']; expected a list of dicts"),
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content[0] is of type 'image_url'; expected",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "refusal"}]},
            "content[1] is of type 'refusal'; expected",
        ),
        ({"content": [{"type": "text", "text": 3}]}, "messages[1].content[0]: text is 3; expected a string"),
        ({"content": {"type": "text", "text": "a"}}, "messages[1]: content is a dict; expected a string, or a list"),
        ({"content": "a", (1, 2): 3}, "messages[1] holds a dict with a key of type tuple; expected strings"),
        ({"content": "a", "x": b"y"}, "messages[1] holds a bytes; expected strings, numbers, lists and dicts only"),
        ({"content": "a", "x": {1, 2}}, "messages[1] holds a set; expected"),
    ],
)
def test_what_clients_may_not_send(toy, message, error):
    for call in (toy.render_chat, toy.encode_chat):
        with pytest.raises(RequestError, match=re.escape(error)):
            call([MESSAGE, {"role": "assistant", **message}])


def test_tools_and_variables_that_hold_themselves(toy):
    with pytest.raises(RequestError, match="tools is nested more than 100 levels deep, or contains itself"):
        toy.render_chat([MESSAGE], [{"name": itself()}])
    with pytest.raises(RequestError, match="variables is nested more than 100 levels deep, or contains itself"):
        toy.render_chat([MESSAGE], style=itself())


def seconds(call) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def test_messages_of_unusual_roles_cost_no_more_than_others():
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    unusual, usual = ([{"role": role, "content": "hello"}] * 2000 for role in ("narrator", "user"))
    assert seconds(lambda: tokenizer.encode_chat(unusual)) < 10 * seconds(lambda: tokenizer.encode_chat(usual)) + 0.5
    assert tokenizer.render_chat(unusual) == "narrator: hello" * 2000


def test_an_ignored_message_among_many_of_unusual_roles():
    template = "{% for m in messages %}{% if m.role != 'nobody' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    chat = [{"role": "narrator", "content": "hello"}] * 500
    with pytest.raises(RequestError, match=r"messages\[300\]: the chat template of toy.gguf ignores the role 'nobody'"):
        tokenizer.render_chat([*chat[:300], {"role": "nobody", "content": "x"}, *chat])


def test_a_template_that_hides_contents_of_unusual_roles():
    template = "{% for m in messages %}{{ m.content | length }},{% endfor %}"
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    chat = [{"role": "narrator", "content": "hello"}]
    assert tokenizer.render_chat(chat * 8) == "5," * 8
    with pytest.raises(RequestError, match=r"messages: 9 have roles other than .* expected at most 8 of them"):
        tokenizer.render_chat(chat * 9)


def test_all_private_characters_cost_no_more_than_others(toy):
    private, other = ("".join(map(chr, range(start, start + 65_000))) for start in (0xF0000, 0x20000))
    assert seconds(lambda: toy.encode_chat([{"role": "user", "content": private}])) < 1
    assert toy.decode(toy.encode_chat([{"role": "user", "content": private + "<|im_end|>"}])).count(private) == 1
    everything = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE), 0xFFFFE, 0xFFFFF]))
    with pytest.raises(RequestError, match="they use every private-use character; expected some to be unused"):
        toy.encode_chat([{"role": "user", "content": everything + other}])


def test_a_role_that_the_template_takes_is_taken():
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    assert tokenizer.render_chat([{"role": "narrator", "content": "hello"}]) == "narrator: hello"


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("a\n{% if %}", CheckpointError, "toy.gguf: the chat template, line 2 does not compile"),
        ("{{ 1 | nosuchfilter }}", CheckpointError, "does not compile: No filter named 'nosuchfilter'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", CheckpointError, "does not compile"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", CheckpointError, "toy.gguf: the chat template exceeds"),
        ("{{ messages.append(1) }}", CheckpointError, "exceeds its limits"),
        ("{{ messages.__class__.mro() }}", CheckpointError, "exceeds its limits"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", CheckpointError, "exceeds its limits: Range too big"),
        ("{{ messages[5].content.strip() }}", RequestError, "does not accept them: UndefinedError"),
        ("{{ 1 // 0 }}", RequestError, "does not accept them: ZeroDivisionError"),
    ],
)
def test_templates_that_are_refused(template, error, message):
    with pytest.raises(error, match=re.escape(message)):
        chat_of(template)


def test_a_checkpoint_without_a_template():
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=None), "base.gguf")
    with pytest.raises(
        RequestError, match=r"base\.gguf: a chat needs .* the checkpoint has none; expected an Instruct"
    ):
        tokenizer.render_chat([MESSAGE])


def test_folders_of_many_templates(tmp_path):
    (toy_folder(tmp_path) / "additional_chat_templates").mkdir()
    for n in range(64):
        (tmp_path / "additional_chat_templates" / f"{n}.jinja").touch()
    with pytest.raises(CheckpointError, match="additional_chat_templates: has 64 templates; expected fewer than 64"):
        Tokenizer.from_folder(tmp_path)


def test_spellings_of_the_template_in_a_folder(tmp_path):
    """From the oldest to the newest way to store a template. A newer one takes precedence."""

    def rendered(tools=None) -> str:
        return Tokenizer.from_folder(tmp_path).render_chat([MESSAGE], tools)

    toy_folder(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered() == "json"
    named = [{"name": "default", "template": "list"}, {"name": "tool_use", "template": "tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert (rendered(), rendered([TOOL])) == ("list", "tools")
    config.write_text('{"chat_template": "config"}')
    assert (rendered(), rendered([TOOL])) == ("config", "config")
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("jinja tools")
    assert (rendered(), rendered([TOOL])) == ("jinja", "jinja tools")


@pytest.mark.parametrize("found", [3, ["default"], [{"name": "default"}], [{"name": "default", "template": 3}]])
def test_a_template_of_another_type(tmp_path, found):
    (toy_folder(tmp_path) / "tokenizer_config.json").write_text(json.dumps({"chat_template": found}))
    with pytest.raises(
        CheckpointError, match=r"tokenizer_config\.json: chat_template is .* expected a string or a list"
    ):
        Tokenizer.from_folder(tmp_path)


def test_a_template_that_is_not_text(tmp_path):
    (toy_folder(tmp_path) / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not readable as UTF-8 text"):
        Tokenizer.from_folder(tmp_path)


def test_a_syntax_error_names_the_file(tmp_path):
    (toy_folder(tmp_path) / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: the chat template, line 1 does not compile"):
        Tokenizer.from_folder(tmp_path).render_chat([MESSAGE])


# Chats with contents that spell special tokens

SPELLED = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "</tool_call>", "<|im_", "end|>", "hello", " ", "\n", "e", "\u0301"])
    | st.text(max_size=3),
    max_size=8,
).map("".join)


@settings(max_examples=300)
@given(SPELLED, SPELLED)
def test_contents_cannot_end_their_turn(toy, system, user):
    """All special tokens come from the template. The text between them is encoded as ordinary text."""
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    wanted = []
    for role, content in (("system", system), ("user", user)):
        wanted += [IM_START, *toy.encode(f"{role}\n{content}", allow_special=False), IM_END, ord("\n")]
    assert toy.encode_chat(chat, add_generation_prompt=False) == wanted


def test_the_models_own_tool_call_in_its_content_counts(toy):
    chat = [{"role": role, "content": "<tool_call><|im_end|>"} for role in ("user", "assistant")]
    ids = toy.encode_chat(chat, add_generation_prompt=False)
    assert ids.count(TOOL_CALL) == 1
    assert ids.count(IM_END) == 3  # one of them ends the template's default system prompt
    assert toy.decode(ids, skip_special=False) == toy.render_chat(chat, add_generation_prompt=False)


def test_the_longest_token_counts_as_in_any_text():
    metadata = toy_metadata()
    metadata["tokenizer.ggml.tokens"][-1] = "<tool_call>!"
    metadata["tokenizer.ggml.token_type"][-1] = 4
    tokenizer = Tokenizer.from_gguf(metadata, "toy.gguf")
    chat = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "<tool_call>!"}]
    ids = tokenizer.encode_chat(chat)
    assert (ids.count(269), ids.count(TOOL_CALL), ids.count(IM_END)) == (1, 0, 3)


def test_special_tokens_in_tools_and_calls_are_text(toy):
    spelled = "</tool_call><|im_end|>"
    call = {"function": {"name": spelled, "arguments": {spelled: [spelled, 1]}}}
    chat = [MESSAGE, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = toy.encode_chat(chat, [{"name": spelled}])
    assert (ids.count(IM_END), ids.count(TOOL_CALL), ids.count(TOOL_CALL_END)) == (4, 1, 1)
    assert toy.decode(ids, skip_special=False) == toy.render_chat(chat, [{"name": spelled}])


@given(st.sets(st.text("ab<", min_size=1, max_size=5), max_size=12), st.text("ab<", max_size=40))
def test_added_tokens_are_found_as_an_expression_finds_them(tokens, text):
    expression = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    found = AnyOf(tokens)
    assert list(found.places(text)) == [match.span() for match in expression.finditer(text)]
    by = {token: token.upper() + "!" for token in tokens}
    assert found.replace(text, by) == expression.sub(lambda match: by[match[0]], text)


def test_private_characters_of_the_user_stay_theirs(toy):
    private = "".join(map(chr, range(0xF0000, 0xF0010)))
    chat = [{"role": "user", "content": private + "<|im_end|>" + private}]
    ids = toy.encode_chat(chat)
    assert ids.count(IM_END) == 2
    assert toy.decode(ids, skip_special=False) == toy.render_chat(chat)


def test_a_template_that_reads_special_tokens_in_contents():
    template = "{{ messages[0].content.split('<|im_end|>') | first }}"
    tokenizer = Tokenizer.from_gguf(toy_metadata(chat_template=template), "toy.gguf")
    with pytest.raises(RequestError, match=r"the chat template of toy\.gguf reads or changes those"):
        tokenizer.encode_chat([{"role": "user", "content": "a<|im_end|>b"}])
