"""The tasks of the paper's Table 1, with the metric and shots its appendix C gives for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from larosa.errors import LarosaError


@dataclass(frozen=True)
class TaskSpec:
    """One column of the paper's accuracy tables.

    `name` is lm-eval's name of the task or group, `folder` where lm-eval keeps its definition below its
    own `tasks` folder.
    """

    name: str
    label: str
    metric: str
    num_fewshot: int
    folder: str


#: In the order of the paper's Tables 12 to 18.
CATALOGUE = {
    spec.name: spec
    for spec in (
        TaskSpec("winogrande", "WinoGrande", "acc", 0, "winogrande"),
        TaskSpec("piqa", "PIQA", "acc_norm", 0, "piqa"),
        TaskSpec("openbookqa", "OBQA", "acc_norm", 0, "openbookqa"),
        TaskSpec("hellaswag", "HellaSwag", "acc_norm", 0, "hellaswag"),
        TaskSpec("boolq", "BoolQ", "acc", 0, "super_glue/boolq"),
        TaskSpec("arc_easy", "ARC-E", "acc_norm", 0, "arc"),
        TaskSpec("arc_challenge", "ARC-C", "acc_norm", 0, "arc"),
        TaskSpec("mmlu", "MMLU", "acc", 5, "mmlu/default"),
    )
}

PAPER_TASKS: tuple[str, ...] = tuple(CATALOGUE)

#: The seven tasks whose mean the paper calls Acc7.
ZERO_SHOT_TASKS: tuple[str, ...] = tuple(name for name, spec in CATALOGUE.items() if spec.num_fewshot == 0)


def specs_of(tasks: Iterable[str]) -> list[TaskSpec]:
    """The specs of the named tasks, each once, in the order given.

    Raises:
        LarosaError: no task, or a name that is none of the paper's.
    """
    names = list(dict.fromkeys(tasks))
    if not names:
        raise LarosaError(f"no task was named; known ones: {', '.join(CATALOGUE)}")
    for name in names:
        if name not in CATALOGUE:
            raise LarosaError(f"unknown task '{name}'; known ones: {', '.join(CATALOGUE)}")
    return [CATALOGUE[name] for name in names]
