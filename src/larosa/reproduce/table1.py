"""Table 1: accuracy on seven zero-shot tasks and 5-shot MMLU."""

from __future__ import annotations

from functools import partial

from larosa.evaluation.tasks import PAPER_TASKS
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import NOT_REACHABLE, PAPER_BUDGET, Experiment
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.tasks import Accuracies, TaskMeasure, lacks_data, mean_of_seven
from larosa.reproduce.variants import CATS, LAROSA, LAROSA_JOINT, TEAL, reachable

_SPARSITIES = (0.25, 0.40, 0.50)


def run(context: Context) -> Results:
    """The dense model, and CATS, TEAL and LaRoSA at each sparsity that they reach."""
    measure = TaskMeasure(context, PAPER_TASKS)
    dense = measure({"method": "dense"}, context.dense)
    rows = [["dense", 0.0, *_cells(dense), *_paper(context, "dense", 0.0)]]
    for sparsity in _SPARSITIES:
        for variant in (CATS, TEAL, LAROSA, LAROSA_JOINT):
            theirs = _paper(context, "" if variant is LAROSA_JOINT else variant.method, sparsity)
            if not reachable(variant, sparsity, context.sizes):
                rows.append([variant.label, sparsity, NOT_REACHABLE, *[None] * len(PAPER_TASKS), *theirs])
                continue
            key = context.variant_key(variant, sparsity, context.alphas(variant))
            found = measure(key, partial(context.sparsified, variant, sparsity))
            rows.append([variant.label, sparsity, *_cells(found), *theirs])
    rows.append(["chance", None, mean_of_seven(dense, "chance"), *(task["chance"] for task in dense.values())])
    rows[-1] += [None] * (len(rows[0]) - len(rows[-1]))
    columns = [Column("method"), Column("sparsity", ".0%"), Column("mean of seven", ".1%")]
    columns += [Column(f"{task} ({found['metric']})", ".1%") for task, found in dense.items()]
    if context.paper:
        columns += [Column("mean of seven, paper", ".2f"), Column("MMLU, paper", ".2f")]
    return Results([Table("table1", "Accuracy", columns, rows)], [], _notes(context, dense))


def _notes(context: Context, dense: Accuracies) -> list[str]:
    items = ", ".join(
        f"{name} {task['items']} of {task['total_items']} (± {task['stderr']:.1%})"
        for name, task in dense.items()
        if task["stderr"] is not None
    )
    notes = [f"Items scored, with the dense model's standard error: {items}. Differences below it say nothing."]
    if mean_of_seven(dense) < mean_of_seven(dense, "chance") + 0.05:
        notes.append("This model answers near chance: what the table compares here is noise.")
    return [*notes, PAPER_BUDGET] if context.paper else notes


def _cells(found: Accuracies) -> list[Cell]:
    return [mean_of_seven(found), *(task["value"] for task in found.values())]


def _paper(context: Context, method: str, sparsity: float) -> list[Cell]:
    if context.paper is None:
        return []
    return list(paper.TABLE_1.get((method, sparsity), {}).get(context.paper.name, (None, None)))


EXPERIMENT = Experiment(
    "table1",
    "Accuracy: CATS, TEAL, LaRoSA",
    "LaRoSA keeps more accuracy than TEAL and CATS at 25, 40 and 50%; CATS cannot reach 50%.",
    run,
    lacks=lacks_data,
)
