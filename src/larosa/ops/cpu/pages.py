"""Memory for weights that are read out of order, on pages so large that few of their addresses must be looked up."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch

#: Of x86-64, and of arm64 with small pages of 4 KiB.
HUGE_PAGE = 2 << 20


def empty_on_huge_pages(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU to be written, from the beginning of a huge page on where the system lends some.

    Smaller ones than a page, and all of them where there is no such page, are where PyTorch puts them.
    """
    size = shape.numel() * dtype.itemsize
    if size < HUGE_PAGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # Linux built without huge pages; it takes ordinary ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=-start % HUGE_PAGE).view(shape)


def on_huge_pages(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where it lies so already or no page is lent, else the same values in such memory."""
    if x.nbytes < HUGE_PAGE or x.data_ptr() % HUGE_PAGE == 0 or sys.platform != "linux":
        return x
    return empty_on_huge_pages(x.shape, x.dtype).copy_(x)
