"""Function calls in a model's text: what is a call, what remains text, and what the grammars of calls admit."""

from __future__ import annotations

import json
from itertools import pairwise

import llguidance
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from qwenkern.errors import RequestError
from qwenkern.text.json_object import JsonObject
from qwenkern.text.tokenizer import Tokenizer
from qwenkern.text.tools import Arguments, Begun, Broken, Call, ToolCalls, call_grammar

CALL = '<tool_call>\n{"name": "tide", "arguments": {"place": "Emden", "hours": 3}}\n</tool_call>'
TIDE = Call("tide", '{"place": "Emden", "hours": 3}')


def parsed(pieces: list[str], names: tuple[str, ...] = ("tide", "f", "g")) -> list[str | Call]:
    """The texts and calls that a parser finds in these pieces of a text, with adjacent texts joined.

    Checks that each call has begun, and that its arguments came in pieces before it. Checks that the arguments of a
    broken call are the beginning of a JSON object."""
    calls = ToolCalls(names)
    found = [item for piece in pieces for item in calls.add(piece)] + calls.finish()
    joined: list[str | Call] = []
    name, arguments = None, ""
    for item in found:
        if isinstance(item, Begun):
            assert name is None
            name, arguments = item.name, ""
        elif isinstance(item, Arguments):
            assert name is not None
            assert item.text
            arguments += item.text
        elif isinstance(item, Broken):
            assert name in names
            assert isinstance(from_json(arguments or "{", allow_partial=True), dict)
            with pytest.raises(ValueError, match="EOF"):
                from_json(arguments)
            name = None
        elif isinstance(item, Call):
            assert (name, arguments) == (item.name, item.arguments)
            assert isinstance(json.loads(arguments), dict)
            name = None
            joined.append(item)
        else:
            assert name is None
            if joined and isinstance(joined[-1], str):
                joined[-1] += item
            else:
                joined.append(item)
    assert name is None
    return joined


def block(inner: str) -> str:
    return f"<tool_call>\n{inner}\n</tool_call>"


# What is a call


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (CALL, [TIDE]),
        (f"Let me look.\n{CALL}\n", ["Let me look.", TIDE]),
        (f"{CALL}\n{CALL}", [TIDE, TIDE]),
        (f"{CALL} \n and {CALL}{CALL}.", [TIDE, "and", TIDE, TIDE, "."]),
        (CALL.replace("\n", ""), [TIDE]),
        (CALL.removesuffix("\n</tool_call>"), [TIDE]),  # the text ends before the closing tag
        (CALL.removesuffix("</tool_call>") + CALL, [TIDE, TIDE]),
        (block('{"arguments": {}, "name": "f"}'), [Call("f", "{}")]),
        (block('{"name": "f"}'), [Call("f", "{}")]),
        (block('{"name": "f", "arguments": null}'), [Call("f", "{}")]),
        (block(r'{"name": "f", "arguments": "{\"a\": [1]}"}'), [Call("f", '{"a": [1]}')]),
        (block('{"name": "f", "arguments": {"a": "高潮\\u00e9"}}'), [Call("f", r'{"a": "高潮\u00e9"}')]),
        (block('{"name": "f", "arguments": {"a": "x\ny"}}'), [Call("f", r'{"a": "x\ny"}')]),
        (block('{"name": "f", "arguments": {"a": "</tool_call>"}}'), [Call("f", '{"a": "</tool_call>"}')]),
        (block(r'{"name": "f", "arguments": {"a": "\"<tool_call>\\"}}'), [Call("f", r'{"a": "\"<tool_call>\\"}')]),
    ],
)
def test_calls_are_found(text, found):
    assert parsed([text]) == found
    assert parsed(list(text)) == found


