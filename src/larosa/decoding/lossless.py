"""Lossless mode: cheap passes draft tokens, and one dense pass over a model's weights checks several of them at once.

What comes is what the dense pass alone gives: each token is drawn from the dense pass's own logits, and a draft only
says for which tokens these are worth computing together (speculative decoding: Leviathan et al., arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from larosa.architectures import Heads
from larosa.config import Compensation, LarosaConfig
from larosa.decoding.drafting import LOOKED_UP, Draft, Drafter, Last, Lookup, ModelDrafter, no_draft, run_ahead
from larosa.decoding.engine import Engine
from larosa.decoding.layers import MAX_ROWS
from larosa.decoding.pace import Acceptance, Clock, CudaClock, HostClock, Pace
from larosa.decoding.sampling import Sampler
from larosa.decoding.steps import steps_of
from larosa.decoding.weights import DecoderWeights
from larosa.errors import LarosaError, choose
from larosa.formats import CacheDtype, Int4, Int8

#: After so many steps without a model's draft one token is drafted again: the text may have become easier. Each time
#: that it does not pay then the steps are twice as many, up to the second number.
_AGAIN, _SELDOM = 64, 256

#: Of a drafter that is never wrong.
_ALL_RIGHT = Acceptance(1.0)

#: What is said of a draft for nothing.
DRAFT_ALONE = "--draft says what drafts for --lossless: add that"


class RoundedDraft(StrEnum):
    """Drafts by a copy of the model's own weights, rounded to nearest when it is made."""

    INT8 = "int8"
    INT4 = "int4"


@dataclass
class Verifications:
    """What became of drafts: dense passes, tokens drafted and accepted, and all tokens that came of the passes.

    Of the first token of a model's drafts, the second and so on, `checked` counts those before which all were right,
    and `right` those of them that were right too.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0
    checked: list[int] = field(default_factory=lambda: [0] * (MAX_ROWS - 1))
    right: list[int] = field(default_factory=lambda: [0] * (MAX_ROWS - 1))

    def count(self, passes: int, drafted: int, tokens: int, by_model: bool) -> None:
        """Count dense passes over the same number of rows, of so many drafted tokens, and the tokens they gave."""
        accepted = tokens - passes
        self.passes += passes
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += tokens
        if by_model:
            for place in range(min(accepted + 1, drafted)):
                self.checked[place] += 1
                self.right[place] += place < accepted

    def add(self, other: Verifications) -> None:
        """Count what another has counted."""
        for name, counted in vars(other).items():
            own = getattr(self, name)
            both = [a + b for a, b in zip(own, counted, strict=True)] if isinstance(own, list) else own + counted
            setattr(self, name, both)

    def accepted_at(self) -> list[float]:
        """The share of the model's first tokens that were right, of its second ones and so on, where it drafted any."""
        return [right / checked for right, checked in zip(self.right, self.checked, strict=True) if checked]

    def to_dict(self) -> dict[str, float | None]:
        """The JSON form, with the share of drafted tokens that were accepted and tokens of a pass."""
        return {
            "passes": self.passes,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
            "tokens_per_pass": self.tokens / self.passes if self.passes else None,
        }


class _Ahead:
    """A token that a plain step draws on the device, which runs it on before the host has looked at it.

    Args:
        last: it, to be run next.
        logits: [1, vocabulary] float32 that it is drawn from.
        text: of whose drafters, and how many of its tokens the host knows.
    """

    def __init__(self, last: Last, logits: torch.Tensor, text: tuple[Sequence[Drafter], int], clock: Clock) -> None:
        self.last, self.logits, self._text, self._clock = last, logits, text, clock
        self._copy = last.token
        if last.token.is_cuda:
            self._copy = torch.empty(1, dtype=torch.int64, pin_memory=True).copy_(last.token, non_blocking=True)
        self._arrived = clock.now()

    def follows(self, drafters: Sequence[Drafter], known: int) -> bool:
        """Whether it comes next in a text. Others may have run since, or the same one on."""
        return self._text[0] is drafters and self._text[1] == known

    def look(self) -> int:
        """The token; waits for it, and for nothing that the device runs behind it."""
        self._clock.wait(self._arrived)
        return int(self._copy)


