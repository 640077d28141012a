"""Texts that end a text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first of some strings to be complete, whatever pieces it comes in.

    What may be the beginning of one is held back until that is decided.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        #: Whether one of the strings came.
        self.stopped = False
        #: What came behind it with the same piece.
        self.rest = ""

    def put(self, piece: str) -> str:
        """Take the next piece of text; give what can be shown of all that has come."""
        text = self._held + piece
        found = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            end, at = min(found)
            self.stopped, self._held, self.rest = True, "", text[end:]
            return text[:at]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, now that no more comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text may be the beginning of the string."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)
