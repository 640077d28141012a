"""Bits and sparsity that read the fewest bytes a token while the divergence from the dense model is within a bound."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from larosa.conversion.pipeline import Sparsified
from larosa.errors import LarosaError
from larosa.evaluation.perplexity import Evaluation
from larosa.formats import WeightFormat
from larosa.sparsity.report import inspect_config
from larosa.utils.progress import advance

#: Beyond this there is nothing left of a model, and at every site an entry has to stay.
_HIGHEST_PERCENT = 90


@dataclass(frozen=True)
class Trial:
    """A setting that was measured; a token reads `bytes_per_token` of weights, adapters, scores and head."""

    weights: WeightFormat
    sparsity: float
    kl_divergence: float
    top1_agreement: float
    bytes_per_token: int


def fewest_bytes(
    candidates: Iterable[tuple[WeightFormat, Sparsified]],
    evaluate: Callable[[Any], Evaluation],
    max_kl: float,
) -> tuple[Sparsified, list[Trial]]:
    """Find the format of weights and the whole percentage of sparsity that read the fewest bytes within a bound.

    Divergence is taken to grow with sparsity. After the first format only sparsities count at which another one reads
    less than the best so far: where already the lowest of these loses too much, one measurement does for the format.

    Args:
        candidates: the model in each format, that of fewest bits first, each made when it is its turn.
        evaluate: measures a model against the dense one.
        max_kl: nats per token.

    Returns:
        The best candidate with its sparsity set, and all that was measured, in order.

    Raises:
        LarosaError: none is within the bound; the message says the least divergence that was found.
    """
    tried: list[Trial] = []
    best: tuple[Sparsified, int] | None = None
    fewest: float = math.inf
    for weights, converted in candidates:
        first = _lowest_below(converted, fewest)
        higher = range(first + 1, _HIGHEST_PERCENT + 1)
        with advance(f"Trying {weights} weights", total=1 + len(higher).bit_length()) as tick:

            def is_too_far(percent: int) -> bool:
                tried.append(_try(weights, converted, percent, evaluate))  # noqa: B023 - called in this round alone
                tick()
                return tried[-1].kl_divergence > max_kl

            if first > _HIGHEST_PERCENT or is_too_far(first):
                continue
            percent = first + bisect_left(higher, True, key=is_too_far)
        best, fewest = (converted, percent), _bytes_per_token(converted, percent)
    if best is None:
        least = min(tried, key=lambda trial: trial.kl_divergence)
        raise LarosaError(
            f"--max-kl {max_kl:g}: even at 0% sparsity the divergence is {least.kl_divergence:.4f}, by rounding alone"
        )
    chosen, percent = best
    chosen.set_sparsity(percent / 100)
    return chosen, tried


def _try(weights: WeightFormat, converted: Sparsified, percent: int, evaluate: Callable[[Any], Evaluation]) -> Trial:
    read = _bytes_per_token(converted, percent)
    found = evaluate(converted.model)
    kl, top1 = found.kl_divergence, found.top1_agreement
    assert kl is not None, "there is a reference"
    assert top1 is not None, "there is a reference"
    return Trial(weights, percent / 100, kl, top1, read)


def _lowest_below(converted: Sparsified, fewest: float) -> int:
    """The lowest percentage at which a token reads fewer bytes, which fall as sparsity rises."""
    if fewest == math.inf:
        return 0  # without a look at others: where thresholds are calibrated each takes a while
    percents = range(_HIGHEST_PERCENT + 1)
    return bisect_left(percents, True, key=lambda percent: _bytes_per_token(converted, percent) < fewest)


def _bytes_per_token(converted: Sparsified, percent: int) -> int:
    """What a token reads at a sparsity, which is set."""
    converted.set_sparsity(percent / 100)
    return inspect_config(converted.model.config, parameters=False).bytes_per_token
