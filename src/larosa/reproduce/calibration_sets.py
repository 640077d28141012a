"""Tables 7 and 8: does it matter what the model is calibrated on."""

from __future__ import annotations

from pathlib import Path

import torch

from larosa.calibration import LayerMoments
from larosa.calibration.sources import SELF
from larosa.data.text import TextSplit
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import PAPER_BUDGET, QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.variants import LAROSA

_SPARSITIES = (0.25, 0.40, 0.50)


def samples(context: Context) -> dict[str, tuple[str, int]]:
    """The calibration samples to compare: label to source and seed; the run's own comes first.

    The second is another draw from the same source, which tells how much of a difference is chance.
    """
    settings = context.settings
    first = settings.calibration
    found = {name(first): (first, settings.seed), f"{name(first)}, another sample": (first, settings.seed + 1)}
    for source in (*settings.other_calibration, SELF):
        if source not in (known for known, _ in found.values()):
            label = name(source)
            found[source if label in found else label] = (source, settings.seed)
    return found


def name(source: str) -> str:
    """A source's name, or as much of its path as tells it from others."""
    path = Path(source)
    return str(Path(*path.parts[-2:])) if len(path.parts) > 1 else source


def run_table7(context: Context) -> Results:
    """LaRoSA, with the covariances of each sample and the same coefficients."""
    alphas = context.alphas(LAROSA)
    rows: list[list[Cell]] = [["dense", 0.0, *quality(context.evaluate_dense())]]
    for label, (source, seed) in samples(context).items():
        for sparsity in _SPARSITIES:
            found = context.evaluate(LAROSA.using(source, seed), sparsity, alphas)
            rows.append([label, sparsity, *quality(found)])
    columns = [Column("calibrated on"), Column("sparsity", ".0%"), *QUALITY]
    tables = [Table("table7", f"LaRoSA by calibration set, {context.evaluated}", columns, rows)]
    notes = [
        "Only the covariances come from the sample; the coefficients are those searched on the first one.",
        "The source self is text that the model generates. The second row of samples is another draw from the first "
        "source: differences of its size are chance.",
    ]
    if context.paper is not None and context.paper.name in paper.TABLE_7:
        theirs: list[list[Cell]] = [[*key, value] for key, value in paper.TABLE_7[context.paper.name].items()]
        columns = [Column("calibrated on"), Column("sparsity", ".0%"), Column("perplexity", ".2f")]
        tables.append(Table("table7-paper", "The paper's Table 7", columns, theirs))
        notes.append(PAPER_BUDGET)
    return Results(tables, [], notes)


def run_table8(context: Context) -> Results:
    """How alike the second moments of the samples are, layer by layer."""

    def measure() -> dict[str, dict[str, float]]:
        found = {label: context.moments(*sample) for label, sample in samples(context).items()}
        first = next(iter(found.values()))
        identity = torch.eye(context.sizes.hidden, dtype=torch.float64)
        found["no direction preferred"] = [LayerMoments(identity, identity)] * context.sizes.layers
        return {label: similarities(first, moments) for label, moments in found.items()}

    keys = [
        [label, SELF if source == SELF else context.digest(source, TextSplit.TRAIN), seed]
        for label, (source, seed) in samples(context).items()
    ]
    found = context.measure("covariances", {**context.calibration_key(), "samples": keys}, measure)
    rows: list[list[Cell]] = [[label, *values.values()] for label, values in found.items()]
    columns = [
        Column("calibrated on"),
        *(Column("h1", ".4f"), Column("h3", ".4f"), Column("h1 and h3", ".4f"), Column("lowest layer", ".4f")),
        Column("shared directions", ".1%"),
    ]
    first = next(iter(found))
    tables = [Table("table8", f"Cosine similarity of second moments to those of {first}", columns, rows)]
    notes = [
        "Averaged over layers; the lowest layer is the least similar one, by h1 and h3 together.",
        "The moments are not centred, so a mean that all texts share makes any two of them alike. Shared directions: "
        "the part of the first sample's leading quarter of eigenvectors that lies in the other's; 25% would be chance.",
        "The row without a preferred direction compares with the identity matrix: what similarity means here.",
    ]
    if context.paper is not None and context.paper.name == paper.TABLE_8_MODEL:
        columns = [Column("calibrated on"), Column("cosine similarity", ".3f")]
        title = "The paper's Table 8 (DS-R1-Distill-Qwen2.5-7B)"
        tables.append(Table("table8-paper", title, columns, [[*row] for row in paper.TABLE_8.items()]))
    return Results(tables, [], notes)


def similarities(first: list[LayerMoments], second: list[LayerMoments]) -> dict[str, float]:
    """Cosine similarities of two samples' second moments, averaged over layers, and their shared directions."""
    h1 = [cosine(a.h1, b.h1) for a, b in zip(first, second, strict=True)]
    h3 = [cosine(a.h3, b.h3) for a, b in zip(first, second, strict=True)]
    joint = [cosine(a.h1 + a.h3, b.h1 + b.h3) for a, b in zip(first, second, strict=True)]
    shared = [shared_directions(a.h1 + a.h3, b.h1 + b.h3) for a, b in zip(first, second, strict=True)]
    return {
        "h1": sum(h1) / len(h1),
        "h3": sum(h3) / len(h3),
        "joint": sum(joint) / len(joint),
        "lowest": min(joint),
        "shared": sum(shared) / len(shared),
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two matrices read as vectors."""
    return float((a * b).sum() / (a.norm() * b.norm()))


def shared_directions(a: torch.Tensor, b: torch.Tensor) -> float:
    """How much of the leading quarter of a's eigenvectors lies in the leading quarter of b's, from 0 to 1."""
    count = max(1, len(a) // 4)
    leading_a, leading_b = (torch.linalg.eigh(matrix).eigenvectors[:, -count:] for matrix in (a, b))
    return float((leading_a.T @ leading_b).square().sum() / count)


TABLE_7 = Experiment(
    "table7",
    "LaRoSA by calibration set: quality",
    "The calibration set hardly matters: WikiText2 and Alpaca give nearly the same perplexity and accuracy.",
    run_table7,
)
TABLE_8 = Experiment(
    "table8",
    "Calibration sets: similarity of the covariances",
    "Covariances from WikiText2, Alpaca and C4 are alike: cosine similarities above 0.99.",
    run_table8,
)
