"""`larosa convert --streaming`: the model that the conversion in memory gives, from layers that are never all there."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import larosa
from larosa.errors import LarosaError
from larosa.utils import layer_files
from larosa.utils.layer_files import LayerFile, absent, in_memory, keep_on_disk

#: Every way through the weights: as they are, rotated, with adapters, refitted, rounded.
WAYS = {
    "default": ("llama",),
    "unchanged": ("qwen3", "--method", "topk"),
    "blocks": ("llama", "--rotation", "block", "--rotation-objective", "fisher", "--selection", "top-k"),
    "int4, rounded": ("llama", "--weights", "int4", "--quantizer", "rtn", "--rotation", "layer"),
}
OTHER_WAYS = {
    "int8": ("qwen3", "--weights", "int8"),
    "planes": ("llama", "--weights", "int4+4"),
    "paper": ("qwen3", "--recipe", "paper", "--search", "none"),
    "one rotation": ("qwen3", "--rotation", "model", "--score", "weights", "--compensation", "linear"),
    "teal": ("llama", "--method", "teal"),
    "sensitivity": ("qwen3", "--search", "sensitivity", "--score", "weights"),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def convert(cli, source: Path, output: Path, text_file: Path, *options: object) -> dict[str, object]:
    """The report of a conversion, without what it took."""
    outcome = cli(
        *("convert", source, output, "--calibration", text_file, "--num-sequences", 3, "--sequence-length", 32),
        *("--json", output.with_suffix(".json"), *options),
    )
    assert outcome.code == 0, outcome.err
    report = json.loads(output.with_suffix(".json").read_text("utf-8"))
    return {key: report[key] for key in ("larosa", "sparsity", "dense", "sparse", "source_bytes")}


@pytest.fixture
def source(tmp_path, make_model, tokenizer):
    """source(family, **overrides): a folder with a dense model of 16 bits in several shards."""

    def make(family: str, **overrides: object) -> Path:
        folder = tmp_path / family
        model = make_model(family, torch.bfloat16, **overrides)
        model.generation_config.temperature = 0.5
        model.generation_config.do_sample = True
        model.save_pretrained(folder, max_shard_size="20KB")
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(
    "way",
    [*WAYS.values(), *(pytest.param(way, marks=pytest.mark.slow) for way in OTHER_WAYS.values())],
    ids=[*WAYS, *OTHER_WAYS],
)
def test_equals_the_conversion_in_memory(cli, source, tmp_path, text_file, way):
    family, *options = way
    if way != WAYS["default"]:
        options.append("--no-measure")
    dense = source(family, tie_word_embeddings=family == "qwen3")
    whole = convert(cli, dense, tmp_path / "whole", text_file, *options)
    streamed = convert(cli, dense, tmp_path / "streamed", text_file, *options, "--streaming")
    assert streamed == whole
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "streamed")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight), name
    for file in (tmp_path / "whole").iterdir():
        if not file.name.startswith("model.") and file.name != "README.md":  # which has the folder's name in it
            assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes(), file.name
    model, _ = larosa.load(str(tmp_path / "streamed"), device="cpu")
    assert model(torch.tensor([[5, 6]])).logits.isfinite().all()


@pytest.mark.parametrize(("options", "most"), [((), 1), (("--weights", "int8"), 1), (("--rotation", "layer"), 2)])
def test_one_layer_is_in_memory_at_a_time(cli, source, tmp_path, text_file, monkeypatch, options, most):
    opened: dict[int, torch.nn.Module] = {}
    seen = []
    own_open, own_close = layer_files.LayerFile.open, layer_files.LayerFile.close

    def watched_open(self, layer):
        own_open(self, layer)
        opened[id(layer)] = layer
        assert all(weight.untyped_storage().nbytes() >= weight.nbytes for weight in layer.parameters())
        seen.append(len(opened))

    def watched_close(self, layer):
        own_close(self, layer)
        if self._users == 0:
            del opened[id(layer)]
            held = sum(weight.untyped_storage().nbytes() for weight in layer.parameters() if weight.dim() > 1)
            assert held < 100  # an element for each matrix

    monkeypatch.setattr(layer_files.LayerFile, "open", watched_open)
    monkeypatch.setattr(layer_files.LayerFile, "close", watched_close)
    convert(cli, source("llama"), tmp_path / "out", text_file, "--streaming", "--no-measure", *options)
    assert max(seen) == most


def test_leaves_nothing_behind(refused, source, tmp_path, text_file):
    dense = source("llama")
    last = max(dense.glob("model-*.safetensors"))
    sound = last.read_bytes()
    tensors = load_file(last)
    name = next(iter(tensors))
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, last, metadata={"format": "pt"})
    line = refused("convert", dense, tmp_path / "out", "--calibration", text_file, "--streaming")
    assert line == f"weight '{name}' holds NaN or Inf; is the checkpoint sound?"
    last.write_bytes(sound[:-8])
    assert str(last) in refused("convert", dense, tmp_path / "out", "--calibration", text_file, "--streaming")
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


def test_what_does_not_stream(refused, source, tmp_path, text_file):
    dense, out = source("llama"), tmp_path / "out"
    text = ("--calibration", text_file, "--streaming")
    assert "never has the whole model to sample from" in refused("convert", dense, out, "--streaming")
    assert "--streaming reads a local folder of safetensors" in refused("convert", "owner/name", out, *text)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "--streaming reads a local folder of safetensors" in refused("convert", tmp_path / "model.gguf", out, *text)
    assert "give one --sparsity" in refused("convert", dense, out, *text, "--sparsity", "0.2,0.4")
    config = json.loads((dense / "config.json").read_text("utf-8"))
    (dense / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    assert refused("convert", dense, out, *text) == f"{dense}: config.json has no key 'dtype': give --dtype"
    (dense / "config.json").write_text(json.dumps(config | {"intermediate_size": 57}))
    assert "is stored as [32, 56], but config.json makes it [32, 57]" in refused("convert", dense, out, *text)
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    assert "weights are missing, 16 in all" in refused("convert", dense, out, *text)
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "is stored, but config.json makes a model without it" in refused("convert", dense, out, *text)


class TestLayerFile:
    @pytest.fixture
    def layer(self, tmp_path):
        """A linear whose weight of ones is on disk, and the file for what changes."""
        layer = torch.nn.Linear(3, 2, bias=False)
        save_file({"layer.weight": torch.ones(2, 3)}, tmp_path / "shard.safetensors")
        layer.weight = torch.nn.Parameter(absent(layer.weight.shape, torch.float32), requires_grad=False)
        own = tmp_path / "own.safetensors"
        keep_on_disk(layer, LayerFile("layer", {"layer.weight": tmp_path / "shard.safetensors"}, own))
        return layer, own

    def test_an_absent_matrix_is_not_taken_for_one(self, layer):
        linear, _ = layer
        assert linear.weight.isnan().all()
        with pytest.raises(RuntimeError):
            linear.weight.copy_(torch.ones(2, 3))

    def test_what_is_changed_is_kept(self, layer):
        linear, own = layer
        with in_memory(linear), in_memory(linear):
            assert torch.equal(linear.weight, torch.ones(2, 3))
        assert not own.exists()
        with in_memory(linear):
            with torch.inference_mode(), in_memory(linear):
                pass
            linear.weight[1].mul_(5)
        assert linear.weight.isnan().all()
        assert torch.equal(load_file(own)["layer.weight"], torch.tensor([[1.0] * 3, [5.0] * 3]))
        with in_memory(linear):
            assert torch.equal(linear.weight, torch.tensor([[1.0] * 3, [5.0] * 3]))
            linear.weight = torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False)
        assert not load_file(own)["layer.weight"].any()

    def test_a_full_disk_is_said(self, layer, tmp_path):
        linear, own = layer
        own.with_suffix(".new").mkdir()
        with pytest.raises(LarosaError, match="cannot keep a layer of"), in_memory(linear):
            linear.weight.zero_()
