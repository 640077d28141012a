"""What a user asks for, completed by a recipe or refused, and the same for Python and for the command line."""

import inspect
from dataclasses import fields

import pytest
import typer

import larosa
from larosa import LarosaError, PerSite
from larosa.cli.main import app
from larosa.conversion import ConversionOptions


def complete(**options):
    """What a conversion does with these options."""
    return ConversionOptions(**options).complete()


def test_python_and_the_command_line_have_every_option():
    """With the same defaults; but coefficients are Python's alone, and the command has several sparsities."""
    shown = inspect.signature(larosa.convert).parameters
    command = {each.name: each for each in typer.main.get_command(app).commands["convert"].params}
    for option in fields(ConversionOptions):
        assert shown[option.name].default == option.default
        if option.name not in ("alphas", "sparsity"):
            assert command[option.name].default == option.default
            assert command[option.name].help
    assert list(shown) == [
        "model",
        "tokenizer",
        *(option.name for option in fields(ConversionOptions)),
        "device",
        "search_log",
    ]


def test_a_keyword_that_there_is_not(make_model):
    with pytest.raises(TypeError, match="sparsty"):
        larosa.convert(make_model("llama"), sparsty=0.5)


def test_the_paper_recipe_is_section_5_1():
    settings = complete(sparsity=0.5, recipe="paper")
    assert (settings.budget, settings.covariance, settings.search) == ("paper", "h1", "grid")
    assert (settings.rotation, settings.prefill) == ("layer", "sparse")
    calibration = settings.calibration
    assert (calibration.source, calibration.num_sequences, calibration.sequence_length) == ("wikitext2", 16, 2048)


@pytest.mark.parametrize(
    ("rotation", "covariance"),
    [("none", None), ("random", None), ("block", None), ("layer", "h3"), ("model", "h3")],
)
def test_a_covariance_is_recorded_where_a_basis_follows_from_it(rotation, covariance):
    assert complete(sparsity=0.5, rotation=rotation, covariance="h3").covariance == covariance


def test_options_override_the_recipe():
    settings = complete(sparsity=0.5, recipe="paper", search="none", budget="weights", num_sequences=3)
    assert (settings.search, settings.budget, settings.covariance) == ("none", "weights", "h1")
    assert settings.calibration.num_sequences == 3


PLAIN = {"value_rotation": False, "score": "magnitude"}


@pytest.mark.parametrize("options", [{"rotation": "random"}, {"rotation": "none", **PLAIN}], ids=["random", "none"])
def test_no_calibration_where_nothing_reads_it(options):
    assert complete(sparsity=0.5, **options).calibration is None
    assert complete(sparsity=0.5, **options, search="grid").calibration is not None


@pytest.mark.parametrize("method", ["topk", "teal", "cats"])
def test_the_paper_recipe_of_what_larosa_is_compared_with(method):
    settings = complete(sparsity=0.25, recipe="paper", method=method)
    calibration = settings.calibration
    assert (calibration.source, calibration.num_sequences, calibration.sequence_length) == ("wikitext2", 16, 2048)
    assert (settings.rotation, settings.covariance, settings.prefill) == ("none", None, "sparse")
    if method == "topk":
        assert (settings.search, settings.budget, settings.alphas) == ("grid", "paper", PerSite())
    else:
        assert (settings.search, settings.budget, settings.alphas) == ("none", "weights", None)


def test_thresholds_are_always_calibrated():
    assert complete(sparsity=0.25, method="teal").calibration.source == "self"
    assert complete(sparsity=0.25, method="cats").calibration.source == "self"
    assert complete(sparsity=0.25, method="topk").calibration is None
    assert complete(sparsity=0.25, method="topk", search="grid").calibration.source == "self"


@pytest.mark.parametrize("method", ["topk", "teal", "cats"])
def test_options_that_say_what_a_method_does_anyway_are_fine(method):
    given = {"rotation": "none", "search": "none", "budget": "weights"}
    assert complete(sparsity=0.25, method=method, **given) == complete(sparsity=0.25, method=method)


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
        complete(sparsity=0.25, method=method, **options)


def test_given_coefficients_replace_the_recipes_search():
    settings = complete(sparsity=0.5, recipe="paper", alphas=PerSite(h1=0.9, h2=1.3))
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
        complete(**{"sparsity": 0.5, **options})
