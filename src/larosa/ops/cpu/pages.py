"""Memory for weights that are read out of order, on pages so large that few of their addresses must be looked up."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch

#: Of x86-64, and of arm64 with small pages of 4 KiB.
HUGE_PAGE = 2 << 20
#: Bytes of a cache line.
_LINE = 64


def empty_on_huge_pages(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU to be written, from the beginning of a huge page on where the system lends some.

    Smaller ones than a page, and all of them where there is no such page, are where PyTorch puts them.
    """
    size = shape.numel() * dtype.itemsize
    if size < HUGE_PAGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    memory, start = _memory(size)
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel(), offset=start).view(shape)


def rows_side_by_side(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same matrices, in memory row by row: a row of the first, that of the second and so on, then the next rows.

    Those who read some rows of all of them find each row in one piece. Rows begin an odd number of cache lines apart,
    so that the same places of many rows do not compete for the same place in a cache. Matrices that lie so already are
    not copied.

    Args:
        matrices: [D, N_i] each, of any dtypes, rows in one piece; first those of bytes.

    Returns:
        As many, each of a storage of its own, for those that tell tensors apart by that.
    """
    offsets, end = [], 0
    for matrix in matrices:
        end = -(-end // matrix.itemsize) * matrix.itemsize
        offsets.append(end)
        end += matrix.shape[1] * matrix.itemsize
    lines = -(-end // _LINE)
    stride, first = _LINE * (lines + 1 - lines % 2), matrices[0].data_ptr()
    strides = [stride // matrix.itemsize for matrix in matrices]
    places = zip(matrices, offsets, strides, strict=True)
    if all(matrix.data_ptr() == first + at and matrix.stride(0) == apart for matrix, at, apart in places):
        return list(matrices)
    rows = len(matrices[0])
    memory, start = _memory(rows * stride)
    result = []
    for matrix, at, apart in zip(matrices, offsets, strides, strict=True):
        width = matrix.shape[1]
        elements = torch.frombuffer(memory, dtype=matrix.dtype, offset=start + at, count=(rows - 1) * apart + width)
        result.append(elements.as_strided((rows, width), (apart, 1)).copy_(matrix))
    return result


def _memory(size: int) -> tuple[mmap.mmap, int]:
    """Memory of so many bytes, which begin at a huge page, where the system lends some, and where that is in it."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size + HUGE_PAGE, **private)
    if sys.platform == "linux" and size >= HUGE_PAGE:
        with suppress(OSError):  # Linux built without huge pages; it takes ordinary ones
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