class Speculation:
    """Dense steps of several tokens over an engine's texts, and who drafts for them.

    Args:
        engine: of the dense pass.
        draft: cheaper weights of the same model; None where the texts alone draft.
        in_blocks: look at drafted tokens only once they have been checked, and at plain ones while the next step runs;
            None for what suits the device: on a GPU each look is a wait.
        drafted: have so many tokens drafted each time, by the model, whatever that is worth; None for what pays.
        clock: times steps; None for the device's.

    Raises:
        LarosaError: `drafted` without a drafter, or more than a step checks.
    """

    def __init__(
        self,
        engine: Engine,
        draft: DecoderWeights | None,
        in_blocks: bool | None = None,
        drafted: int | None = None,
        clock: Clock | None = None,
    ) -> None:
        if drafted is not None and (draft is None or not 0 < drafted < MAX_ROWS):
            raise LarosaError(f"--drafted {drafted}: give 1 to {MAX_ROWS - 1}, and a --draft where nothing is skipped")
        self._always = drafted
        self._device = engine.device
        on_gpu = engine.device.type == "cuda"
        self._in_blocks = on_gpu if in_blocks is None else in_blocks
        #: Of the dense pass, for texts that nobody drafts for too.
        self.steps = steps_of(engine)
        self._drafts = None if draft is None else steps_of(engine.beside(draft), 1)
        self._acceptance, self._looked_up = Acceptance(), Acceptance(LOOKED_UP)
        self._pace = Pace(clock or (CudaClock(engine.device) if on_gpu else HostClock()))
        self._idle, self._again, self._right = 0, _AGAIN, False
        self._ahead: _Ahead | None = None
        #: Of all texts so far.
        self.verifications = Verifications()

    def drafters(self, text: int = 0) -> list[Drafter]:
        """The drafters of a new text, which is that one of the engine's."""
        self._pace.pause()
        found: list[Drafter] = [Lookup(self._pace, self._looked_up)]
        if self._drafts is not None:
            found.append(ModelDrafter(self._drafts, text, self._pace, self._acceptance, self._in_blocks))
        return found

    @torch.inference_mode()
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
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not ahead.follows(drafters, len(tokens)):
            ahead = None
        last = self._last(tokens) if ahead is None else ahead.last
        drafter, draft = self._drafted(tokens, last, most - 1 - last.ahead, sampler, drafters)
        if self._in_blocks and drafter is None:
            if ahead is None:
                ahead = self._plain(last, sampler, text, (drafters, len(tokens)))
            if most > 1:
                self._ahead = self._plain(ahead.last, sampler, text, (drafters, len(tokens) + 1))
            self.verifications.count(1, 0, 1, by_model=False)
            return [sampler.take(ahead.look())], ahead.logits
        rows = torch.cat([last.token, draft.tokens])
        with self._pace.checking(len(rows), idle=self._in_blocks):
            positions = torch.arange(last.position, last.position + len(rows), device=self._device)
            logits = self.steps(rows, positions, text)
            before = [] if ahead is None else [sampler.take(ahead.look())]
            new = sampler.accept(logits, draft.tokens, at_once=self._in_blocks)
        if isinstance(drafter, ModelDrafter):
            drafter.acceptance.observe(len(draft.tokens), len(new) - 1, draft.probabilities)
            self._right = len(new) > len(draft.tokens)
        self.verifications.count(1, len(draft.tokens), len(new), isinstance(drafter, ModelDrafter))
        logits = logits[: len(new)]
        if ahead is None:
            return new, logits
        self.verifications.count(1, 0, 1, by_model=False)
        return [*before, *new], torch.cat([ahead.logits, logits])

    def _last(self, tokens: Sequence[int]) -> Last:
        return Last(torch.full((1,), tokens[-1], device=self._device), len(tokens) - 1, ahead=False)

    def _plain(self, last: Last, sampler: Sampler, text: int, known: tuple[Sequence[Drafter], int]) -> _Ahead:
        """Run a text's last token and draw the next, without waiting for it."""
        with self._pace.checking(1):
            token, logits = run_ahead(self.steps, last, 1, sampler, text)
        return _Ahead(Last(token, last.position + 1, ahead=True), logits, known, self._pace.clock)

    def _drafted(
        self, tokens: Sequence[int], last: Last, most: int, sampler: Sampler, drafters: Sequence[Drafter]
    ) -> tuple[Drafter | None, Draft]:
        """The draft that promises most, and whose it is; none where none pays, but for one token now and then."""
        self._idle += 1
        most = min(most, MAX_ROWS - 1)
        if self._always is not None and most > 0:
            model = drafters[-1]
            assert isinstance(model, ModelDrafter), "there is one"
            return model, model.block(last, min(most, self._always), sampler)
        if most <= 0 or not self._pace.known:
            return None, no_draft(self._device)
        speed = 1 / self._pace.seconds(1) if self._drafts is None else self._pace.speed(self._acceptance)
        promises = [drafter.promise(tokens, last, most, speed) for drafter in drafters]
        best = promises.index(max(promises))
        pays = promises[best] > 0
        if not pays:
            # One that was right is a reason to draft another, where it is not for what drafting takes that none pays.
            again = self._right and self._pace.speed(_ALL_RIGHT) > 1 / self._pace.seconds(1)
            if self._drafts is None or not (again or self._idle >= self._again):
                return None, no_draft(self._device)
            best, most = len(drafters) - 1, 1
        if isinstance(drafters[best], ModelDrafter):
            self._idle, self._again = 0, _AGAIN if pays or self._right else min(2 * self._again, _SELDOM)
            self._right = False  # until it has been checked
        return drafters[best], drafters[best].draft(tokens, last, most, speed, sampler)


