"""What each part of recipe `best` adds to the paper's method: not in the paper, which has none of them."""

from __future__ import annotations

from dataclasses import replace

from larosa.config import Compensation, Covariance, Method, Rotation, RotationObjective, Score, Search
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.settings import SPARSITIES
from larosa.reproduce.variants import LAROSA, Variant

PAPER = Variant("the paper's method", Method.LAROSA, Rotation.LAYER)
GRID = replace(LAROSA, label="  with its grid of coefficients")
JOINT = replace(PAPER, label="+ PCA of h1 and h3", covariance=Covariance.JOINT)
SCORED = replace(JOINT, label="+ weight-aware score", score=Score.WEIGHTS)
VALUES = replace(SCORED, label="+ value rotation", value_rotation=True)
OUTPUTS = replace(VALUES, label="+ output-aware rotation", objective=RotationObjective.OUTPUTS)
SENSITIVE = replace(OUTPUTS, label="  with search by sensitivity", allocation=Search.SENSITIVITY)
FISHER_SCORED = replace(OUTPUTS, label="+ Fisher score", score=Score.FISHER)
FISHER_ROTATED = replace(FISHER_SCORED, label="+ Fisher rotation", objective=RotationObjective.FISHER)
BEST = replace(FISHER_ROTATED, label="+ Fisher search = best", allocation=Search.FISHER)
COMPENSATED = replace(BEST, label="  with compensation", compensation=Compensation.LINEAR)

VARIANTS = (PAPER, GRID, JOINT, SCORED, VALUES, OUTPUTS, SENSITIVE, FISHER_SCORED, FISHER_ROTATED, BEST, COMPENSATED)


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
        "Each row marked + has the parts of all such rows above it. All rows skip the same fraction of weights, at "
        "every site alike but where a grid or search is named.",
    ]
    return Results([Table("recipe", f"The parts of recipe best, {context.evaluated}", columns, rows)], [], notes)


EXPERIMENT = Experiment(
    "recipe",
    "The parts of recipe best, one after another",
    "nothing of the kind: these are this package's extensions, which cost nothing at run time.",
    run,
)