@pytest.mark.parametrize(
    "inner",
    [
        "",
        "tide",
        "[]",
        "null",
        '{"arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "x"}',
        '{"name": "f", "arguments": {}, "place": "Emden"}',  # as a call, it would lose the place
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',  # Python reads it as infinity, which is not JSON
        '{"name": "f", "arguments": {"a": -Infinity}}',
        '{"name": "f", "arguments": {"a": 1' + "0" * 5000 + "}}",
        r'{"name": "f", "arguments": {"a": "\ud800"}}',
        r'{"name": "\udfff", "arguments": {}}',
        '{"name": "f", "arguments": {"a": "never closed}}',
        '{"name": "f", "arguments": {"a": ' + "[" * 200_000 + "}}",
        '{"name": "f", "arguments": ' + '{"a":' * 200_000 + "1" + "}" * 200_000 + "}",
        '{"name": "f", "arguments": {}}}',
        "{'name': 'f', 'arguments': {}}",
    ],
    ids=lambda inner: inner[:50],
)
def test_malformed_calls_are_text(inner):
    text = f"See\n{block(inner)}\n"
    assert parsed([text]) == [text]
    assert parsed([text + CALL]) == [text.rstrip(), TIDE]  # malformed text before a call does not hide the call


@pytest.mark.parametrize(
    "text", ["", "  \n", "<", "a < b", "<tool_call", "</tool_call>", "<tool_call>", "\n<tool_call>\n{"]
)
def test_text_without_calls_stays_as_it_is(text):
    assert "".join(parsed([text])) == text
    assert "".join(parsed(list(text))) == text


def test_text_is_not_held_back_for_long():
    calls = ToolCalls()
    assert calls.add("Hello <b") == ["Hello <b"]
    assert calls.add(" \n<too") == []
    assert calls.add("th>") == [" \n<tooth>"]
    assert calls.add(f" {CALL[:20]}") == []
    assert calls.add(CALL[20:])[-1] == TIDE
    assert calls.finish() == []


def test_a_call_begins_with_its_arguments():
    calls = ToolCalls(["tide"])
    assert calls.add('<tool_call>\n{"name": "tide", "arguments": ') == []
    assert calls.add('{"pl') == [Begun("tide"), Arguments('{"pl')]
    assert calls.add('ace": "Em<') == [Arguments('ace": "Em')]  # a tag may begin here
    assert calls.add("b>\n\\") == [Arguments("<b>\\n")]  # an incomplete escape is held back
    assert calls.add('"", "hours": 3') == [Arguments('\\"", "hours": ')]  # the number may go on
    assert calls.add("0}") == [Arguments("30")]
    assert calls.add("}\n</tool_call") == []
    arguments = r'{"place": "Em<b>\n\"", "hours": 30}'
    assert calls.add(">") == [Arguments("}"), Call("tide", arguments)]
    assert json.loads(arguments) == {"place": 'Em<b>\n"', "hours": 30}
    assert calls.add('<tool_call>{"name": "other", "arguments": {"a": ') == []  # no function has this name
    assert calls.add('<tool_call>{"name": "tide", "arguments": {"a": 1, b') == [
        '<tool_call>{"name": "other", "arguments": {"a": ', Begun("tide"), Arguments('{"a": 1, '),
    ]  # fmt: skip
    assert calls.finish() == [Broken(), '<tool_call>{"name": "tide", "arguments": {"a": 1, b']


FRAGMENTS = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "call>",
            "\n",
            " ",
            '"',
            "\\",
            "{",
            "}",
            "x",
            "é",
            "<",
            CALL,
            CALL[:40],
        ),
        *('{"name": "f", "arguments": ', '{"a": "', '"}}', "{}}", '{"name": "g"}', '{"name": "h", "arguments": {}}'),
    ]
)


@settings(max_examples=400)
@given(st.lists(FRAGMENTS, max_size=24).map("".join), st.data())
@example('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', None)
def test_pieces_do_not_matter(text, data):
    whole = parsed([text])
    assert parsed(list(text)) == whole
    if data is not None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
        assert parsed([text[a:b] for a, b in pairwise([0, *cuts, len(text)])]) == whole
    if all(isinstance(item, str) for item in whole):
        assert "".join(whole) == text


BLANKS = " \t\r\n"
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<")).filter(lambda text: text.strip(BLANKS))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text('a"\\</>\né'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<>"), inner, max_size=3),
    max_leaves=8,
)
CALLS = st.tuples(
    st.sampled_from(["f", "get_tide"]), st.dictionaries(st.text("ab<>"), VALUES | st.just(CALL), max_size=3)
)


