"""Methods at equal bytes: divergence over what a token reads, adapters and scores included. Not in the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from larosa.evaluation.verdict import Q4_K_M, Q6_K
from larosa.reproduce import figures
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.variants import BEST, LAROSA, TEAL, TOPK

SPARSITIES = (0.10, 0.25, 0.40, 0.50, 0.60)

VARIANTS = (
    BEST,
    replace(LAROSA, label="paper"),
    TEAL,
    TOPK,
)
_BASELINES = (TEAL.label, TOPK.label)

#: A method's points: the share of dense bytes and the divergence, in the order of `SPARSITIES`.
Curves = dict[str, list[tuple[float, float]]]


def run(context: Context) -> Results:
    """Every method at every sparsity, each beside the better of TEAL and TopK at the same bytes."""
    found = {variant.label: [context.evaluate(variant, sparsity) for sparsity in SPARSITIES] for variant in VARIANTS}
    curves: Curves = {label: [(each["bytes"], each["kl"]) for each in points] for label, points in found.items()}
    dense = context.evaluate_dense()
    rows: list[list[Cell]] = [["dense", 0.0, 1.0, 0.0, *_cells(dense), None]]
    for label, points in found.items():
        for sparsity, each in zip(SPARSITIES, points, strict=True):
            skipped = each["skipped"]["mean"]
            rows.append([label, sparsity, each["bytes"], skipped, *_cells(each), _share(curves, each)])
    columns = [
        Column("method"),
        Column("sparsity", ".0%"),
        Column("bytes per token, of dense", ".1%"),
        Column("weights skipped, measured", ".1%"),
        QUALITY[0],
        Column("± KL", ".4f"),
        *QUALITY[1:],
        Column("KL, of the better of TEAL and TopK at these bytes", ".2f"),
    ]
    title = f"Divergence over bytes per token, {context.evaluated}"
    notes = [
        "Bytes are those of the decoder that a token reads: weights, adapters and score vectors, not embedding, head, "
        "keys and values, as a share of the checkpoint's own. Weights are those that the evaluated tokens did read, "
        "dense ones not counted.",
        "The baselines at equal bytes are interpolated between their points, the logarithm of the divergence linearly; "
        "outside their points there is none. ± is a standard error over tokens taken as independent.",
        "TEAL and TopK leave the first token dense like the others. paper is LaRoSA with a rotation a layer and its "
        "grid of coefficients, best is recipe best.",
    ]
    return Results([Table("equal-bytes", title, columns, rows)], [_draw(curves)], notes)


def _cells(found: dict[str, Any]) -> list[Cell]:
    kl, *others = quality(found)
    return [kl, found["kl_stderr"], *others]


def _share(curves: Curves, found: dict[str, Any]) -> float | None:
    """A divergence as a share of the better baseline's at the same bytes."""
    baselines = [value for label in _BASELINES if (value := at_bytes(curves[label], found["bytes"])) is not None]
    return found["kl"] / min(baselines) if baselines and min(baselines) > 0 else None


def at_bytes(curve: Sequence[tuple[float, float]], share: float) -> float | None:
    """A curve's divergence at a share of bytes, its logarithm interpolated; None outside its points."""
    points = sorted(curve)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= share <= x1 and y0 > 0 and y1 > 0:
            part = (share - x0) / (x1 - x0) if x1 > x0 else 0.0
            return math.exp((1 - part) * math.log(y0) + part * math.log(y1))
    return None


def _draw(curves: Curves) -> Picture:
    figure, axes = figures.subplots(size=(7.5, 4.6))
    for (label, points), colour, marker in figures.styled(curves.items()):
        axes.plot([100 * x for x, _ in points], [y for _, y in points], marker=marker, color=colour, label=label)
    for name, divergence in (("Q6_K", Q6_K), ("Q4_K_M", Q4_K_M)):
        axes.axhline(divergence, color="black", linewidth=0.8, linestyle=":")
        axes.annotate(name, (1, divergence), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes.set(
        xlabel="bytes per token (% of the dense decoder's)",
        ylabel="KL divergence to dense (nats per token)",
        yscale="log",
    )
    axes.legend()
    caption = (
        "Distance from the dense model over what a token reads; lower and further left is better. Dotted: what "
        "llama.cpp's quantisations of Llama-3-8B lose."
    )
    return Picture("equal-bytes", caption, figures.to_png(figure))


EXPERIMENT = Experiment(
    "equal-bytes",
    "Divergence over bytes per token, by method",
    "nothing of the kind: it compares at equal sparsity, which leaves the adapters' bytes out.",
    run,
)
