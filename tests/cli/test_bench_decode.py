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
    assert all(row["compiled_tokens_per_second"] is None for row in (*kinds, together))
    assert 0 <= together["accepted_at"][0] <= 1
    shown = " ".join(outcome.out.split())
    assert f"All {together['tokens'] + 16} tokens are those of the dense pass alone." in shown
    assert f"right by place: {together['accepted_at'][0]:.1%}" in shown
    for wrong in ((checkpoint, converted), (checkpoint, "--batch", 2)):
        assert "one text at a time of one model" in cli("bench", "decode", *wrong, "--lossless").err
    for wrong in (("--drafted", 8, "--draft", "int8"), ("--drafted", 3)):
        assert "give 1 to 7, and a --draft" in cli("bench", "decode", checkpoint, "--lossless", *wrong).err
    assert "--draft says what drafts for --lossless" in cli("bench", "decode", checkpoint, "--draft", "int8").err


def test_lossless_of_a_shape(cli, checkpoint, tmp_path):
    measured, composed = tmp_path / "m.json", tmp_path / "c.json"
    options = ("--threads", 1, "--lossless", "--draft", "int4")
    always = (*options, "--tokens", 12, "--drafted", 3, "--json", measured)
    assert cli("bench", "decode", checkpoint, *always).code == 0
    assert len(json.loads(measured.read_text("utf-8"))["rows"][-1]["accepted_at"]) == 3
    tiny = ("--shape", "tiny", *options, *QUICK, "--json", composed)
    outcome = cli("bench", "decode", *tiny, "--sparsity", "0.5,0", "--acceptance", f"0.9/0.8,{measured}")
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert "Tokens/s are composed, not measured" in shown
    rows = json.loads(composed.read_text("utf-8"))["rows"]
    assert [(row["sparsity"], row["acceptance"]) for row in rows] == [(0.5, "0.9/0.8"), (0.0, str(measured))]
    assert rows[0]["accepted_at"] == [0.9, 0.8]
    assert rows[1]["accepted_at"] == json.loads(measured.read_text("utf-8"))["rows"][-1]["accepted_at"]
    for row in rows:
        seconds = row["drafted"] * row["draft_ms"] + row["verify_ms"][row["drafted"]]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens_per_pass"] / seconds)
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] * row["dense_ms"] / 1e3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--acceptance is what --shape --lossless needs"),
        (("--acceptance", "0.9", "--weights", "int4"), "--draft says how the drafter of --shape stores its weights"),
        (("--acceptance", "0.9,0.8"), "--acceptance: give one for each of the 1 sparsities, not 2"),
        (("--acceptance", "1.1"), "--acceptance 1.1: give shares from 0 to 1"),
        (("--acceptance", "0.9", "--drafted", 3), "--drafted is for --lossless of a model"),
        (("--acceptance", "nowhere.json"), "nowhere.json: No such file"),
        (("--acceptance", "0.9", "--draft", "folder"), "unknown draft 'folder': one of int8, int4"),
    ],
)
def test_lossless_shapes_that_are_refused(cli, options, message):
    assert message in cli("bench", "decode", "--shape", "tiny", "--lossless", *QUICK, *options).err


def test_files_without_an_acceptance(cli, tmp_path):
    (tmp_path / "d.json").write_text('{"rows": []}', "utf-8")
    outcome = cli("bench", "decode", "--shape", "tiny", "--lossless", "--acceptance", tmp_path / "d.json")
    assert "not what bench decode MODEL --lossless --json writes (--acceptance)" in outcome.err


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


@pytest.mark.gpu
def test_lossless_on_a_gpu(cli, checkpoint, tmp_path):
    written = tmp_path / "d.json"
    options = ("--device", "cuda", "--lossless", "--draft", "int8", "--no-compiled", "--json", written)
    outcome = cli("bench", "decode", checkpoint, *options, "--tokens", 20)
    assert outcome.code == 0, outcome.err
    assert "tokens are those of the dense pass alone" in " ".join(outcome.out.split())
    report = json.loads(written.read_text("utf-8"))
    assert "gpu" in report["machine"]
    assert report["rows"][-1]["drafted"] > 0
    shape = ("--shape", "tiny", *options, *QUICK, "--acceptance", "0.9,0.8", "--sparsity", "0,0.5")
    outcome = cli("bench", "decode", *shape)
    assert outcome.code == 0, outcome.err
    rows = json.loads(written.read_text("utf-8"))["rows"]
    assert all(row["draft_ms"] > 0 and len(row["verify_ms"]) == 8 and row["speedup"] > 0 for row in rows)


@pytest.mark.gpu
def test_generate_losslessly_on_a_gpu(cli, checkpoint):
    options = ("--prompt", "w10 w20", "--max-new-tokens", 40, "--device", "cuda")
    expected = cli("generate", checkpoint, *options)
    found = cli("generate", checkpoint, *options, "--lossless", "--draft", "int8")
    assert found.code == 0, found.err
    assert found.out == expected.out
    assert "tokens of a dense pass" in found.err


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
        (("--shape", "larosa-tiny", "--no-dense"), "--no-dense is for --shape with --weights int8 or int4"),
        (("--shape", "larosa-tiny", "--no-dense", "--weights", "int8", "--device", "cpu"), "--no-dense is for a GPU"),
    ],
)
def test_bad_input(refused, options, message):
    assert message in refused("bench", "decode", *options)


def test_threads_are_set_for_the_run(cli):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert cli("bench", "decode", "--shape", "tiny", *QUICK, "--threads", 1).code == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
