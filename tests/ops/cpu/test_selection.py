"""`top_k`, its fused forms and `above`."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.ops.select import above_reference, top_k_reference
from tests.examples import examples

from .cases import DTYPES, WIDTHS, bits, chances

ops = torch.ops.larosa


@st.composite
def problems(draw, *kinds):
    chance = draw(chances(*kinds))
    rows, width = draw(st.integers(0, 4)), draw(WIDTHS)
    k = draw(st.one_of(st.sampled_from([0, width]), st.integers(0, width)))
    score = chance.maybe(width, dtype=draw(st.sampled_from(DTYPES)))
    return chance, rows, width, k, None if score is None else score.nan_to_num(posinf=1, neginf=1).abs()


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
@given(chances(), st.integers(0, 4), WIDTHS, st.sampled_from([0.0, 1e-45, 0.5, 1.0, 2.0, 1e16, math.inf]))
def test_above_is_the_reference_bit_by_bit(chance, rows, width, threshold):
    x, score = chance.tensor(rows, width), chance.maybe(width)
    score = None if score is None else score.abs()
    found, expected = ops.above(x, threshold, score), above_reference(x, threshold, score)
    same(found[:2], expected[:2])
    assert torch.equal(found[2], expected[2])


def kept(selection):
    values, indices, count = selection
    return values[:, : int(count)], indices[:, : int(count)]


@settings(max_examples=examples(500))
@given(chances(), WIDTHS, st.sampled_from([0.0, 0.5, 1.0, math.inf]))
def test_fused_forms_of_above_are_it_of_what_they_fuse(chance, width, threshold):
    x, gain, score = chance.tensor(1, width), chance.maybe(width), chance.maybe(width)
    score = None if score is None else score.abs()
    expected = ops.above(ops.rms_norm(x, gain, 1e-5), threshold, score)
    same(kept(ops.rms_norm_above(x, gain, 1e-5, threshold, score)), kept(expected))
    gate_up = chance.tensor(1, 2 * width)
    expected = ops.above(ops.silu_mul(gate_up), threshold, score)
    same(kept(ops.silu_mul_above(gate_up, threshold, score)), kept(expected))


def test_long_vectors():
    x = torch.randn(2, 32768, generator=torch.Generator().manual_seed(0))
    for k in (1, 8192, 16384, 32767, 32768):
        same(ops.top_k(x, k), top_k_reference(x, k))


@pytest.mark.parametrize("k", [-1, 9])
def test_counts_that_do_not_fit(k):
    with pytest.raises(ValueError, match=f"cannot keep {k} of 8 entries"):
        ops.top_k(torch.zeros(1, 8), k)
