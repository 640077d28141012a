"""Task accuracy through lm-eval: the paper's eight tasks, on lm-eval's own data or on local files."""

from larosa.evaluation.tasks.accuracy import DEFAULT_BATCH_SIZE, evaluate_tasks
from larosa.evaluation.tasks.catalogue import PAPER_TASKS, ZERO_SHOT_TASKS
from larosa.evaluation.tasks.results import TaskResult, TaskResults

__all__ = ["DEFAULT_BATCH_SIZE", "PAPER_TASKS", "ZERO_SHOT_TASKS", "TaskResult", "TaskResults", "evaluate_tasks"]
