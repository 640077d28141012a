from __future__ import annotations

import json

import pytest
import torch

from larosa.benchmarks.shapes import SHAPES

QUICK = ("--prompt-tokens", 4, "--tokens", 4)


@pytest.fixture(autouse=True)
def small(monkeypatch, family_config):
    monkeypatch.setattr("larosa.benchmarks.bandwidth._BYTES", 1 << 20)
    monkeypatch.setitem(SHAPES, "tiny", lambda: family_config("llama"))


def test_a_shape(cli, tmp_path):
    options = (
        *("--shape", "tiny", "--sparsity", "0.5,0.75", "--layers", 2, "--dtype", "float32", "--threads", 1),
        *("--layers-per-rotation", 2),
    )
    outcome = cli("bench", "decode", *options, *QUICK, "--json", tmp_path / "d.json")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "d.json").read_text("utf-8"))
    assert report["machine"]["threads"] == 1
    assert [row["sparsity"] for row in report["rows"]] == [0, 0, 0.5, 0.75]
    keys = {"shape", "dtype", "threads", "row", "sparsity", "tokens_per_second", "speedup", "floor_fraction"}
    title = "tiny, 2 layers, 2 layers per rotation"
    assert all(keys <= row.keys() and row["shape"] == title for row in report["rows"])
    assert "transformers dense" in outcome.out


def test_keys_and_values_of_8_bits(cli, tmp_path):
    options = ("--shape", "tiny", "--sparsity", "0.5", "--kv-cache-dtype", "int8", "--json", tmp_path / "d.json")
    outcome = cli("bench", "decode", *options, *QUICK)
    assert outcome.code == 0, outcome.err
    assert "int8 keys and values in the engine" in outcome.out
    rows = json.loads((tmp_path / "d.json").read_text("utf-8"))["rows"]
    assert [row["kv_cache_dtype"] for row in rows] == ["bfloat16", "int8", "int8"]
    assert rows[1]["bytes_per_token"] < rows[0]["bytes_per_token"]


def test_texts_at_once(cli, tmp_path):
    options = ("--shape", "tiny", "--sparsity", "0.5", "--batch", "1,2", "--json", tmp_path / "d.json")
    outcome = cli("bench", "decode", *options, *QUICK)
    assert outcome.code == 0, outcome.err
    assert "of all texts together" in " ".join(outcome.out.split())
    rows = json.loads((tmp_path / "d.json").read_text("utf-8"))["rows"]
    assert [row["batch"] for row in rows] == [1, 1, 2, 1, 2]


def test_lossless(cli, checkpoint, converted, tmp_path):
    options = ("--lossless", "--draft", "int8", "--tokens", 12, "--threads", 1, "--json", tmp_path / "d.json")
    outcome = cli("bench", "decode", checkpoint, *options)
    assert outcome.code == 0, outcome.err
    assert "drafted by int8" in " ".join(outcome.out.split())
    *kinds, together = json.loads((tmp_path / "d.json").read_text("utf-8"))["rows"]
    assert together["kind"] == "all"
    for name in ("texts", "tokens", "drafted"):
        assert together[name] == sum(row[name] for row in kinds)
    assert all(row["tokens_per_pass"] >= 1 and row["speedup"] > 0 for row in kinds)
    for wrong in ((checkpoint, converted), ("--shape", "tiny"), (checkpoint, "--batch", 2)):
        assert "one text at a time of one checkpoint" in cli("bench", "decode", *wrong, "--lossless").err
    assert "--draft says what drafts for --lossless" in cli("bench", "decode", checkpoint, "--draft", "int8").err


def test_checkpoints(cli, checkpoint, converted, tmp_path):
    outcome = cli("bench", "decode", checkpoint, converted, *QUICK, "--json", tmp_path / "d.json")
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "d.json").read_text("utf-8"))
    assert [row["row"] for row in report["rows"]] == ["transformers dense", "engine dense", str(converted)]


@pytest.mark.gpu
def test_checkpoints_on_a_gpu(cli, checkpoint, converted, tmp_path):
    options = ("--device", "cuda", "--json", tmp_path / "d.json")
    outcome = cli("bench", "decode", checkpoint, converted, *QUICK, *options)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "d.json").read_text("utf-8"))
    assert [row["row"] for row in report["rows"]] == ["compiled PyTorch", "engine dense", str(converted)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either checkpoints or --shape"),
        (("somewhere", "--shape", "tiny"), "give either checkpoints or --shape"),
        (("somewhere", "--layers", 2), "are for --shape"),
        (("somewhere", "--selection", "threshold"), "are for --shape"),
        (("somewhere", "--sparsity", "0.5"), "--sparsity, --layers"),
        (("somewhere", "--sparsity", "0.25,0.5"), "are for --shape: leave them out, a checkpoint has its own"),
        (("somewhere", "--layers-per-rotation", 2), "are for --shape"),
        (("--shape", "tiny", "--layers-per-rotation", 0), "0 layers per rotation: give at least 1"),
        (("--shape", "tiny", "--sparsity", "half"), "give fractions separated by commas"),
        (("--shape", "tiny", "--sparsity", "50"), "give a fraction"),
        (("--shape", "tiny", "--batch", "two"), "give numbers of texts separated by commas"),
        (("--shape", "tiny", "--batch", "9"), "--batch takes numbers of texts from 1 to 8, not 9"),
        (("--shape", "gpt-5"), "unknown shape"),
        (("--shape", "tiny", "--device", "cuda:99"), "CUDA devices are visible"),
        (("--shape", "tiny", "--json", "nowhere/d.json"), "--json"),
    ],
)
def test_bad_input(refused, options, message):
    assert message in refused("bench", "decode", *options)


def test_threads_are_set_for_the_run(cli):
    threads = torch.get_num_threads()
    try:
        assert cli("bench", "decode", "--shape", "tiny", *QUICK, "--threads", 2).code == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
