"""How far a model's predictions are from a dense one's: what `llama-perplexity --kl-divergence` of llama.cpp prints.

All by its definitions. So are the errors: standard errors over tokens that are taken as independent, which they are
not quite, so that true errors are somewhat larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

#: In percent, as llama.cpp has them; 50 is the median.
PERCENTILES = (0.1, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)

#: Positions x vocabulary put through softmax at a time: 32 MiB a tensor, whatever the vocabulary.
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, which is None where a single token gives none."""

    value: float
    stderr: float | None

    @classmethod
    def mean(cls, values: torch.Tensor) -> Self:
        """The mean of [tokens]."""
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(float(values.mean()), error)

    def scaled(self, value: float, slope: float) -> Estimate:
        """A function of this that has a value and a slope here, with the error to first order."""
        return Estimate(value, None if self.stderr is None else abs(slope) * self.stderr)

    def exp(self) -> Estimate:
        """e to the power of this."""
        power = float(torch.tensor(self.value, dtype=torch.float64).exp())  # infinite where math.exp raises
        return self.scaled(power, power)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) + ("" if self.stderr is None else f" ± {self.stderr:{spec}}")


@dataclass(frozen=True)
class Distribution:
    """A number that each token has: mean, extremes and `PERCENTILES`, by their names ("99.9")."""

    mean: Estimate
    min: float
    max: float
    percentiles: dict[str, float]

    @classmethod
    def of(cls, values: torch.Tensor) -> Self:
        """Of [tokens] float64; percentiles between two tokens are interpolated."""
        ordered = values.sort().values
        last = len(ordered) - 1
        places = torch.tensor(PERCENTILES, dtype=torch.float64) / 100 * last
        below = places.long()
        found = ordered[below].lerp(ordered[(below + 1).clamp(max=last)], places - below)
        names = [f"{percent:g}" for percent in PERCENTILES]
        return cls(
            Estimate.mean(values), float(ordered[0]), float(ordered[-1]), dict(zip(names, found.tolist(), strict=True))
        )


class TokenScores(NamedTuple):
    """What is kept of each prediction, [tokens] float64 on the CPU; the last three are None without a reference.

    `loss` is -ln p of the token that came, `divergence` KL(reference, model) in nats, `same_top` 1 where the likeliest
    token is the same and 0 elsewhere.
    """

    loss: torch.Tensor
    reference_loss: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    same_top: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, reference: torch.Tensor | None, ids: torch.Tensor) -> Self:
        """Score predictions in float64, a few positions at a time.

        Args:
            logits: [positions, vocabulary].
            reference: the dense model's, maybe on another device.
            ids: the tokens that came, [positions].
        """
        step = max(1, _ELEMENTS // logits.shape[-1])
        parts = []
        for start in range(0, len(logits), step):
            rows = slice(start, start + step)
            log_p = logits[rows].double().log_softmax(-1)
            came = ids[rows, None].to(log_p.device)
            part = [-log_p.gather(-1, came)[:, 0]]
            if reference is not None:
                log_dense = reference[rows].to(log_p).log_softmax(-1)
                part.append(-log_dense.gather(-1, came)[:, 0])
                part.append(F.kl_div(log_p, log_dense, reduction="none", log_target=True).sum(-1))
                part.append((log_p.argmax(-1) == log_dense.argmax(-1)).double())
            parts.append(torch.stack(part).cpu())
        return cls(*torch.cat(parts, 1))

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Those of all windows."""
        return cls(*(torch.cat(values) for values in zip(*parts, strict=True) if values[0] is not None))

    @property
    def finite(self) -> bool:
        """Whether all losses and divergences are numbers."""
        return all(bool(values.isfinite().all()) for values in self if values is not None)

    def perplexity(self) -> Estimate:
        """e to the mean loss."""
        return Estimate.mean(self.loss).exp()


@dataclass(frozen=True)
class Comparison:
    """A model beside its dense reference, in llama.cpp's terms Q beside base.

    `reference_perplexity` is PPL(base), `correlation` that of both losses (None where one of them does not vary),
    `log_perplexity_ratio` ln(PPL(Q)/PPL(base)). `kl_divergence` is in nats per token. `probability_change` is p(Q) -
    p(base) of the token that came, as a fraction, and `same_top_token` the share of tokens whose likeliest is the same.
    """

    reference_perplexity: Estimate
    correlation: float | None
    log_perplexity_ratio: Estimate
    perplexity_ratio: Estimate
    perplexity_difference: Estimate
    kl_divergence: Distribution
    probability_change: Distribution
    probability_change_rms: Estimate
    same_top_token: Estimate

    @classmethod
    def of(cls, scores: TokenScores) -> Self | None:
        """The comparison of all tokens; None where nothing was compared."""
        loss, reference, divergence, same_top = scores
        if reference is None or divergence is None or same_top is None:
            return None
        ratio = Estimate.mean(loss - reference)
        perplexity, dense = Estimate.mean(loss).exp(), Estimate.mean(reference).exp()
        # The losses go up and down together, so that their difference is known better than either.
        difference = Estimate.mean(perplexity.value * loss - dense.value * reference)
        varies = len(loss) > 1 and bool(loss.std() > 0) and bool(reference.std() > 0)
        change = (-loss).exp() - (-reference).exp()
        squares = Estimate.mean(change.square())
        rms = math.sqrt(squares.value)
        return cls(
            reference_perplexity=dense,
            correlation=float(torch.corrcoef(torch.stack([loss, reference]))[0, 1]) if varies else None,
            log_perplexity_ratio=ratio,
            perplexity_ratio=ratio.exp(),
            perplexity_difference=difference.scaled(perplexity.value - dense.value, 1),
            kl_divergence=Distribution.of(divergence),
            probability_change=Distribution.of(change),
            probability_change_rms=squares.scaled(rms, 0.5 / rms if rms else 0),
            same_top_token=Estimate.mean(same_top),
        )
