"""How many tokens are worth drafting, by what has been measured: how long steps take, and which drafts were right."""

from __future__ import annotations

import statistics
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from larosa.decoding.layers import MAX_ROWS

#: Times of a step that are looked at, the last ones.
_KEPT = 15
#: What one more row of a step costs, as a share of a step of one row, where it has not been measured.
_ROW = 0.08
#: What a drafted token costs, likewise.
_DRAFT = 0.5
#: How much one more draft moves what is expected of the next.
_MOVES = 0.05
#: Drafts by how probable they were to their drafter: bounds, and how many of each kind are right until that is known.
_BOUNDS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
_RIGHT = (0.3, 0.5, 0.6, 0.75, 0.85, 0.93, 0.99)


class Clock(Protocol):
    """Marks moments of what a device runs."""

    def now(self) -> Any:
        """A mark behind all that has been given to the device, which nobody waits for."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """The time between two marks; waits for the last."""
        ...


class HostClock:
    """Of a device that has run what it was given when the call returns."""

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def seconds(self, first: float, last: float) -> float:
        """See `Clock`."""
        return last - first


class CudaClock:
    """Of a GPU, by events on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> torch.cuda.Event:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """See `Clock`."""
        last.synchronize()
        return first.elapsed_time(last) / 1e3


class Stopwatch:
    """The median seconds of the last runs of a step. Its first run does not count: it is recorded then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._has_run = False
        self._median: float | None = None
        self._running: tuple[Any, Any, int] | None = None

    @contextmanager
    def running(self, times: int = 1) -> Iterator[None]:
        """Time what is done within: so many runs. Nobody waits for the last of them before the time is asked for."""
        self._stop()
        started = self._clock.now()
        yield
        self._running = started, self._clock.now(), times

    @property
    def seconds(self) -> float | None:
        """Of one run; None before the second."""
        self._stop()
        return self._median

    def _stop(self) -> None:
        if self._running is not None:
            (first, last, times), self._running = self._running, None
            self.add(self._clock.seconds(first, last) / times)

    def add(self, seconds: float) -> None:
        """Count a run."""
        if self._has_run:
            self._times.append(seconds)
            self._median = statistics.median(self._times)
        self._has_run = True


class Acceptance:
    """Which share of a drafter's tokens was accepted, on average and by how probable it held them.

    Args:
        average: what is expected before anything is known.
    """

    def __init__(self, average: float = 0.85) -> None:
        self.average = average
        self._rates = list(_RIGHT)

    def rate(self, probability: float) -> float:
        """The chance of a token that the drafter gives a probability."""
        return self._rates[bisect_right(_BOUNDS, probability)]

    def observe(self, probabilities: Sequence[float], accepted: int) -> None:
        """Learn from a draft, of which so many tokens were accepted."""
        for index, probability in enumerate(probabilities[: accepted + 1]):  # none behind a wrong one was looked at
            right, kind = index < accepted, bisect_right(_BOUNDS, probability)
            self.average += _MOVES * (right - self.average)
            self._rates[kind] += _MOVES * (right - self._rates[kind])


class Pace:
    """What steps take: those that check drafts, by rows, and one that drafts a token."""

    def __init__(self, clock: Clock | None = None) -> None:
        clock = clock or HostClock()
        self.draft = Stopwatch(clock)
        self._checks = [Stopwatch(clock) for _ in range(MAX_ROWS)]
        self._seconds: list[float] = []

    @property
    def known(self) -> bool:
        """Whether a step of one row has been measured, beside which all else is judged."""
        return bool(self._seconds)

    @contextmanager
    def checking(self, rows: int, times: int = 1) -> Iterator[None]:
        """Time a step of so many rows, or several one after the other, the wait for what they give included."""
        with self._checks[rows - 1].running(times):
            yield
        measured = [watch.seconds for watch in self._checks]
        if measured[0] is None:
            return
        # One more row takes no less time. What has not been measured is hoped for, so that it will be.
        hoped = [measured[0] * (1 + _ROW * row) for row in range(MAX_ROWS)]
        found = [guess if seconds is None else seconds for guess, seconds in zip(hoped, measured, strict=True)]
        self._seconds = [min(found[row:]) for row in range(MAX_ROWS)]

    def seconds(self, rows: int) -> float:
        """A step of so many rows."""
        return self._seconds[rows - 1]

    @property
    def draft_seconds(self) -> float:
        """Drafting a token by a model."""
        return _DRAFT * self._seconds[0] if self.draft.seconds is None else self.draft.seconds

    def speed(self, acceptance: Acceptance) -> float:
        """Tokens a second with the best number of a model's drafts, of none perhaps, by what is known on average."""
        best, tokens = 0.0, 0.0
        for count, checked in enumerate(self._seconds):
            tokens += acceptance.average**count
            best = max(best, tokens / (count * self.draft_seconds + checked))
        return best

    def gains(
        self,
        acceptance: Acceptance,
        most: int,
        speed: float,
        *,
        draft: float = 0.0,
        drafted: int = 0,
        chance: float = 1.0,
    ) -> list[float]:
        """Tokens that one more draft promises, that two and so on up to `most` do, over what their time is worth.

        Args:
            speed: tokens a second that are made anyway.
            draft: seconds of drafting one.
            drafted: tokens drafted already, all of them right with this chance.
        """
        gains, tokens = [], 0.0
        for count in range(1, most + 1):
            chance *= acceptance.average
            tokens += chance
            more = count * draft + self.seconds(1 + drafted + count) - self.seconds(1 + drafted)
            gains.append(tokens - speed * more)
        return gains
