"""How much memory the process has needed."""

import resource
import sys

import torch


def peak_memory() -> dict[str, int]:
    """Highest resident memory of the process and highest CUDA allocation so far, in bytes."""
    # Linux counts in KiB, macOS in bytes. Mapped checkpoint files count while they are resident.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak
