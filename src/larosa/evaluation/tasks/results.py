"""What a task evaluation measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import sqrt
from statistics import fmean
from typing import Any

from larosa.evaluation.tasks.catalogue import ZERO_SHOT_TASKS


@dataclass(frozen=True)
class TaskResult:
    """The accuracy of one model on one task.

    `value` and `stderr` are lm-eval's, as fractions; `stderr` is None where lm-eval gives none (a task
    or subject of one item). `items` were scored of `total_items` in the data. `chance` is what guessing
    evenly among the answers of the scored items gives. `truncated_prompts` counts the distinct prompts
    that did not fit the model's context, so that their beginning was cut off. `scores` is 1 for each
    item answered rightly and 0 for the others, in the order of the data (MMLU: subject by subject, by
    alphabet).
    """

    task: str
    metric: str
    num_fewshot: int
    value: float
    stderr: float | None
    items: int
    total_items: int
    chance: float
    truncated_prompts: int
    scores: tuple[int, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the scores of single items."""
        result = asdict(self)
        del result["scores"]
        return result


@dataclass(frozen=True)
class TaskResults:
    """The accuracy of one model on several tasks, and the settings it was measured with."""

    results: dict[str, TaskResult]
    data: str
    limit: int | Mapping[str, int] | None
    batch_size: int
    seed: int
    lm_eval_version: str

    def __getitem__(self, task: str) -> TaskResult:
        return self.results[task]

    @property
    def acc7(self) -> float | None:
        """The paper's Acc7, the plain mean over the seven zero-shot tasks; None unless all were run."""
        seven = self._zero_shot()
        return None if seven is None else fmean(result.value for result in seven)

    @property
    def acc7_stderr(self) -> float | None:
        """The standard error of Acc7, the tasks being independent samples."""
        errors = [result.stderr for result in self._zero_shot() or ()]
        known = [error for error in errors if error is not None]
        return sqrt(sum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None

    @property
    def acc7_chance(self) -> float | None:
        """What guessing gives for Acc7."""
        seven = self._zero_shot()
        return None if seven is None else fmean(result.chance for result in seven)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the scores of single items."""
        return {
            "tasks": {name: result.to_dict() for name, result in self.results.items()},
            "acc7": self.acc7,
            "acc7_stderr": self.acc7_stderr,
            "acc7_chance": self.acc7_chance,
            "data": self.data,
            "limit": dict(self.limit) if isinstance(self.limit, Mapping) else self.limit,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "lm_eval_version": self.lm_eval_version,
        }

    def _zero_shot(self) -> list[TaskResult] | None:
        if not all(name in self.results for name in ZERO_SHOT_TASKS):
            return None
        return [self.results[name] for name in ZERO_SHOT_TASKS]
