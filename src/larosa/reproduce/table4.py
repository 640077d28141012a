"""Table 4: problems that a model reasons about: MATH-500, GPQA-Diamond and AIME 2024; and GSM8K."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError
from larosa.evaluation.reasoning import PROBLEM_SETS, Problem, complete, read_problems, score
from larosa.evaluation.reasoning.completions import TEMPERATURE, TOP_P
from larosa.reproduce import paper
from larosa.reproduce.context import Context
from larosa.reproduce.experiment import PAPER_BUDGET, Experiment
from larosa.reproduce.results import Cell, Column, Results, Table
from larosa.reproduce.settings import ReproduceSettings
from larosa.reproduce.variants import BEST, LAROSA

_SPARSITIES = (0.25, 0.40, 0.50)

_VARIANTS = {"paper": LAROSA, "best": BEST}

Found = dict[str, dict[str, Any]]


def run(context: Context) -> Results:
    """The dense model, the paper's method and recipe best at each sparsity, on the problem sets that are there."""
    sets = _problems(context.settings)
    dense = _measure(context, sets, {"method": "dense"}, context.dense)
    rows = [["dense", 0.0, *_cells(dense), *_paper(context, sets, "dense", 0.0)]]
    for label, variant in _VARIANTS.items():
        for sparsity in _SPARSITIES:
            key = context.variant_key(variant, sparsity, context.alphas(variant))
            found = _measure(context, sets, key, partial(context.sparsified, variant, sparsity))
            rows.append([label, sparsity, *_cells(found), *_paper(context, sets, label, sparsity)])
    columns = [Column("method"), Column("sparsity", ".0%")]
    for name in sets:
        columns += [Column(_label(name), ".1%"), Column(f"± {_label(name)}", ".1%")]
        columns += [Column(f"cut off, {_label(name)}", ".0%")]
    columns += [Column(f"{_label(name)}, paper", ".1f") for name in _paper_sets(context, sets)]
    table = Table("table4", "Reasoning: pass@1, averaged over samples", columns, rows)
    return Results([table], [], _notes(context, sets, dense))


def _problems(settings: ReproduceSettings) -> dict[str, list[Problem]]:
    """The first problems of every set that the folder of task files has.

    Raises:
        LarosaError: it has none, or a malformed one.
    """
    lacking = _lacks_data(settings)
    if lacking is not None:
        raise LarosaError(f"table4 {lacking}")
    folder = settings.task_data
    assert folder is not None, "it lacks nothing"
    return {name: read_problems(name, folder)[: settings.limit] for name in _there(folder)}


def _there(folder: Path) -> list[str]:
    """The problem sets that a folder of task files has."""
    return [name for name, each in PROBLEM_SETS.items() if (folder / each.file).exists()]


def _label(name: str) -> str:
    return PROBLEM_SETS[name].label


def _measure(context: Context, sets: dict[str, list[Problem]], key: dict[str, Any], model: Callable[[], Any]) -> Found:
    """A model's results by problem set."""
    return {name: _measure_set(context, name, problems, key, model) for name, problems in sets.items()}


def _measure_set(
    context: Context, name: str, problems: list[Problem], key: dict[str, Any], model: Callable[[], Any]
) -> dict[str, Any]:
    settings = context.settings
    depends = {"set": name, "max_new_tokens": settings.max_new_tokens, "seed": settings.seed}
    drawn = {**key, "completions": {**depends, "temperature": TEMPERATURE, "top_p": TOP_P}}

    def measure() -> dict[str, Any]:
        loaded = model()
        completions = complete(
            loaded,
            context.tokenizer.plain,
            problems,
            context.log("completions", drawn),
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        )
        return score(problems, completions).to_dict()

    asked = {"samples": settings.samples, "problems": [problem.prompt + problem.answer for problem in problems]}
    return context.measure("reasoning", {**drawn, "asked": asked}, measure)


def _cells(found: Found) -> list[Cell]:
    return [cell for result in found.values() for cell in (result["pass_at_1"], result["stderr"], result["cut_off"])]


def _paper_sets(context: Context, sets: dict[str, list[Problem]]) -> list[str]:
    theirs = {} if context.paper is None else paper.TABLE_4.get(context.paper.name, {})
    return [name for name in paper.TABLE_4_SETS if theirs and name in sets]


def _paper(context: Context, sets: dict[str, list[Problem]], method: str, sparsity: float) -> list[Cell]:
    names = _paper_sets(context, sets)
    if not names or context.paper is None or method == "best":
        return [None] * len(names)
    row = dict(zip(paper.TABLE_4_SETS, paper.TABLE_4[context.paper.name][sparsity], strict=True))
    return [row[name] for name in names]


def _notes(context: Context, sets: dict[str, list[Problem]], dense: Found) -> list[str]:
    settings = context.settings
    counts = ", ".join(f"{_label(name)} {len(problems)}" for name, problems in sets.items())
    notes = [
        f"Problems: {counts}; {settings.samples} samples of each at temperature {TEMPERATURE}, top-p {TOP_P}, cut off "
        f"after {settings.max_new_tokens} tokens or where the model's context ends. Prompts are those of Open-R1's "
        "evaluation; math-verify says which answers are right.",
        "± is the standard error over problems.",
    ]
    absent = [f"{each.label} ({each.file})" for name, each in PROBLEM_SETS.items() if name not in sets]
    if absent:
        notes.append(f"Not in the folder of task files, and left out: {', '.join(absent)}.")
    if all(result["pass_at_1"] < 0.05 for result in dense.values()):
        notes.append("The dense model solves next to none of these problems: what the table compares here is noise.")
    if _paper_sets(context, sets):
        notes += ["The paper's numbers are of the distilled reasoning model of this shape.", PAPER_BUDGET]
    return notes


def _lacks_data(settings: ReproduceSettings) -> str | None:
    if settings.task_data is None:
        return "needs --task-data DIR with the problems (docs/tasks.md lists the files)"
    if not _there(settings.task_data):
        files = ", ".join(each.file for each in PROBLEM_SETS.values())
        return f"needs a problem set in {settings.task_data}: {files}"
    return None


EXPERIMENT = Experiment(
    "table4",
    "Reasoning: MATH-500, GPQA-Diamond, AIME 2024, GSM8K",
    "At 25% reasoning models lose little; at 50% 5 to 9 points of MATH-500.",
    run,
    lacks=_lacks_data,
)
