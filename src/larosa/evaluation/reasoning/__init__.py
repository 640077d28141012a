"""Problems that a model answers in its own words: MATH-500, GPQA-Diamond, AIME 2024 and GSM8K (paper, Table 4)."""

from larosa.evaluation.reasoning.accuracy import ReasoningResult, score
from larosa.evaluation.reasoning.completions import Completion, complete
from larosa.evaluation.reasoning.problems import PROBLEM_SETS, Problem, read_problems

__all__ = [
    "PROBLEM_SETS",
    "Completion",
    "Problem",
    "ReasoningResult",
    "complete",
    "read_problems",
    "score",
]
