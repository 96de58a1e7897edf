"""Lets the API reference show what stands beside the code.

An extension of griffe, which reads the package for mkdocstrings. The comment at the end of a field's line becomes the
field's text. In the docstring of a function, lines that begin with a parameter's name become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Comments(griffe.Extension):
    """See above."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.lines and (found := re.search(r"\s# (.*)", attr.lines[0])):
            attr.docstring = griffe.Docstring(found[1], lineno=attr.lineno, parent=attr)

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        if func.docstring:
            names = "|".join(re.escape(parameter.name) for parameter in func.parameters)
            func.docstring.value = re.sub(
                rf"^({names}): (.*(?:\n    .*)*)", r"\n- `\1`: \2", func.docstring.value, flags=re.MULTILINE
            )
