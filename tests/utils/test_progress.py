"""What long work says where nobody watches it."""

from __future__ import annotations

import pytest

from larosa.utils import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(clock, seconds, total):
    """Items that take so many seconds each."""
    for _ in progress.track(range(total), "Working"):
        clock[0] += seconds


@pytest.mark.parametrize(
    ("seconds", "total", "expected"),
    [
        (1, 29, []),
        (10, 8, ["Working: 3 of 8, about 50 s left", "Working: 6 of 8, about 20 s left"]),
        (120, 3, ["Working: 1 of 3, about 4 min left", "Working: 2 of 3, about 2 min left"]),
        (100, 1, []),
    ],
)
def test_a_file_gets_a_line_at_times(clock, capsys, seconds, total, expected):
    work(clock, seconds, total)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == expected


def test_what_is_short_within_what_is_long_says_nothing(clock, capsys):
    with progress.advance("Trying", 4) as step:
        for _ in range(4):
            work(clock, 5, 4)
            step()
    assert capsys.readouterr().err.splitlines() == ["Trying: 2 of 4, about 40 s left"]


def test_stages_are_timed_with_or_without_lines(clock, capsys):
    with progress.stage_seconds() as seconds:
        work(clock, 0, 3)
    assert list(seconds) == ["Working"]


def test_a_broken_loop_ends_without_a_word(clock, capsys):
    for item in progress.track(range(9), "Working"):
        clock[0] += 31
        if item == 1:
            break
    assert capsys.readouterr().err.splitlines() == ["Working: 1 of 9, about 4 min left"]
