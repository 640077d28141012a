"""Thresholds for every site of every layer from one price of a weight, the same for all tokens.

An entry is worth its square times its score's square and its site's coherence: that is what dropping it costs by
estimate (see `sensitivity.fisher_costs`). It is kept where that is more than a price times the weights it reads. So a
token keeps more where more of its entries matter, and another less: counts that are the same for all tokens cannot.

A head in planes has a threshold of the same price. A sparsity is of the decoder's weights alone: what the head skips
beside it follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from larosa.architectures import Architecture
from larosa.config import HEAD, SITES, HeadThreshold, Thresholds
from larosa.models import head_selector, set_thresholds, thresholds_of
from larosa.sparsity.sensitivity import LEAST_KEPT, Coherence, Place, head_place, observed
from larosa.sparsity.sites import SiteSizes

#: Passes with thresholds set: what is dropped before a site changes what arrives there, and so how much of it is.
_ROUNDS = 2

#: Bits of a float32 magnitude that a histogram tells apart: its exponent and 7 of its mantissa.
_SHIFT = 16
_BINS = 1 << (31 - _SHIFT)


def no_thresholds(sizes: SiteSizes, head: bool = False) -> Thresholds:
    """Thresholds that drop nothing; one of the head too where it is in planes."""
    zeros = {site: [0.0] * sizes.layers for site in SITES}
    return Thresholds(values=zeros, dropped=zeros, head=HeadThreshold() if head else None)


class PricedThresholds:
    """The thresholds of a model for any sparsity, calibrated with what comes before each site sparse too.

    Args:
        model: sparsified by thresholds on Fisher scores, whose thresholds are changed.
        run: runs it on the calibration sequences.
        before: those of the model before it was stored in planes. The coherences are its, as all planes together are
            its weights, but each entry has several columns now.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        run: Callable[[], object],
        before: PricedThresholds | None = None,
    ) -> None:
        self._model, self._architecture, self._run = model, architecture, run
        self._sizes = SiteSizes.of(model.config)
        self._has_head = head_selector(model, architecture) is not None
        self._none = no_thresholds(self._sizes, self._has_head)
        set_thresholds(model, architecture, self._none)
        if before is not None:
            (self._dense,) = observed(model, architecture, run, Histogram)
            self._scale: dict[Place, float] = dict(before._scale)
            if self._has_head:  # whose scores have its coherence in them
                self._scale[head_place(self._sizes.layers)] = math.sqrt(self._sizes.outputs[HEAD])
            return
        self._dense, coherences = observed(model, architecture, run, Histogram, Coherence)
        # A threshold is on the root of an entry's worth, the same for all weights: this times the root of the price.
        self._scale = {
            (layer, site): math.sqrt(self._sizes.outputs[site] / max(found.ratio(), torch.finfo(torch.float32).tiny))
            for (layer, site), found in coherences.items()
        }

    def __call__(self, sparsity: float) -> Thresholds:
        """Thresholds that skip `sparsity` of all weights on average over the calibration tokens."""
        if sparsity == 0:
            return self._none
        found = self._skipping(sparsity, self._dense)
        for _ in range(_ROUNDS):
            set_thresholds(self._model, self._architecture, found)
            (seen,) = observed(self._model, self._architecture, self._run, Histogram)
            found = self._skipping(sparsity, seen)
        return found

    def _skipping(self, sparsity: float, seen: Mapping[Place, Histogram]) -> Thresholds:
        """Those of the price at which the tokens seen skip `sparsity` of all weights."""
        # The estimate knows nothing of an empty site.
        most = {place: histogram.quantile(max(1 - LEAST_KEPT, sparsity)) for place, histogram in seen.items()}
        budget = sparsity * self._sizes.linear_weights

        def at(root: float) -> dict[Place, float]:
            return {place: min(root * scale, most[place]) for place, scale in self._scale.items()}

        def skipped(root: float) -> float:
            return sum(
                seen[place].below(threshold) * self._sizes.weights(place[1])
                for place, threshold in at(root).items()
                if place[1] != HEAD
            )

        low, high = 0.0, max(most[place] / scale for place, scale in self._scale.items())
        for _ in range(60):  # halvings: more than a float32's bits
            middle = (low + high) / 2
            low, high = (middle, high) if skipped(middle) < budget else (low, middle)
        found, layers = at(high), range(self._sizes.layers)
        of_head: HeadThreshold | None = None
        if self._has_head:
            place = head_place(self._sizes.layers)
            of_head = HeadThreshold(value=found[place], dropped=seen[place].below(found[place]))
        return Thresholds(
            values={site: [found[layer, site] for layer in layers] for site in SITES},
            dropped={site: [seen[layer, site].below(found[layer, site]) for layer in layers] for site in SITES},
            head=of_head,
        )


