"""Asking a conversion for quality: --max-kl, --sweep and several sparsities of one calibration."""

from __future__ import annotations

import json

import pytest

from larosa.evaluation.verdict import BAR, verdict

from .conftest import QUICK


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_several_sparsities_give_a_folder_each(cli, checkpoint, tmp_path):
    outcome = cli("convert", checkpoint, tmp_path / "out", *QUICK, "--sparsity", "0.25,0.5", "--json", tmp_path / "j")
    assert outcome.code == 0, outcome.err
    assert [report["larosa"]["sparsity"] for report in read(tmp_path / "j")["reports"]] == [0.25, 0.5]
    for sparsity in (0.25, 0.5):
        folder, alone = tmp_path / f"out-{sparsity}", tmp_path / f"alone-{sparsity}"
        assert cli("convert", checkpoint, alone, *QUICK, "--sparsity", sparsity).code == 0
        for name in ("config.json", "model.safetensors"):
            assert (folder / name).read_bytes() == (alone / name).read_bytes()


def test_max_kl_takes_the_highest_that_stays_below(cli, checkpoint, tmp_path):
    outcome = cli("convert", checkpoint, tmp_path / "out", *QUICK, "--max-kl", 2e-4, "--json", tmp_path / "j")
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "j")
    found = report["larosa"]["sparsity"]
    assert 0 < found < 0.9
    assert report["sparse"]["kl_divergence"] <= 2e-4
    above = f"{found + 0.01:.2f}"
    assert cli("convert", checkpoint, tmp_path / "a", *QUICK, "--sparsity", above, "--json", tmp_path / "j").code == 0
    assert read(tmp_path / "j")["sparse"]["kl_divergence"] > 2e-4


def test_max_kl_that_nothing_meets(refused, checkpoint, tmp_path):
    message = refused("convert", checkpoint, tmp_path / "out", *QUICK, "--max-kl", 1e-30)
    assert "even at 0% sparsity the divergence is" in message
    assert not (tmp_path / "out").exists()


def test_a_sweep_writes_a_picture_and_no_model(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    outcome = cli("convert", checkpoint, "--sweep", *QUICK, "--sparsity", "0.2,0.4", "--json", tmp_path / "j")
    assert outcome.code == 0, outcome.err
    points = read(tmp_path / "j")["points"]
    assert [point["sparsity"] for point in points] == [0.2, 0.4]
    assert points[0]["evaluation"]["kl_divergence"] < points[1]["evaluation"]["kl_divergence"]
    assert points[0]["bytes_per_token"] > points[1]["bytes_per_token"]
    assert {path.name for path in tmp_path.iterdir()} - before == {"sweep.png", "j"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no OUT"),
        (("out", "--sweep"), "--sweep writes no model"),
        (("--sweep", "--max-kl", "0.1"), "--sweep writes no model"),
        (("out", "--max-kl", "0.1", "--sparsity", "0.5"), "not both"),
        (("out", "--max-kl", "0"), "--max-kl needs a number above 0"),
        (("out", "--max-kl", "0.1", "--no-measure"), "--max-kl needs"),
        (("out", "--sparsity", "0.5,0.5"), "several different ones"),
        (("out", "--sparsity", "much"), "give a fraction"),
        (("out", "--sparsity", "0.2,50"), "outside [0, 1)"),
        (("out", "--sparsity", "0.2,0.5", "--method", "teal"), "are of one sparsity"),
    ],
)
def test_what_excludes_each_other(refused, checkpoint, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("convert", checkpoint, *options, *QUICK)


def test_words_grow_worse_with_the_divergence():
    assert len({verdict(kl) for kl in (0.001, 0.02, 0.07, 0.5)}) == 4
    assert not verdict(BAR).startswith("Warning")
    assert verdict(BAR * 1.01).startswith("Warning")
