"""Damaged folders: what is loaded is what the files say, or one line says why not; never a traceback."""

from __future__ import annotations

import json
import random
import shutil
import struct
import warnings
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

import larosa

from ..examples import examples

CONFIGS, INDICES, FILES = max(examples(420), 30), examples(100), examples(220)

VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1.5, 1e30, -0.0, 10**20, "", "x", "4", "float16", "llama", "torch.float16"),
    *(
        [],
        [1],
        [0, 1, 2],
        ["full_attention"],
        {},
        {"a": 1},
        {"rope_type": "yarn"},
        {"rope_type": "linear", "factor": 2.0},
    ),
)
KEYS = (
    *("return_dict", "output_attentions", "output_hidden_states", "use_cache", "torch_dtype", "layer_types", "larosa"),
    *(
        "quantization_config",
        "attn_implementation",
        "_attn_implementation",
        "rope_scaling",
        "auto_map",
        "transformers_weights",
    ),
    *(
        "sliding_window",
        "use_sliding_window",
        "num_labels",
        "is_encoder_decoder",
        "tie_encoder_decoder",
        "_name_or_path",
    ),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_model, tokenizer, words):
    """A dense model of 2 layers, converted ones of 16 and of few bits, and the dense one in two shards."""
    folder = tmp_path_factory.mktemp("sources")
    model = make_model("qwen3", num_hidden_layers=2)
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "shards", max_shard_size="30KB")
    (folder / "text.txt").write_text(words(128), "utf-8")
    options = {"calibration": str(folder / "text.txt"), "num_sequences": 2, "sequence_length": 32}
    few = larosa.convert(deepcopy(model), tokenizer, weights="int4", head="int8", **options)
    few.save_pretrained(folder / "few-bits")
    larosa.convert(model, tokenizer, **options)
    model.save_pretrained(folder / "converted")
    for path in folder.iterdir():
        if path.is_dir():
            tokenizer.save_pretrained(path)
    return folder


@pytest.fixture
def copy(sources, tmp_path):
    """copy(name): a folder to damage, the same one each time."""

    def make(name):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        return shutil.copytree(sources / name, tmp_path / "model")

    return make


def outcome(folder, stored, expected=None):
    """Load and run: True, or the one line. What is loaded must be `stored`; `expected` are the logits, where known."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, tokenizer = larosa.load(str(folder))
            state = model.state_dict()
            assert state.keys() - {"lm_head.weight"} == stored.keys() - {"lm_head.weight"}
            for name, weight in stored.items():
                assert torch.equal(state[name], weight.to(state[name].dtype)), name
            if expected is not None:  # before weights are laid out by columns, which some processors sum otherwise
                assert torch.equal(model(torch.tensor([[5, 6, 7]])).logits, expected)
            larosa.generate(model, tokenizer, "w5 w6 w7", max_new_tokens=2)
    except larosa.LarosaError as error:
        text = str(error)
        assert text.strip()
        assert "\n" not in text
        assert len(text) < 900
        return text
    return True


def logits(folder):
    return larosa.load(str(folder)).model(torch.tensor([[5, 6, 7]])).logits


def mutate(content, chance):
    """Change one or two keys of a configuration, at any depth."""
    for _ in range(chance.choice((1, 1, 2))):
        place = content
        while True:
            key = chance.choice([*place, *(KEYS if place is content else ())] or ["new"])
            if isinstance(place.get(key), dict) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            break
        kind = chance.random()
        if kind < 0.15:
            place.pop(key, None)
        elif kind < 0.3 and isinstance(place.get(key), (int, float)) and not isinstance(place.get(key), bool):
            place[key] = chance.choice(
                (place[key] * 2, place[key] + 1, -place[key], float(place[key]), str(place[key]))
            )
        else:
            place[key] = chance.choice(VALUES)


@pytest.mark.parametrize("name", ["dense", "converted", "few-bits"])
def test_configurations(copy, sources, name):
    chance = random.Random(name)
    folder = copy(name)
    stored = load_file(folder / "model.safetensors")
    original = (folder / "config.json").read_text("utf-8")
    refused = 0
    for _ in range(CONFIGS // 3):
        content = json.loads(original)
        mutate(content, chance)
        (folder / "config.json").write_text(json.dumps(content), "utf-8")
        try:
            refused += outcome(folder, stored) is not True
        except Exception as error:
            raise AssertionError(f"config.json of {content}") from error
    assert 0.2 < refused / (CONFIGS // 3) < 0.95


def break_index(content, chance):
    places = content["weight_map"]
    key = chance.choice(list(places))
    match chance.randrange(9):
        case 0:
            places.pop(key)
        case 1:
            places[key] = chance.choice([*places.values()])
        case 2:
            places[key] = chance.choice(VALUES)
        case 3:
            places[key] = "../" + places[key]
        case 4:
            places["new"] = places[key]
        case 5:
            gone = places[key]
            content["weight_map"] = {name: file for name, file in places.items() if file != gone}
        case 6:
            content.pop("metadata")
        case 7:
            content["weight_map"] = chance.choice(VALUES)
        case 8:
            content["metadata"] = chance.choice(VALUES)


def test_indices(copy):
    chance = random.Random(0)
    folder = copy("shards")
    expected = logits(folder)
    original = (folder / "model.safetensors.index.json").read_text("utf-8")
    stored = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    for _ in range(INDICES):
        content = json.loads(original)
        break_index(content, chance)
        text = json.dumps(content)
        if chance.random() < 0.1:
            text = text[: chance.randrange(len(text))]
        (folder / "model.safetensors.index.json").write_text(text, "utf-8")
        try:
            outcome(folder, stored, expected)
        except Exception as error:
            raise AssertionError(f"index {text}") from error


@pytest.mark.parametrize("name", ["dense", "converted", "few-bits"])
def test_files(copy, name):
    chance = random.Random(name)
    folder = copy(name)
    file = folder / "model.safetensors"
    expected, original = logits(folder), file.read_bytes()
    stored = {name: weight.clone() for name, weight in load_file(file).items()}  # not mapped: the file is about to go
    (length,) = struct.unpack("<Q", original[:8])
    for _ in range(FILES // 3):
        data, weights = bytearray(original), dict(stored)
        file.unlink()  # what has mapped it keeps it
        kind = chance.randrange(5)
        if kind == 0:
            data = data[: chance.randrange(len(data))]
        elif kind == 1:
            data += bytes(chance.randrange(1, 99))
        elif kind == 2:  # the header: what the numbers are, not the numbers themselves, of which any may be right
            for _ in range(chance.choice((1, 1, 3))):
                data[chance.randrange(8 + length)] ^= 1 << chance.randrange(8)
        elif kind == 3:
            data[chance.randrange(8)] = chance.randrange(256)
        else:
            key = chance.choice(list(weights))
            weight = weights.pop(key)
            change = chance.randrange(6)
            if change < 4:
                shapes = (weight.flatten(), weight[:-1], weight[None], weight.to(torch.int32))
                weights[key] = shapes[change].contiguous()
            elif change == 4:
                weights[key + "_scale"] = weight
            save_file(weights, file, metadata={"format": "pt"})
            data = file.read_bytes()
            file.unlink()
        file.write_bytes(data)
        try:
            found = outcome(folder, stored, expected)
        except Exception as error:
            raise AssertionError(f"damage of kind {kind}") from error
        assert found is not True or kind in (2, 3) or weight.dim() == 1, kind
