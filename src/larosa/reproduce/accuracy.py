"""What sparsity costs in accuracy, with errors: recipe best beside what it is compared with. Not in the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from statistics import variance

from larosa.evaluation.tasks import ZERO_SHOT_TASKS
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import Experiment
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.tasks import Accuracies, TaskMeasure, lacks_data, mean_of_seven
from larosa.reproduce.variants import BEST, LAROSA, TEAL, TOPK

SPARSITIES = (0.25, 0.40, 0.50)

VARIANTS = (TOPK, TEAL, replace(LAROSA, label="paper"), BEST)


def run(context: Context) -> Results:
    """The dense model, and every method at every sparsity, on the seven zero-shot tasks."""
    measure = TaskMeasure(context, ZERO_SHOT_TASKS)
    dense = measure({"method": "dense"}, context.dense)
    rows: list[list[Cell]] = [["dense", 0.0, *_mean(dense), None, None, *_cells(dense)]]
    for variant in VARIANTS:
        for sparsity in SPARSITIES:
            key = context.variant_key(variant, sparsity, context.alphas(variant))
            found = measure(key, partial(context.sparsified, variant, sparsity))
            rows.append([variant.label, sparsity, *_mean(found), *_less(found, dense), *_cells(found)])
    chance = [cell for task in dense.values() for cell in (task["chance"], None)]
    rows.append(["chance", None, mean_of_seven(dense, "chance"), None, None, None, *chance])
    columns = [Column("method"), Column("sparsity", ".0%"), Column("mean of seven", ".2%"), Column("±", ".2%")]
    columns += [Column("less dense", "+.2%"), Column("± less dense", ".2%")]
    for task, result in dense.items():
        columns += [Column(f"{task} ({result['metric']})", ".1%"), Column(f"± {task}", ".1%")]
    items = ", ".join(f"{task} {result['items']} of {result['total_items']}" for task, result in dense.items())
    notes = [
        f"Items scored: {items}.",
        "± is a standard error. That of the difference from dense is paired, item by item: both models answer the same "
        "questions, so that it is smaller than the errors of the two.",
        "Prompts are sparse like all tokens, but for the first.",
    ]
    return Results([Table("accuracy", "Accuracy on the seven zero-shot tasks", columns, rows)], [], notes)


def _mean(found: Accuracies) -> list[Cell]:
    return [mean_of_seven(found), _error_of_mean(task["stderr"] for task in found.values())]


def _cells(found: Accuracies) -> list[Cell]:
    return [cell for task in found.values() for cell in (task["value"], task["stderr"])]


def _less(found: Accuracies, dense: Accuracies) -> list[Cell]:
    """The difference of the means from dense, and its paired standard error."""
    return [
        mean_of_seven(found) - mean_of_seven(dense),
        _error_of_mean(_paired_error(found[task]["scores"], dense[task]["scores"]) for task in found),
    ]


def _paired_error(scores: list[int], others: list[int]) -> float | None:
    """The standard error of the mean difference of two models on the same items; None of one item."""
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    return math.sqrt(variance(differences) / len(differences)) if len(differences) > 1 else None


def _error_of_mean(errors: Iterable[float | None]) -> float | None:
    """The standard error of the plain mean of independent numbers; None where one has none."""
    known = list(errors)
    squares = [error**2 for error in known if error is not None]
    return math.sqrt(sum(squares)) / len(known) if len(squares) == len(known) else None


EXPERIMENT = Experiment(
    "accuracy",
    "Accuracy with errors: TopK, TEAL, paper, best",
    "Table 1 has accuracies without errors; MMLU and CATS are in `table1`.",
    run,
    lacks=lacks_data,
)
