"""Loading takes what the files say, or says in one line what is wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import larosa
from larosa.checkpoints.io import load_config


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    path = tmp_path / "dense"
    make_model("qwen3", attention_bias=False).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def refused(folder, match):
    with pytest.raises(larosa.LarosaError, match=match) as caught:
        larosa.load(str(folder))
    assert "\n" not in str(caught.value)


def edit(folder, **changes):
    file = folder / "config.json"
    content = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(content), "utf-8")


def restore(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def shard(folder, *parts, index=None):
    """Spread the weights over files: `parts` are sets of numbers of weights, in the order of their names."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    names, found = sorted(weights), {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({names[i]: weights[names[i]] for i in part}, folder / name, metadata={"format": "pt"})
        found |= {names[i]: name for i in part}
    if index is not False:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index or {"metadata": {}, "weight_map": found}), "utf-8"
        )
    return names


class TestWeights:
    def test_biases_that_the_configuration_does_not_expect(self, folder):
        name = "model.layers.1.self_attn.q_proj.bias"
        restore(folder, lambda weights: weights.update({name: torch.ones(64)}))
        refused(folder, f"'{name}' is stored, but config.json makes a model without it")

    def test_scales_beside_weights_of_8_bits(self, folder):
        def quantize(weights):
            for name in [name for name in weights if "proj" in name]:
                weights[name] = weights[name].to(torch.float8_e4m3fn)
                weights[name + "_scale_inv"] = torch.ones(1)

        restore(folder, quantize)
        refused(folder, "F8_E4M3, a quantized weight; convert the original")

    def test_scales_beside_weights_of_16_bits(self, folder):
        restore(folder, lambda weights: weights.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}))
        refused(folder, "weight_scale_inv' is stored")

    def test_what_older_versions_stored(self, folder):
        restore(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
        larosa.load(str(folder))

    def test_a_stale_index_beside_a_sound_file(self, folder):
        index = {"weight_map": {"lm_head.weight": "model-00007-of-00009.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
        larosa.load(str(folder))

    def test_shards(self, folder):
        whole = larosa.load(str(folder)).model.state_dict()
        count = len(load_file(folder / "model.safetensors"))
        shard(folder, range(0, count, 2), range(1, count, 2))
        loaded = larosa.load(str(folder)).model.state_dict()
        assert all(torch.equal(loaded[name], whole[name]) for name in whole)

    def test_a_weight_in_two_shards(self, folder):
        count = len(load_file(folder / "model.safetensors"))
        names = shard(folder, range(count), range(3, 4))
        refused(folder, f"holds '{names[3]}', which model-00001-of-00002.safetensors holds too")

    def test_shards_without_an_index(self, folder):
        shard(folder, range(3), range(3, 5), index=False)
        refused(folder, "model.safetensors: missing; model-00001-of-00002.safetensors is shards without their index")

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("model.fp16.safetensors", "a variant of the weights"),
            ("consolidated.safetensors", "Mistral's own names"),
            ("adapter_model.safetensors", "only an adapter"),
            ("weights.safetensors", "of another name"),
            ("pytorch_model.bin", "never pickled weights"),
        ],
    )
    def test_weights_of_another_name(self, folder, name, what):
        (folder / "model.safetensors").rename(folder / name)
        refused(folder, f"{name} is .*{what}")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        refused(folder, "no other weights in this folder")

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
    def test_a_pointer_of_git_lfs(self, folder, name):
        (folder / "model.safetensors").unlink(missing_ok=name != "config.json")
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "utf-8")
        refused(folder, f"{name}: a git-lfs pointer, not the file itself: run git lfs pull")

    def test_an_adapter_beside_the_model(self, folder):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8")
        refused(folder, "adapter_config.json: merge it into the model .peft: merge_and_unload., or move it out")

    def test_an_adapter_alone(self, folder):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', "utf-8")
        (folder / "config.json").unlink()
        refused(folder, "an adapter, not a model")


class TestConfig:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("max_position_embeddings", 128.5),
            ("max_position_embeddings", "long"),
            ("max_position_embeddings", 0),
            ("rms_norm_eps", "1e-6x"),
            ("rms_norm_eps", None),
            ("bos_token_id", [1, 2]),
            ("bos_token_id", 128),
            ("pad_token_id", 5000),
            ("layer_types", ["full_attention"]),
            ("num_attention_heads", 0),
            ("num_key_value_heads", 3),
            ("num_hidden_layers", True),
            ("vocab_size", -1),
            ("hidden_act", "unheard-of"),
            ("dtype", "torch.float16"),
            ("dtype", "int8"),
            ("dtype", 16),
            ("rope_parameters", {"rope_type": "yarn"}),
            ("rope_scaling", {"type": "unheard-of", "factor": 2.0}),
            ("head_dim", 0),
            ("_attn_implementation", "flash_attention_2"),
            ("attn_implementation", "unheard-of"),
            ("model_type", ["llama"]),
            ("transformers_weights", "../other.safetensors"),
        ],
    )
    def test_faults(self, folder, key, value):
        edit(folder, **{key: value})
        with pytest.raises(larosa.LarosaError) as caught:
            larosa.load(str(folder))
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "changes",
        [
            {"output_attentions": True},
            {"output_hidden_states": True},
            {"return_dict": False},
            {"use_cache": False},
        ],
    )
    def test_what_only_changes_the_form_of_the_output(self, folder, token_ids, changes):
        expected = larosa.load(str(folder)).model(token_ids(1, 5)).logits
        edit(folder, **changes)
        model, tokenizer = larosa.load(str(folder))
        assert torch.equal(model(token_ids(1, 5)).logits, expected)
        larosa.generate(model, tokenizer, "w5 w6", max_new_tokens=2)

    def test_a_fault_shows_after_the_same_folder_was_sound_and_again(self, folder):
        larosa.load(str(folder))
        edit(folder, hidden_act="unheard-of")
        for _ in range(2):
            refused(folder, "unheard-of")

    def test_a_configuration_is_checked_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        edit(folder, layer_types=["full_attention"])
        with pytest.raises(larosa.LarosaError, match="layer_types"):
            load_config(str(folder))


class TestNames:
    @pytest.mark.parametrize("name", ["./nowhere", "../a/b", "/no/such", "~/model", "a/b/c", "model/"])
    def test_a_mistyped_path(self, name):
        with pytest.raises(larosa.LarosaError, match=r": no such folder$"):
            larosa.load(name)

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(larosa.LarosaError, match=r"no config.json in this folder"):
            larosa.load(str(tmp_path))


def test_a_tokenizer_that_is_missing(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "no tokenizer in this folder")
