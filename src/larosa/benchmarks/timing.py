"""Times of calls that take turns, so that a busy moment of the machine hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: What is timed: does the same work on one of several sets of weights, by number.
Call = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over all rounds: median, and 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The timing of these measurements, two at least."""
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), tenths[0], tenths[-1])

    def to_dict(self) -> dict[str, float]:
        """The JSON form."""
        return {"median": self.median, "p10": self.low, "p90": self.high}


def time_in_turns(calls: Mapping[str, Call], copies: int, rounds: int) -> dict[str, Timing]:
    """Time each call on the CPU, in each round once on every copy of the weights; a first round is not counted.

    Args:
        calls: what to time, by name.
        copies: sets of weights to go through, so many that no cache holds them.
        rounds: at least 2.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False, *[True] * rounds]:
        for name, call in calls.items():
            start = time.perf_counter()
            for copy in range(copies):
                call(copy)
            if counted:
                seconds[name].append((time.perf_counter() - start) / copies)
    return {name: Timing.of(measured) for name, measured in seconds.items()}
