"""Whether answers are right, by math-verify, and how many are: pass@1 averaged over samples."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, variance
from typing import Any

from larosa.errors import LarosaError
from larosa.evaluation.reasoning.completions import Completion
from larosa.evaluation.reasoning.problems import Problem

#: A letter behind "Answer:", dressed as models dress it; of several the last.
_LETTER = re.compile(r"answer\s*:[\s*$({]*(?:\\(?:boxed|text)\{)*\(?([A-D])\b", re.IGNORECASE)


@dataclass(frozen=True)
class ReasoningResult:
    """A model's score on a problem set.

    Args:
        pass_at_1: the share of right answers, averaged over samples.
        stderr: its standard error over problems; None of one problem.
        problems, samples: how many problems, and answers to each.
        cut_off: the share of answers that did not end by themselves.
        scores: for each problem the share of right answers.
    """

    pass_at_1: float
    stderr: float | None
    problems: int
    samples: int
    cut_off: float
    scores: list[float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def score(problems: Sequence[Problem], completions: Iterable[Completion]) -> ReasoningResult:
    """Score answers, as many to each problem.

    Raises:
        LarosaError: math-verify is not installed, or a problem's own answer is none that it can read.
    """
    answers: dict[str, list[Completion]] = {problem.id: [] for problem in problems}
    for completion in completions:
        answers[completion.problem].append(completion)
    scores = [fmean(is_right(problem, each.text) for each in answers[problem.id]) for problem in problems]
    every = [each for found in answers.values() for each in found]
    return ReasoningResult(
        pass_at_1=fmean(scores),
        stderr=math.sqrt(variance(scores) / len(scores)) if len(scores) > 1 else None,
        problems=len(problems),
        samples=len(every) // len(problems),
        cut_off=fmean(not each.finished for each in every),
        scores=scores,
    )


def is_right(problem: Problem, text: str) -> bool:
    """Whether a text's final answer is the problem's.

    The right letter is the last one behind "Answer:", as the prompt asks for. Elsewhere what stands in a box comes
    first, then a final answer in words, as lighteval's metric for these problem sets has it.

    Raises:
        LarosaError: math-verify is not installed, or the problem's own answer is none that it can read.
    """
    if problem.is_choice:
        letters = _LETTER.findall(text)
        return bool(letters) and letters[-1].upper() == problem.answer
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise LarosaError(f"checking answers needs math-verify ({error}): pip install 'larosa[reasoning]'") from None
    expected = parse(f"${problem.answer}$", [LatexExtractionConfig()])
    if not expected:
        raise LarosaError(f"problem {problem.id}: math-verify reads no answer from '{problem.answer}'")
    targets = [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    return bool(verify(expected, parse(text, targets)))
