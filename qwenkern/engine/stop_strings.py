"""Finds stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Returns text as it comes, but holds back an ending that may be the beginning of a stop string. Ends the text
    before the first stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self.held = ""  # text that is held back
        self.found: str | None = None

    def add(self, text: str) -> str:
        """Adds a piece of text. Returns the text that is certain not to belong to a stop string."""
        if not self.strings:
            return text
        self.held += text
        matches = [(at, stop) for stop in self.strings if (at := self.held.find(stop)) >= 0]
        if matches:
            at, self.found = min(matches)
            text, self.held = self.held[:at], ""
            return text
        keep = max((self._overlap(stop) for stop in self.strings), default=0)
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return text

    def finish(self) -> str:
        """Ends the text, and returns the part that was held back."""
        text, self.held = self.held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """The length of the longest ending of the held text that ``stop`` begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)
