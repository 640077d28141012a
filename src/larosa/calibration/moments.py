"""Second moments of the activations that are rotated, one decoder layer at a time (paper, equation 7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from larosa.architectures import Architecture, Heads
from larosa.calibration.layers import visit_layers
from larosa.calibration.observers import HeadMoments, SecondMoment, attached, behind


class LayerMoments(NamedTuple):
    """mean(x^T x) over all calibration tokens, not centred, [D, D] float64.

    x is the RMSNorm's output before its gain: the gain is folded into the weights, so this is what
    gets rotated.
    """

    h1: torch.Tensor
    h3: torch.Tensor


class LayerStatistics(NamedTuple):
    """What one layer's bases are found from.

    `values` holds one moment for each key-value head, [keys, size, size] float64: of what its query heads
    give the attention's output projection.
    """

    moments: LayerMoments
    values: torch.Tensor


@torch.no_grad()
def layer_statistics(
    model: Any, architecture: Architecture, sequences: torch.Tensor, device: torch.device, first: int = 0
) -> Iterator[LayerStatistics]:
    """Yield each layer's statistics as soon as it has run; arguments as for `visit_layers`.

    The first `first` tokens of each sequence are left out, because they stay dense.

    A layer may be changed by the caller once its moments have been yielded.

    Raises:
        LarosaError: an activation is NaN or Inf; the message names layer and site.
    """
    heads = Heads.of(model.config)
    for visit in visit_layers(model, architecture, sequences, device):
        moments = {site: SecondMoment(f"layer {visit.index}, site {site}") for site in LayerMoments._fields}
        values = HeadMoments(f"layer {visit.index}, site h2", heads)
        with attached(
            *(architecture.tap_unit_norm(visit.layer, site, behind(first, m.see)) for site, m in moments.items()),
            architecture.tap(visit.layer, "h2", behind(first, values.see)),
        ):
            visit.outputs()
        finished = LayerMoments(**{site: moment.finish() for site, moment in moments.items()})
        yield LayerStatistics(finished, values.finish())


def layer_second_moments(
    model: Any, architecture: Architecture, sequences: torch.Tensor, device: torch.device
) -> Iterator[LayerMoments]:
    """The residual stream's part of `layer_statistics`."""
    for layer in layer_statistics(model, architecture, sequences, device):
        yield layer.moments
