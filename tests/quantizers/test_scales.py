"""Searched scales against finer searches, and what must hold whatever the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from larosa import LarosaError
from larosa.formats import Int4, Int5, Int6, Int8
from larosa.quantizers import round_groups, round_to_nearest

FORMATS = (Int4, Int5, Int6, Int8)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(weights, scales, q):
    """Sum of squares in each group."""
    return (weights.double() - scales.double()[..., None] * q.double()).square().sum(-1)


def nearest(weights, scale, form):
    return (weights / scale[..., None]).round().clamp(form.lowest, form.highest)


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("heavy", [False, True])
def test_near_the_best_of_a_fine_grid(group, heavy):
    weights = normal(64, group)
    weights = weights * weights.abs() if heavy else weights
    form = Int4(group)
    found = error(weights, *round_groups(weights, form))
    steps = [weights.abs().amax(-1) / reach * sign for reach in torch.linspace(4, 24, 2000) for sign in (1, -1)]
    grid = torch.stack([error(weights, scale, nearest(weights, scale, form)) for scale in steps]).amin(0)
    assert (found.sum() / grid.sum()) < 1.02
    to_the_largest = weights.abs().amax(-1) / 7
    assert found.sum() < 0.9 * error(weights, to_the_largest, nearest(weights, to_the_largest, form)).sum()


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_numbers_are_the_nearest(kind):
    weights, form = normal(50, 32), kind(32)
    scales, q = round_groups(weights, form)
    assert torch.equal(q, nearest(weights, scales.double(), form))
    steps = (weights / scales.double()[:, None] - q).abs()
    if kind is Int8:  # the largest may be cut off by a fraction of a step
        assert (steps.sort(-1).values[:, :-1] <= 0.5).all()
        assert (steps < 0.75).all()


@given(st.sampled_from(FORMATS), st.integers(0, 2**31), st.sampled_from((0.5, -0.375, 2.0**-60, -3 * 2.0**90)))
def test_what_is_a_scale_times_whole_numbers_stays_what_it_is(kind, seed, scale):
    form, chance = kind(32), torch.Generator().manual_seed(seed)
    q = torch.randint(form.lowest, form.highest + 1, (1, 32), generator=chance).float()
    q[0, seed % 32] = form.lowest  # a group of others has smaller numbers and a larger scale
    weights = scale * q
    scales, found = round_groups(weights, form)
    assert torch.equal(scales.float()[:, None] * found, weights)


@given(st.sampled_from(FORMATS), st.integers(0, 2**31), st.integers(-90, 90))
def test_powers_of_two_and_signs_pass_through(kind, seed, power):
    form, weights = kind(32), normal(2, 32, seed=seed, dtype=torch.float32)
    scales, q = round_groups(weights, form)
    for factor in (2.0**power, -1.0):
        scaled, same = round_groups(weights * factor, form)
        assert torch.equal(same, q)
        assert torch.equal(scaled.double(), scales.double() * factor)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (65, 4), (97, 2), (129, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matrices_by_columns(kind, shape, dtype):
    weight, form = normal(*shape, dtype=dtype), kind(32)
    codes, scales = round_to_nearest(weight, form, "a weight")
    dense = form.dequantize(codes, scales, shape[0], torch.float64)
    for d in range(shape[1]):
        for start in range(0, shape[0], 32):
            part = weight[start : start + 32, d].to(torch.promote_types(dtype, torch.float32))[None]
            one, q = round_groups(part, form)
            assert torch.equal(dense[d, start : start + 32], (one.double()[:, None] * q)[0])


@pytest.mark.parametrize("kind", FORMATS)
def test_zeros_huge_and_tiny_columns(kind):
    weight, form = normal(40, 5, dtype=torch.float32), kind(32)
    weight[:, 0], weight[:, 1], weight[:32, 4] = 0, weight[:, 2] * 2.0**120, 0
    weight[:, 3] = weight[:, 2] * 2.0**-140  # below what bfloat16 scales reach
    codes, scales = round_to_nearest(weight, form, "a weight")
    dense = form.dequantize(codes, scales, 40, torch.float64)
    assert not dense[0].any()
    assert not scales[4, 0].any()
    assert torch.equal(dense[1], dense[2] * 2.0**120)
    assert ((dense[3] - weight[:, 3].double()).abs() < 1e-37).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_no_numbers(kind, value):
    weight = normal(40, 5)
    weight[37, 2] = value
    with pytest.raises(LarosaError, match="layer 3: a weight is NaN or Inf, or too large for a scale"):
        round_to_nearest(weight, kind(32), "layer 3")
