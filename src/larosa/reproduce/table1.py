"""Table 1: accuracy on seven zero-shot tasks and 5-shot MMLU."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from larosa.evaluation.tasks import PAPER_TASKS, evaluate_tasks
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import NOT_REACHABLE, PAPER_BUDGET, Experiment
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.settings import ReproduceSettings
from larosa.reproduce.variants import CATS, LAROSA, LAROSA_JOINT, TEAL, reachable

_SPARSITIES = (0.25, 0.40, 0.50)
_MMLU = "mmlu"

#: MMLU's limit counts items of each of its 57 subjects, the others' items of the task.
_MMLU_SHARE = 20


def run(context: Context) -> Results:
    """The dense model, and CATS, TEAL and LaRoSA at each sparsity that they reach."""
    dense = _measure(context, {"method": "dense"}, context.dense)
    rows = [["dense", 0.0, *_cells(dense), *_paper(context, "dense", 0.0)]]
    for sparsity in _SPARSITIES:
        for variant in (CATS, TEAL, LAROSA, LAROSA_JOINT):
            theirs = _paper(context, "" if variant is LAROSA_JOINT else variant.method, sparsity)
            if not reachable(variant, sparsity, context.sizes):
                rows.append([variant.label, sparsity, NOT_REACHABLE, *[None] * len(PAPER_TASKS), *theirs])
                continue
            key = context.variant_key(variant, sparsity, context.alphas(variant))
            found = _measure(context, key, partial(context.sparsified, variant, sparsity))
            rows.append([variant.label, sparsity, *_cells(found), *theirs])
    rows.append(["chance", None, dense["acc7_chance"], *(task["chance"] for task in dense["tasks"].values())])
    rows[-1] += [None] * (len(rows[0]) - len(rows[-1]))
    columns = [Column("method"), Column("sparsity", ".0%"), Column("mean of seven", ".1%")]
    columns += [Column(f"{task} ({found['metric']})", ".1%") for task, found in dense["tasks"].items()]
    if context.paper:
        columns += [Column("mean of seven, paper", ".2f"), Column("MMLU, paper", ".2f")]
    return Results([Table("table1", "Accuracy", columns, rows)], [], _notes(context, dense))


def _notes(context: Context, dense: dict[str, Any]) -> list[str]:
    items = ", ".join(
        f"{name} {task['items']} of {task['total_items']} (± {task['stderr']:.1%})"
        for name, task in dense["tasks"].items()
        if task["stderr"] is not None
    )
    notes = [f"Items scored, with the dense model's standard error: {items}. Differences below it say nothing."]
    if dense["acc7"] < dense["acc7_chance"] + 0.05:
        notes.append("This model answers near chance: what the table compares here is noise.")
    return [*notes, PAPER_BUDGET] if context.paper else notes


def _measure(context: Context, key: dict[str, Any], model: Callable[[], Any]) -> dict[str, Any]:
    settings = context.settings

    def measure() -> dict[str, Any]:
        loaded = model()
        found = evaluate_tasks(
            loaded, context.tokenizer.plain, data=settings.task_data, limit=limits(settings), seed=settings.seed
        )
        return found.to_dict()

    tasks = {"limit": limits(settings), "data": _digest(settings.task_data), "seed": settings.seed}
    return context.measure("tasks", {**key, "tasks": tasks}, measure)


def limits(settings: ReproduceSettings) -> dict[str, int] | None:
    """`--limit` by task: so many items of each, and a twentieth of that of each MMLU subject."""
    if settings.limit is None:
        return None
    return {task: -(-settings.limit // _MMLU_SHARE) if task == _MMLU else settings.limit for task in PAPER_TASKS}


def _digest(folder: Path | None) -> str | None:
    """A hash of the task files."""
    if folder is None:
        return None
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _cells(found: dict[str, Any]) -> list[Cell]:
    return [found["acc7"], *(task["value"] for task in found["tasks"].values())]


def _paper(context: Context, method: str, sparsity: float) -> list[Cell]:
    if context.paper is None:
        return []
    return list(paper.TABLE_1.get((method, sparsity), {}).get(context.paper.name, (None, None)))


EXPERIMENT = Experiment(
    "table1",
    "Accuracy: CATS, TEAL, LaRoSA",
    "LaRoSA keeps more accuracy than TEAL and CATS at 25, 40 and 50%; CATS cannot reach 50%.",
    run,
    lacks=lambda settings: (
        None if settings.task_data else "needs --task-data DIR; run alone, table1 downloads the tasks"
    ),
)
