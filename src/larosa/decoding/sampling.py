"""From the logits of a step to its token."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from larosa.errors import LarosaError
from larosa.ops.greedy import NO_TOKEN
from larosa.utils.finite import not_finite

#: What divides logits is no less, so that it is not rounded to zero; the likeliest token has everything long before.
_LEAST_TEMPERATURE = 1e-30

#: Below all that exponential noise gives but for a zero, which would choose what has no probability.
_LEAST_NOISE = 1e-300

#: What `model.generate` keeps where neither a checkpoint nor its caller says how many.
_TOP_K = 50

#: What else generation settings can say about which token comes next, and the values that mean nothing.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "typical_p": (1.0,),
    "top_h": (),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": (),
    "sequence_bias": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
}


def unused_settings(config: Any) -> list[str]:
    """The names of a checkpoint's generation settings that would change its text elsewhere and do not here."""
    return [name for name, idle in _UNUSED.items() if getattr(config, name, None) not in (None, *idle)]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; what transformers' logits processors of these names do, in their order.

    Args:
        temperature: divides the logits; 0 takes the likeliest token, whatever top_k, top_p, min_p and seed are.
        top_k: keep so many of the likeliest tokens, and those that are as likely as the last of them; 0 keeps all.
        top_p: of those keep the smallest set with this much of their probability, in (0, 1].
        min_p: of those keep what is at least this times as likely as the likeliest, in [0, 1].
        repetition_penalty: before all else, divides positive logits of tokens in the prompt or the text so far, and
            multiplies negative ones; above 0, and 1 does nothing.
        seed: of the generator; the same seed and logits give the same tokens on the same device.

    Raises:
        LarosaError: one is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            whole = isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
                raise LarosaError(f"{field.name} must be a {'whole ' if whole else ''}number, not {value!r}")
        _check("temperature", self.temperature, 0 <= self.temperature < math.inf, "at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty < math.inf, "above 0")
        _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "in [-2^63, 2^64)")

    @classmethod
    def of(cls, config: Any, **given: Any) -> Sampling:
        """What is given, and for what is None what `model.generate` takes from a checkpoint's generation settings.

        Where they say `do_sample` that is temperature 1 and top_k 50 for want of others. Else it is temperature 0, and
        what they say beside that takes effect once a temperature is given.

        Args:
            config: a transformers `GenerationConfig`.
            given: fields of this class.

        Raises:
            LarosaError: one is out of its range.
        """
        chosen = {name: value for name, value in given.items() if value is not None}
        names = [field.name for field in fields(cls) if field.name not in ("seed", *chosen)]
        usual = {"temperature": 1.0, "top_k": _TOP_K} if config.do_sample else {}
        read = usual | {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
        if not config.do_sample:
            read["temperature"] = 0.0
        try:
            found = cls(**{name: read[name] for name in names if name in read})
        except LarosaError as error:
            raise LarosaError(f"generation_config.json: {error}") from None
        return replace(found, **chosen)

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def _check(name: str, value: float, right: bool, wanted: str) -> None:
    if not right:
        raise LarosaError(f"{name} must be {wanted}, not {value}")


class Sampler:
    """Draws the tokens of a text, or of several at once.

    Its own generator makes it follow its seed alone. With a repetition penalty it keeps track of the tokens that it has
    drawn: `start` begins a new text.

    Args:
        banned: token ids that are never drawn.
        device: of the logits.
        kernels: take the likeliest token by `torch.ops.larosa.greedy`, for which a GPU's kernels must be there.
    """

    def __init__(
        self,
        sampling: Sampling | None = None,
        *,
        banned: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        kernels: bool = False,
    ) -> None:
        self._sampling = sampling or Sampling()
        self._banned = torch.tensor(banned, dtype=torch.int64, device=device) if banned else None
        self._kernels = kernels
        #: Of the logits.
        self.device = device
        self._seen: torch.Tensor | None = None
        #: Of the next tokens of a text that is drafted, [vocabulary] each, as far as they have been looked at.
        self._noise: list[torch.Tensor] = []
        self.generator = torch.Generator(device).manual_seed(self._sampling.seed)

    def start(self, prompts: torch.Tensor, vocabulary: int) -> None:
        """Begin texts after prompts [B, length] int64, with logits [B, vocabulary] for each next token.

        It may be left out without a repetition penalty. Where it is called again, the same memory is used.
        """
        if self._sampling.repetition_penalty == 1:
            return
        if self._seen is None or self._seen.shape != (len(prompts), vocabulary):
            self._seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool, device=self.device)
        self._seen.zero_().scatter_(1, prompts.to(self.device), True)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The tokens drawn from logits [B, vocabulary] float32: [B] int64, `NO_TOKEN` where they are unusable."""
        greedy = self._sampling.temperature == 0
        changed = self._changes
        if greedy and self._kernels and not changed:
            token: torch.Tensor = torch.ops.larosa.greedy(logits)
            return token
        # Of a row with NaN, the maximum is NaN.
        highest, best = logits.max(dim=-1)
        # On the CPU looking costs less than to go on without.
        if greedy and not changed and logits.is_cpu and all(map(math.isfinite, highest.tolist())):
            return best
        usable = highest.isfinite()
        if changed:
            logits = self.changed(logits)
            best = logits.argmax(dim=-1)
        if not greedy:
            best = self._draw(torch.where(usable[:, None], logits, 0))
        if self._seen is not None:
            self._seen.scatter_(1, best[:, None], True)
        return torch.where(usable, best, NO_TOKEN)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is drawn meanwhile, the tokens drawn afterwards are the same."""
        state = self.generator.get_state()
        yield
        self.generator.set_state(state)

    @contextmanager
    def trying(self, ahead: torch.Tensor | None = None) -> Iterator[None]:
        """What is drawn meanwhile does not count as drawn for the repetition penalty.

        Args:
            ahead: [1] int64, a token that was proposed as the text's next one, and counts as drawn meanwhile.
        """
        seen = None if self._seen is None else self._seen.clone()
        if self._seen is not None and ahead is not None:
            self._seen.scatter_(1, ahead[None].clamp_min(0), True)
        yield
        if self._seen is not None and seen is not None:
            self._seen.copy_(seen)

    def propose(self, logits: torch.Tensor, ahead: int) -> torch.Tensor:
        """What `accept` would draw from logits [1, vocabulary], `ahead` tokens behind the text's next one: [1] int64.

        `NO_TOKEN` where they are NaN or Inf. On a GPU nothing waits.
        """
        token = self._at(logits, ahead)
        if self._seen is not None:
            self._seen.scatter_(1, token[None].clamp_min(0), True)
        return token

    def take(self, token: int) -> int:
        """Count a token as drawn, which was proposed as the text's next one from the logits that it is drawn from.

        Raises:
            LarosaError: these are NaN or Inf.
        """
        if token == NO_TOKEN:
            raise not_finite("the model's logits are")
        if self._seen is not None:
            self._seen[0, token] = True
        del self._noise[:1]
        return token

    def accept(self, logits: torch.Tensor, proposed: torch.Tensor | None = None, *, at_once: bool = False) -> list[int]:
        """A text's next tokens: each drawn from its own row, up to the first that is another than was proposed.

        What is drawn depends on the logits and on the token's own noise, which `propose` uses too: so the text is the
        same whatever is proposed, and the same noise makes it likely that what is proposed is drawn.

        Args:
            logits: [proposed + 1, vocabulary] float32, of the text's next token and behind each proposed one.
            proposed: [n] int64, tokens that follow each other in one text; None for none.
            at_once: draw from all rows before looking at any, as is best where looking waits.

        Raises:
            LarosaError: logits that are drawn from are NaN or Inf.
        """
        if proposed is None:
            proposed = torch.empty(0, dtype=torch.int64, device=logits.device)
        new: list[int] = []
        for rows in [logits] if at_once else logits.split(1):
            drawn = self._at(rows, len(new), proposed)
            told = torch.cat([drawn, proposed[len(new) :]]).tolist()  # of both together, for telling may be waiting
            for token, guess in zip(told[: len(drawn)], [*told[len(drawn) :], None], strict=False):
                if token == NO_TOKEN:
                    raise not_finite("the model's logits are")
                new.append(token)
                if self._seen is not None:
                    self._seen[0, token] = True
                if token != guess:
                    del self._noise[: len(new)]
                    return new
        raise AssertionError("behind the last row nothing was proposed")

    def _at(self, logits: torch.Tensor, ahead: int, proposed: torch.Tensor | None = None) -> torch.Tensor:
        """The tokens [N] drawn from logits [N, vocabulary], `NO_TOKEN` where they are NaN or Inf.

        Each by its own noise, that of the token `ahead` behind the text's next one and those that follow it. For each
        but the first what was proposed before it counts as drawn.

        The largest of probabilities over exponential noise is a draw in proportion to the probabilities.
        """
        greedy, changed = self._sampling.temperature == 0, self._changes
        if greedy and self._kernels and not changed:
            likeliest: torch.Tensor = torch.ops.larosa.greedy(logits)
            return likeliest
        usable = logits.amax(dim=-1).isfinite()  # of a row with NaN, it is NaN
        seen = self._seen
        if seen is not None and proposed is not None and len(logits) > 1:
            seen = seen.repeat(len(logits), 1)
            for row, token in enumerate(proposed.clamp_min(0).split(1)[: len(logits) - 1], start=1):
                seen[row:].index_fill_(1, token, True)
        if changed:
            logits = self.changed(logits, seen)
        if greedy:
            return torch.where(usable, logits.argmax(dim=-1), NO_TOKEN)
        weights, tokens = candidates(logits, self._sampling)
        while len(self._noise) < ahead + len(logits):
            own = torch.empty(logits.shape[-1], dtype=torch.float64, device=logits.device)
            self._noise.append(own.exponential_(generator=self.generator).clamp_min_(_LEAST_NOISE))
        noise = torch.stack(self._noise[ahead : ahead + len(logits)])
        if tokens is None:
            best = (weights / noise).argmax(dim=-1)
        else:
            best = (weights / noise.gather(-1, tokens)).argmax(dim=-1)
            best = tokens.gather(-1, best[:, None])[:, 0]
        return torch.where(usable, best, NO_TOKEN)

    @property
    def _changes(self) -> bool:
        """Whether `changed` does anything."""
        return self._banned is not None or self._sampling.repetition_penalty != 1

    def changed(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, vocabulary] after the penalty and the ban, from which `candidates` goes on.

        Args:
            seen: [B, vocabulary] bool, which tokens the penalty is for; None for those of the texts.
        """
        penalty = self._sampling.repetition_penalty
        if penalty != 1:
            seen = self._seen if seen is None else seen
            assert seen is not None, "a repetition penalty needs start()"
            # An extreme penalty overflows.
            penalised = torch.where(logits < 0, logits * penalty, logits / penalty).nan_to_num()
            logits = torch.where(seen, penalised, logits)
        return logits if self._banned is None else logits.index_fill(-1, self._banned, -torch.inf)

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        weights, tokens = candidates(logits, self._sampling)
        drawn = self._drawn_index(weights)
        return drawn if tokens is None else tokens.gather(-1, drawn[:, None])[:, 0]

    def _drawn_index(self, weights: torch.Tensor) -> torch.Tensor:
        """An index of each row of `weights` [B, N], in proportion to them; never one whose weight is 0."""
        sums = weights.double().cumsum(dim=-1)
        shape = (len(weights), 1)
        drawn = torch.rand(shape, dtype=torch.float64, generator=self.generator, device=weights.device) * sums[:, -1:]
        return torch.searchsorted(sums, drawn, right=True)[:, 0].clamp_max(weights.shape[-1] - 1)


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that may be drawn from logits [B, vocabulary], by temperature, top_k, top_p and min_p.

    Returns:
        Weights [B, N], in proportion to which to draw, and their tokens [B, N], or None where they are in the
        vocabulary's order. Tokens that are never drawn have no weight, or are not there.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    scores = (logits - highest) / max(sampling.temperature, _LEAST_TEMPERATURE)  # does not overflow upwards
    vocabulary = logits.shape[-1]
    if sampling.top_k:
        last = scores.topk(min(sampling.top_k, vocabulary), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    probabilities = torch.softmax(scores, dim=-1)
    if not sampling.truncates:
        return probabilities, None
    least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
    size = vocabulary
    if logits.is_cpu:  # elsewhere counting would wait
        # Few, as a rule, so that a large vocabulary need not be sorted: all that are less likely than this have not
        # 1 - top_p together.
        bound = least.clamp_min((1 - sampling.top_p) / vocabulary)
        size = int(((probabilities >= bound) & (probabilities > 0)).sum(dim=-1).max().clamp_min(1))
    ranked, tokens = probabilities.topk(size, dim=-1)
    kept = ranked >= least
    if sampling.top_p < 1:
        # A token belongs to the set if those before it do not reach top_p.
        kept &= ranked.cumsum(dim=-1) - ranked < sampling.top_p
    return torch.where(kept, ranked, 0), tokens
