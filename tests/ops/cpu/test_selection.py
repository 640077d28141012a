"""`top_k`, its fused forms and `above`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops.cpu import library
from larosa.ops.select import above_reference, top_k_reference
from tests.examples import examples

from .cases import DTYPES, ISAS, WIDTHS, Chance, bits, chances

ops = torch.ops.larosa


@st.composite
def problems(draw, *kinds):
    chance = draw(chances(*kinds))
    rows, width = draw(st.integers(0, 4)), draw(WIDTHS)
    k = draw(st.one_of(st.sampled_from([0, width]), st.integers(0, width)))
    score = chance.maybe(width, dtype=draw(st.sampled_from(DTYPES)))
    return chance, rows, width, k, None if score is None else score.nan_to_num(posinf=1, neginf=1).abs()


#: How many columns an entry has.
COLUMNS = st.sampled_from([1, 1, 2, 3])


def scores(chance, columns):
    """One for each column, or none."""
    score = chance.maybe(columns, dtype=DTYPES[int(torch.randint(len(DTYPES), (), generator=chance.generator))])
    return None if score is None else score.abs()


def same(selection, expected) -> None:
    values, indices = selection
    assert torch.equal(indices, expected[1])
    assert torch.equal(bits(values), bits(expected[0]))
    assert indices.dtype == torch.int32


@settings(max_examples=examples(2500))
@given(problems())
def test_top_k_is_the_reference_bit_by_bit(problem):
    chance, rows, width, k, score = problem
    x = chance.tensor(rows, width)
    if rows and width > 2:
        x[0, 0], x[0, width // 2] = -torch.finfo(x.dtype).max, torch.finfo(x.dtype).tiny
    same(ops.top_k(x, k, score), top_k_reference(x, k, score))


@settings(max_examples=examples(1000))
@given(problems())
def test_fused_selections_are_top_k_of_what_they_fuse(problem):
    chance, rows, width, k, score = problem
    x, gain = chance.tensor(rows, width), chance.maybe(width)
    same(ops.rms_norm_top_k(x, gain, 1e-5, k, score), ops.top_k(ops.rms_norm(x, gain, 1e-5), k, score))
    gate_up = chance.tensor(rows, 2 * width)
    same(ops.silu_mul_top_k(gate_up, k, score), ops.top_k(ops.silu_mul(gate_up), k, score))


@settings(max_examples=examples(1000))
@given(chances(), st.integers(0, 4), WIDTHS, COLUMNS, st.sampled_from([0.0, 1e-45, 0.5, 1.0, 2.0, 1e16, math.inf]))
def test_above_is_the_reference_bit_by_bit(chance, rows, width, each, threshold):
    x, score = chance.tensor(rows, width), scores(chance, each * width)
    found, expected = ops.above(x, threshold, score), above_reference(x, threshold, score)
    same(found[:2], expected[:2])
    assert torch.equal(found[2], expected[2])


def kept(selection):
    values, indices, count = selection
    return values[:, : int(count)], indices[:, : int(count)]


@settings(max_examples=examples(500))
@given(chances(), WIDTHS, COLUMNS, st.sampled_from([0.0, 0.5, 1.0, math.inf]))
def test_fused_forms_of_above_are_it_of_what_they_fuse(chance, width, each, threshold):
    x, gain, score = chance.tensor(1, width), chance.maybe(width), scores(chance, each * width)
    expected = ops.above(ops.rms_norm(x, gain, 1e-5), threshold, score)
    same(kept(ops.rms_norm_above(x, gain, 1e-5, threshold, score)), kept(expected))
    gate_up = chance.tensor(1, 2 * width)
    expected = ops.above(ops.silu_mul(gate_up), threshold, score)
    same(kept(ops.silu_mul_above(gate_up, threshold, score)), kept(expected))


@pytest.fixture
def filled():
    """PyTorch's memory is full of NaN and large numbers until it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("each", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.5, math.inf])
def test_an_entry_has_the_columns_whose_own_scores_reach(filled, isa, each, threshold):
    library.set_isa(isa)
    chance = Chance(torch.Generator().manual_seed(0), "special", 1)
    x, score = chance.tensor(3, 77), chance.tensor(77 * each).abs()
    gate_up = chance.tensor(3, 154)
    fused = {
        "above": (x, ops.above(x, threshold, score)),
        "rms_norm_above": (ops.rms_norm(x, None, 1e-5), ops.rms_norm_above(x, None, 1e-5, threshold, score)),
        "silu_mul_above": (ops.silu_mul(gate_up), ops.silu_mul_above(gate_up, threshold, score)),
    }
    for vectors, (values, indices, count) in fused.values():
        assert values.shape == indices.shape == (3, 77 * each)
        for row, vector in enumerate(vectors):
            weighted = (vector * score.view(each, 77)).abs().flatten().tolist()
            expected = [column for column, weight in enumerate(weighted) if not weight <= threshold]
            behind = 77 * each - len(expected)
            assert int(count[row]) == len(expected)
            assert indices[row].tolist() == expected + [0] * behind
            kept = torch.tensor([float(vector[column % 77]) for column in expected] + [0.0] * behind)
            assert torch.equal(bits(values[row]), bits(kept))


@pytest.mark.parametrize("length", [0, 7, 9, 15])
def test_scores_of_another_number_of_columns_are_refused(length):
    message = f"score must have 8 entries, or a multiple of it, not {length}$"
    for call in (
        lambda score: ops.above(torch.zeros(1, 8), 0.5, score),
        lambda score: ops.rms_norm_above(torch.zeros(1, 8), None, 1e-5, 0.5, score),
        lambda score: ops.silu_mul_above(torch.zeros(1, 16), 0.5, score),
    ):
        with pytest.raises(ValueError, match=message):
            call(torch.ones(length))


def test_long_vectors():
    x = torch.randn(2, 32768, generator=torch.Generator().manual_seed(0))
    for k in (1, 8192, 16384, 32767, 32768):
        same(ops.top_k(x, k), top_k_reference(x, k))


@pytest.mark.parametrize("k", [-1, 9])
def test_counts_that_do_not_fit(k):
    with pytest.raises(ValueError, match=f"cannot keep {k} of 8 entries"):
        ops.top_k(torch.zeros(1, 8), k)
