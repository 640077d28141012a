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

#: Times of a step that are looked at, the last ones, and how many there have to be: one may have been held up.
_KEPT, _FEWEST = 15, 3
#: What one more row of a step costs, as a share of a step of one row, where it has not been measured.
_ROW = 0.08
#: What a drafted token costs, likewise.
_DRAFT = 0.5
#: How much one more draft moves what is expected of the next, at least, and how many drafts a first guess counts for.
_MOVES = 0.03
_GUESS = 8
#: Drafts by how probable they were to their drafter: bounds, and how many of each kind are right until that is known.
_BOUNDS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
_RIGHT = (0.3, 0.5, 0.6, 0.75, 0.85, 0.93, 0.99)


class Clock(Protocol):
    """Marks moments of what a device runs."""

    def now(self) -> Any:
        """A mark behind all that has been given to the device, which nobody waits for."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether the device has come so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait until it has."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """The time between two marks that have been passed."""
        ...


class HostClock:
    """Of a device that has run what it was given when the call returns."""

    def now(self) -> float:
        """See `Clock`."""
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        """See `Clock`."""
        return True

    def wait(self, mark: float) -> None:
        """See `Clock`."""

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

    def passed(self, mark: torch.cuda.Event) -> bool:
        """See `Clock`."""
        return mark.query()

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Clock`."""
        mark.synchronize()

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """See `Clock`."""
        return first.elapsed_time(last) / 1e3


class Stopwatch:
    """The median seconds of the last runs of a step. Its first run does not count: it is recorded then."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._has_run = False
        self._median: float | None = None
        self._running: deque[tuple[Any, Any, int]] = deque()

    def put(self, first: Any, last: Any, times: int = 1) -> None:
        """Count so many runs between two marks, once the device has come so far: nobody waits for it."""
        self._running.append((first, last, times))

    @property
    def seconds(self) -> float | None:
        """Of one run, by those that are over; None as long as these are too few to say."""
        while self._running and self._clock.passed(self._running[0][1]):
            first, last, times = self._running.popleft()
            self.add(self._clock.seconds(first, last) / times)
        return self._median

    def add(self, seconds: float) -> None:
        """Count a run."""
        if self._has_run:
            self._times.append(seconds)
            if len(self._times) >= _FEWEST:
                self._median = statistics.median(self._times)
        self._has_run = True


class Acceptance:
    """Which share of a drafter's tokens was accepted, on average and by how probable it held them.

    Args:
        average: what is expected before anything is known.
    """

    def __init__(self, average: float = 0.85) -> None:
        self.average = average
        self._looked_at = 0
        self._rates = list(_RIGHT)

    def rate(self, probability: float) -> float:
        """The chance of a token that the drafter gives a probability."""
        return self._rates[bisect_right(_BOUNDS, probability)]

    def observe(self, drafted: int, accepted: int, probabilities: Sequence[float] = ()) -> None:
        """Learn from a draft of so many tokens, and from how probable they were, where that is known."""
        looked_at = range(min(drafted, accepted + 1))  # none behind a wrong one was looked at
        for index in looked_at:
            self._looked_at += 1
            moves = max(_MOVES, 1 / (_GUESS + self._looked_at))
            self.average += moves * ((index < accepted) - self.average)
        for index, probability in zip(looked_at, probabilities, strict=False):
            kind = bisect_right(_BOUNDS, probability)
            self._rates[kind] += _MOVES * ((index < accepted) - self._rates[kind])


class Pace:
    """What steps take: those that check drafts, by rows, and one that drafts a token.

    Where the host waits for what a step gives, its time goes on until something is run again: meanwhile the device has
    nothing to do.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or HostClock()
        self.draft = Stopwatch(self.clock)
        self._checks = [Stopwatch(self.clock) for _ in range(MAX_ROWS)]
        self._seconds: list[float] = []
        self._waiting: tuple[Stopwatch, Any] | None = None

    @property
    def known(self) -> bool:
        """Whether a step of one row has been measured, beside which all else is judged."""
        return bool(self._seconds)

    @contextmanager
    def drafting(self, count: int = 1) -> Iterator[None]:
        """Time the drafting of so many tokens."""
        first = self._begin()
        yield
        self.draft.put(first, self.clock.now(), count)

    @contextmanager
    def checking(self, rows: int, idle: bool = False) -> Iterator[None]:
        """Time a step of so many rows.

        Args:
            idle: the device has nothing to do until the next step or draft, which the time goes on to.
        """
        first = self._begin()
        yield
        if idle:
            self._waiting = self._checks[rows - 1], first
        else:
            self._checks[rows - 1].put(first, self.clock.now())
        self._look()

    def pause(self) -> None:
        """Something else comes next: how long it keeps the device idle says nothing."""
        self._waiting = None

    def _begin(self) -> Any:
        now = self.clock.now()
        if self._waiting is not None:
            (watch, first), self._waiting = self._waiting, None
            watch.put(first, now)
        return now

    def _look(self) -> None:
        """Read the stopwatches. What has not been measured is hoped for, so that it will be."""
        measured = [watch.seconds for watch in self._checks]
        if measured[0] is None:
            return
        hoped = [measured[0] * (1 + _ROW * row) for row in range(MAX_ROWS)]
        over = [seconds - hope for seconds, hope in zip(measured[1:], hoped[1:], strict=True) if seconds is not None]
        more = max(0.0, min(over, default=0.0))  # what a wait adds, whatever the rows
        found = [
            hope + more * (row > 0) if seconds is None else seconds
            for row, (hope, seconds) in enumerate(zip(hoped, measured, strict=True))
        ]
        # One more row takes no less time.
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
