"""The benchmark's bookkeeping; times themselves are not tested."""

import json

import pytest

from larosa.benchmarks.bandwidth import read_bandwidth
from larosa.benchmarks.kernels import DTYPES, FORMATS, SPARSITIES, WIDTHS, Shape, measure_kernels
from larosa.benchmarks.timing import Timing, time_in_turns


@pytest.fixture(scope="module")
def result():
    return measure_kernels(shapes=(Shape((40, 24), 32),), rounds=2, bytes_of_copies=1 << 14)


def test_every_kernel_has_its_rows(result):
    products = [row for row in result.rows if row.kernel in ("linear", "sparse_linear", "low_bit_linear")]
    assert [(row.dtype, row.sparsity) for row in products if row.kernel == "sparse_linear"] == [
        (str(dtype).removeprefix("torch."), sparsity) for dtype in DTYPES for sparsity in SPARSITIES
    ]
    assert [(row.dtype, row.sparsity) for row in products if row.kernel == "low_bit_linear"] == [
        (form.name, sparsity) for form in FORMATS for sparsity in SPARSITIES
    ]
    assert {(row.kernel, int(row.shape)) for row in result.rows if row not in products} == {
        (kernel, width) for kernel, widths in WIDTHS.items() for width in widths
    }


def test_ratios_follow_from_what_was_measured(result):
    for row in result.rows:
        content = row.to_dict()
        assert content["speedup"] == pytest.approx(content["dense"]["median"] / content["time"]["median"])
        assert content["floor"] == pytest.approx(content["bytes"] / content["bandwidth"])
        assert content["bandwidth_fraction"] == pytest.approx(content["floor"] / content["time"]["median"])
        assert content["threads"] == result.machine["threads"]
    half = next(row for row in result.rows if row.kernel == "sparse_linear" and row.sparsity == 0.5)
    assert (half.shape, half.bytes) == ("40+24x32", 64 * 16 * 2)
    half = next(row for row in result.rows if row.dtype == "int4" and row.sparsity == 0.5)
    assert (half.shape, half.bytes) == ("40+24x32", (20 + 12 + 2 * 2 + 2) * 16)


def test_the_share_of_selections_needs_the_layer(result):
    assert result.selection_share is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_calls_take_turns_on_every_copy():
    done = []
    timings = time_in_turns(
        {"a": lambda copy: done.append(("a", copy)), "b": lambda copy: done.append(("b", copy))}, copies=2, rounds=3
    )
    assert done == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 4
    assert all(timing.low <= timing.median <= timing.high for timing in timings.values())


def test_timing_is_the_median_and_the_outer_tenths():
    assert Timing.of([float(i) for i in range(11)]) == Timing(5.0, 1.0, 9.0)


def test_bandwidth_is_that_of_a_memory():
    assert 1e8 < read_bandwidth(rounds=2) < 1e13
