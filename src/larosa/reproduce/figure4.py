"""Figure 4: speedup over output length, and with it Figure 3d."""

from __future__ import annotations

from typing import Any

from larosa.reproduce import figures
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.results import Cell, Column, Picture, Results, Table
from larosa.reproduce.settings import MAIN_SPARSITY
from larosa.reproduce.speed import COLUMNS, baseline, cells, decoding, label, notes


def run(context: Context) -> Results:
    """Every decoder at every length, each length measured on its own with a cache just as long."""
    found = {
        length: decoding(context, (MAIN_SPARSITY,), length, teal_sparsities=(MAIN_SPARSITY,))
        for length in sorted(set(context.settings.lengths))
    }
    rows: list[list[Cell]] = [
        [length, *cells(row), row["speedup"]] for length, benchmark in found.items() for row in benchmark["rows"]
    ]
    columns = [Column("tokens decoded", "d"), *COLUMNS, Column("speedup", ".2f")]
    first = next(iter(found.values()))
    about = notes(first)
    if any(label(row) == "TEAL" for row in first["rows"]):
        about.append("TEAL is the compiled decoder with TEAL's kernel, written from its paper's description.")
    else:
        about.append("TEAL's kernel is for GPUs: here LaRoSA stands beside dense decoding alone.")
    about.append("The paper shows its speeds as curves without numbers, so that none stand here.")
    title = f"Decoding speed over output length at {MAIN_SPARSITY:.0%}"
    return Results([Table("figure4", title, columns, rows)], [_draw(found)], about)


def _draw(found: dict[int, dict[str, Any]]) -> Picture:
    base = baseline(next(iter(found.values())))["row"]
    curves: dict[str, list[float]] = {}
    for benchmark in found.values():
        for row in benchmark["rows"]:
            if row["row"] != base:
                curves.setdefault(label(row), []).append(row["speedup"])
    figure, axes = figures.subplots(size=(7, 4.2))
    for (name, values), colour, marker in figures.styled(curves.items()):
        axes.plot(list(found), values, marker=marker, color=colour, label=name)
    axes.axhline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens decoded", ylabel=f"speedup over {base}", ylim=(0, None))
    axes.set_xticks(list(found), labels=[str(length) for length in found])
    axes.legend()
    caption = f"Speedup over {base} (dashed) by output length; LaRoSA, and TEAL where it is measured, at 50%."
    return Picture("figure4", caption, figures.to_png(figure))


EXPERIMENT = Experiment(
    "figure4",
    "Decoding speed over output length",
    "At 50% on an A100 LaRoSA's speedup is steadier than TEAL's from 128 to 2048 tokens, and larger for long outputs.",
    run,
    left_out_where_refused=True,
)
