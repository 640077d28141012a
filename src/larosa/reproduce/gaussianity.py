"""How Gaussian the activations are, before and after rotation: Theorem A.1 assumes that they are."""

from __future__ import annotations

import math
from typing import Any

import torch

from larosa.config import SITES, Covariance, Method, Rotation
from larosa.reproduce import figures
from larosa.reproduce.activations import look, sample, unsparsified
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.variants import Variant

BASES = {
    "none": Variant("none", Method.TOPK),
    "random": Variant("random", Method.LAROSA, Rotation.RANDOM),
    "PCA (LaRoSA)": Variant("PCA", Method.LAROSA, Rotation.LAYER, Covariance.H1),
}


#: The mean distance of n truly Gaussian numbers is this over the root of n.
_FLOOR = 0.63


def kolmogorov_smirnov(x: torch.Tensor) -> torch.Tensor:
    """Largest gap between the distribution of each row's entries and the Gaussian of their mean and deviation.

    Args:
        x: [rows, entries].

    Returns:
        [rows], from 0 (Gaussian) to 1.
    """
    x = x.double()
    count = x.shape[-1]
    deviation = x.std(-1, keepdim=True, correction=0).clamp_min(torch.finfo(torch.float64).tiny)
    z = ((x - x.mean(-1, keepdim=True)) / deviation).sort(-1).values
    expected = (1 + torch.erf(z / math.sqrt(2))) / 2
    steps = torch.arange(count + 1, dtype=torch.float64, device=x.device) / count
    # The empirical distribution jumps at each entry: look on both sides of the jump.
    return torch.maximum(expected - steps[:-1], steps[1:] - expected).amax(-1)


def excess_kurtosis(x: torch.Tensor) -> torch.Tensor:
    """Fourth standardised moment of each row's entries less 3: 0 for a Gaussian, more for heavier tails."""
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    variance = x.square().mean(-1).clamp_min(torch.finfo(torch.float64).tiny)
    return x.pow(4).mean(-1) / variance.square() - 3


def run(context: Context) -> Results:
    """Distances from a Gaussian across the channels of a token, and across the tokens of a channel."""
    found = {name: _measure(context, variant) for name, variant in BASES.items()}
    rows: list[list[Cell]] = []
    for site in SITES:
        for name, sites in found.items():
            if site in ("h2", "h4") and name != "none":
                continue
            layers = sites[site]
            rows.append([site, name, *(_mean(layers, key) for key in ("tokens", "kurtosis", "channels"))])
    columns = [
        *(Column("site"), Column("rotation")),
        Column("KS distance, channels of a token", ".4f"),
        Column("excess kurtosis, channels of a token", ".2f"),
        Column("KS distance, tokens of a channel", ".4f"),
    ]
    floor = _FLOOR / math.sqrt(context.sizes.hidden)
    notes = [
        "Kolmogorov-Smirnov distance between a distribution and the Gaussian of its mean and deviation, averaged over "
        f"tokens or channels and layers. Truly Gaussian activations would show about {floor:.3f} for a token of "
        f"{context.sizes.hidden} channels, since it has no more.",
        "The theorem needs the channels of a token to be Gaussian with one variance. PCA gives every channel a "
        "variance of its own, so a token's channels are a mixture with heavy tails, which makes dropping the small "
        "ones cheaper than the theorem says; a random rotation gives them one variance.",
        "h2 and h4 are not rotated.",
    ]
    table = Table("gaussianity", f"Distance from a Gaussian, {context.evaluated}", columns, rows)
    return Results([table], [_draw(found)], notes)


def _measure(context: Context, variant: Variant) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        layers: dict[str, list[dict[str, float]]] = {site: [] for site in SITES}

        def see(layer: int, site: str, x: torch.Tensor) -> None:
            layers[site].append(
                {
                    "tokens": float(kolmogorov_smirnov(x).mean()),
                    "channels": float(kolmogorov_smirnov(x.T).mean()),
                    "kurtosis": float(excess_kurtosis(x).mean()),
                }
            )

        windows = sample(context)
        look(context, unsparsified(context, variant), windows, see)
        return layers

    key = context.basis_key(variant)
    return context.measure("gaussianity", key, measure)


def _mean(layers: list[dict[str, float]], key: str) -> float:
    return sum(layer[key] for layer in layers) / len(layers)


def _draw(found: dict[str, dict[str, Any]]) -> Picture:
    figure, axes = figures.subplots(1, 2, size=(9, 3.8), sharey=True)
    for place, site in zip(axes, ("h1", "h3"), strict=True):
        for (name, sites), colour, marker in figures.styled(found.items()):
            distances = [layer["tokens"] for layer in sites[site]]
            place.plot(range(1, len(distances) + 1), distances, marker=marker, color=colour, label=name)
        place.set(title=f"Site {site}", xlabel="layer", ylim=(0, None))
        place.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("KS distance to a Gaussian")
    figures.add_legend(figure, axes[0], title="rotation")
    caption = "Distance of a token's channels from a Gaussian, by layer; 0 is Gaussian."
    return Picture("gaussianity", caption, figures.to_png(figure))


EXPERIMENT = Experiment(
    "gaussianity",
    "Are the activations Gaussian?",
    "Appendix A argues by the central limit theorem that rotated activations are approximately Gaussian.",
    run,
)