class SteadyShares:
    """Keeps the share of entries that each site of a model drops while its weights change, by its thresholds.

    Args:
        model: sparsified by thresholds, whose shares now are the ones to keep.
        run: runs it on the text on which they hold.
    """

    def __init__(self, model: Any, architecture: Architecture, run: Callable[[], object]) -> None:
        self._model, self._architecture, self._run = model, architecture, run
        (seen,) = observed(model, architecture, run, Histogram)
        now = thresholds_of(model, architecture)
        self._shares = {(layer, site): found.below(now[site][layer]) for (layer, site), found in seen.items()}

    def restore(self) -> None:
        """Set thresholds that drop these shares again."""
        (seen,) = observed(self._model, self._architecture, self._run, Histogram)
        values = thresholds_of(self._model, self._architecture)
        for (layer, site), share in self._shares.items():
            values[site][layer] = seen[layer, site].reaching(share)
        set_thresholds(self._model, self._architecture, values)


class Histogram:
    """How the magnitudes of a site's entries times scores are distributed, to within a hundredth of each.

    With several planes an entry counts once for each.
    """

    def __init__(self, selector: Any, _linears: list[Any]) -> None:
        self._selector = selector
        self._counts: torch.Tensor | int = 0
        self._below: torch.Tensor | None = None

    def __call__(self, _module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        """A forward pre-hook."""
        x = self._selector.dense.sparse_tokens(inputs[0]).float()
        if self._selector.score is not None:
            x = self._selector.copies(x) * self._selector.score.float()
        bins = (x.abs().contiguous().view(torch.int32) >> _SHIFT).flatten()
        self._counts = self._counts + torch.bincount(bins, minlength=_BINS).cpu()

    def below(self, magnitude: float) -> float:
        """The share of the entries up to a magnitude; within a bin they are taken for evenly spread."""
        shares = self._shares()
        word = int(torch.tensor(magnitude).view(torch.int32))
        at, within = word >> _SHIFT, (word & ((1 << _SHIFT) - 1)) / (1 << _SHIFT)
        return float(shares[at] + within * (shares[at + 1] - shares[at]))

    def quantile(self, share: float) -> float:
        """The magnitude up to which this share of the entries goes, rounded down to where its bin begins."""
        return _magnitude(self._bin(share) << _SHIFT)

    def reaching(self, share: float) -> float:
        """The magnitude up to which this share of the entries goes: what `below` gives it back for."""
        shares, at = self._shares(), self._bin(share)
        in_bin = float(shares[at + 1] - shares[at])
        within = (share - float(shares[at])) / in_bin if in_bin else 0.0
        return _magnitude((at << _SHIFT) + min(round(within * (1 << _SHIFT)), (1 << _SHIFT) - 1))

    def _bin(self, share: float) -> int:
        """The bin in which this share of the entries is reached."""
        return max(int(torch.searchsorted(self._shares(), torch.tensor(share, dtype=torch.float64))) - 1, 0)

    def _shares(self) -> torch.Tensor:
        """The share of the entries below each bin, and at last that of all."""
        if self._below is None:
            assert isinstance(self._counts, torch.Tensor), "the model has run"
            below = torch.cat([torch.zeros(1, dtype=torch.int64), self._counts]).cumsum(0)
            self._below = below.double() / below[-1]
        return self._below


def _magnitude(word: int) -> float:
    """The float32 of these bits."""
    return float(torch.tensor(word, dtype=torch.int32).view(torch.float32))
