"""Table 10: the grid of sparsity coefficients, whole."""

from __future__ import annotations

from typing import Any

from larosa.config import SITES, PerSite
from larosa.reproduce import figures, paper
from larosa.reproduce.context import Context, best_point
from larosa.reproduce.experiment import QUALITY, Experiment, quality
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.settings import MAIN_SPARSITY
from larosa.reproduce.variants import LAROSA, TOPK_GS

Points = list[tuple[PerSite, dict[str, Any]]]


def run(context: Context) -> Results:
    """All points on the calibration sequences, and the chosen ones on the evaluated text."""
    columns = [Column(f"alpha {site}", ".2f") for site in SITES]
    chosen: list[list[Cell]] = []
    every: list[list[Cell]] = []
    grids = {}
    for variant in (TOPK_GS, LAROSA):
        grids[variant.label] = points = context.grid(variant)
        every += [[variant.label, *_four(alphas), found["kl"], found["perplexity"]] for alphas, found in points]
        picks = {"all 1": PerSite()}
        picks |= {
            f"lowest {name}": best_point(points, by)[0] for name, by in (("perplexity", "perplexity"), ("KL", "kl"))
        }
        for name, alphas in picks.items():
            found = context.evaluate(variant, MAIN_SPARSITY, alphas)
            chosen.append([variant.label, name, *_four(alphas), *quality(found)])
    tables = [
        Table(
            "table10",
            f"Coefficients chosen on calibration sequences, at 50%, {context.evaluated}",
            [Column("method"), Column("chosen by"), *columns, *QUALITY],
            chosen,
        ),
        Table(
            "table10-grid",
            f"Every point of the grid at 50%, on {context.settings.search_sequences} calibration sequences",
            [Column("method"), *columns, QUALITY[0], QUALITY[2]],
            every,
        ),
    ]
    if context.paper is not None:
        tables += _paper(context.paper.name)
    return Results(tables, [_draw(grids)], _notes())


def _four(alphas: PerSite) -> list[Cell]:
    return [alphas[site] for site in SITES]


def _paper(name: str) -> list[Table]:
    tables = []
    if name == paper.TABLE_10_MODEL:
        columns = [Column("method"), Column("alpha h1", ".2f"), Column("alpha h3", ".2f"), Column("perplexity", ".2f")]
        rows: list[list[Cell]] = [[method, *point, value] for method, point, value in paper.TABLE_10]
        tables.append(Table("table10-paper", "The paper's Table 10, at 60%", columns, rows))
    columns = [Column(f"alpha {site}", ".2f") for site in SITES]
    tables.append(Table("table11-paper", "The paper's Table 11 for this model", columns, [[*paper.TABLE_11[name]]]))
    return tables


def _notes() -> list[str]:
    return [
        "Alpha scales the sparsity of its site: below 1, more is kept there. The other two coefficients follow from "
        "the budget, here the fraction of weights skipped, attention and MLP each on their own.",
        "The paper's Table 10 is at 60% and under its own budget.",
        "Points that would ask a site to drop more than everything at 60% are left out, so that the same coefficients "
        "hold at every sparsity.",
    ]


def _draw(grids: dict[str, Points]) -> Picture:
    figure, axes = figures.subplots(2, len(grids), size=(9, 7.2), squeeze=False)
    for column, (label, points) in enumerate(grids.items()):
        for row, (by, name) in enumerate((("kl", "KL divergence to dense (nats/token)"), ("perplexity", "perplexity"))):
            _draw_map(figure, axes[row][column], points, by, f"{label}: {name}")
    caption = (
        "Divergence and perplexity on calibration sequences over alpha 1 and alpha 3 at 50%. Crosses mark the "
        "lowest value, circles all coefficients at 1; white points are outside the budget."
    )
    return Picture("table10", caption, figures.to_png(figure))


def _draw_map(figure: Any, axes: Any, points: Points, by: str, title: str) -> None:
    import numpy as np

    firsts = sorted({alphas.h1 for alphas, _ in points})
    thirds = sorted({alphas.h3 for alphas, _ in points})
    values = np.full((len(thirds), len(firsts)), np.nan)
    for alphas, found in points:
        values[thirds.index(alphas.h3), firsts.index(alphas.h1)] = found[by]
    best = best_point(points, by)[0]
    image = axes.imshow(values, origin="lower", cmap="cividis", aspect="auto")
    axes.plot(firsts.index(best.h1), thirds.index(best.h3), "x", color="white", markersize=10, markeredgewidth=2.5)
    if 1.0 in firsts and 1.0 in thirds:
        axes.plot(
            *(firsts.index(1.0), thirds.index(1.0), "o"),
            **{"color": "white", "markersize": 9, "fillstyle": "none", "markeredgewidth": 2},
        )
    axes.set(title=title, xlabel="alpha 1 (h1: input of q, k, v)", ylabel="alpha 3 (h3: input of gate, up)")
    axes.set_xticks(range(len(firsts)), [f"{value:.2f}" for value in firsts], rotation=45)
    axes.set_yticks(range(len(thirds)), [f"{value:.2f}" for value in thirds])
    axes.grid(False)
    figure.colorbar(image, ax=axes)


EXPERIMENT = Experiment(
    "table10",
    "The grid of sparsity coefficients",
    "Moving sparsity from h1 and h3 to h2 and h4 lowers perplexity; the best point of LLaMA3-8B is (0.8, 0.8).",
    run,
)
