"""`greedy` against its reference on a CPU, exactly."""

import math

import pytest
import torch

from larosa.ops.greedy import greedy_reference

from .cases import entries
from .test_selection import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocabulary", [1, 31, 1024, 8193, 40001])
def test_the_largest_logit(target, kind, vocabulary):
    logits = entries(kind, 3, vocabulary, seed=vocabulary)
    assert torch.equal(target("greedy", logits), greedy_reference(logits))


@pytest.mark.parametrize("place", [0, 777, 19_999])
def test_each_place_and_what_is_not_a_number(target, place):
    logits = -entries("normal", 1, 20_000, seed=place).abs() - 1  # below zero, as bits in the other direction
    for logit, token in ((-0.5, place), (3.0, place), (-0.0, place), (math.inf, -1), (math.nan, -1), (-math.nan, -1)):
        logits[0, place] = logit
        assert target("greedy", logits).tolist() == [token]
    assert target("greedy", torch.full((1, 20_000), -math.inf)).tolist() == [-1]


def test_of_equal_logits_the_first(target):
    logits = torch.zeros(1, 20_000)
    logits[0, [5_000, 12_345, 19_999]] = 2.0
    assert target("greedy", logits).tolist() == [5_000]


def test_logits_of_another_format(target):
    if target.kernels.__name__.endswith("cuda.kernels"):
        with pytest.raises(ValueError, match="logits must be contiguous float32"):
            target("greedy", torch.zeros(1, 8).half())
