"""Accuracies on tasks as measurements: one model on one task each, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from larosa.evaluation.tasks import DEFAULT_BATCH_SIZE, PAPER_TASKS, ZERO_SHOT_TASKS, evaluate_tasks
from larosa.evaluation.tasks.local import read_task
from larosa.reproduce.context import Context
from larosa.reproduce.settings import ReproduceSettings

#: A model's results by task: `TaskResult.to_dict`, with `scores`.
Accuracies = dict[str, dict[str, Any]]

#: Prompts at a time on a GPU, which few leave idle.
_GPU_BATCH = 64
#: MMLU's limit counts items of each of its 57 subjects, the others' items of the task.
_MMLU_SHARE = 20


class TaskMeasure:
    """Measures models on tasks, one after the other, so that a run that was stopped goes on where it was."""

    def __init__(self, context: Context, tasks: tuple[str, ...]) -> None:
        """Look at the task files, so that what is wrong with the last of them stops before the first is scored.

        Raises:
            LarosaError: a file that is missing or malformed.
        """
        self._context, self._tasks = context, tasks
        folder = context.settings.task_data
        self._data: str | None = None
        if folder is not None:
            self._data = _digest(folder)
            for task in tasks:
                read_task(task, folder)

    def __call__(self, key: dict[str, Any], model: Callable[[], Any]) -> Accuracies:
        """One model's accuracies.

        Args:
            key: what it follows from.
            model: gives it, where anything has to be measured.
        """
        return {task: self._measure(task, key, model) for task in self._tasks}

    def _measure(self, task: str, key: dict[str, Any], model: Callable[[], Any]) -> dict[str, Any]:
        settings = self._context.settings
        limit = limits(settings).get(task)

        def measure() -> dict[str, Any]:
            loaded, tokenizer = model(), self._context.tokenizer.plain
            found = evaluate_tasks(
                loaded,
                tokenizer,
                [task],
                data=settings.task_data,
                limit=limit,
                seed=settings.seed,
                batch_size=DEFAULT_BATCH_SIZE if self._context.device == "cpu" else _GPU_BATCH,
            )[task]
            return {**found.to_dict(), "scores": found.scores}

        depends = {"task": task, "limit": limit, "data": self._data, "seed": settings.seed}
        return self._context.measure("tasks", {**key, "tasks": depends}, measure)


def limits(settings: ReproduceSettings) -> dict[str, int]:
    """`--limit` by task: so many items of each, and a twentieth of that of each MMLU subject; empty without one."""
    if settings.limit is None:
        return {}
    return {task: -(-settings.limit // _MMLU_SHARE) if task == "mmlu" else settings.limit for task in PAPER_TASKS}


def mean_of_seven(found: Accuracies, of: str = "value") -> float:
    """The paper's Acc7, or what guessing gives for it (`chance`)."""
    return fmean(found[task][of] for task in ZERO_SHOT_TASKS)


def lacks_data(settings: ReproduceSettings) -> str | None:
    """Why a run of everything leaves tasks out."""
    return None if settings.task_data else "needs --task-data DIR; run alone, it downloads the tasks"


def _digest(folder: Path) -> str:
    """A hash of the task files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