@settings(max_examples=200)
@given(st.lists(PLAIN | CALLS, max_size=6))
def test_texts_and_calls_are_told_apart(parts):
    """The calls are written as the chat template writes them. The expected values are those that they were made of."""
    text, wanted = "", []
    for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
        if isinstance(part, tuple):
            text += "\n" + block(json.dumps({"name": part[0], "arguments": part[1]}, ensure_ascii=False))
            wanted.append(part)
            continue
        text += part
        part = part.lstrip(BLANKS) if isinstance(before, tuple) else part
        part = part.rstrip(BLANKS) if isinstance(after, tuple) else part
        joins = wanted and isinstance(wanted[-1], str)
        wanted[-1:] = [wanted[-1] + part] if joins else [*wanted[-1:], part]
    found = [item if isinstance(item, str) else (item.name, json.loads(item.arguments)) for item in parsed([text])]
    assert found == wanted


# Arguments that come in pieces

SEPARATORS = st.tuples(st.sampled_from([",", ", ", " ,\n\t"]), st.sampled_from([":", ": ", " :\r\n"]))


@settings(max_examples=200)
@given(st.dictionaries(st.text('a"\\é😀\n'), VALUES, max_size=4), SEPARATORS, st.booleans(), st.data())
def test_objects_come_as_they_are_written(value, separators, ensure_ascii, data):
    text = json.dumps(value, separators=separators, ensure_ascii=ensure_ascii)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    read = JsonObject()
    assert "".join(read.add(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])) == text
    assert read.is_whole
    assert (read.add("} more"), read.rest) == ("", "} more")


MUTATED = st.sampled_from(
    ["", "{", "}", "]", "[", ",", ":", '"', "\\", "\\u", "\\ud800", "0", "-", "e9", "1e999", "NaN", "nul"]
)


