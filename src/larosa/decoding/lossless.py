"""Lossless mode: cheap passes draft tokens, and one dense pass over the same weights checks several of them at once.

What comes is what the dense pass alone gives, token for token where it is greedy and in distribution where it is
sampled (speculative sampling: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Drafts come from the
sparse pass of a converted model, or from the text itself where its last words have stood in it before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from larosa.config import Compensation, LarosaConfig
from larosa.decoding.cache import CacheDtype
from larosa.decoding.engine import Engine
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.sampling import Proposal, Sampler
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError
from larosa.sparsity.report import inspect_config

#: What one more row of a dense pass costs, as a share of a pass of one row.
_ROW_COST = 0.08
#: Drafts are made where they promise so much more than plain decoding: what is promised is uncertain.
_WORTH = 1.03
#: How much one more draft moves what is expected of the next.
_MOVES = 0.05
#: After so many tokens without a draft one is tried again: the text may have become easier.
_AGAIN = 32
#: How many tokens are drafted: few numbers, for a step of each number of rows is recorded when it first runs.
_COUNTS = (0, 1, 3, MAX_ROWS - 1)
#: Tokens that a prompt lookup compares, most first.
_LOOKUPS = (3, 2)


@dataclass
class Verifications:
    """What became of drafts: dense passes, tokens drafted and accepted, and all tokens that came of the passes."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0

    def to_dict(self) -> dict[str, float | None]:
        """The JSON form, with the share of drafted tokens that were accepted and tokens of a pass."""
        return {
            "passes": self.passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "tokens_per_pass": self.tokens / self.passes if self.passes else None,
        }


class Drafter(Protocol):
    """Guesses how a text goes on."""

    #: What a drafted token costs, as a share of a dense pass.
    cost: float

    def most(self, text: Sequence[int]) -> int:
        """How many tokens it can draft here."""
        ...

    def draft(self, text: Sequence[int], count: int, sampler: Sampler) -> list[Proposal]:
        """Draft up to `count` tokens behind a text, of which all but the last token have been run."""
        ...


class SparseDrafter:
    """The sparse pass of a converted model, over the keys and values of the dense one."""

    def __init__(self, engine: Engine, cost: float) -> None:
        self.cost = cost
        self._engine = engine

    def most(self, text: Sequence[int]) -> int:
        """See `Drafter`."""
        return MAX_ROWS - 1

    def draft(self, text: Sequence[int], count: int, sampler: Sampler) -> list[Proposal]:
        """See `Drafter`. Keys and values of the drafted tokens stand where the dense pass writes its own."""
        proposals: list[Proposal] = []
        token = text[-1]
        with sampler.trying():
            for position in range(len(text) - 1, len(text) - 1 + count):
                logits = self._engine.step(torch.tensor([token]), torch.tensor([position]))
                proposals.append(sampler.propose(logits))
                token = proposals[-1].token
        return proposals


class Lookup:
    """What followed the last place where the text's last words had stood before."""

    cost = 0.0

    def __init__(self) -> None:
        self._read = 0
        #: Where each run of so many tokens ends, the last time but that of the text's end.
        self._ends: dict[tuple[int, ...], int] = {}

    def most(self, text: Sequence[int]) -> int:
        """See `Drafter`."""
        start = self._following(text)
        return 0 if start is None else min(len(text) - start, MAX_ROWS - 1)

    def draft(self, text: Sequence[int], count: int, sampler: Sampler) -> list[Proposal]:
        """See `Drafter`."""
        start = self._following(text)
        assert start is not None, "most() has found it"
        return [Proposal(token, None) for token in text[start : start + count]]

    def _following(self, text: Sequence[int]) -> int | None:
        for end in range(self._read, len(text)):  # a run that ends with the text is noted once the text has gone on
            for length in _LOOKUPS:
                if end >= length:
                    self._ends[tuple(text[end - length : end])] = end
        self._read = len(text)
        found = (self._ends.get(tuple(text[len(text) - length :])) for length in _LOOKUPS if len(text) >= length)
        return next((end for end in found if end is not None), None)


