"""Magnitude thresholds from calibration: TEAL at the four sites, CATS at the gate (paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.calibration import LayerVisit, Magnitudes, SortedMagnitudes, attached, behind, visit_layers
from larosa.config import Method, Thresholds
from larosa.errors import LarosaError
from larosa.sparsity.sites import SiteSizes
from larosa.utils.progress import track

#: From a visited layer and its sites' magnitudes to the share of entries that each site drops.
Allocation = Callable[[LayerVisit, dict[str, SortedMagnitudes]], dict[str, float]]


def uniform_shares(method: Method, sparsity: float, sizes: SiteSizes) -> dict[str, float]:
    """The same share of entries dropped at all of a method's sites, so that `sparsity` of all weights is skipped.

    Raises:
        LarosaError: the method's sites decide over too few weights.
    """
    reach = sizes.reach(method)
    if sparsity >= reach:
        raise LarosaError(
            f"{method.upper()} skips only up and down: at most {reach:.1%} of this model's weights, "
            f"and {sparsity:.1%} is asked for"
        )
    return dict.fromkeys(method.sites, sparsity / reach)


@torch.no_grad()
def calibrate_thresholds(
    model: nn.Module,
    architecture: Architecture,
    sequences: torch.Tensor,
    device: torch.device,
    sites: tuple[str, ...],
    allocate: Allocation,
    first: int = 0,
) -> Thresholds:
    """Each layer's thresholds: quantiles of the dense model's magnitudes over all calibration tokens.

    One layer's magnitudes are held at a time, in the model's dtype. Arguments as for `visit_layers`.

    Args:
        sites: where to take them.
        allocate: the share of entries that each site is to drop, layer by layer.
        first: how many tokens of each sequence are left out, because they stay dense.

    Raises:
        LarosaError: an activation is NaN or Inf.
    """
    values: dict[str, list[float]] = {site: [] for site in sites}
    dropped: dict[str, list[float]] = {site: [] for site in sites}
    visits = visit_layers(model, architecture, sequences, device)
    for visit in track(visits, "Calibrating thresholds", total=len(architecture.layers(model))):
        seen = {site: Magnitudes(f"layer {visit.index}, site {site}") for site in sites}
        with attached(*(architecture.tap(visit.layer, site, behind(first, m.see)) for site, m in seen.items())):
            visit.outputs()
        magnitudes = {site: m.finish() for site, m in seen.items()}
        for site, share in allocate(visit, magnitudes).items():
            values[site].append(magnitudes[site].threshold(share))
            dropped[site].append(magnitudes[site].dropped(values[site][-1]))
    return Thresholds(values=values, dropped=dropped)
