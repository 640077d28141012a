"""Table 4 end to end: sampled answers, kept and scored, beside the paper's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from larosa.errors import LarosaError
from larosa.evaluation.reasoning import Completion
from larosa.reproduce import EXPERIMENTS, paper, table4
from larosa.reproduce import context as context_module
from larosa.reproduce.context import Context


@pytest.fixture
def problems(tmp_path):
    """A folder of task files with two problems of one set."""
    folder = tmp_path / "tasks" / "math500"
    folder.mkdir(parents=True)
    lines = [{"problem": "w9 w10", "answer": "2"}, {"problem": "w11", "answer": "3"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder.parent


@pytest.fixture
def context(dense, settings, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(context_module, "GRID", (0.9, 1.0))
    return Context(str(dense), settings(task_data=problems, samples=2, max_new_tokens=4), tmp_path / "cache")


def test_every_model_answers_and_a_second_run_reads(context, monkeypatch):
    results = EXPERIMENTS["table4"].run(context)
    (table,) = results.tables
    rows = [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]
    points = [(row["method"], row["sparsity"]) for row in rows]
    assert points == [("dense", 0.0), *((name, each) for name in ("paper", "best") for each in (0.25, 0.4, 0.5))]
    assert all(row["MATH-500"] == 0 and row["± MATH-500"] == 0 for row in rows)  # random words, not one boxed
    assert "GPQA-Diamond (gpqa/gpqa_diamond.csv)" in results.notes[2]
    assert "noise" in results.notes[3]
    logs = list((context._cache._folder).glob("completions-*.jsonl"))
    assert [len(log.read_text("utf-8").splitlines()) for log in logs] == [4] * 7  # a model, 2 samples of 2 problems
    assert len({log.read_text("utf-8") for log in logs}) > 1
    monkeypatch.setattr(table4, "complete", None)
    assert EXPERIMENTS["table4"].run(context) == results


def test_right_answers_count(context, monkeypatch):
    def answer(model, tokenizer, problems, log, *, samples, **_):
        said = "\\boxed{2}" if getattr(model.config, "larosa", None) is None else "\\boxed{5}"
        return [
            Completion(problem.id, sample, f"The final answer is ${said}$.", 9, finished=True)
            for problem in problems
            for sample in range(samples)
        ]

    monkeypatch.setattr(table4, "complete", answer)
    (table,) = EXPERIMENTS["table4"].run(context).tables
    assert [row[2] for row in table.rows] == [0.5, *[0.0] * 6]


def test_the_papers_numbers_beside_a_model_of_its_shape(context):
    context.paper = next(model for model in paper.MODELS if model.name == "Qwen2.5-7B")
    sets = {"math500": [], "gsm8k": [], "aime24": []}
    assert table4._paper(context, sets, "paper", 0.25) == [91.0, 46.7]
    assert table4._paper(context, sets, "dense", 0.0) == [93.4, 50.0]
    assert table4._paper(context, sets, "best", 0.25) == [None, None]


@pytest.mark.parametrize(("folder", "message"), [(None, "needs --task-data DIR"), ("empty", "needs a problem set in")])
def test_what_it_lacks(context, tmp_path, folder, message):
    (tmp_path / "empty").mkdir()
    changed = replace(context.settings, task_data=folder and tmp_path / folder)
    assert message in EXPERIMENTS["table4"].lacks(changed)
    context.settings = changed
    with pytest.raises(LarosaError, match=message):
        EXPERIMENTS["table4"].run(context)
