"""Progress bars for long work, on standard error so that standard output stays clean."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

stderr = Console(stderr=True, markup=False, emoji=False)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` behind a progress bar; silent where standard error is not a terminal."""
    if total is None:
        total = len(items)  # type: ignore[arg-type]
    with _bar() as progress:
        yield from progress.track(items, total=total, description=description)


@contextmanager
def advance(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar of `total` steps; the function it gives moves it by one."""
    with _bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
