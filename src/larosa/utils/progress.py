"""Progress bars for long work, on standard error so that standard output stays clean."""

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


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` behind a progress bar; silent where standard error is not a terminal."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    with _timed(description), _bar() as progress:
        yield from progress.track(items, total=total, description=description)


@contextmanager
def advance(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of `total` steps; the function it gives moves it by one."""
    with _timed(description), _bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


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


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
