"""Table 2: perplexity over sparsity, with the divergence from the dense model that the paper does not show."""

from __future__ import annotations

from larosa.config import Method
from larosa.reproduce import figures, paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import NOT_REACHABLE, PAPER_BUDGET, QUALITY, Experiment, quality, sites_text
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.settings import SPARSITIES
from larosa.reproduce.variants import CATS, LAROSA, LAROSA_JOINT, TEAL, TOPK, reachable

VARIANTS = (CATS, TEAL, TOPK, LAROSA, LAROSA_JOINT)


def run(context: Context) -> Results:
    """Every method at every sparsity that it reaches."""
    dense = context.evaluate_dense()
    rows: list[list[Cell]] = [["dense", 0.0, None, None, dense["perplexity"], None, *_paper(context, "dense", 0.0)]]
    curves: dict[str, list[tuple[float, float]]] = {}
    for variant in VARIANTS:
        for sparsity in SPARSITIES:
            theirs = [] if variant is LAROSA_JOINT else _paper(context, variant.method, sparsity)
            theirs = theirs or ([None] if context.paper else [])
            if not reachable(variant, sparsity, context.sizes):
                rows.append([variant.label, sparsity, NOT_REACHABLE, None, None, None, *theirs])
                continue
            found = context.evaluate(variant, sparsity)
            rows.append([variant.label, sparsity, *quality(found), found["skipped"]["mean"], *theirs])
            curves.setdefault(variant.label, []).append((sparsity, found["kl"]))
    columns = [Column("method"), Column("sparsity", ".0%"), *QUALITY, Column("weights skipped, measured", ".1%")]
    if context.paper:
        columns.append(Column("perplexity, paper", ".2f"))
    title = f"Quality over sparsity, {context.evaluated}"
    return Results([Table("table2", title, columns, rows)], [_draw(curves)], _notes(context))


def _paper(context: Context, method: str, sparsity: float) -> list[Cell]:
    if context.paper is None:
        return []
    return [paper.TABLE_2.get((method, sparsity), {}).get(context.paper.name)]


def _notes(context: Context) -> list[str]:
    reach = context.sizes.reach(Method.CATS)
    notes = [
        f"CATS zeroes the gate's output, which skips rows of up and columns of down: {reach:.1%} of this model's "
        "weights at most.",
        "Coefficients of both LaRoSA rows, by calibration perplexity at 50%, used at every sparsity: "
        f"{sites_text(context.alphas(LAROSA))}.",
        "Perplexity can fall while the model moves away from the dense one; the divergence cannot.",
    ]
    return [*notes, PAPER_BUDGET] if context.paper else notes


def _draw(curves: dict[str, list[tuple[float, float]]]) -> Picture:
    figure, axes = figures.subplots(size=(7, 4.2))
    for (label, points), colour, marker in figures.styled(curves.items()):
        axes.plot([100 * x for x, _ in points], [y for _, y in points], marker=marker, color=colour, label=label)
    axes.set(
        xlabel="weights skipped per token (%)",
        ylabel="KL divergence to dense (nats per token)",
        xticks=[100 * sparsity for sparsity in SPARSITIES],
        yscale="log",
    )
    axes.legend()
    return Picture("table2", "Distance from the dense model over sparsity; lower is better.", figures.to_png(figure))


EXPERIMENT = Experiment(
    "table2",
    "Quality over sparsity: CATS, TEAL, TopK, LaRoSA",
    "LaRoSA has the lowest perplexity of all methods at 25, 40, 50 and 60%; CATS cannot reach 50%.",
    run,
)
