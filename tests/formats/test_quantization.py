"""The `quantization` block of the settings, and what a user's options make of it."""

import pytest

from larosa import LarosaConfig, LarosaError
from larosa.cli.convert import Weights
from larosa.config import SITES
from larosa.conversion.options import ConversionOptions
from larosa.formats import FORMATS, Int4, Int8, Quantization, WeightFormat

BLOCK = {
    **{"larosa_version": "0.1.0", "recipe": "best", "sparsity": 0.5, "budget": "weights", "rotation": "none"},
    **{"search": "none", "keep": {site: [3] for site in SITES}},
}
INT4 = {"weights": "int4", "head": "int8", "group": 64, "quantizer": "gptq"}


def test_every_format_can_be_asked_for():
    assert {each.value for each in WeightFormat} == {"full", *FORMATS}
    assert {each.value for each in Weights} == {"full", *FORMATS, "auto"}


def test_goes_through_json_unchanged():
    config = LarosaConfig.parse(BLOCK | {"quantization": INT4})
    assert config.model_dump(mode="json")["quantization"] == INT4
    assert LarosaConfig.parse(config.model_dump(mode="json")) == config
    assert (config.linear_format, config.head_format) == (Int4(64), Int8(64))
    plain = LarosaConfig.parse(BLOCK)
    assert (plain.quantization, plain.linear_format, plain.head_format) == (None, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "int3"}, "quantization.weights'"),
        ({"weights": None}, "quantization.weights'"),
        ({"group": 48}, "quantization.group'.*a weight group of 48: one of 32, 64, 128"),
        ({"group": "wide"}, "quantization.group'"),
        ({"group": None}, "quantization.group'"),
        ({"quantizer": None}, "quantization.quantizer'.*weights 'int4' need one"),
        ({"quantizer": "awq"}, "quantization.quantizer'"),
        ({"weights": "full"}, "quantization.quantizer'.*weights 'full' have none"),
        ({"weights": "full", "head": "full", "quantizer": None}, "quantization.head'.*leave 'quantization' out"),
        ({"zero_points": True}, "quantization.zero_points'"),
    ],
)
def test_faults(changes, message):
    with pytest.raises(LarosaError, match=f"config.json, key 'larosa.{message}") as error:
        LarosaConfig.parse(BLOCK | {"quantization": INT4 | changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [[], "int4", 4, {}, True])
def test_no_block(value):
    with pytest.raises(LarosaError, match=r"config.json, key 'larosa.quantization"):
        LarosaConfig.parse(BLOCK | {"quantization": value})


def test_rows_are_not_skipped_in_columns():
    cats = {key: value for key, value in BLOCK.items() if key != "keep"} | {
        "method": "cats",
        "thresholds": {"values": {"gate": [0.1]}, "dropped": {"gate": [0.5]}},
    }
    with pytest.raises(LarosaError, match="method 'cats' skips rows of weights, which int4 stores by columns"):
        LarosaConfig.parse(cats | {"quantization": INT4})
    LarosaConfig.parse(cats | {"quantization": {"head": "int8", "group": 64}})


def complete(weights, head, group, quantizer):
    """The quantization that a conversion with these options has."""
    options = {"weights": weights, "head": head, "weight_group": group, "quantizer": quantizer}
    return ConversionOptions(**options).complete().quantization


def test_options():
    assert complete(None, None, None, None) is None
    assert complete("full", "full", None, None) is None
    assert complete("int4", None, 64, None) == Quantization(**INT4)
    assert complete("int4", "full", 32, "rtn") == Quantization(weights="int4", head="full", group=32, quantizer="rtn")
    assert complete("int4", None, None, None).group == 32
    int8 = complete("int8", None, None, None)
    assert int8 == Quantization(weights="int8", head="int8", group=128, quantizer="gptq")
    assert complete(None, "int8", None, None) == Quantization(head="int8", group=128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("int7", None, None, None), "unknown format of weights 'int7': one of full, int8, int6, int5, int4"),
        (("int4", "int7", None, None), "unknown format of the head 'int7'"),
        (("int4", None, 48, None), "a weight group of 48: one of 32, 64, 128"),
        (("int4", None, None, "awq"), "unknown quantizer 'awq': one of rtn, gptq"),
        (
            (None, None, None, "gptq"),
            "--quantizer gptq is of weights of few bits: add --weights int8, int6, int5, int4",
        ),
        (("full", None, 64, None), "--weight-group 64 is of weights of few bits"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(LarosaError, match=message):
        complete(*options)