@settings(max_examples=400)
@given(st.dictionaries(st.text("ab"), VALUES, max_size=3), st.lists(st.tuples(st.integers(0, 60), MUTATED), max_size=3))
def test_what_comes_of_an_object_is_always_its_beginning(value, changes):
    """pydantic's parser of partial JSON is the reference."""
    text = json.dumps(value)
    for at, more in changes:
        text = text[:at] + more + text[at + 1 :]
    read, come = JsonObject(), ""
    for character in text:
        come += read.add(character)
        assert isinstance(from_json(come or "{", allow_partial=True, allow_inf_nan=False), dict)
    assert text.startswith(come)
    whole = JsonObject()
    assert (whole.add(text), whole.is_whole, whole.rest) == (come, read.is_whole, read.rest)
    try:
        expected = json.loads(text)
        json.dumps(expected, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        assert not read.is_whole or read.rest
    else:
        assert read.is_whole == isinstance(expected, dict)


@pytest.mark.parametrize(
    ("text", "come"),
    [
        ("[1]", ""),
        ("1", ""),
        ('{"a": 1, }', '{"a": 1, '),
        ('{"a": [1 2]}', '{"a": [1 '),
        ('{"a": [}', '{"a": ['),
        ('{"a" 1}', '{"a" '),
        ("{'a': 1}", "{"),
        ('{"a": 01}', '{"a": '),
        ('{"a": 1e999}', '{"a": '),
        ('{"a": -Infinity}', '{"a": '),
        (r'{"a": "x\ud800"}', '{"a": "x'),
        (r'{"a": "x\q"}', '{"a": "x'),
        ('{"a": ' + "9" * 1001 + "}", '{"a": '),
        ('{"a":' * 101, '{"a":' * 100),
    ],
    ids=lambda value: value[:20],
)
def test_where_an_object_breaks(text, come):
    for pieces in ([text], list(text)):
        read = JsonObject()
        assert "".join(read.add(piece) for piece in [*pieces, " more"]) == come
        assert not read.is_whole


# The grammar

PLACES = {"type": "object", "properties": {"place": {"$ref": "#/$defs/Place"}, "hours": {"type": "integer"}}}
PLACES |= {"required": ["place"], "additionalProperties": False, "$defs": {"Place": {"enum": ["Emden", "Kiel"]}}}
TOOLS = [
    {"type": "function", "function": {"name": "tide", "parameters": PLACES}},
    {"type": "function", "function": {"name": "tide_tables"}},
]
TABLES = block('{"name": "tide_tables", "arguments": {}}')
BOTH = f"{CALL}\n{TABLES}"


class Vocabulary:
    """The tokens, in the format that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int]) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = special[0]

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


@pytest.fixture(scope="module")
def vocabulary() -> llguidance.LLTokenizer:
    """The 256 bytes, the two tags, and an end token."""
    tokens = [*(bytes([n]) for n in range(256)), b"<tool_call>", b"</tool_call>", b"<|im_end|>"]
    return llguidance.LLTokenizer(Vocabulary(tokens, [258]))


def admits(tokenizer: llguidance.LLTokenizer, grammar: str, ids: list[int]) -> bool:
    """Whether the grammar accepts these ids and an end after them."""
    matcher = llguidance.LLMatcher(tokenizer, grammar)
    assert not matcher.is_error(), matcher.get_error()
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def with_tags(text: str) -> list[int]:
    """The ids of a text, with a token for each tag."""
    ids = text.encode().replace(b"<tool_call>", b"\xfe").replace(b"</tool_call>", b"\xff")
    return [{0xFE: 256, 0xFF: 257}.get(byte, byte) for byte in ids]


WRONG = [CALL.replace("Emden", "Rom"), CALL.replace("3", '"3"'), CALL.replace("tide", "tid"), CALL[:-1], "<tool_call>"]
WRONG += [
    CALL.replace("place", "port"),
    TABLES.replace("{}", '{"a": 1}'),
    CALL.replace('", "', '",   "'),
    "<tool_call> is a tag",
]


@pytest.mark.parametrize(
    ("choice", "parallel", "right", "wrong"),
    [
        ("required", True, [CALL, TABLES, BOTH], ["", "Hi", f"Hi\n{CALL}", f"{CALL}bye"]),
        ("required", False, [CALL, TABLES], ["", "Hi", BOTH, f"{CALL}\n"]),
        ("function:tide", True, [CALL, f"{CALL}\n{CALL}"], ["", "Hi", TABLES, BOTH]),
        ("function:tide", False, [CALL], ["", TABLES, f"{CALL}\n{CALL}"]),
        ("function:tide_tables", False, [TABLES], ["", CALL]),
        ("auto", True, ["", "Hi\n", CALL, f"Hi\n{BOTH}\nbye", "a < b", "<tool_", "</tool_call>"], []),
        ("auto", False, ["", "Hi\n", CALL, f"Hi\n{TABLES}"], [BOTH, f"{CALL}bye"]),
    ],
)
def test_grammars_admit_right_calls_only(vocabulary, choice, parallel, right, wrong):
    grammar = call_grammar(TOOLS, choice, parallel)
    for text in right:
        assert admits(vocabulary, grammar, with_tags(text)), text
        assert admits(vocabulary, grammar, list(text.encode())), text
    for text in [*wrong, *WRONG]:
        assert not admits(vocabulary, grammar, with_tags(text)), text
        assert not admits(vocabulary, grammar, list(text.encode())), text


FORM = {"type": "object", "properties": {"high": {"type": "boolean"}}, "required": ["high"]}
FORM |= {"additionalProperties": False}


@pytest.mark.parametrize("parallel", [True, False])
def test_grammars_of_calls_or_an_answer(vocabulary, parallel):
    grammar = call_grammar(TOOLS, "auto", parallel, FORM)
    for text in ['{"high":true}', '{"high": false}', CALL, TABLES, *([BOTH] if parallel else [])]:
        assert admits(vocabulary, grammar, with_tags(text)), text
        assert admits(vocabulary, grammar, list(text.encode())), text
    mixed = [f'{{"high":true}}\n{CALL}', f'{CALL}{{"high":true}}', f"Hi\n{CALL}", *([] if parallel else [BOTH])]
    for text in ["", "Hi", "{}", '{"high":1}', *mixed, *WRONG]:
        assert not admits(vocabulary, grammar, with_tags(text)), text
    assert admits(vocabulary, call_grammar(TOOLS, "required", parallel, FORM), with_tags(CALL))
    assert not admits(vocabulary, call_grammar(TOOLS, "required", parallel, FORM), list(b'{"high":true}'))


def test_what_a_grammar_admits_is_parsed(vocabulary):
    assert parsed([f"Hi\n{BOTH}"]) == ["Hi", TIDE, Call("tide_tables", "{}")]


@pytest.mark.parametrize("name", ["a-b_C9", 'a"b\\c/d', "潮", "a\nb", "%json {}", "b: /x/"])
def test_names_and_schemas_cannot_change_the_grammar(vocabulary, name):
    schema = {"type": "object", "properties": {name: {"const": f'"}}\ncall_0: "{name}'}}, "required": [name]}
    schema |= {"additionalProperties": False, "x-guidance": {"lenient": True}}
    grammar = call_grammar([{"type": "function", "function": {"name": name, "parameters": schema}}], "required", False)
    arguments = {name: schema["properties"][name]["const"]}
    text = block(json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False))
    assert admits(vocabulary, grammar, with_tags(text))
    assert not admits(vocabulary, grammar, with_tags(text.replace(": ", ":")))
    assert parsed([text]) == [Call(name, json.dumps(arguments, ensure_ascii=False))]


@pytest.mark.demo
def test_grammars_and_calls_in_the_real_vocabulary(demo_path):
    """Qwen's tags are added tokens, but not special ones: texts contain them, and strings of a grammar match them."""
    from qwenkern.checkpoint import open_checkpoint

    demo = Tokenizer.from_gguf(open_checkpoint(demo_path).metadata, "demo.gguf")
    ids = demo.encode(BOTH)
    assert (ids[0], ids[-1]) == (151657, 151658)
    assert parsed([demo.decode([token]) for token in ids]) == parsed([BOTH])
    tokens = [demo.token_bytes(n) for n in range(demo.vocab_size)]
    vocabulary = llguidance.LLTokenizer(Vocabulary(tokens, sorted(demo.special_ids)))
    assert admits(vocabulary, call_grammar(TOOLS, "required", True), ids)
    assert not admits(vocabulary, call_grammar(TOOLS, "required", True), demo.encode(WRONG[0]))


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "there are no tools"),
        (TOOLS, "function:tid", "names the function 'tid'; expected one of"),
        (TOOLS, "any", "expected 'auto', 'required' or 'function:NAME'"),
        ([{"type": "function"}], "required", r"tools\[0\]: .* expected a function with a name"),
        (
            [TOOLS[0], {"function": {"name": "f", "parameters": {"type": "array"}}}],
            "required",
            r"tools\[1\]: parameters",
        ),
        ([{"function": {"name": "f", "parameters": [1]}}], "required", r"tools\[0\]: parameters are \[1\]"),
    ],
)
def test_tools_that_have_no_grammar(tools, choice, message):
    with pytest.raises(RequestError, match=message):
        call_grammar(tools, choice, True)


# Arguments that come back


@pytest.mark.demo
def test_arguments_as_text_are_rendered_once(demo_path):
    """Clients send the arguments back as text. The real template then writes the same as for the object."""
    from qwenkern.checkpoint import open_checkpoint

    demo = Tokenizer.from_gguf(open_checkpoint(demo_path).metadata, "demo.gguf")

    def conversation(arguments: object) -> list[dict[str, object]]:
        call = {"id": "call_1", "type": "function", "function": {"name": "tide", "arguments": arguments}}
        return [
            {"role": "user", "content": "Emden?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "high"},
        ]

    text = demo.render_chat(conversation(TIDE.arguments), TOOLS)
    assert text == demo.render_chat(conversation(json.loads(TIDE.arguments)), TOOLS)
    assert f"<|im_start|>assistant\n{CALL}<|im_end|>" in text
    # so the next prompt begins with the ids that the model wrote, whose keys and values are cached
    before = demo.encode_chat(conversation(TIDE.arguments)[:1], TOOLS)
    after = demo.encode_chat(conversation(TIDE.arguments), TOOLS)
    assert after[: len(before)] == before
    assert after[len(before) :][: len(demo.encode(CALL))] == demo.encode(CALL)
