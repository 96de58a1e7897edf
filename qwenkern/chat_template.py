"""Chat templates: a checkpoint's Jinja source turns messages into the text its model was trained on.

A template is code that came with a download, so it runs in Jinja's immutable sandbox and is handed nothing but
JSON-like values. The sandbox stops attribute tricks, mutation and huge `range`s; it cannot stop a template that merely
loops for very long.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from .errors import CheckpointError, RequestError
from .reading import read_json, read_text

_USUAL_ROLES = ("system", "user", "assistant", "tool")


def plain(value: Any, name: str, on_text: Callable[[str], str] = str.__str__) -> Any:
    """A copy of `value` in plain JSON types, `on_text` applied to every string in it, dictionary keys included.

    Raises RequestError, naming the argument `name`, for any other type: an object's methods would be open to the
    template.
    """
    if isinstance(value, str):
        return on_text(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {plain(key, name, on_text): plain(item, name, on_text) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, name, on_text) for item in value]
    raise RequestError(f"{name} holds a {type(value).__name__}; expected strings, numbers, lists and dicts only")


class ChatTemplate:
    """The templates of one checkpoint.

    `templates` maps a name to (Jinja source, file it came from); "default" renders, unless there are tools and a
    "tool_use". `tokens` holds what templates may ask for by name, such as eos_token.
    """

    def __init__(self, templates: Mapping[str, tuple[str, str]], tokens: Mapping[str, str], source: str) -> None:
        self._templates = dict(templates)
        self._tokens = dict(tokens)
        self._source = source
        self._compiled: dict[str, Any] = {}

    @classmethod
    def from_folder(cls, folder: Path, tokens: Mapping[str, str]) -> ChatTemplate:
        """From chat_template.jinja and additional_chat_templates/, else tokenizer_config.json, else chat_template.json:
        the newest spelling counts. None of them is no error until a chat is asked for.
        """
        files = {"default": folder / "chat_template.jinja"}
        files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
        templates = {name: (read_text(file), str(file)) for name, file in files.items() if file.is_file()}
        for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
            if not templates and (found := read_json(file).get("chat_template")) is not None:
                entries = [{"name": "default", "template": found}] if isinstance(found, str) else found
                try:
                    templates = {entry["name"] + "": (entry["template"] + "", str(file)) for entry in entries}
                except (
                    TypeError,
                    KeyError,
                ) as fault:  # the + "" is what refuses a name or a template that is no string
                    raise CheckpointError(
                        f"{file}: chat_template is {found!r:.60}; expected a string or a list of name and template"
                    ) from fault
        return cls(templates, tokens, str(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokens: Mapping[str, str], source: str) -> ChatTemplate:
        """From tokenizer.chat_template and, by name, tokenizer.chat_template.*."""
        prefix = "tokenizer.chat_template"
        templates = {
            key[len(prefix) + 1 :] or "default": (text, source)
            for key, text in metadata.items()
            if (key == prefix or key.startswith(prefix + ".")) and isinstance(text, str)
        }
        return cls(templates, tokens, source)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text, equal to what transformers' apply_chat_template makes of the same template.

        Raises RequestError for messages that are malformed or that the template refuses or would drop, and when there
        is no template; CheckpointError for a template that does not compile or that oversteps the sandbox.
        """
        _check(messages, tools)
        # A key whose value is None is an absent key: templates test for presence.
        messages = [{k: v for k, v in message.items() if v is not None} for message in plain(messages, "messages")]
        values = {
            **self._tokens,
            **plain(variables, "variables"),
            "tools": plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        text = self._run(name, messages, values)
        for n, message in enumerate(messages):
            # Qwen's template skips a role that it does not know: without this, a misspelt role would lose the message.
            if message["role"] not in _USUAL_ROLES:
                changed = [*messages[:n], {**message, "content": message.get("content", "") + "."}, *messages[n + 1 :]]
                if self._run(name, changed, values) == text:
                    raise RequestError(
                        f"messages[{n}]: the chat template of {self._source} ignores the role {message['role']!r}; "
                        f"expected one of {', '.join(_USUAL_ROLES)}"
                    )
        return text

    def _run(self, name: str, messages: list[dict[str, Any]], values: dict[str, Any]) -> str:
        from jinja2.sandbox import SecurityError

        template = self._compile(name)
        file = self._templates[name][1]
        try:
            return template.render(messages=messages, **values)
        except (SecurityError, OverflowError) as fault:  # OverflowError: a range beyond the sandbox's bound
            raise CheckpointError(f"{file}: the chat template oversteps its sandbox: {fault}") from fault
        except Exception as fault:
            what = f"{type(fault).__name__}: {fault}"
            raise RequestError(f"messages: the chat template of {file} does not accept them: {what}") from fault

    def _compile(self, name: str) -> Any:
        if name not in self._templates:
            have = f"only ones named {sorted(self._templates)}" if self._templates else "none"
            raise RequestError(
                f"{self._source}: a chat needs a chat template named {name!r} and the checkpoint has {have}; "
                "expected an Instruct checkpoint, or plain text through encode()"
            )
        if name not in self._compiled:
            source, file = self._templates[name]
            try:
                self._compiled[name] = _environment().from_string(source)
            except Exception as fault:  # not only TemplateSyntaxError: depth shows as RecursionError or SyntaxError
                line = f", line {fault.lineno}" if getattr(fault, "lineno", None) else ""
                raise CheckpointError(f"{file}: the chat template{line} does not compile: {fault}") from fault
        return self._compiled[name]


def _check(messages: Any, tools: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty one" if isinstance(messages, (list, tuple)) else f"a {type(messages).__name__}"
        raise RequestError(f"messages: found {found}; expected a list of at least one dict with role and content")
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{n}] is a {type(message).__name__}; expected a dict with role and content")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{n}]: role is {message.get('role')!r}; expected a string such as 'user'")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            found = "missing" if content is None else f"a {type(content).__name__}"
            raise RequestError(f"messages[{n}]: content is {found}; expected a string")
    if tools is not None and not (isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)):
        raise RequestError(f"tools: found {tools!r:.80}; expected a list of dicts, one function schema each")


@cache
def _environment() -> Any:
    """Jinja as chat templates are written for: transformers' block trimming, filter and functions."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; a prompt only needs what is inside."""

        tags = {"generation"}  # noqa: RUF012  (Jinja reads a plain set)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
