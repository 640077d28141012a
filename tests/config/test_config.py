import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larosa import LarosaConfig, LarosaError
from larosa.config import SITES, Rotation, check_sparsity
from larosa.config.migrations import FORMAT_VERSION


def block(**changes):
    counts = {site: [3, 4] for site in SITES}
    return {
        "format_version": FORMAT_VERSION,
        "larosa_version": "0.1.0",
        "recipe": "best",
        "sparsity": 0.5,
        "budget": "weights",
        "keep": counts,
        "rotation": "layer",
        "covariance": "joint",
        "search": "none",
        **changes,
    }


def threshold_block(method="teal", **changes):
    sites = ("gate",) if method == "cats" else SITES
    content = block(method=method, rotation="none")
    del content["keep"], content["covariance"]
    content["thresholds"] = {
        "values": {site: [0.25, 0.5] for site in sites},
        "dropped": {site: [0.5, 0.5] for site in sites},
    }
    return content | changes


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_thresholds_go_through_json_unchanged(method):
    config = LarosaConfig.parse(threshold_block(method))
    assert LarosaConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    assert config.layers == 2
    assert config.limits[config.method.sites[0]] == [0.25, 0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (threshold_block(keep=block()["keep"]), r"larosa\.keep'.*method 'teal' has none"),
        (threshold_block(thresholds=None), r"larosa\.thresholds'.*method 'teal' needs it"),
        (block(thresholds=threshold_block()["thresholds"]), r"larosa\.thresholds'.*either 'keep' or 'thresholds'"),
        (block(method="topk", keep=None), r"larosa\.keep'.*method 'topk' needs it"),
        (block(keep=None), r"larosa\.thresholds'.*method 'larosa' needs it, or 'keep'"),
        (threshold_block("cats") | {"method": "teal"}, r"larosa\.thresholds'.*exactly the sites h1, h2, h3, h4"),
        (threshold_block("teal") | {"method": "cats"}, r"larosa\.thresholds'.*exactly the sites gate"),
        (threshold_block(thresholds={"values": {}, "dropped": {}}), r"larosa\.thresholds'"),
        (threshold_block("cats", thresholds={"values": {"gate": [1]}, "dropped": {"gate": [1, 0]}}), "each layer"),
        (threshold_block("cats", thresholds={"values": {"gate": [1]}, "dropped": {}}), "the same sites"),
        (threshold_block("cats", thresholds={"values": {"gate": []}, "dropped": {"gate": []}}), "each layer"),
        (threshold_block("cats", thresholds={"values": {"gate": [-1]}, "dropped": {"gate": [0]}}), "values.gate.0"),
        (threshold_block("cats", thresholds={"values": {"gate": [1]}, "dropped": {"gate": [2]}}), "dropped.gate.0"),
        (threshold_block("cats", thresholds={"values": {"up": [1]}, "dropped": {"up": [1]}}), "values.up"),
        (
            threshold_block("cats", thresholds={"values": {"gate": [float("inf")]}, "dropped": {"gate": [1]}}),
            "values.gate.0",
        ),
    ],
)
def test_counts_or_thresholds_as_the_method_needs(content, message):
    with pytest.raises(LarosaError, match=message) as error:
        LarosaConfig.parse(content)
    assert "\n" not in str(error.value)


def test_goes_through_json_unchanged():
    config = LarosaConfig.parse(
        block(
            alphas={"h1": 0.9, "h2": 1.3, "h3": 0.8, "h4": 1.15},
            prefill="dense",
            calibration={"source": "self", "num_sequences": 16, "sequence_length": 2048, "seed": 0},
        )
    )
    assert LarosaConfig.parse(json.loads(json.dumps(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize("value", [None, "larosa", [], 7])
def test_a_missing_block_says_that_the_checkpoint_is_not_converted(value):
    with pytest.raises(LarosaError, match="no 'larosa' block"):
        LarosaConfig.parse(value)


def test_a_newer_format_is_refused_before_its_keys_are_read():
    with pytest.raises(LarosaError, match=rf"format version {FORMAT_VERSION + 1}.*pip install --upgrade larosa"):
        LarosaConfig.parse({"format_version": FORMAT_VERSION + 1, "something": "new"})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format_version": "one"}, "format_version"),
        ({"method": "wanda"}, "method"),
        ({"method": "teal"}, "keep"),
        ({"recipe": "worst"}, "recipe"),
        ({"sparsity": 50}, "sparsity"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"sparsity": float("nan")}, "sparsity"),
        ({"sparsity": "half"}, "sparsity"),
        ({"budget": "flops"}, "budget"),
        ({"rotation": "row"}, "rotation"),
        ({"layers_per_rotation": 0}, "layers_per_rotation"),
        ({"layers_per_rotation": 1.5}, "layers_per_rotation"),
        ({"layers_per_rotation": 2, "rotation": "block"}, "layers_per_rotation"),
        ({"layers_per_rotation": 2, "rotation": "row"}, "rotation"),
        ({"prefill": "half"}, "prefill"),
        ({"alphas": {"h1": float("inf")}}, "alphas.h1"),
        ({"alphas": {"h5": 1.0}}, "alphas.h5"),
        ({"keep": {"h1": [1], "h2": [1], "h3": [1]}}, "keep.h4"),
        ({"keep": {site: [] for site in SITES}}, "keep.h1"),
        ({"keep": {site: [2.5] for site in SITES}}, "keep.h1.0"),
        ({"keep": {**{site: [3, 4] for site in SITES}, "h2": [3]}}, "keep"),
        ({"keep": {site: [3, -1] for site in SITES}}, "keep"),
        ({"calibration": {"source": "self", "num_sequences": 0, "sequence_length": 8, "seed": 0}}, "num_sequences"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_names_the_bad_key(changes, key):
    with pytest.raises(LarosaError, match=r"config\.json, key 'larosa\.") as error:
        LarosaConfig.parse(block(**changes))
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_from_before_layers_shared_rotations_has_one_a_layer():
    assert "layers_per_rotation" not in block()
    assert LarosaConfig.parse(block()).layers_per_rotation == 1


@given(layers=st.integers(1, 200), size=st.integers(1, 300))
def test_groups_hold_every_layer_once_and_only_the_first_is_shorter(layers, size):
    groups = Rotation.LAYER.groups(layers, size)
    assert [layer for group in groups for layer in group] == list(range(layers))
    assert {len(group) for group in groups[1:]} <= {size}
    assert 1 <= len(groups[0]) <= size
    for rotation in (Rotation.NONE, Rotation.RANDOM, Rotation.MODEL):
        assert rotation.groups(layers) == [range(layers)]
    assert Rotation.BLOCK.groups(layers) == [range(layer, layer + 1) for layer in range(layers)]


@pytest.mark.parametrize("missing", ["larosa_version", "recipe", "sparsity", "budget", "rotation", "search"])
def test_names_the_missing_key(missing):
    content = block()
    del content[missing]
    with pytest.raises(LarosaError, match=rf"key 'larosa\.{missing}'"):
        LarosaConfig.parse(content)


@pytest.mark.parametrize("sparsity", [1.0, 1.5, 50, -0.01, float("nan"), float("inf")])
def test_sparsity_is_a_fraction(sparsity):
    with pytest.raises(LarosaError, match=r"0\.5 for 50%"):
        check_sparsity(sparsity)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.999])
def test_sparsity_in_range_is_returned(sparsity):
    assert check_sparsity(sparsity) == sparsity
