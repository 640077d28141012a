"""Checkpoints of older formats load, and compute what they did."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import larosa
from larosa import LarosaConfig, LarosaError
from larosa.config.migrations import FORMAT_VERSION

#: Written by the first commit that could convert (rotation `block`), and by the last of format version 1 (`layer`, two
#: layers a rotation, scores), with the logits that the model had then.
FORMAT_1 = Path(__file__).parent / "format_1"
_KEEP = {"h1": [8], "h2": [8], "h3": [8], "h4": [12]}
_ALPHAS = {"h1": 1.0, "h2": 1.0, "h3": 1.0, "h4": 1.0}
_CALIBRATION = {"num_sequences": 16, "seed": 0, "sequence_length": 2048, "source": "self"}
_FIRST = {
    **{"alphas": _ALPHAS, "budget": "weights", "calibration": _CALIBRATION, "covariance": "h1", "format_version": 1},
    **{"keep": _KEEP, "larosa_version": "0.1.0", "method": "larosa", "prefill": "sparse", "recipe": "paper"},
    **{"rotation": "none", "search": "none", "sparsity": 0.5},
}
_OTHER_METHODS = {**_FIRST, "thresholds": None}
_SCORES = {**_OTHER_METHODS, "rotation_objective": "fisher", "score": "fisher", "value_rotation": True}
_SHARED = {**_SCORES, "compensation": "none", "layers_per_rotation": 1}
_SECOND = {**_SHARED, "format_version": 2, "rotation": "layer"}
_ADAPTERS = {**_SECOND, "adapters": "int8"}
_TEAL = {
    **{**_OTHER_METHODS, "method": "teal", "alphas": None, "covariance": None, "keep": None},
    "thresholds": {part: {site: [0.25] for site in _KEEP} for part in ("values", "dropped")},
}
#: The `larosa` block as each state of the format wrote it, and what the keys that it lacks have to say today.
BLOCKS = {
    "first": (_FIRST, {"value_rotation": False, "score": "magnitude", "rotation_objective": None, "thresholds": None}),
    "other methods": (_OTHER_METHODS, {"score": "magnitude"}),
    "thresholds": (_TEAL, {"score": "magnitude", "adapters": "full"}),
    "scores": (_SCORES, {"compensation": "none"}),
    "shared rotations": (_SHARED, {"adapters": "full"}),
    "version 2": (_SECOND, {"adapters": "full", "dense_first_token": False}),
    "8-bit adapters": (_ADAPTERS, {"dense_first_token": False}),
    "a dense first token": ({**_ADAPTERS, "dense_first_token": True}, {}),
}


def holds(block, written):
    """Whether all that was written is in a block as it was; keys that came later may be beside it."""
    if not isinstance(written, dict):
        return block == written
    return all(key in block and holds(block[key], value) for key, value in written.items())


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_every_state_of_the_format(name):
    written, added = BLOCKS[name]
    block = LarosaConfig.parse(written).model_dump(mode="json")
    assert block["format_version"] == FORMAT_VERSION
    assert holds(block, {key: value for key, value in written.items() if key != "format_version"})
    assert {key: block[key] for key in added} == added
    assert LarosaConfig.parse(block).model_dump(mode="json") == block


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("name", ["first", "last"])
def test_old_folders_compute_what_they_did(name, tmp_path):
    expected = load_file(FORMAT_1 / name / "expected.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(FORMAT_1 / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.config.larosa["format_version"] == FORMAT_VERSION
    torch.testing.assert_close(logits(model, expected["ids"]), expected["logits"], rtol=1e-4, atol=1e-5)
    base = AutoModel.from_pretrained(FORMAT_1 / name)
    torch.testing.assert_close(base.layers[0].mlp.down_proj.weight, model.model.layers[0].mlp.down_proj.weight)
    model.save_pretrained(tmp_path)  # in the format of now
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["larosa"]["format_version"] == FORMAT_VERSION
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, expected["ids"]), expected["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotation", ["block", "layer", "none"])
def test_the_engine_and_reports_take_an_old_folder(make_model, quick_convert, tokenizer, tmp_path, rotation):
    """Of version 1, made from one of now: an adapter that comes after a product is undone by its inverse."""
    new = quick_convert(make_model("llama", torch.float64), rotation=rotation, sparsity=0.4)
    larosa.save(new, tokenizer, tmp_path / "now", card="")
    shutil.copytree(tmp_path / "now", tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    for name, linear in (("attention_adapter", "self_attn.o_proj"), ("residual_adapter", "mlp.down_proj")):
        for layer in range(3):
            if (adapter := weights.get(f"model.layers.{layer}.{name}.weight")) is not None:
                for part in ("weight", "bias"):
                    key = f"model.layers.{layer}.{linear}.{part}"
                    weights[key] = torch.linalg.inv(adapter) @ weights[key]
    save_file(weights, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "old" / "config.json").read_text("utf-8"))
    config["larosa"]["format_version"] = 1
    (tmp_path / "old" / "config.json").write_text(json.dumps(config), "utf-8")

    old = larosa.load(str(tmp_path / "old")).model
    assert old.config.larosa == larosa.load(str(tmp_path / "now")).model.config.larosa
    for (name, found), expected in zip(old.named_parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)
    assert larosa.inspect(str(tmp_path / "old")).to_dict() == larosa.inspect(str(tmp_path / "now")).to_dict()
    narrow, _ = larosa.load(str(tmp_path / "old"), dtype="float32")
    texts = [
        larosa.generate(narrow, tokenizer, "w5 w6", max_new_tokens=6, engine=engine).text
        for engine in ("larosa", "transformers")
    ]
    assert texts[0] == texts[1]


def test_a_model_whose_weights_nobody_would_change_is_not_made():
    config = AutoConfig.from_pretrained(FORMAT_1 / "last")
    with pytest.raises(LarosaError, match=r"format version 1: load it by larosa\.load or from_pretrained"):
        AutoModelForCausalLM.from_config(config)


def test_weights_on_disk_are_not_left_as_they_were(tmp_path):
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "cpu", "model.layers.2": "disk"}
    with pytest.raises(LarosaError, match="format version 1: load it without offloading"):
        AutoModelForCausalLM.from_pretrained(FORMAT_1 / "first", device_map=places, offload_folder=tmp_path)


@pytest.mark.parametrize("version", [0, -1, 1.5, True, "1", None])
def test_versions_that_there_never_were(version):
    with pytest.raises(LarosaError, match=r"larosa\.format_version"):
        LarosaConfig.parse({**_FIRST, "format_version": version})
