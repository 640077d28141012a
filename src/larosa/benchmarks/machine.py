"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from larosa.ops.cpu import library
from larosa.version import __version__


def machine() -> dict[str, str | int]:
    """The processor and its cores, versions, and the threads and instruction set of the kernels."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "instruction_set": library.isa(),
        "thread_pool": library.threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "larosa": __version__,
    }


def _cpu() -> str:
    information = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty or "x86_64" there
    lines = information.read_text("utf-8").splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
