"""Which tests run, what they are traced for, and where their fixtures are."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from hypothesis import settings

from . import examples  # noqa: F401 - registers the profiles

settings.load_profile("quick")  # what --hypothesis-profile names is loaded after this


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, also where tests are only handed out to others (`-n`).

    There coverage runs already, as it does not yet where they are run: what importing larosa runs is counted there.
    """
    config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_finish() -> None:
    """Have the garbage collector leave out what has been imported, which takes it 0.2 s a time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _thin(items)
    _trace_what_differs(items)
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _thin(items: list[pytest.Item]) -> None:
    """Leave one of every `n` cases of a test marked `one_of(n)` in `make test`."""
    cases: Counter[str] = Counter()
    for item in items:
        if (mark := item.get_closest_marker("one_of")) and not item.get_closest_marker("slow"):
            test = item.nodeid.partition("[")[0]
            if (case := getattr(item, "callspec", None)) and "target" in case.params:
                test += str(case.params["target"])  # each set of a GPU's kernels has its first case
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1


def _trace_what_differs(items: list[pytest.Item]) -> None:
    """Take coverage of a test's cases only until each value of its parameters has been seen.

    What others run is combinations of the same; tracing takes about as long as half of what it traces.
    """
    seen: dict[object, set[object]] = {}
    for item in items:
        case = getattr(item, "callspec", None)
        if case is not None:
            test = item.nodeid.partition("[")[0], item.get_closest_marker("slow") is None
            values = {(name, id(value)) for name, value in case.params.items()}
            if values <= seen.setdefault(test, set()):
                item.add_marker(pytest.mark.no_cover)
            seen[test] |= values
