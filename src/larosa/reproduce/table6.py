"""Table 6: how many rotations a model needs, and what their adapters cost."""

from __future__ import annotations

from larosa.config import Covariance, Method, Rotation
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import PAPER_BUDGET, QUALITY, Experiment, quality, sites_text
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.table19 import tflops
from larosa.reproduce.variants import LAROSA, LAROSA_JOINT, TOPK_GS, Variant

_SPARSITIES = (0.25, 0.50, 0.60)

VARIANTS = (
    TOPK_GS,
    Variant("random", Method.LAROSA, Rotation.RANDOM, searched=True),
    Variant("model", Method.LAROSA, Rotation.MODEL, Covariance.H1, searched=True),
    LAROSA,
    LAROSA_JOINT,
    Variant("block", Method.LAROSA, Rotation.BLOCK, Covariance.H1, searched=True),
)


def run(context: Context) -> Results:
    """Every level of rotation."""
    rows: list[list[Cell]] = []
    for variant in VARIANTS:
        for sparsity in _SPARSITIES:
            found = context.evaluate(variant, sparsity)
            theirs = _paper(context, variant, sparsity) if context.paper else []
            flops = tflops(context.config, variant.rotation)
            rows.append(
                [
                    _label(variant),
                    sparsity,
                    *quality(found),
                    flops,
                    flops / tflops(context.config, Rotation.NONE),
                    context.sizes.num_adapters(variant.rotation),
                    *theirs,
                ]
            )
    columns = [
        *(Column("rotation"), Column("sparsity", ".0%"), *QUALITY),
        *(Column("TFLOPs", ".4g"), Column("of dense", ".3f"), Column("adapters", "d")),
    ]
    if context.paper:
        columns += [Column("perplexity, paper", ".2f"), Column("TFLOPs, paper", ".2f")]
    notes = [
        "TFLOPs are for 2048 tokens and count every weight, as the paper's do: what sparsity saves is not in them.",
        "Coefficients by calibration perplexity at 50%: without rotation "
        f"{sites_text(context.alphas(TOPK_GS))}; with any, LaRoSA's own {sites_text(context.alphas(LAROSA))}.",
    ]
    if context.paper:
        notes.append(PAPER_BUDGET)
    return Results([Table("table6", f"Levels of rotation, {context.evaluated}", columns, rows)], [], notes)


def _label(variant: Variant) -> str:
    return {TOPK_GS: "none", LAROSA: "layer", LAROSA_JOINT: "layer, PCA of h1 and h3"}.get(variant, variant.label)


def _paper(context: Context, variant: Variant, sparsity: float) -> list[Cell]:
    assert context.paper is not None
    if variant.covariance is Covariance.JOINT:
        return [None, None]
    name = context.paper.name
    return [
        paper.TABLE_6.get(name, {}).get((variant.rotation, sparsity)),
        paper.TABLE_6_TFLOPS.get(name, {}).get(variant.rotation),
    ]


EXPERIMENT = Experiment(
    "table6",
    "Levels of rotation: none, model, layer, block",
    "One rotation for the whole model does not help; one a layer does, at little cost; one a block adds little.",
    run,
)
