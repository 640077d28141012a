"""Weights of few bits on the command line, for real, on a tiny random model."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from .conftest import QUICK


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_from_conversion_to_text(cli, refused, checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ("--weights", "int4", "--weight-group", 32, "--head", "int4", "--sparsity", 0)
    outcome = cli("convert", checkpoint, out, *QUICK, *options)
    assert outcome.code == 0, outcome.err
    config = read(out / "config.json")
    assert config["larosa"]["quantization"] == {"weights": "int4", "head": "int4", "group": 32, "quantizer": "gptq"}
    card = (out / "README.md").read_text("utf-8")
    assert "| weights | int4 |\n| head | int4 |\n| weight group | 32 |\n| quantizer | gptq |" in card

    stored = load_file(out / "model.safetensors")
    assert cli("inspect", out, "--json", tmp_path / "i.json").code == 0
    report = read(tmp_path / "i.json")
    assert report["parameter_bytes"] == sum(tensor.nbytes for tensor in stored.values())
    few = {name: t.nbytes for name, t in stored.items() if name.endswith(("codes", "scales"))}
    assert report["head_bytes"] == few.pop("lm_head.codes") + few.pop("lm_head.scales")
    assert report["bytes_dense_total"] == sum(few.values())

    outcome = cli("eval", out, "--reference", checkpoint, "--sequence-length", 64, "--json", tmp_path / "e.json")
    assert outcome.code == 0, outcome.err
    assert 0 < read(tmp_path / "e.json")["kl_divergence"] < 1
    generate = ("generate", out, "--prompt", "w5 w6", "--max-new-tokens", 3)
    for engine in ("transformers", "larosa"):
        outcome = cli(*generate, "--engine", engine)
        assert outcome.code == 0, outcome.err
        assert f"{engine} engine" in outcome.err
    message = refused("recover", out, tmp_path / "again", "--reference", checkpoint, "--sequence-length", 64)
    assert message.endswith("weights of few bits are not trained; convert with --weights full, and recover that")


def test_formats_between_4_and_8_bits(cli, checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ("--weights", "int6", "--head", "int5", "--quantizer", "rtn", "--sparsity", 0.25, "--no-measure")
    outcome = cli("convert", checkpoint, out, *QUICK, *options)
    assert outcome.code == 0, outcome.err
    stored = {"weights": "int6", "head": "int5", "group": 64, "quantizer": "rtn"}
    assert read(out / "config.json")["larosa"]["quantization"] == stored
    assert cli("inspect", out, "--json", tmp_path / "i.json").code == 0
    few = sum(
        t.nbytes for name, t in load_file(out / "model.safetensors").items() if name.endswith(("codes", "scales"))
    )
    report = read(tmp_path / "i.json")
    assert report["bytes_dense_total"] + report["head_bytes"] == few
    outcome = cli("eval", out, "--reference", checkpoint, "--sequence-length", 64, "--json", tmp_path / "e.json")
    assert outcome.code == 0, outcome.err
    assert 0 < read(tmp_path / "e.json")["kl_divergence"] < 1
    outcome = cli("generate", out, "--prompt", "w5 w6", "--max-new-tokens", 3, "--engine", "larosa")
    assert outcome.code == 0, outcome.err
    assert "larosa engine" in outcome.err


def test_two_planes_of_4_bits(cli, refused, checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ("--weights", "int4+4", "--sparsity", 0.6)
    converted = cli("convert", checkpoint, out, *QUICK, *options, "--json", tmp_path / "c.json")
    assert converted.code == 0, converted.err
    stored = {"weights": "int4+4", "head": "int4+4", "group": 64, "quantizer": "rtn"}
    assert read(out / "config.json")["larosa"]["quantization"] == stored
    # Of both planes together so much is skipped, on the calibration's tokens.
    assert read(tmp_path / "c.json")["sparsity"]["weights"] == pytest.approx(0.6, abs=0.01)
    outcome = cli("eval", out, "--reference", checkpoint, "--sequence-length", 64, "--json", tmp_path / "e.json")
    assert outcome.code == 0, outcome.err
    assert 0 < read(tmp_path / "e.json")["kl_divergence"] < 0.2
    assert 0 < read(tmp_path / "e.json")["zeros"]["head"]["mean"] < 1
    outcome = cli("inspect", out, "--json", tmp_path / "i.json")
    report = read(tmp_path / "i.json")
    assert 0 < report["head_bytes_sparse"] < report["head_bytes"]
    found = read(tmp_path / "c.json")
    assert found["bytes_per_token"] == report["bytes_sparse_total"] + report["head_bytes_sparse"]
    assert cli("inspect", checkpoint, "--json", tmp_path / "d.json").code == 0
    dense = read(tmp_path / "d.json")
    assert found["bytes_dense"] == dense["bytes_dense_total"] + dense["head_bytes"] > 2 * found["bytes_per_token"]
    assert f"{found['bytes_per_token'] / 1e6:.1f} (dense {found['bytes_dense'] / 1e6:.1f})" in converted.out
    assert f"{report['head_bytes_sparse']:,}" in outcome.out
    texts = []
    for engine in ("transformers", "larosa"):
        outcome = cli("generate", out, "--prompt", "w5 w6", "--max-new-tokens", 3, "--engine", engine)
        assert outcome.code == 0, outcome.err
        texts.append(outcome.out)
    assert texts[0] == texts[1]
    outcome = cli("generate", out, "--prompt", "w5 w6", "--max-new-tokens", 3, "--lossless", "--temperature", 0)
    assert outcome.code == 0, outcome.err
    message = refused("convert", checkpoint, tmp_path / "no", *QUICK, *options, "--selection", "top-k")
    assert message.endswith("say what is read of them: --selection threshold --score fisher, the defaults")


def test_several_sparsities_share_their_weights(cli, checkpoint, tmp_path):
    outcome = cli(
        *("convert", checkpoint, tmp_path / "out", *QUICK, "--weights", "int8", "--sparsity", "0.5,0.25"),
        *("--no-measure", "--json", tmp_path / "c.json"),
    )
    assert outcome.code == 0, outcome.err
    files = [(tmp_path / f"out-{p}" / "model.safetensors").read_bytes() for p in ("0.5", "0.25")]
    assert files[0] == files[1]
    assert [r["sparsity"]["nominal"] for r in read(tmp_path / "c.json")["reports"]] == [0.5, 0.25]


def test_a_divergence_includes_what_rounding_loses(cli, refused, checkpoint, tmp_path):
    options = ("convert", checkpoint, tmp_path / "out", *QUICK, "--weights", "int4", "--quantizer", "rtn", "--max-kl")
    assert "even at 0% sparsity the divergence is" in refused(*options, "1e-6")
    outcome = cli(*options, 0.2, "--json", tmp_path / "c.json")
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "c.json")["sparse"]["kl_divergence"] <= 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "int4", "--weight-group", 48), "a weight group of 48: one of 32, 64, 128"),
        (("--weight-group", 32), "is of weights of few bits: add --weights int8, int4+4, int6, int5, int4"),
        (("--quantizer", "rtn"), "--quantizer rtn is of weights of few bits"),
        (("--weights", "int8", "--method", "cats"), "method 'cats' skips rows of weights"),
        (("--weights", "auto"), "--weights auto takes what reads the fewest bytes within a bound: add --max-kl"),
        (("--weights", "auto", "--max-kl", 0.1, "--streaming"), "--weights auto holds the model several times"),
        (("--weights", "auto", "--max-kl", 1e-30), "--max-kl 1e-30: even at 0% sparsity the divergence is"),
    ],
)
def test_options_that_mean_nothing(refused, checkpoint, tmp_path, options, message):
    assert message in refused("convert", checkpoint, tmp_path / "out", *QUICK, *options)
    assert not (tmp_path / "out").exists()


def test_bits_and_sparsity_are_chosen_together(cli, checkpoint, tmp_path):
    out, bound = tmp_path / "out", 2e-3
    options = ("--weights", "auto", "--max-kl", bound, "--json", tmp_path / "c.json")
    outcome = cli("convert", checkpoint, out, *QUICK, *options)
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "c.json")
    tried = report["tried"]
    assert {trial["weights"] for trial in tried} >= {"int4", "int8"}
    within = [trial for trial in tried if trial["kl_divergence"] <= bound]
    best = min(within, key=lambda trial: trial["bytes_per_token"])
    stored = report["larosa"]["quantization"]
    assert (stored["weights"] if stored else "full") == best["weights"]
    assert report["larosa"]["sparsity"] == best["sparsity"]
    assert report["sparse"]["kl_divergence"] == best["kl_divergence"]
    assert cli("inspect", out, "--json", tmp_path / "i.json").code == 0
    found = read(tmp_path / "i.json")
    assert found["bytes_sparse_total"] + found["head_bytes_sparse"] == best["bytes_per_token"]
    assert f"{best['sparsity']:.0%}" in outcome.out
