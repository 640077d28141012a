"""Every mistake: one line that says what is wrong, a non-zero exit, nothing half-written, the source untouched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, GPT2Config

import larosa.conversion.checkpoint

from .conftest import QUICK, contents, edit_json


@pytest.fixture
def convert_refused(refused, checkpoint, tmp_path):
    """convert_refused(*options): the error of converting `checkpoint`; checks that nothing is left behind."""

    def run(*options):
        before = contents(checkpoint)
        message = refused("convert", checkpoint, tmp_path / "out", *QUICK, *options)
        assert contents(checkpoint) == before
        assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []
        return message

    return run


@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1", "50", "nan"])
def test_sparsity_out_of_range(convert_refused, sparsity):
    message = convert_refused("--sparsity", sparsity)
    assert "[0, 1)" in message
    assert "0.5 for 50%" in message


def test_sparsity_beyond_the_reach_of_cats(convert_refused, checkpoint):
    # Before the weights are even looked at.
    (checkpoint / "model.safetensors").write_bytes(b"not read")
    message = convert_refused("--method", "cats", "--sparsity", "0.6")
    assert "CATS skips only up and down: at most 42.4% of this model's weights, and 60.0% is asked for" in message


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "topk", "--rotation", "layer"),
        ("--method", "topk", "--search", "greedy"),
        ("--method", "teal", "--covariance", "h1"),
        ("--method", "teal", "--budget", "paper"),
        ("--method", "cats", "--search", "grid"),
        ("--method", "topk", "--selection", "threshold"),
        ("--method", "teal", "--selection", "top-k"),
    ],
)
def test_options_that_do_not_apply_to_the_method(convert_refused, options):
    message = convert_refused(*options)
    assert f"{options[2]} {options[3]} does not apply to method {options[1]}" in message


def test_thresholds_need_their_search(convert_refused):
    assert "--search fisher: add it" in convert_refused("--selection", "threshold", "--search", "none")
    message = convert_refused("--selection", "threshold", "--compensation", "linear")
    assert "leave --selection threshold out" in message


def test_layers_per_rotation(convert_refused):
    assert "0 layers per rotation: give at least 1" in convert_refused("--layers-per-rotation", "0")
    for rotation in ("none", "random", "model", "block"):
        message = convert_refused("--layers-per-rotation", "2", "--rotation", rotation)
        assert f"2 layers per rotation: only rotation 'layer' has a choice, '{rotation}' has none" in message


def test_thresholds_that_do_not_fit_the_model(cli, refused, checkpoint, tmp_path):
    assert cli("convert", checkpoint, tmp_path / "out", "--method", "teal", *QUICK, "--no-measure").code == 0

    def shorten(config):
        for part in filter(None, config["larosa"]["thresholds"].values()):
            part.update({site: numbers[:2] for site, numbers in part.items()})

    edit_json(tmp_path / "out" / "config.json", shorten)
    message = refused("eval", tmp_path / "out")
    assert "config.json, key 'larosa.thresholds': thresholds for 2 layers, the model has 3" in message


def test_calibration_sizes_out_of_range(convert_refused):
    assert "at least 1" in convert_refused("--num-sequences", "0")
    assert "context" in convert_refused("--sequence-length", "4096")


def test_missing_model(refused, tmp_path):
    message = refused("convert", tmp_path / "nowhere", tmp_path / "out")
    assert "nowhere" in message


def test_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("eval", tmp_path / "empty")


def test_a_file_instead_of_a_folder(refused, text_file):
    assert "a folder" in refused("inspect", text_file)


def test_config_that_is_no_json(refused, checkpoint):
    (checkpoint / "config.json").write_text("{", "utf-8")
    assert "config.json: not valid JSON" in refused("eval", checkpoint)


def test_config_without_a_model_type(refused, checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config.pop("model_type"))
    assert "model_type" in refused("inspect", checkpoint)


def test_missing_weights(convert_refused, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors: missing" in convert_refused()


def test_pickled_weights_are_never_read(convert_refused, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    assert "never pickled weights" in convert_refused()


def test_truncated_weights(convert_refused, checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors: corrupt or incomplete" in convert_refused()


def test_missing_shard(convert_refused, checkpoint):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    (checkpoint / "model.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in convert_refused()


def test_missing_weight(convert_refused, checkpoint):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in convert_refused()


def test_weight_of_another_shape(convert_refused, checkpoint):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, file, metadata={"format": "pt"})
    assert "'model.layers.1.mlp.up_proj.weight' is stored as [3, 3]" in convert_refused()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(convert_refused, checkpoint, value):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.2.self_attn.k_proj.weight"][0, 0] = value
    save_file(weights, file, metadata={"format": "pt"})
    assert "model.layers.2.self_attn.k_proj.weight" in convert_refused()


def test_activations_that_are_not_finite(convert_refused, checkpoint, text_file):
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.self_attn.o_proj.weight"].fill_(3e38)  # finite, but what it gives is not
    save_file(weights, file, metadata={"format": "pt"})
    given = ("--calibration", text_file, "--no-measure")
    assert "layer 1: calibration activations are NaN or Inf" in convert_refused(*given)
    plain = ("--recipe", "paper", "--search", "none")
    assert "layer 1, site h3: calibration activations are NaN or Inf" in convert_refused(*given, *plain)


@pytest.mark.parametrize(("config", "reason"), [(Gemma2Config(), "residual stream"), (GPT2Config(), "LayerNorm")])
def test_unsupported_family_says_why(refused, tmp_path, config, reason):
    config.save_pretrained(tmp_path / "other")
    message = refused("convert", tmp_path / "other", tmp_path / "out")
    assert reason in message
    assert "supported: llama, mistral, qwen2, qwen3, smollm3" in message


def test_family_is_found_by_type_not_by_name(cli, checkpoint, tmp_path):
    renamed = checkpoint.rename(tmp_path / "my-gemma-2-finetune")
    assert cli("inspect", renamed).code == 0


def test_quantized_source(convert_refused, checkpoint):
    edit_json(checkpoint / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    assert "quantized" in convert_refused()


def test_converting_twice(refused, converted, tmp_path):
    assert "converted already" in refused("convert", converted, tmp_path / "again", *QUICK, "--no-measure")


def test_output_that_exists(refused, checkpoint, tmp_path):
    (tmp_path / "there").mkdir()
    message = refused("convert", checkpoint, tmp_path / "there")
    assert f"{tmp_path / 'there'}: exists already" in message
    assert message.count(str(tmp_path)) == 1
    assert list((tmp_path / "there").iterdir()) == []


def test_output_whose_parent_is_missing(refused, checkpoint, tmp_path):
    assert "no such folder" in refused("convert", checkpoint, tmp_path / "a" / "b")


def test_json_file_that_cannot_be_written(refused, checkpoint, tmp_path):
    assert "--json" in refused("inspect", checkpoint, "--json", tmp_path / "a" / "b.json")


def test_more_calibration_than_the_text_holds(convert_refused, text_file):
    message = convert_refused("--calibration", text_file, "--num-sequences", "5")
    assert str(text_file) in message
    assert "lower --num-sequences to 4" in message


def test_unknown_calibration_source(convert_refused):
    assert "wikitext3" in convert_refused("--calibration", "wikitext3")


def test_evaluation_text_shorter_than_a_window(refused, checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("w5 w6 w7", "utf-8")
    assert "less than one window" in refused("eval", checkpoint, "--data", tmp_path / "short.txt")


def test_tokenizer_of_another_model(convert_refused, checkpoint, text_file, tmp_path):
    edit_json(
        checkpoint / "tokenizer.json",
        lambda t: t["model"]["vocab"].update({w: i + 128 for w, i in t["model"]["vocab"].items() if i > 3}),
    )
    message = convert_refused("--calibration", text_file)
    assert "tokenizer and model do not belong together" in message


def test_reference_of_another_vocabulary(refused, converted, make_model, tokenizer, tmp_path, text_file):
    make_model("llama", vocab_size=160).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    message = refused(
        *("eval", converted, "--reference", tmp_path / "other", "--data", text_file, "--sequence-length", 32)
    )
    assert "vocabulary of 160" in message


def test_newer_format_version(refused, converted):
    edit_json(converted / "config.json", lambda config: config["larosa"].update(format_version=3))
    message = refused("eval", converted)
    assert "format version 3" in message
    assert "pip install --upgrade larosa" in message


def test_unknown_key_in_the_larosa_block(refused, converted):
    edit_json(converted / "config.json", lambda config: config["larosa"].update(colour="red"))
    assert "larosa.colour" in refused("inspect", converted)


def test_missing_larosa_block(refused, converted):
    edit_json(converted / "config.json", lambda config: config.pop("larosa"))
    assert "larosa" in refused("eval", converted)


def test_counts_that_do_not_fit_the_model(refused, converted):
    def change(config):
        keep = {"h1": [1, 1, 1], "h2": [1, 1, 1], "h3": [1, 1, 1], "h4": [57, 1, 1]}
        config["larosa"] |= {"keep": keep, "thresholds": None}

    edit_json(converted / "config.json", change)
    assert "layer 0 keeps 57 of 56" in refused("eval", converted)


def test_unknown_device(refused, checkpoint):
    assert "unknown device 'gpu'" in refused("eval", checkpoint, "--device", "gpu")


def test_cuda_where_there_is_none(refused, checkpoint):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "0 CUDA devices" in refused("eval", checkpoint, "--device", "cuda")


def test_prompt_longer_than_the_context(refused, checkpoint):
    assert "exceed the model's context of 128" in refused("generate", checkpoint, "--prompt", "w5 " * 100)


@pytest.mark.parametrize(
    "option", [("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.1"), ("--max-new-tokens", "0")]
)
def test_bad_sampling_options(refused, checkpoint, option):
    name = option[0] if option[0] == "--max-new-tokens" else option[0].removeprefix("--").replace("-", "_")
    assert name in refused("generate", checkpoint, "--prompt", "w5", *option)


def test_a_cache_of_8_bits_without_the_engine(refused, checkpoint):
    options = ("--prompt", "w5", "--engine", "transformers", "--kv-cache-dtype", "int8")
    assert "--kv-cache-dtype int8 is of larosa's engine" in refused("generate", checkpoint, *options)


def test_a_method_that_the_engine_does_not_run(refused, cli, checkpoint, tmp_path, text_file):
    options = ("--method", "cats", "--sparsity", 0.3, "--calibration", text_file, *QUICK, "--no-measure")
    assert cli("convert", checkpoint, tmp_path / "out", *options).code == 0
    message = refused("generate", tmp_path / "out", "--prompt", "w5", "--device", "cpu", "--max-new-tokens", 4)
    assert "method cats: use --engine transformers" in message


def test_search_log_without_a_search(convert_refused, tmp_path):
    assert "--search grid" in convert_refused("--search-log", tmp_path / "points.jsonl")


def test_search_log_of_other_settings(refused, checkpoint, tmp_path, text_file):
    log = tmp_path / "points.jsonl"
    log.write_text('{"sparsity": 0.1}\n', "utf-8")
    options = ("--search", "grid", "--search-log", log, "--calibration", text_file, "--no-measure")
    assert "other settings" in refused("convert", checkpoint, tmp_path / "out", *QUICK, *options)
    assert log.read_text("utf-8") == '{"sparsity": 0.1}\n'


def test_disk_known_to_be_too_small(convert_refused, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(larosa.conversion.checkpoint.shutil, "disk_usage", lambda _: usage)
    assert "no space left on the disk" in convert_refused()


def test_disk_that_fills_up_while_writing(convert_refused, monkeypatch, checkpoint):
    from larosa.models import LarosaLlamaForCausalLM

    save = LarosaLlamaForCausalLM.save_pretrained

    def fill(self, folder, **kwargs):
        save(self, folder, **kwargs)  # something has been written by then
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LarosaLlamaForCausalLM, "save_pretrained", fill)
    assert "nothing was written" in convert_refused()


def test_a_really_full_disk(cli, checkpoint, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("not allowed to mount a small file system")
    try:
        outcome = cli("convert", checkpoint, disk / "out", *QUICK, "--no-measure")
        assert outcome.code == 1
        assert "no space left on the disk" in outcome.err
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_interrupt_leaves_only_the_search_log_to_go_on_from(cli, checkpoint, tmp_path, text_file):
    output, log = tmp_path / "out", tmp_path / "out.search.jsonl"
    command = ["convert", checkpoint, output, *QUICK, "--no-measure", "--search", "grid", "--calibration", text_file]
    process = subprocess.Popen(
        [sys.executable, "-c", "from larosa.cli.main import main; main()", *command],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not log.exists() or len(log.read_text("utf-8").splitlines()) < 3:  # in the middle of the search
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out.search.jsonl"]
    points = log.read_text("utf-8").splitlines()
    assert cli(*command).code == 0
    resumed = (output / "search.jsonl").read_text("utf-8").splitlines()
    assert resumed[: len(points)] == points
    assert len(resumed) > len(points)
