"""Figure 1: activation magnitudes before and after rotation."""

from __future__ import annotations

import base64
from typing import Any

import torch

from larosa.reproduce import figures
from larosa.reproduce.activations import look, sample, unsparsified
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.gaussianity import BASES
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.variants import Variant

#: Tokens and channels drawn; more channels are averaged in groups.
_DRAWN_TOKENS = 128
_DRAWN_CHANNELS = 512


def run(context: Context) -> Results:
    """Magnitudes at h1 and h3 of a middle layer, and how much of a token's energy few channels hold."""
    found = {name: _measure(context, variant) for name, variant in BASES.items()}
    rows: list[list[Cell]] = [
        [site, name, *(sites[site][part] for part in ("quarter", "half", "three quarters"))]
        for site in ("h1", "h3")
        for name, sites in found.items()
    ]
    columns = [
        Column("site"),
        Column("rotation"),
        *(Column(f"largest {part}", ".1%") for part in ("25%", "50%", "75%")),
    ]
    title = "Share of a token's energy in its largest entries, mean over tokens and layers"
    notes = ["Top-K keeps the largest entries: at 50%, the share in the middle column, and drops the rest."]
    return Results([Table("figure1", title, columns, rows)], [_draw(context, found)], notes)


def _measure(context: Context, variant: Variant) -> dict[str, Any]:
    middle = _middle(context)

    def measure() -> dict[str, Any]:
        energies: dict[str, list[torch.Tensor]] = {"h1": [], "h3": []}
        maps: dict[str, str] = {}

        def see(layer: int, site: str, x: torch.Tensor) -> None:
            if site not in energies:
                return
            x = x.float()
            energy = x.square().sort(-1, descending=True).values
            energies[site].append((energy.cumsum(-1) / energy.sum(-1, keepdim=True)).mean(0).cpu())
            if layer == middle:
                maps[site] = _pack(x[:_DRAWN_TOKENS].abs().cpu())

        look(context, unsparsified(context, variant), sample(context), see)
        width = context.sizes.hidden
        shares = {site: torch.stack(parts).mean(0) for site, parts in energies.items()}
        return {
            site: {
                "quarter": float(shares[site][width // 4 - 1]),
                "half": float(shares[site][width // 2 - 1]),
                "three quarters": float(shares[site][3 * width // 4 - 1]),
                "map": maps[site],
            }
            for site in energies
        }

    return context.measure("magnitudes", {**context.basis_key(variant), "layer": middle}, measure)


def _middle(context: Context) -> int:
    """The layer drawn: the paper's twelfth of 32, or as far in."""
    return context.sizes.layers * 12 // 32


def _pack(magnitudes: torch.Tensor) -> str:
    """Magnitudes [tokens, D] as text, neighbouring channels averaged to at most so many as are drawn."""
    group = -(-magnitudes.shape[1] // _DRAWN_CHANNELS)
    channels = magnitudes.shape[1] // group
    drawn = magnitudes[:, : channels * group].unflatten(1, (channels, group)).mean(-1).half()
    return f"{channels}:{base64.b64encode(drawn.contiguous().numpy().tobytes()).decode()}"


def _unpack(text: str) -> Any:
    import numpy as np

    channels, _, data = text.partition(":")
    return np.frombuffer(base64.b64decode(data), np.float16).reshape(-1, int(channels)).astype(float)


def _draw(context: Context, found: dict[str, dict[str, Any]]) -> Picture:
    from matplotlib.colors import LogNorm

    figure, axes = figures.subplots(2, len(found), size=(10, 6), sharex=True, sharey=True, squeeze=False)
    norm = LogNorm(vmin=1e-2, vmax=10, clip=True)
    image = None
    for row, site in enumerate(("h1", "h3")):
        for place, (name, sites) in zip(axes[row], found.items(), strict=True):
            magnitudes = _unpack(sites[site]["map"])
            width = context.sizes.hidden
            image = place.imshow(
                *(magnitudes,),
                **{"norm": norm, "cmap": "viridis", "aspect": "auto", "interpolation": "nearest"},
                extent=(0, width, len(magnitudes), 0),
            )
            place.set_title(f"{site}, rotation: {name}")
            place.grid(False)
            if row == 1:
                place.set_xlabel("channel")
        axes[row][0].set_ylabel("token")
    figure.colorbar(image, ax=axes, label="magnitude", extend="both")
    caption = (
        f"Magnitudes of the inputs of attention (h1) and MLP (h3), layer {_middle(context) + 1}. PCA orders channels "
        "by their energy: what can be dropped gathers on the right."
    )
    return Picture("figure1", caption, figures.to_png(figure))


EXPERIMENT = Experiment(
    "figure1",
    "Activations before and after rotation",
    "Rotation makes a few entries of an activation large and the rest small, so that pruning loses less.",
    run,
)
