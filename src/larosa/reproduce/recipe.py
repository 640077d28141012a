"""What each part of recipe `best` adds to the paper's method: not in the paper, which has none of them."""

from __future__ import annotations

from dataclasses import replace

from larosa.config import Covariance, Method, Rotation, RotationObjective, Score
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.settings import SPARSITIES
from larosa.reproduce.variants import Variant

PAPER = Variant("the paper's method", Method.LAROSA, Rotation.LAYER)
JOINT = replace(PAPER, label="+ PCA of h1 and h3", covariance=Covariance.JOINT)
SCORED = replace(JOINT, label="+ weight-aware score", score=Score.WEIGHTS)
VALUES = replace(SCORED, label="+ value rotation", value_rotation=True)
BEST = replace(VALUES, label="+ output-aware rotation = best", objective=RotationObjective.OUTPUTS)
ALLOCATED = replace(BEST, label="+ search by sensitivity", allocated=True)

VARIANTS = (PAPER, JOINT, SCORED, VALUES, BEST, ALLOCATED)


def run(context: Context) -> Results:
    """Every row at every sparsity, each row with all the parts above it."""
    rows: list[list[Cell]] = [["dense", 0.0, *quality(context.evaluate_dense()), None, None]]
    for sparsity in (*SPARSITIES, 0.70):
        paper = context.evaluate(PAPER, sparsity)
        for variant in VARIANTS:
            found = context.evaluate(variant, sparsity)
            share = found["kl"] / paper["kl"] if paper["kl"] else None
            rows.append([variant.label, sparsity, *quality(found), share, found["skipped"]["mean"]])
    columns = [
        Column("parts"),
        Column("sparsity", ".0%"),
        *QUALITY,
        Column("KL, of the paper's", ".2f"),
        Column("weights skipped, measured", ".1%"),
    ]
    notes = [
        "Each row has the parts of all rows above it. All skip the same fraction of weights; all coefficients are 1, "
        "so none has been searched for but in the last row.",
    ]
    return Results([Table("recipe", f"The parts of recipe best, {context.evaluated}", columns, rows)], [], notes)


EXPERIMENT = Experiment(
    "recipe",
    "The parts of recipe best, one after another",
    "nothing of the kind: these are this package's extensions, which cost nothing at run time.",
    run,
)
