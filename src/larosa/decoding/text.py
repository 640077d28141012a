"""Text from tokens as they come, and how fast they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from larosa.decoding.stops import StopStrings

#: What a tokenizer shows for the bytes of an incomplete character.
_INCOMPLETE = "\ufffd"

#: Tokens of the prompt to decode the first new ones with, and more where these begin within a character.
_OVERLAP = 8

#: Most tokens that one character takes: it has as many bytes in UTF-8.
_CHARACTER = 4


class TextStream:
    """Collects the text of a continuation, hands on each piece that is complete, and times the tokens.

    Only the last complete piece and what came after it are decoded, so that a token's cost does not grow
    with the text.

    Args:
        prompt: token ids that the text goes on from: many tokenizers drop the space before a first token.
        on_text: called with each piece of text as soon as it is complete, and cannot belong to a stop string.
        stop: strings that end the text, and are not in it.
    """

    def __init__(
        self, tokenizer: Any, prompt: list[int], on_text: Callable[[str], None] | None, stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._pieces: list[str] = []
        self._times: list[float] = []
        self._last = self._context(prompt)
        self._pending: list[int] = []
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.stopped

    @property
    def text(self) -> str:
        """All text after the prompt."""
        return "".join(self._pieces)

    @property
    def tokens(self) -> int:
        """How many tokens came."""
        return len(self._times)

    @property
    def tokens_per_second(self) -> float | None:
        """Speed after the first token; None for fewer than two."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def put(self, token: int) -> None:
        """Take the next token."""
        self._times.append(time.perf_counter())
        self._pending.append(token)
        piece = self._pending_text()
        # What no further byte completes never will be, and text behind it must not wait.
        if piece and (not piece.endswith(_INCOMPLETE) or len(self._pending) > _CHARACTER):
            self._hand_on(piece)

    def end(self) -> None:
        """Hand on what never became complete."""
        piece = self._pending_text()
        if piece:
            self._hand_on(piece)
        self._write(self._stop.end())

    def _context(self, prompt: list[int]) -> list[int]:
        """The prompt's last tokens, from the beginning of a character on.

        Tokenizers with byte fallback show every byte of a run that begins within a character as incomplete.
        """
        length = _OVERLAP
        while length < len(prompt) and _INCOMPLETE in self._decode(prompt[-length:]):
            length *= 2
        return prompt[-length:]

    def _pending_text(self) -> str:
        before, whole = self._decode(self._last), self._decode(self._last + self._pending)
        # With byte fallback an invalid byte spoils the bytes before it too, which have been handed on.
        return whole[len(before) :] if whole.startswith(before) else self._decode(self._pending)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _hand_on(self, piece: str) -> None:
        self._last, self._pending = self._pending, []
        if not self._stop.stopped:
            self._write(self._stop.put(piece))

    def _write(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            if self._on_text is not None:
                self._on_text(text)