class Expectation:
    """How many tokens of a drafter are worth drafting, by how many were accepted so far."""

    def __init__(self, cost: float) -> None:
        self.rate = 0.75
        self._cost = cost
        self._idle = 0

    def gain(self, count: int) -> float:
        """Tokens in the time of one dense pass, where so many are drafted."""
        return sum(self.rate**i for i in range(count + 1)) / (1 + count * (self._cost + _ROW_COST))

    def best(self, most: int) -> int:
        """How many tokens to draft, up to `most`: 0 where none pays, but for one now and then."""
        count = max((count for count in _COUNTS if count <= most), key=self.gain)
        if count and self.gain(count) < _WORTH:
            count = 0
        return 1 if not count and most and self._idle >= _AGAIN else count

    def observe(self, drafted: int, accepted: int) -> None:
        """Learn from a verification, of no draft by this drafter as well."""
        self._idle = 0 if drafted else self._idle + 1
        for i in range(min(drafted, accepted + 1)):  # what stands behind one that is refused says nothing
            self.rate += _MOVES * ((i < accepted) - self.rate)


class LosslessDecoder:
    """Continues prompts as the dense pass over a model's weights does, by checking drafts.

    The dense pass keeps every entry at every site and in prompts. Of a converted model it is the model before
    conversion, but for what converting rounded.

    Args:
        model: dense or converted, on the CPU. Of a dense model only the text itself drafts.
        max_length: tokens there is room for, prompt included.
        kv_cache_dtype: see `Engine`.

    Raises:
        LarosaError: a model that the engine cannot run, whose dense pass is not the model before conversion, or that
            is not on the CPU; or too little memory for the cache.
    """

    def __init__(self, model: Any, max_length: int, kv_cache_dtype: str = CacheDtype.AUTO) -> None:
        weights = DecoderWeights(model)
        _check(model.config, weights)
        self._engine = Engine(weights.whole(), max_length, kv_cache_dtype)
        # The first one is another for each text.
        self._drafters: list[tuple[Drafter, Expectation]] = [(Lookup(), Expectation(Lookup.cost))]
        if any(layer.skips for layer in weights.layers):
            report = inspect_config(model.config)
            dense = report.bytes_dense_total + report.adapter_bytes + report.head_bytes
            cost = (report.bytes_sparse_total + report.head_bytes) / dense
            self._drafters.append((SparseDrafter(self._engine.beside(weights), cost), Expectation(cost)))
        #: Of all prompts so far.
        self.verifications = Verifications()

    @torch.inference_mode()
    def continue_prompt(
        self, prompt: torch.Tensor, max_new_tokens: int, sampler: Sampler, stop: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue a prompt; see `larosa.decoding.loop.continue_prompt`.

        Raises:
            LarosaError: the prompt does not fit, or logits are NaN or Inf.
        """
        logits = self._engine.prefill(prompt)
        sampler.start(prompt, logits.shape[-1])
        self._drafters[0] = Lookup(), Expectation(Lookup.cost)
        text = prompt[0].tolist()
        new = sampler.accept([], logits)
        left = max_new_tokens
        while True:
            for token in new:
                text.append(token)
                left -= 1
                yield token
                if token in stop or left == 0:
                    return
            new = self._verified(text, left, sampler)

    def _verified(self, text: list[int], left: int, sampler: Sampler) -> list[int]:
        """The next tokens, up to `left`: as many of a draft as are accepted, and one more."""
        counts = [expected.best(min(drafter.most(text), left - 1)) for drafter, expected in self._drafters]
        pairs = list(zip(counts, self._drafters, strict=True))
        count, (drafter, expected) = max(pairs, key=lambda pair: pair[1][1].gain(pair[0]) if pair[0] else 0.0)
        proposals = drafter.draft(text, count, sampler) if count else []
        start = len(text) - 1
        rows = torch.tensor([text[-1], *(proposal.token for proposal in proposals)])
        logits = self._engine.step(rows, torch.arange(start, start + len(rows)))
        new = sampler.accept(proposals, logits)
        for _, other in self._drafters:
            other.observe(*((len(proposals), len(new) - 1) if other is expected else (0, 0)))
        self.verifications.passes += 1
        self.verifications.drafted += len(proposals)
        self.verifications.accepted += len(new) - 1
        self.verifications.tokens += len(new)
        return new


def _check(config: Any, weights: DecoderWeights) -> None:
    if weights.device.type != "cpu":
        raise LarosaError("--lossless runs on the CPU alone: a GPU's kernels check one token at a time")
    if getattr(config, "larosa", None) is None:
        return
    block = LarosaConfig.parse(config.larosa)
    refit = "--compensation linear" if block.compensation is not Compensation.NONE else "larosa recover"
    if block.compensation is not Compensation.NONE or block.recovery is not None:
        raise LarosaError(
            f"--lossless: {refit} has changed this model's weights, so that with nothing skipped they are no longer "
            "the dense model; convert it without"
        )
