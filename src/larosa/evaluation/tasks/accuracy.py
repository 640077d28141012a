"""Task accuracy of a model in memory, dense or converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError
from larosa.evaluation.tasks.catalogue import PAPER_TASKS, specs_of
from larosa.evaluation.tasks.local import read_task
from larosa.evaluation.tasks.results import TaskResults
from larosa.evaluation.zeros import sparse_prompts
from larosa.utils.progress import stderr

DEFAULT_BATCH_SIZE = 8


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str] = PAPER_TASKS,
    *,
    data: Path | str | None = None,
    limit: int | Mapping[str, int] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = 0,
) -> TaskResults:
    """Accuracy on the paper's tasks through lm-eval, with the metrics and shots of the paper's appendix C.

    Prompts, answers and scoring are lm-eval's own task definitions. As in the paper, prompts are
    sparsified like decoding, whatever the model's `prefill` setting. All tasks are loaded before the
    first is scored, so that bad input stops early; each is scored by itself, so that a result does not
    depend on which others were asked for.

    Args:
        tasks: names out of `PAPER_TASKS`.
        data: None for lm-eval's own data, downloaded; or a folder of local files (docs/tasks.md).
        limit: score only the first so many items of a task; of each subject, for MMLU. A mapping gives
            it by task, and leaves the tasks that it does not name whole.
        batch_size: how many prompts to run at a time.
        seed: for lm-eval's choice of examples; the paper's tasks make none.

    Raises:
        LarosaError: lm-eval is not installed, an unknown task, data that is missing, malformed or not to
            be downloaded, NaN logits.
    """
    specs = specs_of(tasks)
    limits = {spec.name: limit.get(spec.name) if isinstance(limit, Mapping) else limit for spec in specs}
    if isinstance(limit, Mapping):
        specs_of(limit)
    for name, items in limits.items():
        if items is not None and items < 1:
            raise LarosaError(f"the limit of '{name}' must be at least 1 item, not {items}")
    if batch_size < 1:
        raise LarosaError(f"the batch size must be at least 1, not {batch_size}")
    harness = _harness()
    loaded = [
        harness.load_stock(spec) if data is None else harness.load_local(spec, read_task(spec.name, Path(data)))
        for spec in specs
    ]
    lm = harness.InMemoryModel(model, tokenizer, batch_size)
    results = {}
    with sparse_prompts(model):
        for task in loaded:
            if stderr.is_terminal:
                stderr.print(f"{task.spec.label} ({task.spec.num_fewshot}-shot)")
            results[task.spec.name] = harness.run(lm, task, limits[task.spec.name], seed)
    return TaskResults(
        results=results,
        data="lm-eval" if data is None else str(data),
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        lm_eval_version=harness.VERSION,
    )


def _harness() -> Any:
    try:
        from larosa.evaluation.tasks import harness
    except ImportError as error:
        raise LarosaError(f"task accuracy needs lm-eval ({error}): pip install 'larosa[lm-eval]'") from None
    return harness
