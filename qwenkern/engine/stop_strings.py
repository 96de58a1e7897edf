"""Stop strings in a text that comes piece by piece."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on, except what a stop string could still begin with, and ends it before the first one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = strings
        self.held = ""  # text that is not passed on yet
        self.found: str | None = None

    def add(self, text: str) -> str:
        """Takes a piece. Returns the text that is now certain."""
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
        """The held text, once nothing more comes."""
        text, self.held = self.held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that ``stop`` begins with."""
        longest = min(len(stop) - 1, len(self.held))
        return next((size for size in range(longest, 0, -1) if self.held.endswith(stop[:size])), 0)
