"""`top_k` bit by bit, and its fused forms against it and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from larosa.errors import LarosaError
from larosa.ops.norm import rms_norm_reference, silu_mul_reference
from larosa.ops.select import top_k_reference
from tests.examples import examples

from .cases import DTYPES, bits, entries, seeded

KINDS = ("normal", "tied", "zero", "special", "huge")


def same(selection, expected) -> None:
    values, indices = selection
    assert indices.dtype == torch.int32
    assert torch.equal(indices, expected[1])
    assert torch.equal(bits(values), bits(expected[0]))


def scores(width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return entries("normal", width, seed=seed).abs().to(dtype)


@settings(max_examples=examples(60))
@given(st.data())
def test_top_k_is_the_reference_bit_by_bit(target, data):
    width = data.draw(st.integers(1, 300) | st.sampled_from([1023, 1024]), label="width")
    rows = data.draw(st.integers(0, 3), label="rows")
    k = data.draw(st.integers(0, width) | st.sampled_from([0, 1, width]), label="k")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    x = entries(data.draw(st.sampled_from(KINDS)), rows, width, seed=seed)
    score = data.draw(st.none() | st.sampled_from(DTYPES).map(lambda dtype: scores(width, dtype, seed)))
    same(target("top_k", x, k, score), top_k_reference(x, k, score))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [4096, 4097])
def test_long_vectors(target, kind, width):
    x = entries(kind, 1, width, seed=width)
    for k in (1, width // 2, width - 1):
        same(target("top_k", x, k, None), top_k_reference(x, k))


@pytest.mark.parametrize("kind", ["normal", "tied"])
def test_the_longest_vector(target, kind):
    x = entries(kind, 1, 32768, seed=0)
    same(target("top_k", x, 16384, None), top_k_reference(x, 16384))


@pytest.mark.parametrize("alike", ["distinct", "in fours", "equal"])
@pytest.mark.parametrize("count", [255, 256, 257, 1024, 1025, 4096])
def test_many_entries_that_begin_with_the_same_bits(target, alike, count):
    """`count` entries that differ in the last bits, if at all, among smaller and larger ones."""
    generator = seeded(count)
    below = {"distinct": torch.arange(count), "in fours": torch.arange(count) // 4, "equal": torch.zeros(count)}[alike]
    larger = (4096 - count) // 2
    x = torch.cat([1 + below * 2.0**-23, torch.full((larger,), 2.0), torch.full((4096 - count - larger,), 0.5)])
    x *= torch.randn(4096, generator=generator).sign()
    x = x[torch.randperm(4096, generator=generator)][None]
    for k in {larger, larger + 1, larger + count // 2, larger + count - 1, larger + count}:
        same(target("top_k", x, k, None), top_k_reference(x, k))


def test_entries_on_both_sides_of_a_power_of_two(target):
    x = (1 + (torch.arange(2000) - 1000).float() * 2.0**-24)[None]
    for k in (1, 999, 1000, 1001, 1999):
        same(target("top_k", x, k, None), top_k_reference(x, k))


def test_scores_that_make_nan(target):
    x, score = entries("special", 1, 1500, seed=0), scores(1500, torch.float32, 1)
    score[::3] = 0
    assert 0 < (x * score).isnan().sum() < 600
    for k in (5, 600):
        same(target("top_k", x, k, score), top_k_reference(x, k, score))


def check_fused(selection, exact, k, score) -> None:
    """The entries are those of the exact vector, and none left out counts clearly more than one kept."""
    values, indices = selection
    assert (indices.diff(dim=1) > 0).all()
    kept = torch.zeros(exact.shape, dtype=torch.bool).scatter(1, indices.long(), True)
    assert kept.sum(1).eq(k).all()
    torch.testing.assert_close(values.double(), exact[kept].view(len(exact), k), rtol=1e-5, atol=1e-30)
    counted = exact.abs() * (1 if score is None else score.double())
    if 0 < k < exact.shape[1]:
        least = counted.where(kept, torch.inf).amin(1)
        most = counted.where(~kept, -torch.inf).amax(1)
        assert (most <= least * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("kind", ["normal", "tied", "zero"])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (300, 150), (300, 0), (300, 300), (1500, 700)])
def test_fused_selections_are_top_k_of_what_they_fuse(target, kind, width, k):
    x, gate_up = entries(kind, 2, width, seed=1), entries(kind, 2, 2 * width, seed=2)
    gain, score = entries("normal", width, seed=3).bfloat16(), scores(width, torch.float32, 4)
    for weighted in (None, score):
        selection = target("silu_mul_top_k", gate_up, k, weighted)
        check_fused(selection, silu_mul_reference(gate_up.double()), k, weighted)
        for gained in (None, gain):
            selection = target("rms_norm_top_k", x, gained, 1e-5, k, weighted)
            check_fused(selection, rms_norm_reference(x.double(), gained, 1e-5), k, weighted)


def test_nan_spreads_as_in_the_reference(target):
    x = entries("normal", 1, 300, seed=0)
    x[0, 7] = torch.nan
    values, indices = target("rms_norm_top_k", x, None, 1e-5, 100, None)
    assert values.isnan().all()
    assert (indices.diff() > 0).all(), "whichever they are"
    gate_up = torch.cat([x, torch.ones(1, 300)], 1)
    values, indices = target("silu_mul_top_k", gate_up, 1, None)
    assert values.isnan().all()
    assert indices.tolist() == [[7]]


def test_gates_of_any_size(target):
    gate_up = torch.cat([torch.linspace(-80, 80, 1999), torch.full((1999,), 1e10)])[None]
    check_fused(target("silu_mul_top_k", gate_up, 1999, None), silu_mul_reference(gate_up.double()), 1999, None)


def test_saturated_gates(target):
    gate_up = torch.tensor([[-1e30, -200.0, 0.0, 200.0, 1e30, 1.0, 1.0, 1.0, 2.0, 1.0]])
    values, indices = target("silu_mul_top_k", gate_up, 2, None)
    assert indices.tolist() == [[3, 4]]
    assert values.tolist() == [[400.0, torch.tensor(1e30).item()]]


@pytest.mark.parametrize("k", [-1, 9])
def test_counts_that_do_not_fit(target, k):
    with pytest.raises(ValueError, match=f"cannot keep {k} of 8 entries"):
        target("top_k", torch.zeros(1, 8), k, None)


def test_vectors_too_long_for_a_block(emulator):
    from larosa.ops.cuda import kernels

    with pytest.raises(LarosaError, match="at most 32768 entries, not 40000: set LAROSA_CUDA_KERNELS=triton"):
        kernels.top_k(torch.zeros(1, 40000), 5)
