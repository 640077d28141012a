"""What guesses how a text goes on: a cheaper copy of the model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from larosa.decoding.loop import checked
from larosa.decoding.pace import Acceptance, Pace
from larosa.decoding.sampling import Sampler
from larosa.decoding.steps import Steps

#: Tokens that a prompt lookup compares, most first.
_LOOKUPS = (3, 2)
#: How many looked-up tokens are right until that is known.
_LOOKED_UP = 0.6


class Draft(NamedTuple):
    """Tokens [n] int64, and how probable each was to who drafted them, [n] in [0, 1]: both on the engine's device."""

    tokens: torch.Tensor
    probabilities: torch.Tensor


def no_draft(device: torch.device) -> Draft:
    """Of no tokens."""
    return Draft(torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device))


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
        steps: of an engine of the cheaper weights, beside the one that checks.
        text: which of its texts it drafts for.
        in_blocks: decide how many to draft before the first and look at none, as on a GPU looking is waiting. Else
            each token's probability has a part in whether another one follows.
    """

    def __init__(self, steps: Steps, text: int, pace: Pace, acceptance: Acceptance, in_blocks: bool) -> None:
        self.acceptance = acceptance
        self._steps, self._text, self._pace, self._in_blocks = steps, text, pace, in_blocks

    def promise(self, text: Sequence[int], most: int, speed: float) -> float:
        """See `Drafter`."""
        return max(self._gains(most, speed), default=0.0)

    def draft(self, text: Sequence[int], most: int, speed: float, sampler: Sampler) -> Draft:
        """See `Drafter`. The dense step writes its own keys and values over those of the drafted tokens."""
        if not self._in_blocks:
            return self._one_by_one(text, most, speed, sampler)
        gains = self._gains(most, speed)
        return self.block(text, 1 + gains.index(max(gains)), sampler)

    def block(self, text: Sequence[int], count: int, sampler: Sampler) -> Draft:
        """Draft so many tokens, whatever they are worth."""
        with self._pace.draft.running(count):
            tokens, logits = run_ahead(self._steps, text, count, sampler, self._text)
            return Draft(tokens, _highest(logits))

    def _one_by_one(self, text: Sequence[int], most: int, speed: float, sampler: Sampler) -> Draft:
        tokens, chance = [text[-1]], 1.0
        probabilities: list[float] = []
        with sampler.trying():
            while len(tokens) == 1 or max(self._gains(most, speed, len(tokens) - 1, chance), default=0.0) > 0:
                with self._pace.draft.running():
                    position = torch.tensor([len(text) - 2 + len(tokens)])
                    logits = self._steps(torch.tensor(tokens[-1:]), position, self._text)
                    tokens += checked(sampler.propose(logits, len(tokens) - 1))
                    probabilities.append(float(_highest(logits)))
                chance *= self.acceptance.rate(probabilities[-1])
        return Draft(torch.tensor(tokens[1:]), torch.tensor(probabilities))

    def _gains(self, most: int, speed: float, drafted: int = 0, chance: float = 1.0) -> list[float]:
        """Of further tokens."""
        return self._pace.gains(
            self.acceptance, most - drafted, speed, draft=self._pace.draft_seconds, drafted=drafted, chance=chance
        )


def run_ahead(
    steps: Steps, tokens: Sequence[int], count: int, sampler: Sampler, text: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the next tokens of a text, and run all but the last of them, on a GPU without waiting for any.

    For `Sampler.accept` they are not drawn yet.

    Args:
        tokens: of the text so far, of which all but the last have been run.
        text: which one of the engine's it is.

    Returns:
        The new tokens [count], and the logits [count, vocabulary] that they were drawn from.
    """
    device, start = sampler.device, len(tokens) - 1
    token = torch.full((1,), tokens[-1], device=device)
    drawn, logits = [], []
    with sampler.trying():
        for ahead, position in enumerate(torch.arange(start, start + count, device=device).split(1)):
            logits.append(steps(token, position, text))
            token = sampler.propose(logits[-1], ahead)
            drawn.append(token)
    return torch.cat(drawn), torch.cat(logits)


def _highest(logits: torch.Tensor) -> torch.Tensor:
    """The probability [B] of the likeliest token of logits [B, vocabulary]."""
    return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()


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
        tokens = torch.tensor(text[start : start + count], device=sampler.device)
        return Draft(tokens, torch.full((len(tokens),), _LOOKED_UP, device=sampler.device))

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
