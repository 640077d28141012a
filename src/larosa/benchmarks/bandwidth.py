"""How fast memory can be read: the floor of everything that reads weights."""

from __future__ import annotations

import torch

from larosa.benchmarks.timing import time_in_turns

_BYTES = 1 << 30


def read_bandwidth(rounds: int = 10) -> float:
    """Bytes a second that PyTorch's threads read together: the sum of a gibibyte of float32, median of `rounds`."""
    data = torch.ones(_BYTES // 4)
    return _BYTES / time_in_turns({"read": lambda _: data.sum()}, copies=1, rounds=rounds)["read"].median
