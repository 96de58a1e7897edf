"""Finds added tokens in a text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping


class AnyOf:
    """Finds the tokens of a set in a text, from left to right: at each position the longest token that begins there. A
    regular expression would take seconds to compile for the 14,000 added tokens of a speech model."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._tokens = frozenset(tokens)
        lengths: dict[str, set[int]] = {}
        for token in self._tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._firsts = re.compile("|".join(map(re.escape, lengths)) or "(?!)")  # (?!) matches nowhere

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """The start and the end of each token that is found."""
        end = 0
        for first in self._firsts.finditer(text):
            start = first.start()
            for length in self._lengths[first[0]] if start >= end else ():
                if (found := text[start : start + length]) in self._tokens:
                    end = start + len(found)
                    yield start, end
                    break

    def replace(self, text: str, by: Mapping[str, str]) -> str:
        parts: list[str] = []
        end = 0
        for start, following in self.places(text):
            parts += text[end:start], by[text[start:following]]
            end = following
        return "".join([*parts, text[end:]])
