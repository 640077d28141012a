"""Table 3: tokens a second over sparsity."""

from __future__ import annotations

from typing import Any

from larosa.benchmarks.decode import LAROSA
from larosa.reproduce import figures, paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.speed import COLUMNS, baseline, cells, decoding, notes

SPARSITIES = (0.0, 0.25, 0.50, 0.75)
_GPUS = ("A100", "H20")


def run(context: Context) -> Results:
    """Dense decoders, and LaRoSA at the paper's sparsities."""
    tokens = context.settings.lengths[0]
    found = decoding(context, SPARSITIES, tokens)
    base = baseline(found)
    rows: list[list[Cell]] = [
        [*cells(row), base["floor_ms"] / row["floor_ms"], row["speedup"], *_paper(context, row, base)]
        for row in found["rows"]
    ]
    columns = [*COLUMNS, Column("speedup that bytes predict", ".2f"), Column("speedup", ".2f")]
    if context.paper:
        columns += [Column(f"{what}, paper, {gpu}", ".2f") for gpu in _GPUS for what in ("tokens/s", "speedup")]
    title = f"Decoding speed over sparsity, {tokens} tokens after {base['prompt_tokens']}"
    return Results([Table("table3", title, columns, rows)], [_draw(context, found, base)], notes(found))


def _paper(context: Context, row: dict[str, Any], base: dict[str, Any]) -> list[Cell]:
    if context.paper is None:
        return []
    method = {LAROSA: "larosa", base["row"]: "dense"}.get(row["row"])
    cells: list[Cell] = []
    for gpu in _GPUS:
        models = paper.TABLE_3.get((gpu, method or "", row["sparsity"]), {})
        cells += models.get(context.paper.name, (None, None))
    return cells


def _draw(context: Context, found: dict[str, Any], base: dict[str, Any]) -> Picture:
    ours = [row for row in found["rows"] if row["row"] == LAROSA]
    curves = {
        "LaRoSA": [row["speedup"] for row in ours],
        "what bytes predict": [base["floor_ms"] / row["floor_ms"] for row in ours],
    }
    if context.paper and context.paper.name in paper.TABLE_3["A100", "dense", 0.0]:
        for gpu in _GPUS:
            printed = [paper.TABLE_3[gpu, "larosa", sparsity][context.paper.name] for sparsity in SPARSITIES]
            curves[f"the paper's, {gpu}"] = [speedup for _, speedup in printed]
    figure, axes = figures.subplots(size=(7, 4.2))
    for (name, values), colour, marker in figures.styled(curves.items()):
        axes.plot([100 * s for s in SPARSITIES], values, marker=marker, color=colour, label=name)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set(
        xlabel="weights skipped per token (%)",
        ylabel=f"speedup over {base['row']}",
        xticks=[100 * sparsity for sparsity in SPARSITIES],
        ylim=(0, None),
    )
    axes.legend()
    return Picture("table3", f"Speedup of decoding over {base['row']} (dashed), by sparsity.", figures.to_png(figure))


EXPERIMENT = Experiment(
    "table3",
    "Decoding speed over sparsity",
    "On A100 and H20, LaRoSA decodes 0.88 to 0.92, 1.10 to 1.24, 1.30 to 1.51 and 1.68 to 1.92 times as fast as the "
    "dense model at 0, 25, 50 and 75%.",
    run,
    left_out_where_refused=True,
)
