"""Lossless mode: cheap passes draft tokens, and one dense pass over a model's weights checks several of them at once.

What comes is what the dense pass alone gives: each token is drawn from the dense pass's own logits, and a draft only
says for which tokens these are worth computing together (speculative decoding: Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from larosa.architectures import Heads
from larosa.config import Compensation, LarosaConfig
from larosa.decoding.drafting import Draft, Drafter, Lookup, ModelDrafter
from larosa.decoding.engine import Engine
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.pace import Acceptance, Pace
from larosa.decoding.sampling import Sampler
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError, choose
from larosa.formats import CacheDtype, Int4, Int8

#: After so many steps without a model's draft one token is drafted again: the text may have become easier.
_AGAIN = 64

#: What is said of a draft for nothing.
DRAFT_ALONE = "--draft says what drafts for --lossless: add that"


class RoundedDraft(StrEnum):
    """Drafts by a copy of the model's own weights, rounded to nearest when it is made."""

    INT8 = "int8"
    INT4 = "int4"


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


class Speculation:
    """Dense steps of several tokens over an engine's texts, and who drafts for them.

    Args:
        engine: of the dense pass.
        draft: cheaper weights of the same model; None where the texts alone draft.
    """

    def __init__(self, engine: Engine, draft: DecoderWeights | None) -> None:
        self._engine = engine
        self._drafts = None if draft is None else engine.beside(draft)
        self._acceptance = Acceptance()
        self._pace = Pace()
        self._idle = 0
        #: Of all texts so far.
        self.verifications = Verifications()

    def drafters(self, text: int = 0) -> list[Drafter]:
        """The drafters of a new text, which is that one of the engine's."""
        found: list[Drafter] = [Lookup(self._pace)]
        if self._drafts is not None:
            found.append(ModelDrafter(self._drafts, text, self._pace, self._acceptance))
        return found

    def advance(
        self, tokens: Sequence[int], most: int, sampler: Sampler, drafters: Sequence[Drafter], text: int = 0
    ) -> tuple[list[int], torch.Tensor]:
        """The next tokens of a text, of which all but the last have been run, and run all of them but the last.

        Args:
            tokens: of the text so far, prompt included.
            most: how many are wanted at most, one at least.
            drafters: of this text.
            text: which one of the engine's it is.

        Returns:
            The new tokens, and the logits [new tokens, vocabulary] that they were drawn from.

        Raises:
            LarosaError: the logits are NaN or Inf.
        """
        drafter, draft = self._drafted(tokens, min(most, MAX_ROWS) - 1, sampler, drafters)
        rows, start = torch.tensor([tokens[-1], *draft.tokens]), len(tokens) - 1
        with self._pace.checking(len(rows)):
            logits = self._engine.step(rows, torch.arange(start, start + len(rows)), [text] * len(rows))
            new = sampler.accept(draft.tokens, logits)
        if drafter is not None:
            drafter.acceptance.observe(draft.probabilities, len(new) - 1)
        found = self.verifications
        found.passes += 1
        found.drafted += len(draft.tokens)
        found.accepted += len(new) - 1
        found.tokens += len(new)
        return new, logits[: len(new)]

    def _drafted(
        self, tokens: Sequence[int], most: int, sampler: Sampler, drafters: Sequence[Drafter]
    ) -> tuple[Drafter | None, Draft]:
        """The draft that promises most, and whose it is; none where none pays, but for one token now and then."""
        self._idle += 1
        if most == 0 or not self._pace.known:
            return None, Draft([], [])
        speed = 1 / self._pace.seconds(1) if self._drafts is None else self._pace.speed(self._acceptance)
        promises = [drafter.promise(tokens, most, speed) for drafter in drafters]
        best = promises.index(max(promises))
        if promises[best] <= 0:
            if self._drafts is None or self._idle < _AGAIN:
                return None, Draft([], [])
            best, most = len(drafters) - 1, 1
        if isinstance(drafters[best], ModelDrafter):
            self._idle = 0
        return drafters[best], drafters[best].draft(tokens, most, speed, sampler)


