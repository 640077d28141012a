"""TEAL's block-wise greedy allocation of sparsity among the sites of a layer (Liu et al., 2024, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.utils.hooks import RemovableHandle

from larosa.architectures import Architecture
from larosa.calibration import LayerVisit, SortedMagnitudes, attached
from larosa.ops import drop_up_to

#: A step raises the share dropped at the site with the fewest weights by this much, and at the others by
#: what skips as many weights.
STEP = 0.1

#: The error is measured on the first sequences with together at least so many tokens: enough to rank sites,
#: and each step costs a run of the layer per site. The thresholds themselves come from all tokens.
TOKENS = 2048


def greedy_shares(
    target: float, weights: Mapping[str, int], error: Callable[[Mapping[str, float]], float], step: float = STEP
) -> dict[str, float]:
    """The share that each site drops, found by raising one site at a time where it costs least.

    All start at 0. Every step skips the same number of weights more, at the site where the error is
    lowest afterwards (the first of equals), until `target` of all weights is met exactly. Greed is
    short-sighted, so the even allocation is returned where its error is lower.

    Args:
        target: fraction of the weights to skip, in [0, 1].
        weights: of each site.
        error: of an allocation, on the calibration tokens.
        step: share dropped in one step at the site with the fewest weights.
    """
    shares = dict.fromkeys(weights, 0.0)
    stride = step * min(weights.values())
    total = sum(weights.values())
    left, lowest = target * total, 0.0
    while left > 1e-12 * total:
        trials = {}
        for site, weight in weights.items():
            raised = min(1.0, shares[site] + min(stride, left) / weight)
            if raised > shares[site]:
                trials[site] = {**shares, site: raised}
        errors = {site: error(trial) for site, trial in trials.items()}
        best = min(errors, key=errors.__getitem__)
        left -= (trials[best][best] - shares[best]) * weights[best]
        shares, lowest = trials[best], errors[best]
    even = dict.fromkeys(weights, target)
    return shares if lowest == 0 or lowest <= error(even) else even


class GreedyAllocation:
    """Allocates within each layer, which keeps its own budget, by the error of the layer's output.

    The error is the mean over tokens of |y - y'| / |y|, y being the residual stream behind the layer: its
    length varies by orders of magnitude between tokens, and the next norm divides by it. Each layer is
    fed what the dense layers before it give.
    """

    def __init__(self, architecture: Architecture, target: float, weights: Mapping[str, int], first: int = 0) -> None:
        self._architecture = architecture
        self._target = target
        self._weights = weights
        self._first = first  # tokens that stay dense

    def __call__(self, visit: LayerVisit, magnitudes: dict[str, SortedMagnitudes]) -> dict[str, float]:
        """The share that each site of the visited layer drops."""
        count = math.ceil(TOKENS / visit.inputs[0].shape[-2])
        inputs, outputs = visit.inputs[:count], visit.outputs()[:count]

        def error(shares: Mapping[str, float]) -> float:
            thresholds = {site: magnitudes[site].threshold(share) for site, share in shares.items()}
            with attached(*(self._sparsify(visit, site, threshold) for site, threshold in thresholds.items())):
                errors = [_relative_error(visit.run(x), y) for x, y in zip(inputs, outputs, strict=True)]
            return float(torch.cat(errors).mean())

        return greedy_shares(self._target, self._weights, error)

    def _sparsify(self, visit: LayerVisit, site: str, threshold: float) -> RemovableHandle:
        def drop(x: torch.Tensor) -> torch.Tensor:
            dense, sparse = x[..., : self._first, :], x[..., self._first :, :]
            return torch.cat([dense, drop_up_to(sparse, threshold)], -2)

        return self._architecture.tap(visit.layer, site, drop)


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """|y - y'| / |y| of each token, float64."""
    found, expected = found.double(), expected.double()
    lengths = expected.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return ((found - expected).norm(dim=-1) / lengths).flatten()
