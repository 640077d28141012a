"""Second moments of the rotated sites' activations, one decoder layer at a time (paper, equation 7)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from larosa.architectures import Architecture
from larosa.calibration.layers import visit_layers
from larosa.calibration.observers import SecondMoment, attached


class LayerMoments(NamedTuple):
    """mean(x^T x) over all calibration tokens, not centred, [D, D] float64.

    x is the RMSNorm's output before its gain: the gain is folded into the weights, so this is what
    gets rotated.
    """

    h1: torch.Tensor
    h3: torch.Tensor


@torch.no_grad()
def layer_second_moments(
    model: nn.Module, architecture: Architecture, sequences: torch.Tensor, device: torch.device
) -> Iterator[LayerMoments]:
    """Yield each layer's moments as soon as it has run; arguments as for `visit_layers`.

    A layer may be changed by the caller once its moments have been yielded.

    Raises:
        LarosaError: an activation is NaN or Inf; the message names layer and site.
    """
    for visit in visit_layers(model, architecture, sequences, device):
        moments = {site: SecondMoment(f"layer {visit.index}, site {site}") for site in LayerMoments._fields}
        with attached(*(architecture.tap_unit_norm(visit.layer, site, m.see) for site, m in moments.items())):
            visit.outputs()
        yield LayerMoments(**{site: moment.finish() for site, moment in moments.items()})
