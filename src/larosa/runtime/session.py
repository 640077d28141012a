"""A text in the making, beside others over the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from larosa.decoding.drafting import Drafter
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.lossless import Speculation
from larosa.decoding.sampling import Sampler
from larosa.decoding.steps import Steps
from larosa.errors import LarosaError

#: Prompts run in pieces that end at multiples of so many tokens, the last one aside. PyTorch's sums depend on how many
#: rows a product has, and a piece is the same whatever follows: so a prefix is reused in whole pieces, to the bit.
PIECE = 128


class TextEngine(Protocol):
    """What sessions ask of an engine; see `larosa.decoding.Engine`."""

    max_length: int

    def extend(self, tokens: torch.Tensor, start: int, text: int = 0) -> torch.Tensor:
        """Run the next tokens [1, length] of a prompt, and give [length, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary] for [N, D]."""
        ...

    def take(self, other: Any, length: int, source: int = 0, text: int = 0) -> None:
        """Copy the first keys and values of a text of another engine."""
        ...


class Session:
    """A text in the making: its prompt runs piece by piece, then each token that is drawn.

    Args:
        engine: runs it, and other sessions as well.
        steps: of that engine.
        text: which of its texts it is.
        speculation: of that engine, for `step_drafted`; None where nothing is drafted.
    """

    def __init__(self, engine: TextEngine, steps: Steps, text: int = 0, speculation: Speculation | None = None) -> None:
        self._engine, self._steps, self._text = engine, steps, text
        self._speculation = speculation
        self._drafters: list[Drafter] = []
        self._prompt: list[int] = []
        #: Token ids whose keys and values are kept, prompt and drawn tokens alike.
        self.tokens: list[int] = []
        #: How many of them, from the first on, ran in whole pieces of a prompt.
        self.reusable = 0

    @property
    def max_length(self) -> int:
        """Tokens there is room for."""
        return self._engine.max_length

    @property
    def left(self) -> int:
        """Tokens of the prompt that have not run."""
        return max(0, len(self._prompt) - len(self.tokens))

    def prefill(self, prompt: Sequence[int]) -> torch.Tensor:
        """Run a prompt, but for what is held of it from before; the result is that of a new session.

        Returns:
            [1, vocabulary] float32, the logits of the token that follows.

        Raises:
            LarosaError: the prompt is empty or does not fit.
        """
        self.start(prompt)
        while self.left:
            hidden = self.advance()
        return self.logits(hidden[-1:])

    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        """Go on with tokens that are given, not drawn; see `prefill`: all that is held becomes the prompt."""
        return self.prefill([*self.tokens, *tokens])

    def start(self, prompt: Sequence[int], reuse: bool = True) -> None:
        """Take a prompt, for `advance` to run.

        Args:
            reuse: keep what is held of it from before; else every position runs again.

        Raises:
            LarosaError: the prompt is empty or does not fit.
        """
        if not 0 < len(prompt) <= self.max_length:
            raise LarosaError(f"a prompt of {len(prompt)} tokens does not fit a session of {self.max_length}")
        self._prompt = list(prompt)
        if self._speculation is not None:
            self._drafters = self._speculation.drafters(self._text)
        self.truncate(self.common(self._prompt) if reuse else 0)

    def advance(self) -> torch.Tensor:
        """Run the next piece of the prompt.

        Returns:
            [tokens of the piece, D] float32, for `logits`.
        """
        start = len(self.tokens)
        piece = self._prompt[start : (start // PIECE + 1) * PIECE]
        hidden = self._engine.extend(torch.tensor([piece]), start, self._text)
        self.tokens += piece
        self.reusable = len(self.tokens) // PIECE * PIECE
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary] float32, what follows N tokens of what `advance` gives."""
        return self._engine.logits(hidden)

    def step(self, token: int) -> torch.Tensor:
        """Run one token that was drawn; see `step_together`."""
        return step_together([self], [token])

    def step_drafted(self, token: int, most: int, sampler: Sampler) -> tuple[list[int], torch.Tensor]:
        """Run one token that was drawn, and as many as are drafted behind it and right; see `Speculation.advance`.

        Args:
            most: how many tokens are wanted; there is room for them.
        """
        assert self._speculation is not None, "its engine's model is lossless"
        self._check_ready()
        new, logits = self._speculation.advance([*self.tokens, token], most, sampler, self._drafters, self._text)
        self.tokens += [token, *new[:-1]]
        return new, logits

    def _check_ready(self) -> None:
        if not self.tokens or self.left:
            raise LarosaError("a session has to run a prompt before a step")
        if len(self.tokens) == self.max_length:
            raise LarosaError(f"a session of {self.max_length} tokens is full")

    def truncate(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        del self.tokens[length:]
        self.reusable = min(self.reusable, len(self.tokens) // PIECE * PIECE)

    def common(self, prompt: Sequence[int]) -> int:
        """How many tokens of a prompt are held in whole pieces, one at least left out: its logits are needed."""
        length = 0
        while (
            length + PIECE <= min(self.reusable, len(prompt) - 1)
            and self.tokens[length : length + PIECE] == prompt[length : length + PIECE]
        ):
            length += PIECE
        return length

    def take_prefix(self, other: Session) -> None:
        """Copy what another session of the same weights holds more of this one's prompt."""
        length = other.common(self._prompt)
        if length > len(self.tokens):
            self._engine.take(other._engine, length, other._text, self._text)
            self.tokens = other.tokens[:length]
            self.reusable = length


def step_together(sessions: Sequence[Session], tokens: Sequence[int]) -> torch.Tensor:
    """Run one token that was drawn for each session; those of one engine together.

    Returns:
        [sessions, vocabulary] float32, the logits of the tokens that follow: the same as of each alone, to the bit.

    Raises:
        LarosaError: one has no text yet, its prompt has not run, or it is full.
    """
    for session in sessions:
        session._check_ready()
    together: dict[TextEngine, list[int]] = {}
    for row, session in enumerate(sessions):
        together.setdefault(session._engine, []).append(row)
    logits: dict[int, torch.Tensor] = {}
    for rows in together.values():
        for first in range(0, len(rows), MAX_ROWS):
            some = rows[first : first + MAX_ROWS]
            drawn = torch.tensor([tokens[row] for row in some])
            positions = torch.tensor([len(sessions[row].tokens) for row in some])
            found = sessions[some[0]]._steps(drawn, positions, [sessions[row]._text for row in some])
            logits.update(zip(some, found.split(1), strict=True))
    for session, token in zip(sessions, tokens, strict=True):
        session.tokens.append(token)
    return torch.cat([logits[row] for row in range(len(sessions))])
