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
    assert {each.value for each in WeightFormat} == {"full", "int4+4", *FORMATS}
    assert {each.value for each in Weights} == {*WeightFormat, "auto"}


def test_planes():
    priced = {"score": "fisher", "search": "fisher", "keep": None}
    priced["thresholds"] = {part: {site: [0.1] for site in SITES} for part in ("values", "dropped")}
    planes = {"weights": "int4+4", "head": "int4+4", "group": 64, "quantizer": "rtn"}
    of_head = priced | {"thresholds": priced["thresholds"] | {"head": {"value": 0.2, "dropped": 0.3}}}
    config = LarosaConfig.parse(BLOCK | of_head | {"quantization": planes})
    assert LarosaConfig.parse(config.model_dump(mode="json")) == config
    assert (config.linear_format, config.head_format, config.planes) == (Int4(64, planes=2), Int4(64, planes=2), 2)
    assert complete("int4+4", None, None, None) == Quantization(**planes)
    whole = planes | {"head": "int8"}
    config = LarosaConfig.parse(BLOCK | priced | {"quantization": whole})
    assert (config.linear_format, config.head_format, config.planes) == (Int4(64, planes=2), Int8(64), 2)
    assert complete("int4+4", "int8", None, None) == Quantization(**whole)
    for thresholds, quantization, message in (
        (of_head, whole, "'head' is of a head in planes"),
        (of_head, None, "'head' is of a head in planes"),
        (priced, planes, "a head in planes needs 'head'"),
    ):
        with pytest.raises(LarosaError, match=f"config.json, key 'larosa.thresholds': .*{message}"):
            LarosaConfig.parse(BLOCK | thresholds | {"quantization": quantization})
    # 4 bits and 16 of a scale for 64 weights, twice; of D = 3 inputs two columns each.
    assert config.linear_format.column_bytes(128) == 2 * (64 + 2 * 2)
    assert [tuple(t.shape) for t in config.linear_format.empty(128, 3)] == [(6, 64), (6, 2)]
    choices = list(Quantization.choices(None, None, "gptq", planes=True))
    assert choices == ["int4+4", "int4", "int5", "int6", "int8", "full"]
    in_planes = Quantization.choices(WeightFormat.INT4_4, None, None, planes=True)
    assert in_planes == {"int4+4": Quantization(**planes)}
    planes = whole
    for changes in ({"score": "magnitude"}, {"thresholds": None, "keep": BLOCK["keep"]}):
        with pytest.raises(LarosaError, match=r"weights 'int4\+4': thresholds on scores say what is read of them"):
            LarosaConfig.parse(BLOCK | priced | {"quantization": planes} | changes)


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
        ({"weights": "int4+4"}, r"quantization.quantizer'.*weights 'int4\+4' are rounded plane by plane, by 'rtn'"),
        ({"head": "int4+4"}, r"quantization.head'.*'int4\+4' goes with weights 'int4\+4'"),
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
        (("int7", None, None, None), "unknown format of weights 'int7': one of full, int8, int4\\+4, int6, int5, int4"),
        (("int4", "int7", None, None), "unknown format of the head 'int7'"),
        (("int4", None, 48, None), "a weight group of 48: one of 32, 64, 128"),
        (("int4", None, None, "awq"), "unknown quantizer 'awq': one of rtn, gptq"),
        (
            (None, None, None, "gptq"),
            r"--quantizer gptq is of weights of few bits: add --weights int8, int4\+4, int6, int5, int4",
        ),
        (("full", None, 64, None), "--weight-group 64 is of weights of few bits"),
        (("int4+4", None, None, "gptq"), r"--weights int4\+4 are rounded plane by plane: --quantizer rtn"),
        (("int4", "int4+4", None, None), r"--head int4\+4 goes with --weights int4\+4"),
        ((None, "int4+4", None, None), r"--head int4\+4 goes with --weights int4\+4"),
    ],
)
def test_options_that_mean_nothing(options, message):
    with pytest.raises(LarosaError, match=message):
        complete(*options)
