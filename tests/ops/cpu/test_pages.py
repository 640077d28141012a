"""Matrices laid out by columns, and the memory that they lie on."""

import re
import resource
from pathlib import Path

import pytest
import torch

from larosa.ops import column_major
from larosa.ops.cpu.pages import HUGE_PAGE, rows_side_by_side

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


@pytest.mark.parametrize("depth", [1, 2, 700, 4001])
def test_rows_lie_side_by_side_and_are_put_there_once(depth):
    codes = [torch.randint(0, 256, (depth, width), dtype=torch.uint8) for width in (511, 96)]
    scales = [torch.randn(depth, width).bfloat16() for width in (16, 3)]
    matrices = [*codes, *scales]
    laid_out = rows_side_by_side(matrices)
    assert all(torch.equal(one, other) for one, other in zip(laid_out, matrices, strict=True))
    assert [x.data_ptr() - laid_out[0].data_ptr() for x in laid_out] == [0, 511, 608, 640]
    assert {x.stride(0) * x.itemsize for x in laid_out} == {11 * 64}  # 646 bytes
    assert len({x.untyped_storage().data_ptr() for x in laid_out}) == 4
    assert depth < 4001 or laid_out[0].data_ptr() % HUGE_PAGE == 0
    again = rows_side_by_side(laid_out)
    assert all(one is other for one, other in zip(laid_out, again, strict=True))


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system has no transparent huge pages"
)
def test_only_large_matrices_ask_for_huge_pages():
    large, small = column_major(torch.randn(LARGE)), column_major(torch.randn(8, 8))
    assert advised(large.data_ptr())
    assert advised(large.data_ptr() + large.numel() * 4 - 1)
    assert not advised(small.data_ptr())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much memory is used")
def test_the_memory_outlives_the_function_and_goes_with_the_tensor():
    """Its pages are given back: thirty matrices of 64 MiB, one after the other, would not fit the address limit."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    weight = torch.zeros(4096, 4096)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    try:
        for _ in range(30):
            assert column_major(weight)[-1, -1] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
