"""lm-eval at work: its task definitions, on its own data or ours, and its model class around ours.

The only module that imports lm-eval; import it where lm-eval is known to be there.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lm_eval
import lm_eval.api.task
import lm_eval.tasks
from lm_eval import evaluator
from lm_eval.api.group import Group
from lm_eval.config.group import GroupConfig
from lm_eval.models.huggingface import HFLM

from larosa.errors import LarosaError
from larosa.evaluation.tasks.catalogue import TaskSpec
from larosa.evaluation.tasks.local import Splits
from larosa.evaluation.tasks.results import TaskResult
from larosa.utils.finite import not_finite

VERSION: str = lm_eval.__version__

_DEFINITIONS = Path(lm_eval.tasks.__file__).parent


@dataclass(frozen=True)
class LoadedTask:
    """A task as lm-eval's evaluator takes it, documents included: one task, or a group of many."""

    spec: TaskSpec
    tasks: dict[str, Any]
    groups: dict[str, Any]


class InMemoryModel(HFLM):
    """lm-eval's class for Hugging Face models, around one in memory; watches for prompts that get cut."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        # lm-eval gives tokenizers a padding token: the caller's own stays as it is.
        with _quiet():
            super().__init__(
                pretrained=model,
                tokenizer=deepcopy(tokenizer),
                backend="causal",
                batch_size=batch_size,
                max_batch_size=None,
            )
        self.cut: set[str] = set()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """lm-eval's own, with its progress bar only where standard error is a terminal."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        for (context, answer), context_ids, answer_ids in requests:
            if not answer_ids or len(answer_ids) > self.max_length:
                raise LarosaError(
                    f"the answer '{answer.strip()[:40]}' has {len(answer_ids)} tokens, outside the model's 1 to "
                    f"{self.max_length}: this tokenizer or model cannot be scored on it"
                )
            if len(context_ids) + len(answer_ids) > self.max_length + 1:
                self.cut.add(context)
        return super()._loglikelihood_tokens(requests, **kwargs)


def load_stock(spec: TaskSpec) -> LoadedTask:
    """The task as lm-eval has it, downloaded or from the cache.

    Raises:
        LarosaError: the data cannot be had.
    """
    try:
        with _quiet():
            loaded = _manager(spec).load(spec.name)
    except Exception as error:  # the hub's failures come as many unrelated types
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise LarosaError(
            f"the data of '{spec.name}' cannot be downloaded ({reason}): go online, or name a folder of local files"
        ) from error
    return LoadedTask(spec, loaded["tasks"], {spec.name: loaded["groups"][spec.name]} if loaded["groups"] else {})


def load_local(spec: TaskSpec, documents: dict[str, Splits]) -> LoadedTask:
    """The task as lm-eval defines it, on documents of ours, by lm-eval's names of task or subjects.

    Raises:
        LarosaError: a subject of the definition has no documents.
    """
    with _quiet():
        manager = _manager(spec)
        group = manager.task_index[spec.name].cfg if spec.name in manager.all_groups else None
        names = [spec.name] if group is None else manager.all_subtasks
        for name in names:
            if name not in documents:
                subject = name.removeprefix(f"{spec.name}_")
                raise LarosaError(
                    f"the local files of '{spec.name}' lack the subject '{subject}': add its test and dev file"
                )
        members = [{"task": name, **_replacing_data(documents[name])} for name in names]
        tasks = manager.load({"group": f"{spec.name}_local", "task": members})["tasks"]
    if group is None:
        return LoadedTask(spec, tasks, {})
    whole = Group.from_config(GroupConfig(group=spec.name, aggregate_metric_list=group["aggregate_metric_list"]))
    for task in tasks.values():
        whole.add(task)
    return LoadedTask(spec, tasks, {spec.name: whole})


def run(model: InMemoryModel, task: LoadedTask, limit: int | None, seed: int) -> TaskResult:
    """Score a model on a loaded task, on the first `limit` items of it or, in a group, of each member.

    Raises:
        LarosaError: log-likelihoods that are NaN.
    """
    spec = task.spec
    model.cut.clear()
    for member in task.tasks.values():
        member.set_config(key="num_fewshot", value=spec.num_fewshot)
        member.set_fewshot_seed(seed=seed)
    with _quiet():
        report = evaluator.evaluate(model, {"tasks": task.tasks, "groups": task.groups}, limit=limit, log_samples=True)
    samples = [sample for name in sorted(task.tasks) for sample in report["samples"][name]]
    for sample in samples:
        if any(math.isnan(log_likelihood) for log_likelihood, _ in sample["filtered_resps"]):
            raise not_finite("the model's logits are")
    measured = report["results"][spec.name]
    stderr = measured[f"{spec.metric}_stderr,none"]
    return TaskResult(
        task=spec.name,
        metric=spec.metric,
        num_fewshot=spec.num_fewshot,
        value=float(measured[f"{spec.metric},none"]),
        stderr=None if isinstance(stderr, str) else float(stderr),
        items=len(samples),
        total_items=sum(report["n-samples"][name]["original"] for name in task.tasks),
        chance=sum(1 / len(sample["arguments"]) for sample in samples) / len(samples),
        truncated_prompts=len(model.cut),
        scores=tuple(int(sample[spec.metric]) for sample in samples),
    )


def _manager(spec: TaskSpec) -> Any:
    """lm-eval's task manager for one folder of definitions: reading all of them takes seconds."""
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(_DEFINITIONS / spec.folder))


def _replacing_data(splits: Splits) -> dict[str, Any]:
    """What replaces the download in a stock definition; splits that we lack are none."""
    return {
        "custom_dataset": _provider(splits),
        "dataset_path": "local",
        **{
            f"{split}_split": None
            for split in ("training", "validation", "test")
            if _DATASET_NAMES[split] not in splits
        },
    }


#: The splits' names in every data set of the paper's tasks.
_DATASET_NAMES = {"training": "train", "validation": "validation", "test": "test"}


def _provider(splits: Splits) -> Callable[..., dict[str, Any]]:
    return lambda **_: {name: datasets.Dataset.from_list(documents) for name, documents in splits.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep messages below errors away, lm-eval's prints off standard output, and its bars to few a task."""
    # transformers warns of prompts beyond the context, which are counted here.
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels, bars = [logger.level for logger in loggers], datasets.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            # One bar for each of MMLU's 57 subjects, for work of milliseconds.
            mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
