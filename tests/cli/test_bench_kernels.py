from __future__ import annotations

import functools
import json

import pytest

from larosa.benchmarks.kernels import LAYER, Shape, measure_kernels


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The same measurements of matrices a hundred times smaller, and of one of the layer's own."""
    monkeypatch.setattr("larosa.benchmarks.bandwidth._BYTES", 1 << 20)
    shapes = (Shape((40,), 24), LAYER[1][2])
    quick = functools.partial(measure_kernels, shapes=shapes, bytes_of_copies=1)
    monkeypatch.setattr("larosa.cli.bench.measure_kernels", quick)


def test_a_table_and_json(cli, tmp_path):
    outcome = cli("bench", "kernels", "--device", "cpu", "--rounds", 2, "--json", tmp_path / "k.json")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "k.json").read_text("utf-8"))
    keys = {"kernel", "shape", "dtype", "threads", "sparsity", "speedup", "bandwidth_fraction", "floor", "time"}
    assert all(keys <= row.keys() for row in report["rows"])
    assert {"sparse_linear", "linear", "top_k"} <= {row["kernel"] for row in report["rows"]}
    assert "GB/s" in outcome.out
    row = next(row for row in report["rows"] if row["kernel"] == "linear")
    assert f"{row['speedup']:.2f}x" in outcome.out, "whole, however narrow the terminal is"
    assert "…" not in outcome.out


def test_what_cannot_be_measured(refused, tmp_path):
    assert "CUDA devices are visible" in refused("bench", "kernels", "--device", "cuda:99")
    assert "--json" in refused("bench", "kernels", "--json", tmp_path / "missing" / "k.json")
