import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larosa import LarosaConfig, LarosaError, PerSite
from larosa.config import SITES, Rotation, check_sparsity
from larosa.config.migrations import FORMAT_VERSION
from larosa.conversion.options import Settings


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


def test_the_paper_recipe_is_section_5_1():
    settings = Settings.complete(sparsity=0.5, recipe="paper")
    assert (settings.budget, settings.covariance, settings.search) == ("paper", "h1", "grid")
    assert (settings.rotation, settings.prefill) == ("layer", "sparse")
    calibration = settings.calibration
    assert (calibration.source, calibration.num_sequences, calibration.sequence_length) == ("wikitext2", 16, 2048)


@pytest.mark.parametrize(
    ("rotation", "covariance"),
    [("none", None), ("random", None), ("block", None), ("layer", "h3"), ("model", "h3")],
)
def test_a_covariance_is_recorded_where_a_basis_follows_from_it(rotation, covariance):
    assert Settings.complete(sparsity=0.5, rotation=rotation, covariance="h3").covariance == covariance


def test_options_override_the_recipe():
    settings = Settings.complete(sparsity=0.5, recipe="paper", search="none", budget="weights", num_sequences=3)
    assert (settings.search, settings.budget, settings.covariance) == ("none", "weights", "h1")
    assert settings.calibration.num_sequences == 3


PLAIN = {"value_rotation": False, "score": "magnitude"}


@pytest.mark.parametrize("options", [{"rotation": "random"}, {"rotation": "none", **PLAIN}], ids=["random", "none"])
def test_no_calibration_where_nothing_reads_it(options):
    assert Settings.complete(sparsity=0.5, **options).calibration is None
    assert Settings.complete(sparsity=0.5, **options, search="grid").calibration is not None


@pytest.mark.parametrize("method", ["topk", "teal", "cats"])
def test_the_paper_recipe_of_what_larosa_is_compared_with(method):
    settings = Settings.complete(sparsity=0.25, recipe="paper", method=method)
    calibration = settings.calibration
    assert (calibration.source, calibration.num_sequences, calibration.sequence_length) == ("wikitext2", 16, 2048)
    assert (settings.rotation, settings.covariance, settings.prefill) == ("none", None, "sparse")
    if method == "topk":
        assert (settings.search, settings.budget, settings.alphas) == ("grid", "paper", PerSite())
    else:
        assert (settings.search, settings.budget, settings.alphas) == ("none", "weights", None)


def test_thresholds_are_always_calibrated():
    assert Settings.complete(sparsity=0.25, method="teal").calibration.source == "self"
    assert Settings.complete(sparsity=0.25, method="cats").calibration.source == "self"
    assert Settings.complete(sparsity=0.25, method="topk").calibration is None
    assert Settings.complete(sparsity=0.25, method="topk", search="grid").calibration.source == "self"


@pytest.mark.parametrize("method", ["topk", "teal", "cats"])
def test_options_that_say_what_a_method_does_anyway_are_fine(method):
    given = {"rotation": "none", "search": "none", "budget": "weights"}
    assert Settings.complete(sparsity=0.25, method=method, **given) == Settings.complete(sparsity=0.25, method=method)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("topk", {"rotation": "layer"}, "--rotation layer does not apply to method topk"),
        ("topk", {"covariance": "h1"}, "--covariance h1 does not apply to method topk"),
        ("topk", {"search": "greedy"}, "--search greedy does not apply to method topk"),
        ("teal", {"rotation": "random"}, "--rotation random does not apply to method teal"),
        ("teal", {"covariance": "joint"}, "--covariance joint does not apply to method teal"),
        ("teal", {"budget": "paper"}, "--budget paper does not apply to method teal"),
        ("teal", {"search": "grid"}, "--search grid does not apply to method teal: .*none and greedy"),
        ("teal", {"alphas": PerSite()}, "alphas does not apply to method teal"),
        ("cats", {"rotation": "layer", "recipe": "paper"}, "--rotation layer does not apply to method cats"),
        ("cats", {"covariance": "h3"}, "--covariance h3 does not apply to method cats"),
        ("cats", {"budget": "paper"}, "--budget paper does not apply to method cats"),
        ("cats", {"search": "greedy"}, "--search greedy does not apply to method cats: .*no search"),
        ("larosa", {"search": "greedy"}, "--search greedy does not apply to method larosa"),
        ("wanda", {}, "unknown method 'wanda': one of larosa, topk, teal, cats"),
    ],
)
def test_options_that_do_not_apply(method, options, message):
    with pytest.raises(LarosaError, match=message):
        Settings.complete(sparsity=0.25, method=method, **options)


def test_given_coefficients_replace_the_recipes_search():
    settings = Settings.complete(sparsity=0.5, recipe="paper", alphas=PerSite(h1=0.9, h2=1.3))
    assert settings.search == "none"
    assert settings.alphas.h2 == 1.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "fast"}, "unknown recipe 'fast': one of paper, best"),
        ({"rotation": "row"}, "unknown rotation 'row': one of none, random, model, layer, block"),
        ({"budget": "p"}, "unknown budget"),
        ({"covariance": "h2"}, "unknown covariance"),
        ({"search": "random"}, "unknown search"),
        ({"prefill": "none"}, "unknown prefill"),
        ({"layers_per_rotation": 0}, "0 layers per rotation: give at least 1"),
        ({"layers_per_rotation": -2}, "-2 layers per rotation: give at least 1"),
        *(
            ({"layers_per_rotation": 2, "rotation": rotation}, f"only rotation 'layer' has a choice, '{rotation}' has")
            for rotation in ("none", "random", "model", "block")
        ),
        ({"layers_per_rotation": 2, "method": "topk"}, "only rotation 'layer' has a choice, 'none' has"),
        ({"num_sequences": 0}, "--num-sequences must be at least 1, not 0"),
        ({"sequence_length": -5}, "--sequence-length must be at least 1, not -5"),
        ({"sparsity": 50}, "give a fraction"),
        ({"alphas": PerSite(), "search": "grid"}, "either alphas or a search"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(LarosaError, match=message):
        Settings.complete(**{"sparsity": 0.5, **options})
