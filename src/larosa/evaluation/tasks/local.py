"""Local task files as the documents that lm-eval's stock task definitions read.

Every reader gives documents in the schema of the data set that the stock definition downloads, so that
its prompts, answers and scoring apply unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from larosa.errors import LarosaError
from larosa.evaluation.tasks.records import Record, csv_archive, json_lines, labels

#: Documents by split.
Splits = dict[str, list[dict[str, Any]]]

#: An end of a sentence inside a text, closing quotation marks and brackets included.
_SENTENCE_END = re.compile(r"[.!?][\"')]* ")

#: MMLU's shots, which the dev split must hold.
_MMLU_SHOTS = 5


def read_task(name: str, folder: Path) -> dict[str, Splits]:
    """The documents of a task: by lm-eval's name of the task, or of each subject for MMLU.

    Raises:
        LarosaError: the folder or a file is missing or malformed; names file and line.
    """
    if not folder.is_dir():
        raise LarosaError(f"{folder} is not a folder; name the one that holds the task files (see docs/tasks.md)")
    if name == "mmlu":
        return _mmlu(folder / "mmlu" / "mmlu_test_dev.tar.xz")
    return {name: _READERS[name](folder)}


def _arc(file: str) -> Callable[[Path], Splits]:
    def read(folder: Path) -> Splits:
        return {
            "test": [
                {"question": record.text("question"), **_lettered(record)}
                for record in json_lines(folder / "arc" / file)
            ]
        }

    return read


def _openbookqa(folder: Path) -> Splits:
    return {
        "test": [
            {"question_stem": record.text("question_stem"), **_lettered(record)}
            for record in json_lines(folder / "openbookqa" / "test.jsonl")
        ]
    }


def _lettered(record: Record) -> dict[str, Any]:
    """Choices and the index of the right one, as the data sets give them: with letters."""
    texts = record.texts("choices")
    letters = [chr(ord("A") + index) for index in range(len(texts))]
    return {
        "choices": {"text": texts, "label": letters},
        "answerKey": letters[record.index("gold", len(texts))],
    }


def _piqa(folder: Path) -> Splits:
    questions = folder / "piqa" / "valid.jsonl"
    answers = folder / "piqa" / "valid-labels.lst"
    records = json_lines(questions)
    right = labels(answers, ("0", "1"))
    if len(records) != len(right):
        raise LarosaError(
            f"{answers} has {len(right)} labels for the {len(records)} items of {questions}; "
            "use two files that belong together"
        )
    return {
        "validation": [
            {**{key: record.text(key) for key in ("goal", "sol1", "sol2")}, "label": label}
            for record, label in zip(records, right, strict=True)
        ]
    }


def _boolq(folder: Path) -> Splits:
    """BoolQ without the question marks, which the prompt adds, and with the title where there is one.

    SuperGLUE's passages, which the stock task reads, begin with the title of the article and two hyphens.
    """
    documents = []
    for record in json_lines(folder / "boolq" / "dev.jsonl"):
        passage = record.text("passage")
        if "title" in record.values:
            passage = f"{record.text('title')} -- {passage}"
        documents.append(
            {
                "question": record.text("question").removesuffix("?"),
                "passage": passage,
                "label": int(record.one_of("answer", (True, False))),
            }
        )
    return {"validation": documents}


def _winogrande(folder: Path) -> Splits:
    documents = []
    for record in json_lines(folder / "winogrande" / "dev.jsonl"):
        document = {key: record.text(key) for key in ("sentence", "option1", "option2")}
        if "_" not in document["sentence"]:
            raise LarosaError(f"{record.where}: 'sentence' has no '_', the place that the options fill")
        documents.append({**document, "answer": record.one_of("answer", ("1", "2"))})
    return {"validation": documents}


def _hellaswag(folder: Path) -> Splits:
    documents = []
    for record in json_lines(folder / "hellaswag" / "val.jsonl.xz"):
        if "ctx_b" in record.values:
            beginning, fragment = record.text("ctx_a"), record.string("ctx_b")
        else:
            beginning, fragment = split_context(record.text("ctx"))
        endings = record.texts("endings")
        documents.append(
            {
                "activity_label": record.text("activity_label"),
                "ctx_a": beginning,
                "ctx_b": fragment,
                "endings": endings,
                "label": str(record.index("label", len(endings))),
            }
        )
    return {"validation": documents}


def split_context(context: str) -> tuple[str, str]:
    """A HellaSwag context as `ctx_a`, whole sentences, and `ctx_b`, the beginning of the next one.

    The data set's `ctx` joins the two, and lm-eval capitalises the second. Contexts from WikiHow end with
    a sentence and have no second part; those from ActivityNet always have one.
    """
    if context.endswith((".", "!", "?")):
        return context, ""
    ends = [match.end() for match in _SENTENCE_END.finditer(context)]
    if not ends:
        return context, ""
    return context[: ends[-1] - 1], context[ends[-1] :]


def _mmlu(path: Path) -> dict[str, Splits]:
    files = csv_archive(path)
    subjects = sorted(
        name.removeprefix("test/").removesuffix("_test.csv")
        for name in files
        if name.startswith("test/") and name.endswith("_test.csv")
    )
    if not subjects:
        raise LarosaError(f"{path}: no file test/SUBJECT_test.csv in it; see docs/tasks.md for the layout")
    tasks = {}
    for subject in subjects:
        dev = f"dev/{subject}_dev.csv"
        if dev not in files:
            raise LarosaError(f"{path}: no file {dev} in it, the examples that go before each question")
        if len(files[dev]) < _MMLU_SHOTS:
            raise LarosaError(f"{path}: {dev} has {len(files[dev])} items; {_MMLU_SHOTS} go before each question")
        tasks[f"mmlu_{subject}"] = {
            "test": [_mmlu_document(record) for record in files[f"test/{subject}_test.csv"]],
            "dev": [_mmlu_document(record) for record in files[dev]],
        }
    return tasks


def _mmlu_document(record: Record) -> dict[str, Any]:
    return {
        "question": record.text("question"),
        "choices": [record.text(f"choice{index}") for index in range(4)],
        "answer": int(record.one_of("answer", ("0", "1", "2", "3"))),
    }


_READERS: dict[str, Callable[[Path], Splits]] = {
    "winogrande": _winogrande,
    "piqa": _piqa,
    "openbookqa": _openbookqa,
    "hellaswag": _hellaswag,
    "boolq": _boolq,
    "arc_easy": _arc("arc_easy_test.jsonl"),
    "arc_challenge": _arc("arc_challenge_test.jsonl"),
}
