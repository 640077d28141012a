"""Every command for real, on tiny random models; quality is the bundled model's tests' business."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer

import larosa
from larosa.data.bundled import bundled_model
from larosa.decoding import CacheDtype, Engine
from larosa.decoding.loop import continue_prompt, stop_tokens
from larosa.decoding.sampling import Sampler

from .conftest import QUICK, contents


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_convert_writes_a_complete_checkpoint_and_leaves_the_source_alone(cli, checkpoint, tmp_path):
    before, output = contents(checkpoint), tmp_path / "out"
    outcome = cli("convert", checkpoint, output, *QUICK, "--sparsity", 0.4, "--json", tmp_path / "c.json")
    assert outcome.code == 0, outcome.err
    assert contents(checkpoint) == before
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "generation_config.json"} <= set(
        contents(output)
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "dense", "out"]  # nothing else left behind
    report = read(tmp_path / "c.json")
    assert report["sparsity"]["nominal"] == 0.4
    assert report["sparsity"]["weights"] == pytest.approx(0.4, abs=0.02)  # k is a whole number of 32 entries
    assert report["sparse"]["kl_divergence"] > 0
    assert report["peak_memory_bytes"]["cpu"] > report["source_bytes"]
    config = read(output / "config.json")
    assert config["model_type"] == "larosa_llama"
    assert config["larosa"]["calibration"] == {
        "source": "self",
        "num_sequences": 4,
        "sequence_length": 32,
        "seed": 0,
    }
    assert f"{report['sparse']['perplexity']:.3f}" in (output / "README.md").read_text("utf-8")


def test_options_reach_the_checkpoint(cli, checkpoint, tmp_path, text_file):
    options = (
        *("--recipe", "paper", "--search", "none", "--budget", "weights", "--rotation", "layer"),
        *("--covariance", "h3", "--prefill", "dense", "--seed", 7, "--calibration", text_file),
        *("--dtype", "float64", "--max-shard-size", "20KB", "--no-measure"),
    )
    outcome = cli("convert", checkpoint, tmp_path / "out", *QUICK, *options)
    assert outcome.code == 0, outcome.err
    config = read(tmp_path / "out" / "config.json")
    assert config["dtype"] == "float64"
    block = config["larosa"]
    chosen = {key: block[key] for key in ("recipe", "search", "budget", "rotation", "covariance", "prefill")}
    assert list(chosen.values()) == ["paper", "none", "weights", "layer", "h3", "dense"]
    assert block["calibration"]["source"] == str(text_file)
    assert block["calibration"]["seed"] == 7
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_layers_that_share_a_rotation(cli, checkpoint, tmp_path):
    outcome = cli("convert", checkpoint, tmp_path / "out", *QUICK, "--rotation", "layer", "--layers-per-rotation", 2)
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "out" / "config.json")["larosa"]["layers_per_rotation"] == 2
    assert "| layers per rotation | 2 |" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert cli("inspect", tmp_path / "out", "--json", tmp_path / "i.json").code == 0
    config = read(tmp_path / "out" / "config.json")
    assert read(tmp_path / "i.json")["adapter_bytes"] == 4 * config["hidden_size"] ** 2  # one, as it has three layers
    assert cli("eval", tmp_path / "out", "--reference", checkpoint).code == 0


def test_paper_recipe_searches_and_keeps_its_points(cli, checkpoint, tmp_path, text_file):
    outcome = cli(
        *("convert", checkpoint, tmp_path / "out", "--recipe", "paper", "--no-measure"),
        *("--calibration", text_file, "--num-sequences", 1, "--sequence-length", 16),
    )
    assert outcome.code == 0, outcome.err
    block = read(tmp_path / "out" / "config.json")["larosa"]
    assert (block["budget"], block["covariance"], block["search"]) == ("paper", "h1", "grid")
    points = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text("utf-8").splitlines()[1:]]
    best = min(points, key=lambda point: point["perplexity"])
    assert (block["alphas"]["h1"], block["alphas"]["h3"]) == (best["alpha1"], best["alpha3"])
    assert not (tmp_path / "out.search.jsonl").exists()


def test_convert_with_offload_gives_the_same_model(cli, checkpoint, converted, tmp_path):
    assert cli("convert", checkpoint, tmp_path / "out", *QUICK, "--offload").code == 0
    assert contents(tmp_path / "out")["model.safetensors"] == contents(converted)["model.safetensors"]


def test_eval_reports_what_python_measures(cli, checkpoint, converted, text_file, tmp_path):
    outcome = cli(
        *("eval", converted, "--data", text_file, "--reference", checkpoint),
        *("--sequence-length", 32, "--max-sequences", 3, "--json", tmp_path / "e.json"),
    )
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "e.json")
    model, tokenizer = larosa.load(str(converted), device="cpu")
    reference, _ = larosa.load(str(checkpoint), device="cpu")
    expected = larosa.evaluate(
        model, tokenizer, str(text_file), sequence_length=32, max_sequences=3, reference=reference
    )
    assert report["tokens"] == 3 * 31
    assert report["perplexity"] == pytest.approx(expected.perplexity)
    assert report["kl_divergence"] == pytest.approx(expected.kl_divergence)
    assert report["top1_agreement"] == pytest.approx(expected.top1_agreement)
    assert report["sparsity"].keys() == {"nominal", "weights", "weights_net_of_adapters"}
    assert report["zeros"] == {site: asdict(spread) for site, spread in expected.zeros.items()}
    assert report["actual_sparsity"] == asdict(expected.actual_sparsity)
    assert 0.4 < report["actual_sparsity"]["mean"] < 0.6


def test_eval_by_both_protocols(cli, checkpoint, converted, text_file, tmp_path):
    options = ("--data", text_file, "--reference", checkpoint, "--sequence-length", 32, "--json", tmp_path / "e.json")
    outcome = cli("eval", converted, *options, "--protocol", "both", "--prompt-length", 20)
    assert outcome.code == 0, outcome.err
    assert "continuation, dense prompt of 20 tokens" in outcome.out
    every, behind = read(tmp_path / "e.json")["evaluations"]
    assert (every["protocol"], every["prompt_length"], every["tokens"]) == ("all", 0, 4 * 31)
    assert (behind["protocol"], behind["prompt_length"], behind["tokens"]) == ("continuation", 20, 4 * 11)
    assert cli("eval", converted, *options).code == 0
    assert {key: read(tmp_path / "e.json")[key] for key in every} == every
    found = every["comparison"]
    for label, value, stderr in (
        ("perplexity", every["perplexity"], every["perplexity_stderr"]),
        ("dense", *found["reference_perplexity"].values()),
        ("KL divergence to dense", *found["kl_divergence"]["mean"].values()),
    ):
        row = next(line for line in outcome.out.splitlines() if f"{label}  " in line)
        assert f"{value:.4f} ± {stderr:.4f}" in row.split("│")[2]
    assert cli("eval", converted, *options, "--protocol", "continuation").code == 0
    assert read(tmp_path / "e.json")["prompt_length"] == 16


def test_eval_of_a_dense_model_needs_no_reference(cli, checkpoint, text_file, tmp_path):
    outcome = cli("eval", checkpoint, "--data", text_file, "--sequence-length", 32, "--json", tmp_path / "e.json")
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "e.json")
    assert report["kl_divergence"] is None
    assert report["zeros"] is None
    assert report["sparsity"] == {"nominal": 0, "weights": 0, "weights_net_of_adapters": 0}
    assert math.isfinite(report["perplexity"])


def test_eval_of_a_dense_model_against_itself_finds_no_difference(cli, checkpoint, text_file, tmp_path):
    options = ("--data", text_file, "--sequence-length", 32, "--json", tmp_path / "e.json")
    assert cli("eval", checkpoint, "--reference", checkpoint, *options).code == 0
    report = read(tmp_path / "e.json")
    assert report["kl_divergence"] == 0
    assert report["top1_agreement"] == 1


def test_inspect_adds_up(cli, checkpoint, tmp_path):
    folder = tmp_path / "rotated"
    assert cli("convert", checkpoint, folder, *QUICK, "--rotation", "layer", "--no-measure").code == 0
    outcome = cli("inspect", folder, "--json", tmp_path / "i.json")
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "i.json")
    assert len(report["sites"]) == 3 * 4
    sparse = sum(site["bytes_sparse"] for site in report["sites"])
    assert report["bytes_sparse_total"] == sparse + report["adapter_bytes"] + report["score_bytes"]
    assert report["score_bytes"] == 3 * (3 * 32 + 56) * 4
    assert report["adapter_bytes"] == 2 * 32 * 32 * 4  # between three layers, float32
    assert report["flops_sparse"] < report["flops_dense"] < report["flops_converted"]


def test_inspect_of_a_dense_model_skips_nothing(cli, checkpoint, tmp_path):
    assert cli("inspect", checkpoint, "--json", tmp_path / "i.json").code == 0
    report = read(tmp_path / "i.json")
    assert report["larosa"] is None
    assert report["bytes_sparse_total"] == report["bytes_dense_total"]


@pytest.mark.parametrize("engine", ["larosa", "transformers"])
def test_generate_streams_what_greedy_decoding_gives(cli, converted, tmp_path, engine):
    options = ("--max-new-tokens", 8, "--engine", engine, "--device", "cpu", "--json", tmp_path / "g.json")
    outcome = cli("generate", converted, "--prompt", "w10 w20", *options)
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "g.json")
    model, _ = larosa.load(str(converted), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(converted)
    ids = tokenizer("w10 w20", return_tensors="pt").input_ids
    for _ in range(8):  # without a cache: another way to the same tokens
        best = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
        if int(best) == model.config.eos_token_id:
            break
    assert "w10 w20" + report["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert report["tokens"] == ids.shape[1] - 2
    assert outcome.out == "w10 w20" + report["text"] + "\n"
    assert f"tokens/s, {engine} engine" in outcome.err
    assert report["engine"] == engine


def test_generate_with_keys_and_values_of_8_bits(cli, converted, tmp_path):
    options = ("--max-new-tokens", 8, "--device", "cpu", "--kv-cache-dtype", "int8", "--json", tmp_path / "g.json")
    outcome = cli("generate", converted, "--prompt", "w10 w20", *options)
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "g.json")["kv_cache_dtype"] == "int8"
    model, tokenizer = larosa.load(str(converted), device="cpu")
    ids = tokenizer("w10 w20", return_tensors="pt").input_ids
    engine = Engine(model, 10, CacheDtype.INT8)
    tokens = continue_prompt(engine, ids, 8, Sampler(), stop_tokens(model))
    assert outcome.out == tokenizer.decode([*ids[0], *tokens], skip_special_tokens=True) + "\n"


def test_generate_losslessly(cli, converted, tmp_path):
    options = ("--max-new-tokens", 30, "--temperature", 0, "--json", tmp_path / "g.json")
    outcome = cli("generate", converted, "--prompt", "w10 w20", "--lossless", *options)
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "g.json").read_text("utf-8"))
    found = report["lossless"]
    assert found["passes"] + found["accepted"] == report["tokens"] - 1
    assert f"{found['accepted']} of {found['drafted']} drafted ones accepted" in " ".join(outcome.err.split())


def test_generate_samples_by_seed(cli, converted):
    def text(seed):
        options = ("--max-new-tokens", 16, "--temperature", 1, "--top-p", 0.9, "--seed", seed)
        outcome = cli("generate", converted, "--prompt", "w10", *options)
        assert outcome.code == 0, outcome.err
        return outcome.out

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.slow
def test_an_interrupted_generation_ends_without_a_traceback():
    command = ("generate", bundled_model(), "--prompt", "The river", "--max-new-tokens", "2000", "--temperature", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", "from larosa.cli.main import main; main()", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.read(40)  # in the middle of the text
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, 1)
    assert b"Traceback" not in err


def test_version(cli):
    outcome = cli("--version")
    assert outcome.code == 0
    assert outcome.out.strip() == f"larosa {larosa.__version__}"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("topk", ()),
        ("topk", ("--search", "grid", "--num-sequences", 1, "--sequence-length", 8)),
        ("teal", ()),
        ("teal", ("--search", "greedy")),
        ("cats", ("--sparsity", 0.3)),
        ("larosa", ()),
        ("larosa", ("--rotation", "layer")),
        ("larosa", ("--selection", "top-k")),
    ],
    ids=["topk", "topk-grid", "teal", "teal-greedy", "cats", "larosa", "larosa-rotated", "larosa-counts"],
)
@pytest.mark.one_of(2)
def test_every_method_from_end_to_end(cli, checkpoint, tmp_path, text_file, method, options):
    output, sparsity = tmp_path / "out", 0.3 if method == "cats" else 0.5
    counts = method == "topk" or "top-k" in options
    options = ("--method", method, "--calibration", text_file, *QUICK, *options, "--json", tmp_path / "c.json")
    outcome = cli("convert", checkpoint, output, *options)
    assert outcome.code == 0, outcome.err
    assert "weights skipped, as measured" in outcome.out
    report, block = read(tmp_path / "c.json"), read(output / "config.json")["larosa"]
    assert report["larosa"] == block
    assert (block["method"], block["sparsity"]) == (method, sparsity)
    assert (block["thresholds"] is None) == counts
    assert (block["keep"] is None) != counts
    assert report["sparse"]["actual_sparsity"].keys() == {"mean", "min", "max", "std"}
    assert (output / "search.jsonl").exists() == ("grid" in options)
    card = (output / "README.md").read_text("utf-8")
    assert f"| method | {method} |" in card
    assert ("rotated basis" in card) == ("layer" in options)
    assert ("on average over the calibration text" in card) != counts
    assert "None" not in card

    outcome = cli(
        *("eval", output, "--reference", checkpoint, "--data", text_file),
        *("--sequence-length", 32, "--json", tmp_path / "e.json"),
    )
    assert outcome.code == 0, outcome.err
    report = read(tmp_path / "e.json")
    assert list(report["zeros"]) == ["h1", "h2", "h3", "h4", *(["gate"] if method == "cats" else [])]
    actual = report["actual_sparsity"]
    assert actual["min"] <= actual["mean"] <= actual["max"]
    assert actual["mean"] == pytest.approx(sparsity, abs=0.1)
    assert (actual["std"] > 0.001) != counts
    assert report["kl_divergence"] > 0

    outcome = cli("inspect", output, "--json", tmp_path / "i.json")
    assert outcome.code == 0, outcome.err
    assert (" threshold " in outcome.out) != counts
    row = read(tmp_path / "i.json")["sites"][-1]
    assert (row["k"] is None, row["threshold"] is None) == (bool(block["thresholds"]), not block["thresholds"])

    engine = ("--engine", "transformers") if method == "cats" else ()
    outcome = cli("generate", output, "--prompt", "w10 w20", "--max-new-tokens", 4, *engine)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("w10 w20")


@pytest.mark.parametrize("options", [("--method", "teal", "--search", "greedy"), ("--method", "cats")])
@pytest.mark.one_of(2)
def test_offload_gives_the_same_thresholds(cli, checkpoint, tmp_path, text_file, options):
    options = (*options, "--sparsity", 0.3, "--calibration", text_file, *QUICK, "--no-measure")
    assert cli("convert", checkpoint, tmp_path / "a", *options).code == 0
    assert cli("convert", checkpoint, tmp_path / "b", *options, "--offload").code == 0
    for name in ("config.json", "model.safetensors"):
        assert contents(tmp_path / "a")[name] == contents(tmp_path / "b")[name]


def test_a_log_of_an_earlier_search_is_left_alone(cli, checkpoint, tmp_path, text_file):
    log = tmp_path / "out.search.jsonl"
    log.write_text("another conversion's\n", "utf-8")
    options = ("--method", "teal", "--calibration", text_file, *QUICK, "--no-measure")
    assert cli("convert", checkpoint, tmp_path / "out", *options).code == 0
    assert log.read_text("utf-8") == "another conversion's\n"
    assert not (tmp_path / "out" / "search.jsonl").exists()
