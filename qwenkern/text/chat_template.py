"""Chat templates: a checkpoint's Jinja source converts messages to the text on which its model was trained.

A template is downloaded code. So it runs in a sandbox that limits its time and memory (sandbox/), and gets only values
of JSON's types.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError, shown
from ..reading import read_json, read_text
from .messages import check_can_go_on, plain, read_messages, size, unused_characters

_MOST_TEMPLATES = 64
_USUAL_ROLES = ("system", "user", "assistant", "tool")
_ASKS_FOR_NULL = re.compile(r"content\W{0,3}\s+is\s+(not\s+)?none\b", re.IGNORECASE)  # as DeepSeek-R1's does
_END = "\U0010fffd"  # marks the end of an unfinished last message while the template runs; a private-use character
_MOST_TRIALS = 8  # renderings that test whether a template ignores messages of unusual roles


@dataclass(frozen=True)
class Conversation:
    """The input of a template, in plain types."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool = False


class ChatTemplate:
    """The templates of one checkpoint.

    `templates` maps a name to (Jinja source, its file). With tools the template "tool_use" renders if it exists, in any
    other case "default". `tokens` has the tokens that templates may use by name, such as eos_token.
    """

    def __init__(self, templates: Mapping[str, tuple[str, str]], tokens: Mapping[str, str], source: str) -> None:
        self._templates = dict(templates)
        self._tokens = dict(tokens)
        self._source = Path(source).name or source  # a server shows it to clients, who must not see the folder
        self._compiled: dict[str, Any] = {}

    @classmethod
    def from_folder(cls, folder: Path, tokens: Mapping[str, str]) -> ChatTemplate:
        """Reads chat_template.jinja and additional_chat_templates/, else tokenizer_config.json, else
        chat_template.json: the first of these that exists. A missing template is an error only when a chat is rendered.
        """
        files = {"default": folder / "chat_template.jinja"}
        files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        if len(files) > _MOST_TEMPLATES:
            raise CheckpointError(
                f"{folder / 'additional_chat_templates'}: has {len(files) - 1} templates; expected fewer than "
                f"{_MOST_TEMPLATES}"
            )
        templates = {name: (read_text(file), str(file)) for name, file in files.items() if file.is_file()}
        for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
            if not templates and (found := read_json(file).get("chat_template")) is not None:
                entries = [{"name": "default", "template": found}] if isinstance(found, str) else found
                try:
                    templates = {entry["name"] + "": (entry["template"] + "", str(file)) for entry in entries}
                except (
                    TypeError,
                    KeyError,
                ) as fault:  # the + "" refuses a name or a template that is not a string
                    raise CheckpointError(
                        f"{file}: chat_template is {shown(found, 60)}; expected a string or a list of name and template"
                    ) from fault
        return cls(templates, tokens, str(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokens: Mapping[str, str], source: str) -> ChatTemplate:
        """Reads tokenizer.chat_template and the named templates tokenizer.chat_template.*."""
        prefix = "tokenizer.chat_template"
        templates = {
            key[len(prefix) + 1 :] or "default": (text, source)
            for key, text in metadata.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(text, str)
        }
        return cls(templates, tokens, source)

    def settings(self) -> dict[str, Any]:
        """The fields of a tokenizer_config.json with these templates and tokens."""
        entries = [{"name": name, "template": source} for name, (source, _) in self._templates.items()]
        return self._tokens | ({"chat_template": entries} if entries else {})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text. It equals that of transformers' apply_chat_template with the same template.

        add_generation_prompt: whether the text ends with the beginning of an answer.
        continue_final_message: the text ends with the last message's content instead, which the answer continues.

        Messages are first converted as messages.py describes. If the template does not know the role "developer", it
        gets "system" instead, as in llama.cpp.

        Raises RequestError for messages that are malformed or that the template refuses or would drop, and if there is
        no template. Raises CheckpointError for a template that does not compile or that exceeds the sandbox's limits.
        """
        return self.read(messages, tools, add_generation_prompt, continue_final_message, **variables)[1]

    def read(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> tuple[Conversation, str]:
        """The conversation as the template gets it, and its text. Arguments and errors are those of `render`."""

        def conversation(read_arguments: bool) -> Conversation:
            read = read_messages(messages, read_arguments, keep_null)
            for message in read:
                if message["role"] == "developer" and not knows_developers:
                    message["role"] = "system"
            begins = add_generation_prompt and not continue_final_message
            others = plain(tools, "tools"), plain(variables, "variables")
            return Conversation(read, *others, begins, continue_final_message)

        _check_tools(tools)
        if continue_final_message:
            check_can_go_on(messages)
        knows_developers = any("developer" in source for source, _ in self._templates.values())
        keep_null = any(_ASKS_FOR_NULL.search(source) for source, _ in self._templates.values())
        chat = conversation(read_arguments=True)
        try:
            text = self.write(chat)
            as_text = _shows_python(chat, text)
        except RequestError:
            as_text = conversation(read_arguments=False) != chat
            if not as_text:
                raise
        if as_text:  # a template that writes arguments unchanged into the text (DeepSeek-R1's) needs JSON, not a dict
            chat = conversation(read_arguments=False)
            text = self.write(chat)
        self._check_roles(chat, text)
        return chat, text

    def write(self, chat: Conversation) -> str:
        """The template's text for a conversation."""
        from jinja2.sandbox import SecurityError

        from .sandbox import budget

        if chat.continue_final_message:
            return self._write_unfinished(chat)
        name = "tool_use" if chat.tools and "tool_use" in self._templates else "default"
        template = self._compile(name)
        file = self._templates[name][1]
        values = self._tokens | chat.variables
        values |= {"tools": chat.tools, "add_generation_prompt": chat.add_generation_prompt}
        try:
            with budget(size([chat.messages, chat.tools, chat.variables])):
                return template.render(messages=chat.messages, **values)
        except (SecurityError, OverflowError, RecursionError) as fault:  # OverflowError: a range too large
            raise CheckpointError(f"{file}: the chat template exceeds its limits: {fault}") from fault
        except Exception as fault:
            what, name = f"{type(fault).__name__}: {fault}", Path(file).name
            raise RequestError(f"messages: the chat template of {name} does not accept them: {what:.1000}") from fault

    def _write_unfinished(self, chat: Conversation) -> str:
        """The text up to the end of the last message's content."""
        *others, last = chat.messages
        marked = {**last, "content": last["content"] + _END + " "}
        text = self.write(replace(chat, messages=[*others, marked], continue_final_message=False))
        end = text.rfind(_END)
        if end < 0 or last["content"].strip() not in text[:end]:
            raise RequestError(
                f"messages: the chat template of {self._source} changes or omits the content of the last message, so "
                "it cannot be continued; expected continue_final_message to be false"
            )
        # As in transformers: a template that has removed the blank after the mark also removes blanks before it.
        return text[:end] if text.startswith(_END + " ", end) else text[:end].rstrip()

    def _check_roles(self, chat: Conversation, text: str) -> None:
        """Raises RequestError if the template skips a message because of its role, as Qwen's template does: otherwise a
        message with a misspelt role would be lost silently."""
        unusual = [n for n, message in enumerate(chat.messages) if message["role"] not in _USUAL_ROLES]
        if not unusual:
            return

        def with_more(more: Mapping[int, str]) -> str:
            changed = [
                {**message, "content": (message.get("content") or "") + more[n]} if n in more else message
                for n, message in enumerate(chat.messages)
            ]
            return self.write(replace(chat, messages=changed))

        mark = next(unused_characters(text), "")
        try:
            found = re.findall(f"{mark}([0-9]+){mark}", with_more({n: f"{mark}{n}{mark}" for n in unusual}))
        except RequestError:  # the template interprets the contents, and refuses the marks
            found = []
        seen = set(map(int, found)) if mark else set()
        unseen = [n for n in unusual if n not in seen]
        for n in unseen[:_MOST_TRIALS]:
            if with_more({n: "."}) == text:
                raise RequestError(
                    f"messages[{n}]: the chat template of {self._source} ignores the role "
                    f"{shown(chat.messages[n]['role'])}; expected one of {', '.join(_USUAL_ROLES)}"
                )
        if len(unseen) > _MOST_TRIALS:
            raise RequestError(
                f"messages: {len(unseen)} have roles other than {', '.join(_USUAL_ROLES)}, and the chat template of "
                f"{self._source} does not show their contents as they are; expected at most {_MOST_TRIALS} of them"
            )

    def _compile(self, name: str) -> Any:
        if name not in self._templates:
            have = f"only ones named {sorted(self._templates)}" if self._templates else "none"
            raise RequestError(
                f"{self._source}: a chat needs a chat template named {shown(name)}, and the checkpoint has {have}; "
                "expected an Instruct checkpoint, or plain text through encode()"
            )
        if name not in self._compiled:
            from .sandbox import LARGEST_TEMPLATE, budget

            source, file = self._templates[name]
            if len(source) > LARGEST_TEMPLATE:
                raise CheckpointError(
                    f"{file}: the chat template has {len(source)} characters; expected {LARGEST_TEMPLATE} at most"
                )
            try:
                with budget():
                    self._compiled[name] = _environment().from_string(source)
            except Exception as fault:  # not only TemplateSyntaxError: depth shows as RecursionError or SyntaxError
                line = f", line {number}" if (number := getattr(fault, "lineno", None)) else ""
                raise CheckpointError(f"{file}: the chat template{line} does not compile: {fault}") from fault
        return self._compiled[name]


def _check_tools(tools: Any) -> None:
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)):
        raise RequestError(f"tools: found {shown(tools)}; expected a list of dicts, one function schema each")


def _shows_python(chat: Conversation, text: str) -> bool:
    """Whether the text has the arguments of a call in Python's notation of a dict."""
    calls = (call for message in chat.messages for call in message.get("tool_calls", []))
    functions = (call["function"] if isinstance(call.get("function"), dict) else call for call in calls)
    for arguments in islice((a for f in functions if isinstance(a := f.get("arguments"), dict) and a), 1):
        return repr(arguments) in text
    return False


@cache
def _environment() -> Any:
    """The Jinja environment that chat templates expect: transformers' block trimming, filter and functions."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension

    from .sandbox import Sandbox

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training. A prompt needs only its contents."""

        tags = {"generation"}  # noqa: RUF012  (Jinja reads a plain set)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(pattern: str) -> str:
        if len(pattern) > 1000:
            raise TemplateError("strftime_now takes 1,000 characters at most")
        return datetime.now().strftime(pattern)

    return Sandbox(
        {"raise_exception": raise_exception, "strftime_now": strftime_now},
        {"tojson": tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
