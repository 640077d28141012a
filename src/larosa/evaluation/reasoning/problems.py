"""The problems as local files have them, in the prompts of Open-R1's evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from larosa.errors import LarosaError
from larosa.evaluation.tasks.records import Record, csv_records, json_lines

_MATH_PROMPT = (
    "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
    "following format: 'Therefore, the final answer is: $\\boxed{{ANSWER}}$. I hope it is correct' (without quotes) "
    "where ANSWER is just the final number or expression that solves the problem. Think step by step before answering."
    "\n\n{question}"
)

_CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n{question}"
    "\n\nA) {a}\nB) {b}\nC) {c}\nD) {d}"
)

_LETTERS = "ABCD"


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        id: of its own within the set.
        prompt: what the user says.
        answer: LaTeX without dollar signs, or the letter of the right choice.
        is_choice: whether the answer is one of the letters A to D.
    """

    id: str
    prompt: str
    answer: str
    is_choice: bool = False


def _math(question: str, answer: str, number: int) -> Problem:
    return Problem(str(number), _MATH_PROMPT.format(question=question), answer)


def _answered(path: Path) -> list[Problem]:
    return [_math(each.text("problem"), each.text("answer"), number) for number, each in enumerate(json_lines(path))]


def _solved(path: Path) -> list[Problem]:
    """The answer stands behind #### at the end of the solution."""
    problems = []
    for number, record in enumerate(json_lines(path)):
        _, mark, answer = record.text("answer").rpartition("####")
        if not mark or not answer.strip():
            raise LarosaError(f"{record.where}: 'answer' has no '####' with the answer behind it")
        problems.append(_math(record.text("question"), answer.strip().replace(",", ""), number))
    return problems


def _chosen(path: Path) -> list[Problem]:
    """The choices in an order of their own for each question, the same in every run."""
    return [_choices(number, record) for number, record in enumerate(csv_records(path))]


def _choices(number: int, record: Record) -> Problem:
    right = record.text("Correct Answer").strip()
    choices = [right, *(record.text(f"Incorrect Answer {index}").strip() for index in (1, 2, 3))]
    order = random.Random(number).sample(range(4), 4)
    shown = dict(zip("abcd", (choices[index] for index in order), strict=True))
    prompt = _CHOICE_PROMPT.format(question=record.text("Question").strip(), **shown)
    return Problem(str(number), prompt, _LETTERS[order.index(0)], is_choice=True)


@dataclass(frozen=True)
class ProblemSet:
    """A set of problems: its name in print, where it lies in a folder of task files, and how that file is read."""

    label: str
    file: str
    read: Callable[[Path], list[Problem]]


#: By name, in the order of the paper's Table 4; GSM8K is not in it, and within reach of a small model.
PROBLEM_SETS = {
    "math500": ProblemSet("MATH-500", "math500/test.jsonl", _answered),
    "gpqa_diamond": ProblemSet("GPQA-Diamond", "gpqa/gpqa_diamond.csv", _chosen),
    "aime24": ProblemSet("AIME 2024", "aime24/test.jsonl", _answered),
    "gsm8k": ProblemSet("GSM8K", "gsm8k/test.jsonl", _solved),
}


def read_problems(name: str, folder: Path) -> list[Problem]:
    """The problems of a set.

    Args:
        name: one of `PROBLEM_SETS`.
        folder: holds the set's file.

    Raises:
        LarosaError: an unknown set, or a file that is missing or malformed; names file and line.
    """
    if name not in PROBLEM_SETS:
        raise LarosaError(f"unknown problem set '{name}'; known ones: {', '.join(PROBLEM_SETS)}")
    chosen = PROBLEM_SETS[name]
    return chosen.read(folder / chosen.file)