class LosslessDecoder:
    """Continues prompts as the dense pass over a model's weights does, by checking drafts.

    The dense pass keeps every entry at every site and in prompts. Of a converted model it is the model before
    conversion, but for what converting rounded.

    Args:
        model: dense or converted, on the CPU.
        max_length: tokens there is room for, prompt included.
        kv_cache_dtype: see `Engine`.
        draft: see `draft_weights`.

    Raises:
        LarosaError: a model that the engine cannot run, whose dense pass is not the model before conversion, or that
            is not on the CPU; a draft that does not belong to it; or too little memory.
    """

    def __init__(self, model: Any, max_length: int, kv_cache_dtype: str = CacheDtype.AUTO, draft: Any = None) -> None:
        weights = DecoderWeights(model)
        check_lossless(weights)
        self._engine = Engine(weights.whole(), max_length, kv_cache_dtype)
        self._speculation = Speculation(self._engine, draft_weights(weights, draft))

    @property
    def verifications(self) -> Verifications:
        """Of all prompts so far."""
        return self._speculation.verifications

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
        drafters = self._speculation.drafters()
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
            new, _ = self._speculation.advance(text, left, sampler, drafters)


def draft_weights(weights: DecoderWeights, draft: Any) -> DecoderWeights | None:
    """What drafts for the dense pass over some weights; None where nothing but the text can.

    Args:
        draft: `int8` or `int4` for a copy that is rounded so; another model of the same sizes, for one that was
            converted from the same weights with better rounding; None for these weights themselves, where they skip
            something.

    Raises:
        LarosaError: an unknown name, a model of other sizes or in another basis, or too little memory for a copy.
    """
    if draft is None:
        return weights if any(layer.skips for layer in weights.layers) else None
    if isinstance(draft, str):
        linears = choose(RoundedDraft, draft, "draft")
        form = Int8(Int8.usual_group) if linears is RoundedDraft.INT8 else Int4(Int4.usual_group)
        return weights.rounded(form, Int8(form.group))
    other = DecoderWeights(draft)
    _check_alike(weights, other)
    return other


def check_lossless(weights: DecoderWeights) -> None:
    """Refuse weights whose dense pass is not the model before conversion, or cannot check several tokens.

    Raises:
        LarosaError: the message says which.
    """
    if weights.device.type != "cpu":
        raise LarosaError("--lossless runs on the CPU alone: a GPU's kernels check one token at a time")
    if weights.shard is not None:
        raise LarosaError("--lossless runs in one process, whose drafts no others have to check: leave torchrun out")
    block = _block(weights.config)
    if block is None:
        return
    refit = "--compensation linear" if block.compensation is not Compensation.NONE else "larosa recover"
    if block.compensation is not Compensation.NONE or block.recovery is not None:
        raise LarosaError(
            f"--lossless: {refit} has changed this model's weights, so that with nothing skipped they are no longer "
            "the dense model; convert it without"
        )


def _check_alike(weights: DecoderWeights, draft: DecoderWeights) -> None:
    """Refuse a drafter whose keys and values are not those of the weights that check."""
    mine, theirs = (_sizes(each) for each in (weights, draft))
    if mine != theirs:
        raise LarosaError(f"--draft: {theirs} cannot draft for {mine}: convert the same model")
    if draft.dtype != weights.dtype:
        dtypes = [str(each.dtype).removeprefix("torch.") for each in (draft, weights)]
        raise LarosaError(f"--draft: a model in {dtypes[0]}, where the other is in {dtypes[1]}: give a --dtype")
    for name, block in (("the model", _block(weights.config)), ("--draft", _block(draft.config))):
        if block is not None and block.value_rotation:
            raise LarosaError(
                f"{name} has its values rotated, so that the two cannot share them: convert it with --no-value-rotation"
            )


def _sizes(weights: DecoderWeights) -> str:
    heads = Heads.of(weights.config)
    layers, tokens = weights.config.num_hidden_layers, len(weights.embedding)
    return f"a model of {layers} layers, {heads.keys} keys of {heads.size} entries each and {tokens} tokens"


def _block(config: Any) -> LarosaConfig | None:
    return None if getattr(config, "larosa", None) is None else LarosaConfig.parse(config.larosa)
