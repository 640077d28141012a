"""GPTQ against the textbook form: after each column the rest is refitted by the inverse of what is left of H."""

import pytest
import torch

from larosa.formats import Int4, Int8
from larosa.quantizers import gptq, round_groups


def correlated(inputs, seed=0, tokens=200):
    """E[s^T s] of entries that depend on each other and are zero half of the time."""
    chance = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=chance, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=chance, dtype=torch.float64) @ mix
    x *= 0.5 + torch.rand(inputs, generator=chance)
    x[x.abs() < x.abs().median(dim=1, keepdim=True).values] = 0
    return x.T @ x / tokens


def columns_of(inputs, groups, group, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(inputs, groups, group, generator=generator, dtype=torch.float64)


def textbook(columns, moment, form, damping=0.01):
    """Optimal Brain Surgeon, one column after the other, with a fresh inverse for each."""
    left = columns.clone()
    H = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    scales, q = torch.empty(columns.shape[:2], dtype=torch.bfloat16), torch.empty_like(columns)
    rest = sorted(range(len(columns)), key=lambda d: -float(moment[d, d]))
    while rest:
        d, at = rest[0], torch.tensor(rest)
        inverse = torch.linalg.inv(H[at][:, at])
        scales[d], q[d] = round_groups(left[d], form)
        error = left[d] - scales[d].double()[:, None] * q[d]
        for place, other in enumerate(rest):
            left[other] -= inverse[place, 0] / inverse[0, 0] * error
        rest = rest[1:]
    return scales, q


def loss(columns, moment, scales, q):
    """E|s (W - W')^T|^2, of all outputs together."""
    wrong = (columns - scales.double()[..., None] * q).flatten(1)
    return float((wrong * (moment @ wrong)).sum())


@pytest.mark.parametrize("kind", [Int4, Int8])
@pytest.mark.parametrize("inputs", [1, 7, 70])  # less and more than are passed on at a time
def test_equals_the_textbook(kind, inputs):
    columns, moment, form = columns_of(inputs, 2, 32), correlated(inputs), kind(32)
    scales, q = gptq(columns, moment, form)
    wanted_scales, wanted = textbook(columns, moment, form)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(q, wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [Int4, Int8])
def test_loses_less_than_rounding(kind, seed):
    columns, moment, form = columns_of(48, 3, 32, seed), correlated(48, seed), kind(32)
    fitted, rounded = gptq(columns, moment, form), round_groups(columns, form)
    assert loss(columns, moment, *fitted) < 0.7 * loss(columns, moment, *rounded)


@pytest.mark.parametrize("moment", [torch.zeros(9, 9).double(), torch.diag(torch.arange(9.0).double())])
def test_without_correlations_it_is_rounding(moment):
    columns, form = columns_of(9, 2, 64), Int4(64)
    for found, expected in zip(gptq(columns, moment, form), round_groups(columns, form), strict=True):
        assert torch.equal(found, expected)


def test_inputs_that_never_come_are_rounded():
    columns, moment, form = columns_of(12, 1, 32), correlated(12), Int4(32)
    moment[5] = moment[:, 5] = 0
    scales, q = gptq(columns, moment, form)
    wanted_scales, wanted = textbook(columns, moment, form)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(q, wanted)
    assert torch.equal(q[5], round_groups(columns[5], form)[1])
