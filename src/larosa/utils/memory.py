"""How much memory the process has needed, and how much there is."""

import gc
import sys

import psutil
import torch


def peak_memory() -> dict[str, int]:
    """Highest resident memory of the process and highest CUDA allocation so far, in bytes."""
    peak = {"cpu": _peak_resident()}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def _peak_resident() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    # Linux counts in KiB, macOS in bytes. Mapped checkpoint files count while they are resident.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def release_memory(device: torch.device) -> None:
    """Hand back what nobody uses any more: reference cycles, and what PyTorch keeps of a GPU's memory for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
