"""Figure 5: the relative output error that Theorem A.1 predicts, and what is measured."""

from __future__ import annotations

from typing import Any

import torch

from larosa.config import SITES
from larosa.evaluation.theory import theoretical_relative_error
from larosa.ops import drop_up_to, keep_top_k
from larosa.reproduce import figures
from larosa.reproduce.activations import look, sample, site_weights, unsparsified
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.gaussianity import BASES
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.thresholds import calibrated_thresholds
from larosa.reproduce.variants import Variant
from larosa.sparsity import keeps_of

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: Errors by site, layer and share dropped.
Errors = dict[str, list[list[float]]]


def relative_error(x: torch.Tensor, sparse: torch.Tensor, weight: torch.Tensor) -> float:
    """E|y - y'| / E|y| of the outputs of a site, as Theorem A.1 has it; x and sparse [tokens, D]."""
    error = ((x - sparse) @ weight.T).float().norm(dim=-1).mean()
    return float(error / (x @ weight.T).float().norm(dim=-1).mean())


def run(context: Context) -> Results:
    """Errors of TEAL, of Top-K without and with a random rotation, and of LaRoSA, beside the theorem's."""
    found = {
        "TEAL": _thresholded(context),
        "TopK": _counted(context, BASES["none"]),
        "TopK, random rotation": _counted(context, BASES["random"]),
        "LaRoSA": _counted(context, BASES["PCA (LaRoSA)"]),
    }
    rows: list[list[Cell]] = []
    for site in SITES:
        for index, share in enumerate(SHARES):
            width = context.sizes.width[site]
            theory = theoretical_relative_error(keeps_of(width, share), width)
            means = {name: _mean(errors[site], index) for name, errors in found.items()}
            rows.append([site, share, theory, *means.values()])
    columns = [Column("site"), Column("dropped", ".0%"), Column("Theorem A.1", ".4f")]
    columns += [Column(name, ".4f") for name in found]
    notes = [
        "Relative error of the outputs of all matrices that read a site, of what dropping does at that site alone: "
        "its input is the dense model's. Mean over layers.",
        "TEAL drops what is below its calibrated threshold, so that its actual share differs from the one given; the "
        "others drop it exactly.",
        "h2 and h4 are not rotated in LaRoSA, so that it equals TopK there. The paper's figure shows the output of "
        "the down projection, whose input is h4.",
    ]
    return Results([Table("figure5", "Relative output error", columns, rows)], [_draw(context, found)], notes)


def _thresholded(context: Context) -> Errors:
    thresholds = calibrated_thresholds(context, SHARES)

    def measure() -> Errors:
        model = context.dense()
        return _measure(context, model, lambda layer, site, x, index: drop_up_to(x, thresholds[site][layer][index]))

    key = {"calibration": context.calibration_key(), "evaluation": context.evaluation_key, "shares": list(SHARES)}
    return context.measure("threshold-errors", key, measure)


def _counted(context: Context, variant: Variant) -> Errors:
    def measure() -> Errors:
        model = unsparsified(context, variant)
        return _measure(
            context, model, lambda layer, site, x, index: keep_top_k(x, keeps_of(x.shape[-1], SHARES[index]))
        )

    return context.measure("count-errors", {**context.basis_key(variant), "shares": list(SHARES)}, measure)


def _measure(context: Context, model: Any, select: Any) -> Errors:
    errors: Errors = {site: [] for site in SITES}

    def see(layer: int, site: str, x: torch.Tensor) -> None:
        weight = site_weights(context, model, layer, site)
        errors[site].append([relative_error(x, select(layer, site, x, index), weight) for index in range(len(SHARES))])

    look(context, model, sample(context), see)
    return errors


def _mean(layers: list[list[float]], index: int) -> float:
    return sum(layer[index] for layer in layers) / len(layers)


def _draw(context: Context, found: dict[str, Errors]) -> Picture:
    figure, axes = figures.subplots(2, 2, size=(9.5, 7.4), sharex=True, sharey=True)
    readers = {"h1": "q, k, v", "h2": "o", "h3": "gate, up", "h4": "down"}
    percent = [100 * share for share in SHARES]
    for place, site in zip(axes.flat, SITES, strict=True):
        width = context.sizes.width[site]
        theory = [theoretical_relative_error(keeps_of(width, share), width) for share in SHARES]
        place.plot(percent, theory, color="black", linestyle="--", label="Theorem A.1")
        for (name, errors), colour, marker in figures.styled(found.items()):
            if site in ("h2", "h4") and name not in ("TEAL", "TopK"):
                continue
            curves = errors[site]
            means = [_mean(curves, index) for index in range(len(SHARES))]
            place.plot(percent, means, color=colour, marker=marker, markersize=4, label=name)
            if name in ("TEAL", "LaRoSA"):
                edges = [[edge(curve[i] for curve in curves) for i in range(len(SHARES))] for edge in (min, max)]
                place.fill_between(percent, *edges, color=colour, alpha=0.15, linewidth=0)
        place.set(title=f"{site} (read by {readers[site]})", ylim=(0, 1))
    for place in axes[1]:
        place.set_xlabel("entries dropped (%)")
    for place in axes[:, 0]:
        place.set_ylabel("relative output error")
    axes[0][0].legend()
    caption = (
        "Relative output error by site; lines are means over layers, bands reach from the best to the worst layer."
    )
    return Picture("figure5", caption, figures.to_png(figure))


EXPERIMENT = Experiment(
    "figure5",
    "Theoretical and measured output error",
    "LaRoSA's error is below TEAL's and closer to the theory's, since rotation makes activations more Gaussian.",
    run,
)
