"""What guesses how a text goes on: a cheaper copy of the model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from larosa.decoding.engine import Engine
from larosa.decoding.pace import Acceptance, Pace
from larosa.decoding.sampling import Sampler

#: Tokens that a prompt lookup compares, most first.
_LOOKUPS = (3, 2)
#: How many looked-up tokens are right until that is known.
_LOOKED_UP = 0.6


class Draft(NamedTuple):
    """Tokens, and how probable each was to who drafted them, in [0, 1]."""

    tokens: list[int]
    probabilities: list[float]


class Drafter(Protocol):
    """Guesses how a text goes on, of which all but the last token have been run.

    A draft has up to `most` tokens, as many as gain something (`Pace.gains`) beside a speed in tokens a second.
    """

    acceptance: Acceptance

    def promise(self, text: Sequence[int], most: int, speed: float) -> float:
        """What the best draft gains; 0 or less where there is none or none pays."""
        ...

    def draft(self, text: Sequence[int], most: int, speed: float, sampler: Sampler) -> Draft:
        """Draft a token, and more while they pay."""
        ...


class ModelDrafter:
    """Steps that read less than dense ones, over the same keys and values.

    Args:
        engine: of the cheaper weights, beside the one that checks.
        text: which of its texts it drafts for.
    """

    def __init__(self, engine: Engine, text: int, pace: Pace, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self._engine, self._text, self._pace = engine, text, pace

    def promise(self, text: Sequence[int], most: int, speed: float) -> float:
        """See `Drafter`."""
        return self._gain(most, speed, 0, 1.0)

    def draft(self, text: Sequence[int], most: int, speed: float, sampler: Sampler) -> Draft:
        """See `Drafter`. The dense step writes its own keys and values over those of the drafted tokens."""
        draft, token, chance = Draft([], []), text[-1], 1.0
        with sampler.trying():
            while not draft.tokens or self._gain(most, speed, len(draft.tokens), chance) > 0:
                with self._pace.draft.running():
                    position = torch.tensor([len(text) - 1 + len(draft.tokens)])
                    logits = self._engine.step(torch.tensor([token]), position, [self._text])
                    token = sampler.propose(logits, len(draft.tokens))
                    probability = float((logits.max() - logits.logsumexp(dim=-1)).exp())
                draft.tokens.append(token)
                draft.probabilities.append(probability)
                chance *= self.acceptance.rate(probability)
        return draft

    def _gain(self, most: int, speed: float, drafted: int, chance: float) -> float:
        """Of the best number of further tokens."""
        gains = self._pace.gains(
            self.acceptance, most - drafted, speed, draft=self._pace.draft_seconds, drafted=drafted, chance=chance
        )
        return max(gains, default=0.0)


class Lookup:
    """What followed the last place where the text's last words had stood before."""

    def __init__(self, pace: Pace) -> None:
        self.acceptance = Acceptance(_LOOKED_UP)
        self._pace = pace
        self._read = 0
        #: Where each run of so many tokens ends, the last time but that of the text's end.
        self._ends: dict[tuple[int, ...], int] = {}

    def promise(self, text: Sequence[int], most: int, speed: float) -> float:
        """See `Drafter`."""
        return max(self._gains(text, most, speed), default=0.0)

    def draft(self, text: Sequence[int], most: int, speed: float, sampler: Sampler) -> Draft:
        """See `Drafter`."""
        gains, start = self._gains(text, most, speed), self.following(text)
        assert start is not None, "it has promised something"
        count = 1 + gains.index(max(gains))
        return Draft(list(text[start : start + count]), [_LOOKED_UP] * count)

    def _gains(self, text: Sequence[int], most: int, speed: float) -> list[float]:
        start = self.following(text)
        return [] if start is None else self._pace.gains(self.acceptance, min(len(text) - start, most), speed)

    def following(self, text: Sequence[int]) -> int | None:
        """Where what followed begins; None where the text's last words are new."""
        for end in range(self._read, len(text)):  # a run that ends with the text is noted once the text has gone on
            for length in _LOOKUPS:
                if end >= length:
                    self._ends[tuple(text[end - length : end])] = end
        self._read = len(text)
        found = (self._ends.get(tuple(text[len(text) - length :])) for length in _LOOKUPS if len(text) >= length)
        return next((end for end in found if end is not None), None)