class LosslessDecoder:
    """Continues prompts as the dense pass over a model's weights does, by checking drafts.

    The dense pass keeps every entry at every site and in prompts. Of a converted model it is the model before
    conversion, but for what converting rounded.

    Args:
        model: dense or converted.
        max_length: tokens there is room for, prompt included.
        kv_cache_dtype: see `Engine`.
        draft: see `draft_weights`.
        in_blocks, drafted: see `Speculation`.

    Raises:
        LarosaError: a model that the engine cannot run, or whose dense pass is not the model before conversion; a
            draft that does not belong to it; or too little memory.
    """

    def __init__(
        self,
        model: Any,
        max_length: int,
        kv_cache_dtype: str = CacheDtype.AUTO,
        draft: Any = None,
        in_blocks: bool | None = None,
        drafted: int | None = None,
    ) -> None:
        weights = DecoderWeights(model)
        check_lossless(weights)
        self._engine = Engine(weights.whole(), max_length, kv_cache_dtype)
        self._speculation = Speculation(self._engine, draft_weights(weights, draft), in_blocks, drafted)

    @property
    def verifications(self) -> Verifications:
        """Of all prompts so far, or since `count_anew`."""
        return self._speculation.verifications

    def count_anew(self) -> None:
        """Forget the verifications of earlier prompts."""
        self._speculation.verifications = Verifications()

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
        new = sampler.accept(logits)
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
    """Refuse weights whose dense pass is not the model before conversion, or that are one rank's.

    Raises:
        LarosaError: the message says which.
    """
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
    if draft.device != weights.device:
        raise LarosaError(f"--draft: a model on {draft.device}, where the other is on {weights.device}")
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
