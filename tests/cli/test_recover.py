"""`larosa recover` from end to end."""

from __future__ import annotations

import json

import pytest

import larosa


@pytest.fixture
def other_checkpoint(tmp_path, make_model, tokenizer):
    """A model of another width."""
    make_model("llama", hidden_size=48, num_attention_heads=4).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


QUICK = ("--num-sequences", 24, "--sequence-length", 16, "--steps", 8, "--batch", 6, "--evaluate-every", 4)


def test_from_end_to_end(cli, checkpoint, tmp_path, text_file):
    convert = ("--calibration", text_file, "--num-sequences", 2, "--sequence-length", 32, "--no-measure")
    assert cli("convert", checkpoint, tmp_path / "out", "--sparsity", 0.6, *convert).code == 0
    outcome = cli(
        *("recover", tmp_path / "out", tmp_path / "better", "--reference", checkpoint, *QUICK),
        *("--learning-rate", 0.001, "--json", tmp_path / "r.json"),
    )
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["held_out_after"] < report["held_out_before"]
    assert report["larosa"]["recovery"]["source"] == "self"
    assert "| recovery | " in (tmp_path / "better" / "README.md").read_text("utf-8")
    assert not list(tmp_path.glob("*.recovery.pt*"))
    before, after = (larosa.load(str(tmp_path / name)).model for name in ("out", "better"))
    assert before.dtype == after.dtype
    old, new = before.config.larosa, after.config.larosa
    assert old["thresholds"]["values"] != new["thresholds"]["values"], "they follow the weights"
    new["thresholds"]["values"] = old["thresholds"]["values"]
    assert old == new | {"recovery": None}
    found = cli("eval", tmp_path / "better", "--reference", checkpoint, "--data", text_file, "--sequence-length", 32)
    assert found.code == 0, found.err


def test_what_cannot_be_recovered(cli, checkpoint, tmp_path, text_file, other_checkpoint):
    convert = ("--calibration", text_file, "--num-sequences", 2, "--sequence-length", 32, "--no-measure")
    assert cli("convert", checkpoint, tmp_path / "out", *convert).code == 0
    for model, reference, options, message in (
        (checkpoint, checkpoint, (), "not a converted model"),
        (tmp_path / "out", tmp_path / "out", (), "--reference is the dense one"),
        (tmp_path / "out", other_checkpoint, (), "not the model it was converted from"),
        (tmp_path / "out", checkpoint, ("--steps", 0), "--steps must be at least 1"),
        (tmp_path / "out", checkpoint, ("--learning-rate", "nan"), "--learning-rate nan"),
        (tmp_path / "out", checkpoint, ("--sequence-length", 10**6), "outside the model's context"),
        (tmp_path / "out", checkpoint, ("--data", text_file, "--num-sequences", 10**6), "are asked for"),
    ):
        outcome = cli("recover", model, tmp_path / "better", "--reference", reference, *QUICK, *options)
        assert outcome.code == 1
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
        assert not (tmp_path / "better").exists()
