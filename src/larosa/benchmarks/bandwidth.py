"""How fast memory can be read: the floor of everything that reads weights."""

from __future__ import annotations

import statistics
import time

import torch

#: More than caches hold.
_BYTES = 1 << 29


class ReadTest:
    """The sum of half a gibibyte of float32 by PyTorch's threads, to be run in between what it is the floor of.

    A machine that is shared reads faster in one minute than in another.
    """

    def __init__(self) -> None:
        self._data = torch.ones(_BYTES // 4)  # written, so that there is memory behind it
        self._seconds: list[float] = []

    def run(self) -> None:
        """Read it all once."""
        start = time.perf_counter()
        self._data.sum()
        self._seconds.append(time.perf_counter() - start)

    @property
    def bandwidth(self) -> float:
        """Bytes a second, median of the runs so far."""
        return _BYTES / statistics.median(self._seconds)


def read_bandwidth(rounds: int = 10) -> float:
    """Bytes a second that PyTorch's threads read together, median of `rounds`."""
    test = ReadTest()
    for _ in range(rounds):
        test.run()
    return test.bandwidth
