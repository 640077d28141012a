"""Telling a model's thoughts, between <think> and </think>, from its answer."""

from __future__ import annotations

from typing import NamedTuple

from larosa.decoding.stops import StopStrings

_OPEN, _CLOSE = "<think>", "</think>"


class Parts(NamedTuple):
    """A piece of text, taken apart."""

    reasoning: str
    content: str


class ReasoningSplitter:
    """Takes a text apart as it comes; tags and the white space around them are left out.

    Args:
        prompt: what the model was given as text: some templates open the thoughts themselves.
    """

    def __init__(self, prompt: str) -> None:
        self._thinking = prompt.rstrip().endswith(_OPEN)
        self._undecided = not self._thinking
        self._start = ""
        self._strips = self._thinking
        self._end = StopStrings([_CLOSE])

    def put(self, text: str, last: bool = False) -> Parts:
        """Take the next piece, `last` if no more comes."""
        if self._undecided:
            self._start += text
            start = self._start.lstrip()
            if not last and len(start) < len(_OPEN) and _OPEN.startswith(start):
                return Parts("", "")
            self._undecided = False
            if not start.startswith(_OPEN):
                return Parts("", self._start)
            self._thinking = self._strips = True
            text = start.removeprefix(_OPEN)
        if not self._thinking:
            return Parts("", self._stripped(text))
        shown = self._end.put(text)
        if not self._end.stopped:
            return Parts(self._stripped(shown + (self._end.end() if last else "")), "")
        reasoning = self._stripped(shown)
        self._thinking, self._strips = False, True
        return Parts(reasoning, self._stripped(self._end.rest))

    def _stripped(self, text: str) -> str:
        """Without white space at the beginning of a part."""
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return text
