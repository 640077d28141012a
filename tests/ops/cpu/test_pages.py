"""Matrices laid out by columns, and the memory that they lie on."""

import re
import resource
import sys
from pathlib import Path

import pytest
import torch

from larosa.ops import column_major
from larosa.ops.cpu.pages import HUGE_PAGE, on_huge_pages

LARGE = (1024, 1025)  # with 2 bytes an element more than one huge page, and not a whole number of them


def advised(address: int) -> bool:
    """Whether Linux knows that the memory at an address is to be on huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("an address of no mapping")


@pytest.mark.parametrize("shape", [LARGE, (1025, 1024), (1, 3_000_000), (3, 5), (1, 1), (7, 0), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_matrix_with_its_columns_in_one_piece(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    columns = column_major(weight)
    assert columns.dtype is dtype
    assert columns.shape == weight.shape
    assert torch.equal(columns, weight)
    assert columns.t().is_contiguous()


def test_a_matrix_laid_out_so_already_is_not_copied():
    columns = column_major(torch.randn(LARGE))
    assert column_major(columns) is columns


def test_a_large_matrix_begins_on_a_huge_page_and_owns_no_more_than_its_elements():
    columns = column_major(torch.randn(LARGE, dtype=torch.bfloat16))
    assert columns.data_ptr() % HUGE_PAGE == 0
    assert columns.storage_offset() == 0
    assert columns.untyped_storage().nbytes() == columns.numel() * 2


@pytest.mark.skipif(sys.platform != "linux", reason="others lend no huge pages")
def test_rows_of_bytes_are_put_on_huge_pages_once():
    codes = torch.randint(0, 256, (2049, 1031), dtype=torch.uint8)[1:]  # not at the beginning of a page
    moved = on_huge_pages(codes)
    assert moved.data_ptr() % HUGE_PAGE == 0
    assert torch.equal(moved, codes)
    assert on_huge_pages(moved) is moved
    small = torch.zeros(8, 8, dtype=torch.uint8)
    assert on_huge_pages(small) is small


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system has no transparent huge pages"
)
def test_only_large_matrices_ask_for_huge_pages():
    large, small = column_major(torch.randn(LARGE)), column_major(torch.randn(8, 8))
    assert advised(large.data_ptr())
    assert advised(large.data_ptr() + large.numel() * 4 - 1)
    assert not advised(small.data_ptr())


def test_the_memory_outlives_the_function_and_goes_with_the_tensor():
    """Its pages are given back: a hundred matrices of 64 MiB, one after the other, would not fit the address limit."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    weight = torch.zeros(4096, 4096)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    try:
        for _ in range(100):
            assert column_major(weight)[-1, -1] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
