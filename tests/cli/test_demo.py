"""`larosa demo` with less to measure. What it finds at its own sizes is tested in tests/data/test_bundled.py."""

from __future__ import annotations

import json

import larosa.cli.demo
from larosa.benchmarks.decode import measure_shape
from larosa.demo import quality


def test_compares_methods_and_times_them(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "_SAMPLE", {"num_sequences": 4, "sequence_length": 32})
    monkeypatch.setattr(quality, "_MEASURED_LENGTH", 64)
    monkeypatch.setattr(quality, "_MEASURED_WINDOWS", 1)
    monkeypatch.setattr(quality, "SPARSITIES", (0.5,))
    monkeypatch.setattr(larosa.cli.demo, "run_speed_demo", lambda: [measure_shape("larosa-tiny", layers=1, tokens=4)])
    picture, file = tmp_path / "demo.png", tmp_path / "demo.json"
    outcome = cli("demo", "--output", picture, "--json", file, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(file.read_text("utf-8"))
    rows = [(row["method"], row["sparsity"]) for row in report["rows"]]
    assert rows == [
        ("Dense", 0.0),
        *((method, 0.5) for method in quality.METHODS),
    ]
    assert report["rows"][0]["kl_divergence"] == 0
    assert all(row["kl_divergence"] > 0 for row in report["rows"][1:])
    assert [row["row"] for row in report["speed"]] == ["transformers dense", "engine dense", "LaRoSA", "LaRoSA"]
    for method in quality.METHODS:
        assert method in outcome.out
