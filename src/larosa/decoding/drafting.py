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
LOOKED_UP = 0.6


class Last(NamedTuple):
    """The last token of a text, and what a step over it needs.

    `token` is [1] int64 on the engine's device. `ahead` says that the host has not looked at it: the text as the host
    knows it ends one token before.
    """

    token: torch.Tensor
    position: int
    ahead: bool


class Draft(NamedTuple):
    """Tokens [n] int64 on the engine's device, and how probable each was to who drafted them, where that was asked."""

    tokens: torch.Tensor
    probabilities: Sequence[float] = ()


def no_draft(device: torch.device) -> Draft:
    """Of no tokens."""
    return Draft(torch.empty(0, dtype=torch.int64, device=device))


class Drafter(Protocol):
    """Guesses how a text goes on behind its last token, which is the first that has not been run.

    A draft has up to `most` tokens, as many as gain something (`Pace.gains`) beside a speed in tokens a second. `text`
    is what the host knows of it.
    """

    def promise(self, text: Sequence[int], last: Last, most: int, speed: float) -> float:
        """What the best draft gains; 0 or less where there is none or none pays."""
        ...

    def draft(self, text: Sequence[int], last: Last, most: int, speed: float, sampler: Sampler) -> Draft:
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

    def promise(self, text: Sequence[int], last: Last, most: int, speed: float) -> float:
        """See `Drafter`."""
        return max(self._gains(most, speed), default=0.0)

    def draft(self, text: Sequence[int], last: Last, most: int, speed: float, sampler: Sampler) -> Draft:
        """See `Drafter`. The dense step writes its own keys and values over those of the drafted tokens."""
        if not self._in_blocks:
            return self._one_by_one(last, most, speed, sampler)
        gains = self._gains(most, speed)
        return self.block(last, 1 + gains.index(max(gains)), sampler)

    def block(self, last: Last, count: int, sampler: Sampler) -> Draft:
        """Draft so many tokens, whatever they are worth."""
        with self._pace.drafting(count):
            return Draft(run_ahead(self._steps, last, count, sampler, self._text)[0])

    def _one_by_one(self, last: Last, most: int, speed: float, sampler: Sampler) -> Draft:
        tokens, chance = [last.token], 1.0
        probabilities: list[float] = []
        with sampler.trying():
            while len(tokens) == 1 or max(self._gains(most, speed, len(tokens) - 1, chance), default=0.0) > 0:
                with self._pace.drafting():
                    position = torch.tensor([last.position - 1 + len(tokens)])
                    logits = self._steps(tokens[-1], position, self._text)
                    tokens.append(sampler.propose(logits, len(tokens) - 1))
                    checked(tokens[-1])
                    probabilities.append(float(_highest(logits)))
                chance *= self.acceptance.rate(probabilities[-1])
        return Draft(torch.cat(tokens[1:]), probabilities)

    def _gains(self, most: int, speed: float, drafted: int = 0, chance: float = 1.0) -> list[float]:
        """Of further tokens."""
        return self._pace.gains(
            self.acceptance, most - drafted, speed, draft=self._pace.draft_seconds, drafted=drafted, chance=chance
        )


def run_ahead(steps: Steps, last: Last, count: int, sampler: Sampler, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the next tokens of a text, and run all but the last of them, on a GPU without waiting for any.

    For the sampler they are not drawn yet.

    Args:
        last: to be run first.
        text: which one of the engine's it is.

    Returns:
        The new tokens [count], and the logits [count, vocabulary] that they were drawn from.
    """
    token = last.token
    drawn, logits = [], []
    with sampler.trying(token if last.ahead else None):
        places = torch.arange(last.position, last.position + count, device=sampler.device)
        for number, position in enumerate(places.split(1), start=last.ahead):
            logits.append(steps(token, position, text))
            token = sampler.propose(logits[-1], number)
            drawn.append(token)
    return (drawn[0], logits[0]) if count == 1 else (torch.cat(drawn), torch.cat(logits))


def _highest(logits: torch.Tensor) -> torch.Tensor:
    """The probability [B] of the likeliest token of logits [B, vocabulary]."""
    return (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).exp()


class Lookup:
    """What followed the last place where the text's last words had stood before.

    Args:
        acceptance: which share of looked-up tokens is right, drafted or not: the text says so as it goes on.
    """

    def __init__(self, pace: Pace, acceptance: Acceptance) -> None:
        self._pace, self._acceptance = pace, acceptance
        self._read = 0
        #: Where each run of so many tokens ends, the last time but that of the text's end.
        self._ends: dict[tuple[int, ...], int] = {}

    def promise(self, text: Sequence[int], last: Last, most: int, speed: float) -> float:
        """See `Drafter`."""
        return max(self._gains(text, last, most, speed), default=0.0)

    def draft(self, text: Sequence[int], last: Last, most: int, speed: float, sampler: Sampler) -> Draft:
        """See `Drafter`."""
        gains, start = self._gains(text, last, most, speed), self.following(text)
        assert start is not None, "it has promised something"
        start += last.ahead
        found = text[start : start + 1 + gains.index(max(gains))]
        # From pinned memory copying does not wait for what the GPU has to do.
        device = last.token.device
        return Draft(torch.tensor(found, pin_memory=device.type == "cuda").to(device, non_blocking=True))

    def _gains(self, text: Sequence[int], last: Last, most: int, speed: float) -> list[float]:
        start = self.following(text)
        if start is None:
            return []
        # Where the last token has not been looked at, it has to be what was looked up too.
        chance = self._acceptance.average if last.ahead else 1.0
        most = min(len(text) - start - last.ahead, most)
        return self._pace.gains(self._acceptance, most, speed, chance=chance)

    def following(self, text: Sequence[int]) -> int | None:
        """Where what followed begins; None where the text's last words are new."""
        for end in range(self._read, len(text)):  # a run that ends with the text is noted once the text has gone on
            start = self._found(text, end) if self._read else None  # a prompt is not what is guessed
            if start is not None:
                self._acceptance.observe(1, int(text[start] == text[end]))
            for length in _LOOKUPS:
                if end >= length:
                    self._ends[tuple(text[end - length : end])] = end
        self._read = len(text)
        return self._found(text, len(text))

    def _found(self, text: Sequence[int], end: int) -> int | None:
        found = (self._ends.get(tuple(text[end - length : end])) for length in _LOOKUPS if end >= length)
        return next((start for start in found if start is not None), None)
