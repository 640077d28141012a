"""Looking at the activations of all sites during one forward pass, before and after rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from larosa.calibration import attached
from larosa.config import SITES, PerSite, Rotation
from larosa.reproduce.context import Context
from larosa.reproduce.variants import Variant

#: Sees one site's activations [tokens, D]: layer index, site, activations.
Look = Callable[[int, str, torch.Tensor], None]

#: One forward pass reads about so many tokens.
_TOKENS = 2048


def unsparsified(context: Context, variant: Variant) -> Any:
    """The model in a variant's basis, with nothing dropped; where nothing is rotated, the dense model."""
    if variant.rotation is Rotation.NONE:
        return context.dense()
    return context.sparsified(variant, 0.0, PerSite())


def sample(context: Context) -> torch.Tensor:
    """The first evaluated windows, as many as one forward pass takes, [number, length]."""
    return context.windows[: max(1, _TOKENS // context.sequence_length)]


@torch.inference_mode()
def look(context: Context, model: Any, windows: torch.Tensor, see: Look) -> None:
    """Run `windows` and show the input of every site of every layer, the norm's gain included."""
    architecture = context.architecture

    def tap(layer: int, site: str) -> Callable[[torch.Tensor], None]:
        return lambda x: see(layer, site, x.detach().flatten(0, -2))

    handles = [
        architecture.tap(layer, site, tap(index, site))
        for index, layer in enumerate(architecture.layers(model))
        for site in SITES
    ]
    with attached(*handles):
        model(windows.to(model.get_input_embeddings().weight.device), use_cache=False)


def site_weights(context: Context, model: Any, layer: int, site: str) -> torch.Tensor:
    """The matrices that read a site, stacked, [outputs, D]."""
    linears = context.architecture.linears(context.architecture.layers(model)[layer], site)
    return torch.cat([linear.weight for linear in linears])
