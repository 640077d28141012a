"""Progress of long work on standard error, so that standard output stays clean: bars, or in a file a line at times."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)

stderr = Console(stderr=True, markup=False, emoji=False)


#: Seconds between the lines of what runs so long, where standard error is no terminal.
_BETWEEN_LINES = 30.0


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` behind a progress bar, or with a line at times where standard error is no terminal."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    with advance(description, total) as step:
        for item in items:
            yield item
            step()


@contextmanager
def advance(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of `total` steps, or such lines; the function it gives moves it by one."""
    with _timed(description):
        if not stderr.is_terminal:
            yield _Lines(description, total).step
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=stderr, transient=True) as progress:
            task = progress.add_task(description, total=total)
            yield lambda: progress.advance(task)


class _Lines:
    """Says how far something is that takes long, for who reads it in a file."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total, self._done = description, total, 0
        self._started = self._said = time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._said < _BETWEEN_LINES or self._done >= self._total:
            return
        self._said = now
        left = (now - self._started) / self._done * (self._total - self._done)
        time_left = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        stderr.print(f"{self._description}: {self._done} of {self._total}, about {time_left} left", soft_wrap=True)


@contextmanager
def stage_seconds() -> Iterator[dict[str, float]]:
    """The seconds that each stage behind a bar has taken while this was open, by its description.

    A stage within another counts for both.
    """
    found: dict[str, float] = {}
    token = _seconds.set(found)
    try:
        yield found
    finally:
        _seconds.reset(token)


@contextmanager
def _timed(description: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        stages = _seconds.get()
        if stages is not None:
            stages[description] = stages.get(description, 0.0) + time.perf_counter() - started
