"""The search for bits and sparsity, against every setting there is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from larosa.config import LarosaConfig
from larosa.conversion import sparsify
from larosa.conversion.options import ConversionOptions
from larosa.conversion.within import fewest_bytes
from larosa.errors import LarosaError
from larosa.formats import Quantization, WeightFormat
from larosa.sparsity.report import inspect_config

PERCENTS = range(91)


@pytest.fixture(scope="module")
def formats(make_model):
    """A model in each format, and what a token reads in it at each percentage."""
    settings = ConversionOptions(sparsity=0.5, score="weights", value_rotation=False, selection="top-k").complete()
    converted = sparsify(make_model("llama"), None, settings)
    made = {
        weights: converted if stored is None else converted.stored(stored)
        for weights, stored in Quantization.choices(None, None, "rtn", planes=False).items()
    }
    return made, {weights: [read(each, percent) for percent in PERCENTS] for weights, each in made.items()}


def read(converted, percent):
    converted.set_sparsity(percent / 100)
    found = inspect_config(converted.model.config, parameters=False)
    return found.bytes_sparse_total + found.head_bytes_sparse


def test_formats_differ_in_their_weights_alone(formats):
    made, bytes_read = formats
    assert list(made) == ["int4", "int5", "int6", "int8", "full"]
    dense = [of[0] for of in bytes_read.values()]
    assert dense == sorted(set(dense))
    blocks = []
    for each in made.values():
        each.set_sparsity(0.5)
        blocks.append(LarosaConfig.parse(each.model.config.larosa))
    assert [block.quantization and block.quantization.weights for block in blocks] == [*list(made)[:-1], None]
    assert all(block.keep == blocks[0].keep for block in blocks)


@given(
    rounding=st.tuples(*(st.floats(0, most) for most in (0.4, 0.2, 0.1, 0.05, 0.0))),
    slope=st.floats(0.01, 2),
    bound=st.floats(1e-3, 0.5),
)
def test_nothing_within_the_bound_reads_less(formats, rounding, slope, bound):
    made, bytes_read = formats
    loses = dict(zip(made, rounding, strict=True))

    def kl(weights, sparsity):
        return loses[weights] + slope * sparsity**2

    def evaluate(model):
        block = LarosaConfig.parse(model.config.larosa)
        weights = block.quantization.weights if block.quantization else WeightFormat.FULL
        return SimpleNamespace(kl_divergence=kl(weights, block.sparsity), top1_agreement=1.0)

    found, tried = fewest_bytes(made.items(), evaluate, bound)
    chosen = LarosaConfig.parse(found.model.config.larosa)
    weights = chosen.quantization.weights if chosen.quantization else WeightFormat.FULL
    within = {(w, p): bytes_read[w][p] for w in made for p in PERCENTS if kl(w, p / 100) <= bound}
    assert bytes_read[weights][round(100 * chosen.sparsity)] == min(within.values())
    assert (weights, round(100 * chosen.sparsity)) in within
    assert len(tried) <= 5 * 8  # a bisection a format
    assert all(trial.bytes_per_token == bytes_read[trial.weights][round(100 * trial.sparsity)] for trial in tried)
    assert all(trial.kl_divergence == kl(trial.weights, trial.sparsity) for trial in tried)


def test_a_bound_that_nothing_meets(formats):
    made, _ = formats
    evaluate = lambda model: SimpleNamespace(kl_divergence=0.25, top1_agreement=1.0)  # noqa: E731
    with pytest.raises(LarosaError, match=r"--max-kl 0.2: even at 0% sparsity the divergence is 0.2500"):
        fewest_bytes(made.items(), evaluate, 0.2)
