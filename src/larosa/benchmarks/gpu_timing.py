"""What a measurement on a GPU ran on, how fast its memory is read, and times of captured calls."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from larosa.benchmarks.timing import Call, Timing
from larosa.ops.backend import chosen_kernels
from larosa.ops.cuda.launch import early_launches
from larosa.version import __version__

#: What a test of the bandwidth reads, and holds meanwhile.
READ_BYTES = 1 << 32


def gpu_machine(device: torch.device) -> dict[str, str | int]:
    """The GPU, versions, and which kernels of larosa's run on it."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "kernels": chosen_kernels(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": _version("triton"),
        "larosa": __version__,
    }


def gpu_read_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Bytes a second that are read of memory: the sum of four gibibytes of float32, the fastest of `rounds`.

    The fastest, for a floor is not to look nearer than it is.
    """
    data = torch.ones(READ_BYTES // 4, device=device)
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        data.sum()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return READ_BYTES / min(seconds)


def time_captured(calls: Mapping[str, Call], copies: int, rounds: int) -> dict[str, Timing]:
    """Seconds of one call by replays of CUDA graphs, which take turns; each graph calls once on every copy.

    Args:
        calls: what to time, by name.
        copies: sets of weights to go through, so many that no cache holds them.
        rounds: replays of each graph, at least 2, after one that is not counted.
    """
    graphs = {name: _captured(call, copies) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for counted in [False, *[True] * rounds]:
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if counted:
                seconds[name].append(start.elapsed_time(end) / 1e3 / copies)
    return {name: Timing.of(measured) for name, measured in seconds.items()}


def _captured(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy in range(copies):  # compiles kernels, which capturing must not
            call(copy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with early_launches(), torch.cuda.graph(graph):  # as in the engine's graph; nobody looks at the results
        for copy in range(copies):
            call(copy)
    return graph


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
